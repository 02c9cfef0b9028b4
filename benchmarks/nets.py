"""More networks of the benchmarks, and the images that each network reads."""

from __future__ import annotations

from collections.abc import Callable

import torchvision
from torch import nn

from pyrocurv.nn.networks import MLP, LeNet5

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


def resnet18() -> nn.Module:
    """torchvision's, 11,181,642 weights, of which 9,600 are of norm layers."""
    return torchvision.models.resnet18(num_classes=CLASSES)


NETS: dict[str, Callable[[], nn.Module]] = {"lenet": LeNet5, "mlp": MLP, "resnet18": resnet18}
IMAGES = {"lenet": (1, 28, 28), "mlp": (1, 28, 28), "resnet18": (3, 32, 32)}
BATCH = {"lenet": 128, "mlp": 128, "resnet18": 32}
