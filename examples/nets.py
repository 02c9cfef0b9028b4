"""The nets of `classification.py`: images to the logits of ten classes."""

from __future__ import annotations

from torch import nn

CLASSES = 10


def make_net(dataset: str, small: bool) -> nn.Sequential:
    """A small net for 8 x 8 digits, 38,282 weights or 1,034; LeNet-5 for the rest, 61,706."""
    if dataset == "digits":
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
    channels, padding = (3, 0) if dataset == "cifar10" else (1, 2)
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
