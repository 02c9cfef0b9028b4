"""scikit-learn's digits, 8 x 8 pixels, and a small network for them: shared by the examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

CLASSES = 10
Labeled = tuple[Tensor, Tensor]  # images [N, 1, 8, 8], classes [N]


class Digits(NamedTuple):
    """Images scaled to mean 0 and variance 1 over the training images."""

    train: Labeled
    test: Labeled
    unseen: Tensor  # [M, 1, 8, 8], images of another kind


def load(train_size: int = 400) -> Digits:
    """At most 400 training images and 1,000 test images, always the same ones.

    The other 397 images are for choosing hyper-parameters (`benchmarks/classification.py`).
    """
    digits = load_digits()
    x = torch.as_tensor(digits.images).float().unsqueeze(1) / 16
    y = torch.as_tensor(digits.target).long()
    test, rest = permutation(len(y)).split([1000, len(y) - 1000])
    train = rest[permutation(len(rest))[397:]][:train_size]
    mean, std = x[train].mean(), x[train].std()
    x = (x - mean) / std
    return Digits((x[train], y[train]), (x[test], y[test]), (photo_patches() - mean) / std)


def permutation(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))


def photo_patches() -> Tensor:
    """Two photographs in shades of gray, cut into pieces of 32 x 32 pixels shown as 8 x 8."""
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    gray = photos.float().mean(-1).unsqueeze(1) / 255  # [2, 1, H, W]
    patches = F.unfold(F.avg_pool2d(gray, 4), 8, stride=8)  # [2, 8 * 8, patches]
    return patches.transpose(1, 2).reshape(-1, 1, 8, 8)


def make_net(small: bool = False) -> nn.Sequential:
    """Two convolutions and two linear layers: 38,282 weights, or 1,034 if `small`."""
    a, b, hidden, stride = (4, 8, 16, 2) if small else (16, 32, 64, 1)
    return nn.Sequential(
        nn.Conv2d(1, a, 3, stride, padding=1),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(b * (4 // stride) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )
