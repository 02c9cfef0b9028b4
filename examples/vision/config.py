"""The command line: its fields are the options, its comments the help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dataset = Literal["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagenet", "folder"]
Method = Literal[
    "adam", "sgd", "muon", "second-order", "ngvi", "laplace", "ensemble", "mc-dropout", "swag",
    "ivon",
]


@dataclass(frozen=True)
class Config:
    """What to train on which images, and what to make of it. None: as in `vision/settings.py`."""

    # ---- what to train ----
    dataset: Dataset = "digits"
    """digits come with scikit-learn; "folder" is one of your own, with train/ and val/, or with a
    folder for each class, of which a fifth is held out."""
    model: str = "lenet5"
    """lenet5, small-cnn, resnet20, vit-tiny, or a name of torchvision.models: resnet18, ..."""
    method: Method = "ngvi"
    """How the network is trained, and what predicts."""
    # ---- data ----
    data_root: Path = Path("data")
    """Folder of the data."""
    download: bool = False
    """Let torchvision download what is not in --data-root."""
    train_size: int | None = None
    """Train on so many images only, the first ones in a fixed random order."""
    image_size: int | None = None
    """Height and width of the images in pixels."""
    evaluate_on: Literal["test", "validation"] = "test"
    """validation: hold out a tenth of the training images to choose settings on."""
    ood: Literal[
        "auto", "none", "mnist", "fashion-mnist", "cifar10", "cifar100", "photographs"
    ] = "auto"
    """Images of another kind, which the network should be unsure of: a data set of --data-root, or
    pieces of photographs."""
    workers: int = 0
    """Processes that read images."""
    # ---- training ----
    epochs: int | None = None
    """Passes over the training images."""
    batch: int | None = None
    """Images in a step, of all processes together."""
    lr: float | None = None
    """Learning rate at its peak; it rises linearly, and falls to 0 as a cosine."""
    weight_decay: float | None = None
    """Weight decay of the method, decoupled for ngvi; of laplace the prior precision per image."""
    seed: int = 0
    """Of weights, order of the images, augmentation and samples."""
    device: str = "auto"
    """cpu, cuda, mps, ...; auto: the accelerator if there is one."""
    amp: bool = False
    """Run the network in bfloat16 where autocast does so."""
    pretrained: Path | None = None
    """A state dict to start from, as torch.save wrote it; a head of another size is left out."""
    # ---- posterior: ngvi, second-order and laplace ----
    guide: Literal["kfac", "ekfac", "diagonal", "block", "full"] = "kfac"
    """Structure of the precision (second-order: of the preconditioner)."""
    curvature: Literal["auto", "hessian", "ggn", "fisher", "empirical"] = "auto"
    """Curvature of the negative log likelihood; auto: ggn for laplace, else fisher."""
    layers: Literal["last", "all"] = "last"
    """Layers that laplace's posterior covers."""
    temperature: float | None = None
    """T of the KL term of ngvi; None: chosen by the run."""
    update: Literal["auto", "natural", "muon", "whitened-muon", "soap"] = "auto"
    """How ngvi moves the mean, and second-order the weights; auto: whitened-muon for networks."""
    prior_scale: float = 1.0
    """Width of ngvi's prior, relative to the default, 1/sqrt(inputs of the layer)."""
    samples: int | None = None
    """Samples of the posterior for a prediction (ngvi, mc-dropout, swag, ivon)."""
    members: int = 5
    """Networks of an ensemble."""
    dropout: float = 0.1
    """Probability of mc-dropout, at the inputs of all linear layers."""
    # ---- results ----
    checkpoint: Path | None = None
    """Written after each epoch."""
    resume: bool = False
    """Go on from --checkpoint, bit for bit, if the file is there."""
    report: Path | None = None
    """Write a self-contained HTML page."""
    out: Path | None = None
    """Write the table and the training curves as JSON."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's logs."""
    smoke: bool = False
    """A few batches of everything, to check the set-up."""
    smoke_all: bool = False
    """A few batches of each model with each method, on digits, and a table of what happened."""
