"""The networks of the benchmarks: 28 x 28 grey images to the logits of ten classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

CLASSES = 10


def lenet() -> nn.Sequential:
    """LeNet-5, 61,706 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def mlp() -> nn.Sequential:
    """784-512-512-10, 669,706 weights."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, CLASSES),
    )


NETS: dict[str, Callable[[], nn.Sequential]] = {"lenet": lenet, "mlp": mlp}
