"""Labeled images for `classification.py`, and images of another kind, which it never trains on.

Digits come with scikit-learn; MNIST, Fashion-MNIST and CIFAR-10 are read from a folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets

Labeled = tuple[Tensor, Tensor]  # images [N, C, H, W], classes [N]

FROM_FOLDER = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
}
NAMES = ["digits", *FROM_FOLDER]
UNSEEN = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}  # each is the other's unseen kind


class Refusal(Exception):
    """A request that cannot be met; the message says what to do, in one line."""


@dataclass(frozen=True)
class Data:
    """Images scaled to mean 0 and variance 1 over the training images."""

    train: Labeled
    val: Labeled  # to choose hyper-parameters on
    test: Labeled
    unseen: Tensor  # [M, C, H, W]


def load(
    name: str, root: str = "data", download: bool = False, train_size: int | None = None
) -> Data:
    """The data set `name`, always split the same way, with the first `train_size` to train on."""
    if name == "digits":
        rest, test = _shuffled_split(*_digits(), size=1000)
        rest, val = _shuffled_split(*rest, size=397)
    else:
        x, y = from_folder(name, root, train=True, download=download)
        rest, val = _shuffled_split(x, y, size=len(y) // 6)
        test = from_folder(name, root, train=False, download=download)
    x, y = (t[:train_size] for t in rest)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    scaled = [((images - mean) / std, classes) for images, classes in ((x, y), val, test)]
    return Data(*scaled, unseen=(_unseen(name, root, like=x) - mean) / std)


def from_folder(name: str, root: str, train: bool, download: bool = False) -> Labeled:
    """Images in [0, 1] and classes, read from the files that torchvision keeps below `root`."""
    try:
        data = FROM_FOLDER[name](root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        if download:
            raise Refusal(f"cannot download {name} to {root}: {_first_line(error)}") from error
        hint = "pass --download, or --data-root FOLDER if you have it elsewhere"
        raise Refusal(f"{name} is not in the folder '{root}': {hint}") from error
    x = torch.as_tensor(data.data).float() / 255
    x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
    return x, torch.as_tensor(data.targets).long()


def photo_patches(size: int) -> Tensor:
    """Two photographs in gray, cut into pieces of about 32 x 32 pixels: [M, 1, size, size]."""
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    gray = photos.float().mean(-1).unsqueeze(1) / 255  # [2, 1, H, W]
    gray = F.avg_pool2d(gray, 32 // size)
    patches = F.unfold(gray, size, stride=size)  # [2, size * size, number]
    return patches.transpose(1, 2).reshape(-1, 1, size, size)


def _digits() -> Labeled:
    digits = load_digits()
    x = torch.as_tensor(digits.images).float().unsqueeze(1) / 16
    return x, torch.as_tensor(digits.target).long()


def _unseen(name: str, root: str, like: Tensor) -> Tensor:
    """The other MNIST if its files are there, else pieces of photographs; shaped as `like`."""
    try:
        return from_folder(UNSEEN[name], root, train=False)[0]
    except (KeyError, Refusal):
        return photo_patches(like.shape[-1]).expand(-1, *like.shape[1:])


def _shuffled_split(x: Tensor, y: Tensor, size: int) -> tuple[Labeled, Labeled]:
    """The rest, and `size` examples drawn at random."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rest, part = order[size:], order[:size]
    return (x[rest], y[rest]), (x[part], y[part])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
