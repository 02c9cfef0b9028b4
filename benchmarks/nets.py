"""The networks of the benchmarks, to the logits of ten classes, and the images that each reads."""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import nn

CLASSES = 10


def digits_net(small: bool) -> nn.Sequential:
    """A convolutional network for 8 x 8 images, 38,282 weights, or 1,034 if `small`."""
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


def lenet(channels: int = 1, padding: int = 2) -> nn.Sequential:
    """LeNet-5, 61,706 weights, for 28 x 28 images; without `padding` for 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
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


def resnet18() -> nn.Module:
    """torchvision's, 11,181,642 weights, of which 9,600 are of norm layers."""
    return torchvision.models.resnet18(num_classes=CLASSES)


NETS: dict[str, Callable[[], nn.Module]] = {"lenet": lenet, "mlp": mlp, "resnet18": resnet18}
IMAGES = {"lenet": (1, 28, 28), "mlp": (1, 28, 28), "resnet18": (3, 32, 32)}
BATCH = {"lenet": 128, "mlp": 128, "resnet18": 32}
