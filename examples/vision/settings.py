"""Ready settings for each data set and method, in two tables.

Learning rates for digits and the MNISTs are of the order that `benchmarks/optimizers.py` found on
validation images of Fashion-MNIST. Those for CIFAR and ImageNet are the usual ones of the
literature; nothing was tuned on these data here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from resuming import Refusal
from vision.config import Config

# ---- data sets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSettings:
    """How the images are prepared, and how long a network trains on them."""

    size: int  # pixels
    mean: tuple[float, ...]  # of pixels in [0, 1], one for each channel
    std: tuple[float, ...]
    augmentation: str  # "none", "crop-flip" or "resized-crop"
    epochs: int
    batch: int
    unseen: str  # images of another kind
    samples: int = 16  # of the posterior for a prediction


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {
    "digits": DataSettings(28, (0.305,), (0.376,), "none", 20, 50, "photographs", samples=32),
    "mnist": DataSettings(28, (0.1307,), (0.3081,), "none", 5, 128, "fashion-mnist"),
    "fashion-mnist": DataSettings(28, (0.2860,), (0.3530,), "none", 10, 128, "mnist"),
    "cifar10": DataSettings(
        32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "crop-flip", 100, 128, "cifar100"
    ),
    "cifar100": DataSettings(
        32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "crop-flip", 150, 128, "cifar10"
    ),
    "imagenet": DataSettings(
        224, IMAGENET_MEAN, IMAGENET_STD, "resized-crop", 90, 256, "photographs", samples=8
    ),
    "folder": DataSettings(
        224, IMAGENET_MEAN, IMAGENET_STD, "resized-crop", 30, 64, "photographs", samples=8
    ),
}
SMOKE = {"epochs": 1, "batch": 8, "samples": 2, "train_size": 24}
SMOKE_TEST = 24  # images
UNSEEN = 2000  # images of each unseen kind

# ---- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodSettings:
    """What a method is given besides the network."""

    lr: float
    weight_decay: float
    warm_up: float = 0.05  # share of the steps in which the learning rate rises
    on: dict[str, dict[str, Any]] = field(default_factory=dict)  # other values for a data set


SMALL, LARGE = ("cifar10", "cifar100"), ("imagenet", "folder")


def on(names: tuple[str, ...], **values: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names, values)


ADAM = MethodSettings(3e-3, 0.01, on={
    **on(SMALL, lr=1e-3, weight_decay=0.05), **on(LARGE, lr=1e-3, weight_decay=0.05),
})
SGD = MethodSettings(0.05, 5e-4, on={**on(SMALL, lr=0.1), **on(LARGE, lr=0.1, weight_decay=1e-4)})
METHODS = {
    "adam": ADAM,
    "sgd": SGD,
    "muon": MethodSettings(0.02, 0.1, on={**on(SMALL, lr=0.01), **on(LARGE, lr=0.01)}),
    "second-order": MethodSettings(0.03, 0.3),
    "ngvi": MethodSettings(0.02, 0.0, on={**on(SMALL, lr=0.04), **on(LARGE, lr=0.04)}),
    "laplace": MethodSettings(3e-3, 1e-4, on={  # decay x images: the precision of the first prior
        "digits": {"weight_decay": 5e-3}, **on(SMALL, lr=1e-3),
        "folder": {"lr": 1e-3, "weight_decay": 1e-3},
        "imagenet": {"lr": 1e-3, "weight_decay": 1e-5},
    }),
    "ensemble": ADAM,
    "mc-dropout": ADAM,
    "swag": replace(SGD, warm_up=0.02),
    "ivon": MethodSettings(1.0, 1e-4, on={"digits": {"lr": 0.3}, **on(LARGE, lr=0.5)}),
}

# ---- what a run uses ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """All values of a run, none of them open."""

    data: DataSettings
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warm_up: float
    samples: int
    train_size: int | None


def resolve(config: Config) -> Settings:
    """What the command line says, else the tables. Raises Refusal for a number out of range."""
    data, method = DATASETS[config.dataset], METHODS[config.method]
    method = replace(method, **method.on.get(config.dataset, {}))
    size = config.image_size or data.size
    found: dict[str, Any] = {
        "epochs": data.epochs, "batch": data.batch, "samples": data.samples, "train_size": None,
        "lr": method.lr, "weight_decay": method.weight_decay,
    }
    found |= SMOKE if config.smoke else {}
    given = {name: getattr(config, name) for name in found}
    found |= {name: value for name, value in given.items() if value is not None}
    for name, value in {**found, "image_size": size, "members": config.members}.items():
        lowest = 0 if name == "weight_decay" else 1
        is_low = value is not None and (value <= 0 if name == "lr" else value < lowest)
        if is_low:
            needed = "a positive number" if name == "lr" else f"{lowest} or more"
            raise Refusal(f"--{name.replace('_', '-')} {value}: {needed} is needed")
    return Settings(data=replace(data, size=size), warm_up=method.warm_up, **found)
