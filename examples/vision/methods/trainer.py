"""What the training loop needs of a method, whichever it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision.config import Config
from vision.settings import Settings

Batch = tuple[Tensor, Tensor]  # images [B, C, H, W], classes [B]
Metrics = Mapping[str, Tensor | float]  # means over the batch: loss, nll, kl, accuracy
BN_BATCHES = 50  # that statistics of batch norm after training are from


@dataclass(frozen=True)
class Problem:
    """What a method is made for."""

    make_network: Callable[[], nn.Module]  # on its device, with new random weights
    num_data: int  # N, the distinct training images of all processes
    steps: int  # of the whole run
    config: Config
    settings: Settings


def nothing(loader: Iterable[Batch]) -> None:
    """For methods that are ready after the last step."""


def cosine(progress: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Trainer:
    """A method: how it steps and predicts, and the objects whose states are a checkpoint.

    `predict` returns log probabilities [S, B, classes] at S samples of the posterior, or
    [1, B, classes] where there is one distribution only.
    """

    train_step: Callable[[Tensor, Tensor], Metrics]
    predict: Callable[[Tensor], Tensor]
    modules: Sequence[nn.Module]  # in train() mode for a step, in eval() mode for a prediction
    optimizers: Sequence[torch.optim.Optimizer]  # whose learning rates follow the schedule
    objects: Mapping[str, Any]
    finish: Callable[[Iterable[Batch]], None] = nothing  # after the last epoch, plain images
    schedule: Callable[[float], float] = cosine  # progress in [0, 1] -> factor, after the warm-up

    def train(self, mode: bool = True) -> None:
        for module in self.modules:
            module.train(mode)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """The share of the classes that are right."""
    return (logits.detach().argmax(-1) == y).float().mean()


def log_softmax(logits: Tensor) -> Tensor:
    """In single precision, whatever autocast has computed the logits in."""
    return logits.float().log_softmax(-1)
