"""Images with a label for `classification.py`, and images of a kind that it never trains on.

Digits come with scikit-learn; MNIST, Fashion-MNIST and CIFAR-10 are read from a folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision import datasets

Labelled = tuple[Tensor, Tensor]  # images [N, C, H, W], classes [N]

FROM_FOLDER = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "cifar10": datasets.CIFAR10,
}
NAMES = ["digits", *FROM_FOLDER]
UNSEEN = {"mnist": "fashion-mnist", "fashion-mnist": "mnist"}  # each is the other's unseen kind


class Refusal(Exception):
    """What the user asked for cannot be had; the message says what to do, in one line."""


@dataclass(frozen=True)
class Data:
    """Images scaled to mean 0 and variance 1 over the training images."""

    train: Labelled
    val: Labelled  # to choose hyper-parameters on
    test: Labelled
    unseen: Tensor  # [M, C, H, W]

    def to(self, device: str) -> Data:
        train, val, test = (
            (x.to(device), y.to(device)) for x, y in (self.train, self.val, self.test)
        )
        return Data(train, val, test, self.unseen.to(device))


def load(
    name: str, root: str = "data", download: bool = False, train_size: int | None = None
) -> Data:
    """The data set `name`, always split alike; trained on its first `train_size` images."""
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


def from_folder(name: str, root: str, train: bool, download: bool = False) -> Labelled:
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
    """Two photographs, cut into grey pieces of about 32 x 32 pixels shown as [M, 1, size, size]."""
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    grey = photos.float().mean(-1).unsqueeze(1) / 255  # [2, 1, H, W]
    grey = F.avg_pool2d(grey, 32 // size)
    patches = F.unfold(grey, size, stride=size)  # [2, size * size, number]
    return patches.transpose(1, 2).reshape(-1, 1, size, size)


def _digits() -> Labelled:
    digits = load_digits()
    x = torch.as_tensor(digits.images).float().unsqueeze(1) / 16
    return x, torch.as_tensor(digits.target).long()


def _unseen(name: str, root: str, like: Tensor) -> Tensor:
    """The other MNIST where it is at hand, else pieces of photographs; shaped as `like`."""
    try:
        return from_folder(UNSEEN[name], root, train=False)[0]
    except (KeyError, Refusal):
        return photo_patches(like.shape[-1]).expand(-1, *like.shape[1:])


def _shuffled_split(x: Tensor, y: Tensor, size: int) -> tuple[Labelled, Labelled]:
    """The rest, and `size` examples drawn at random."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    rest, part = order[size:], order[:size]
    return (x[rest], y[rest]), (x[part], y[part])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
