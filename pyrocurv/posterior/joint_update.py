"""The update of one Gaussian over all latents of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures import Dense, Diagonal, Structure
from pyrocurv.structures.serialization import map_tensors, serializable

CAP = 1.0  # on |X|, in steps of Λ
LOG_2PI = math.log(2 * math.pi)


@serializable
@dataclass(frozen=True, eq=False)
class Whole:
    """After `step` steps: the iterate, and its running average where there is one."""

    step: int
    loc: Tensor
    precision: Dense | Diagonal
    mean_loc: Tensor | None = None
    mean_precision: Dense | Diagonal | None = None

    def to(self, like: Tensor) -> Whole:
        """On the device and in the dtype of `like`."""
        if self.loc.device == like.device and self.loc.dtype == like.dtype:
            return self
        return map_tensors(self, lambda tensor: tensor.to(like))


def retract(precision: Dense | Diagonal, target: Tensor, rate: float) -> Dense | Diagonal:
    """Λ moved towards the target H [P, P], or its diagonal [P]."""
    if isinstance(precision, Diagonal):
        values = precision.diag()
        x = target / values - 1
        r = _rate(x, rate)
        return Diagonal(values * (1 + r * x + (r * x).square() / 2))
    root = torch.linalg.cholesky(precision.dense())
    half = torch.linalg.solve_triangular(root, target, upper=False)
    x = torch.linalg.solve_triangular(root, half.mT, upper=False)
    x = (x + x.mT) / 2 - torch.eye(len(x)).to(x)
    r = _rate(x, rate)
    x = r * x
    change = x + x @ x / 2
    moved = precision.dense() + root @ change @ root.mT
    return Dense((moved + moved.mT) / 2)


def _rate(x: Tensor, rate: float) -> Tensor:
    return (CAP / x.norm()).clamp(max=rate)


def log_q(precision: Structure, square: Tensor) -> Tensor:
    """The log density of a sample, for square = |z|²."""
    return (precision.logdet() - square - precision.size * LOG_2PI) / 2
