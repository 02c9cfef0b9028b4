"""A Gaussian with the mean and covariance of the weights that SGD passes at the end of training.

w = mean + σ z / √2 + D u / √(2 (K - 1)), with σ the standard deviations and D [P, K] the last K
deviations from the mean. Maddox et al. 2019, "A simple baseline for Bayesian uncertainty in deep
learning", arXiv:1902.02476.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import update_bn

from vision.methods.point import point, sgd
from vision.methods.trainer import BN_BATCHES, Batch, Metrics, Problem, Trainer, cosine, log_softmax
from vision.processes import average_statistics_

START, FACTOR = 0.75, 0.2  # of the steps when it starts to collect; of the learning rate from then
RANK = 20  # K


class Moments:
    """Mean and square of weight vectors [P], and the last deviations from the mean."""

    def __init__(self, like: Tensor) -> None:
        self.steps = self.count = 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.deviations: list[Tensor] = []

    def add(self, weights: Tensor) -> None:
        self.count += 1
        self.mean.lerp_(weights, 1 / self.count)
        self.square.lerp_(weights.square(), 1 / self.count)
        self.deviations = [*self.deviations, weights - self.mean][-RANK:]

    def sample(self) -> Tensor:
        """A draw [P]."""
        sd = (self.square - self.mean.square()).clamp(min=0).sqrt()
        draw = self.mean + sd * torch.randn_like(sd) / 2**0.5
        scale = (2 * max(1, len(self.deviations) - 1)) ** -0.5
        for deviation in self.deviations:
            draw = draw + scale * torch.randn((), device=sd.device) * deviation
        return draw

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            like = self.mean
            moved = value.to(like) if isinstance(value, Tensor) else value
            setattr(self, name, [v.to(like) for v in value] if isinstance(value, list) else moved)


def schedule(progress: float) -> float:
    """A cosine to FACTOR at START, and constant from there."""
    return FACTOR + (1 - FACTOR) * cosine(min(1.0, progress / START))


def swag(problem: Problem) -> Trainer:
    """SGD; the networks of the samples are drawn once, after the last epoch."""
    net = problem.make_network()
    trained = point(problem, sgd, net)
    moments = Moments(parameters_to_vector(net.parameters()).detach())
    first = min(int(START * problem.steps), problem.steps - 1)
    interval = max(1, (problem.steps - first) // RANK)
    drawn: list[nn.Module] = []

    def train_step(x: Tensor, y: Tensor) -> Metrics:
        metrics = trained.train_step(x, y)
        moments.steps += 1
        if moments.steps > first and (moments.steps - first - 1) % interval == 0:
            moments.add(parameters_to_vector(net.parameters()).detach())
        return metrics

    def finish(loader: Iterable[Batch]) -> None:
        drawn.clear()
        for _ in range(problem.settings.samples):
            member = copy.deepcopy(net)
            vector_to_parameters(moments.sample(), member.parameters())
            update_bn(_few(loader, moments.mean.device), member)
            average_statistics_(member)
            drawn.append(member.eval())

    def predict(x: Tensor) -> Tensor:
        return torch.stack([log_softmax(member(x)) for member in drawn or [net]])

    objects = {**trained.objects, "moments": moments}
    return replace(trained, train_step=train_step, predict=predict, objects=objects, finish=finish,
                   schedule=schedule)


def _few(loader: Iterable[Batch], device: torch.device) -> Iterable[Tensor]:
    return (x.to(device) for x, _ in islice(loader, BN_BATCHES))
