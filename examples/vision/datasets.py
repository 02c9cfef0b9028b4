"""The images of each data set, read by torchvision from the files that the data set comes in.

Small images are kept in memory as bytes, files are read when they are needed. `ImageData` has the
same images augmented (to train on) and plain (to fit a curvature or batch norm on). N, which a
posterior needs, is the number of distinct images, however they are augmented.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from resuming import Refusal
from vision.transforms import Pipeline

IN_MEMORY = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}
IDX_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
DIGITS_TEST = 1000
HELD_OUT = 0.2  # of a folder without val/
VALIDATION = 0.1  # of the training images


# ---- sources: images and classes, without any transform -----------------------------------------


@dataclass(frozen=True)
class MemoryImages:
    """Images as bytes."""

    pixels: Tensor  # [N, C, H, W], uint8
    labels: Tensor  # [N]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class FileImages:
    """An `ImageFolder`, or an `ImageNet`."""

    folder: datasets.ImageFolder
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.folder)


Source = MemoryImages | FileImages


class Images(Dataset[tuple[Tensor, int]]):
    """Rows of a source through a pipeline: (image [C, H, W], class)."""

    def __init__(self, source: Source, rows: Sequence[int], pipeline: Pipeline) -> None:
        self.source, self.pipeline = source, pipeline
        self.rows = torch.as_tensor(rows, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """Several at once, which `DataLoader` asks for: pixels in memory are prepared together."""
        rows = self.rows[torch.as_tensor(indices)]
        if isinstance(self.source, MemoryImages):
            pixels, labels = self.source.pixels[rows], self.source.labels[rows]
            return list(zip(self.pipeline.batch(pixels), labels.tolist(), strict=True))
        examples = (self.source.folder[row] for row in rows.tolist())
        return [(self.pipeline.one(image), label) for image, label in examples]


@dataclass(frozen=True)
class ImageData:
    """What a run reads."""

    train: Images
    plain: Images  # the images of `train`, not augmented
    test: Images
    classes: tuple[str, ...]


# ---- reading ------------------------------------------------------------------------------------


def load(
    name: str, root: Path, pipelines: tuple[Pipeline, Pipeline], *, download: bool = False,
    train_size: int | None = None, test_size: int | None = None, validation: bool = False,
) -> ImageData:
    """The data set `name`, with the pipelines of training and of all else.

    Args:
        name: as `--dataset`.
        root: folder of the data.
        pipelines: for training, and for everything else.
        download: let torchvision download what is absent.
        train_size: use the first so many training images, in a fixed random order.
        test_size: the same of the test images.
        validation: a tenth of the training images in the place of the test images.

    Raises Refusal if the data are absent, in a line that says what to do.
    """
    train, train_rows, test, test_rows = read(name, root, download)
    if validation:
        order = shuffled(train_rows)
        size = max(1, int(VALIDATION * len(order)))
        test, test_rows, train_rows = train, order[:size], order[size:]
    if train_size is not None:
        train_rows = shuffled(train_rows)[:train_size]
    if test_size is not None:
        test_rows = shuffled(test_rows)[:test_size]
    augmented, plain = pipelines
    return ImageData(
        Images(train, train_rows, augmented), Images(train, train_rows, plain),
        Images(test, test_rows, plain), train.classes,
    )


def read(name: str, root: Path, download: bool) -> tuple[Source, list[int], Source, list[int]]:
    """Training images and test images, each as rows of a source."""
    if name == "digits":
        digits = read_digits()
        order = shuffled(range(len(digits)))
        return digits, order[DIGITS_TEST:], digits, order[:DIGITS_TEST]
    if name == "folder":
        return read_folder(root)
    part = read_imagenet if name == "imagenet" else read_in_memory
    train, test = (part(name, root, is_train, download) for is_train in (True, False))
    return train, list(range(len(train))), test, list(range(len(test)))


def read_digits() -> MemoryImages:
    """scikit-learn's 1,797 digits of 8 x 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Refusal("--dataset digits is in scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    pixels = torch.as_tensor(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
    return MemoryImages(pixels, torch.as_tensor(digits.target).long(), tuple("0123456789"))


def read_in_memory(name: str, root: Path, train: bool, download: bool = False) -> MemoryImages:
    """One of the MNISTs or CIFARs."""
    kind = IN_MEMORY[name]
    with _refusing(name, root, download), _unpacked(kind, root) as folder:
        data = kind(folder, train=train, download=download)
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    names = (name.split(" - ")[-1] for name in data.classes)  # "7 - seven"
    return MemoryImages(pixels, torch.as_tensor(data.targets).long(), tuple(names))


def read_imagenet(name: str, root: Path, train: bool, download: bool = False) -> FileImages:
    """ImageNet 2012, from its archives or from train/ and val/ with a folder for each class.

    torchvision unpacks the archives at the first call, and reads the names of the classes from the
    devkit; without it their folders' names are used.
    """
    split = "train" if train else "val"
    known = ("meta.bin", "ILSVRC2012_devkit_t12.tar.gz")
    if not any((root / file).exists() for file in known):
        if not (root / split).is_dir():
            raise Refusal(
                f"no ImageNet in '{root}': put ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train"
                ".tar and ILSVRC2012_img_val.tar there (image-net.org, they cannot be downloaded "
                "without an account), or train/ and val/ with a folder for each class"
            )
        return _file_images(root / split)
    with _refusing(name, root, download):
        data = datasets.ImageNet(root, split)
    return FileImages(data, tuple(names[0] for names in data.classes))


def read_folder(root: Path) -> tuple[Source, list[int], Source, list[int]]:
    """train/ and val/ (or test/), else one folder of classes, of which a fifth is held out."""
    held_out = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if (root / "train").is_dir() and held_out is not None:
        train, test = _file_images(root / "train"), _file_images(held_out)
        if train.classes != test.classes:
            raise Refusal(
                f"{root / 'train'} and {held_out} have different classes, "
                f"{_some(train.classes)} and {_some(test.classes)}: give them the same folders"
            )
        return train, list(range(len(train))), test, list(range(len(test)))
    images = _file_images(root)
    order = shuffled(range(len(images)))
    size = max(1, int(HELD_OUT * len(order)))
    return images, order[size:], images, order[:size]


def _file_images(folder: Path) -> FileImages:
    try:
        data = datasets.ImageFolder(folder)
    except (FileNotFoundError, OSError) as error:
        raise Refusal(
            f"no images in '{folder}' ({_first_line(error)}): --data-root needs a folder for each "
            "class with images in it, or train/ and val/ with such folders"
        ) from error
    return FileImages(data, tuple(data.classes))


# ---- helpers ------------------------------------------------------------------------------------


def shuffled(rows: Sequence[int]) -> list[int]:
    """The rows in an order that is the same every time."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(rows)[order].tolist()


@contextmanager
def _unpacked(kind: Any, root: Path) -> Iterator[Path]:
    """The folder to read from: a temporary one for the packed files of an MNIST."""
    raw = root / kind.__name__ / "raw"
    packed = [raw / f"{file}.gz" for file in IDX_FILES]
    is_packed = issubclass(kind, datasets.MNIST) and all(file.exists() for file in packed)
    if not is_packed or all((raw / file).exists() for file in IDX_FILES):
        yield root
        return
    with TemporaryDirectory() as other:
        target = Path(other) / kind.__name__ / "raw"
        target.mkdir(parents=True)
        for file in packed:
            with gzip.open(file) as source, (target / file.stem).open("wb") as copy:
                shutil.copyfileobj(source, copy)
        yield Path(other)


@contextmanager
def _refusing(name: str, root: Path, download: bool) -> Iterator[None]:
    """What torchvision raises for absent or damaged files, as a line that says what to do."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        if download:
            raise Refusal(f"cannot download {name} to '{root}': {_first_line(error)}") from error
        hint = "pass --download, or --data-root FOLDER if you have it elsewhere"
        if name == "imagenet":
            hint = "put its archives there, or the folders train and val"
        reason = _first_line(error)
        raise Refusal(f"{name} is not in the folder '{root}' ({reason}): {hint}") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


