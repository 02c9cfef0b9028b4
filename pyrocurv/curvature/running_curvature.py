"""The curvature of a block so far: a frozen value, which an update replaces.

All structures here are a mean over examples.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyrocurv.curvature.truncated_factor import TruncatedFactor
from pyrocurv.curvature.update_interval import UpdateInterval
from pyrocurv.layers.block import Block
from pyrocurv.structures import Kronecker, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import serializable

S = TypeVar("S", bound=Structure)


@serializable
@dataclass(frozen=True, eq=False)
class RunningCurvature:
    """The curvature of a block after `count` estimates, and what the next average is formed from.

    With `count` 0 the curvature is zero, and the first estimate replaces it. Kronecker blocks
    average their factors, or `truncated_factors` if a factor is truncated. `curvature` and
    `truncated_factors` are scaled by `scaling`, that of the prior at the last estimate. `interval`
    is used with `every="auto"`.

    The average of Hessians may be indefinite; `semidefinite` is the nearest matrix that can be part
    of a precision. The noise of single estimates cancels in the average before it is projected. A
    correction that keeps each estimate positive would add the variance of the noise instead, and is
    not known for factors.
    """

    count: int
    curvature: Structure
    interval: UpdateInterval = UpdateInterval()
    factors: Kronecker | None = None
    truncated_factors: tuple[TruncatedFactor, TruncatedFactor] | None = None  # output and input
    scaling: KroneckerScaling | None = None
    positions: int = 1  # S at which the last estimate saw the weights

    @property
    def root(self) -> Tensor | None:
        """The scale [P] of the weights that `curvature` belongs to; None for 1."""
        return None if self.scaling is None else self.scaling.root

    @property
    def known(self) -> Structure | None:
        """The curvature, or None before the first estimate."""
        return self.curvature if self.count else None

    def semidefinite(self, kind: str) -> Structure:
        """The curvature, of this kind, as a positive semi-definite matrix."""
        return self.curvature.psd() if kind == "hessian" else self.curvature

    def is_in(self, scaling: KroneckerScaling | None) -> bool:
        """Whether `curvature` is scaled in this way."""
        old, new = roots_of(self.scaling), roots_of(scaling)
        if old is None or new is None:
            return old is new
        return torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])


class DueBlock(NamedTuple):
    """A block that takes an estimate, its average so far, and the scaling of its prior."""

    block: Block
    average: RunningCurvature
    scaling: KroneckerScaling | None


def average(mean: S | None, value: S, weight: float) -> S:
    """The mean with one more value of this weight; the value itself if it is the first."""
    return value if mean is None else mean.lerp(value, weight)


def without_estimate(average: RunningCurvature) -> RunningCurvature:
    """The average as it is, with a warning; raises where there is none yet."""
    if average.count == 0:
        raise FloatingPointError("the first curvature estimate is not finite")
    warnings.warn("a curvature estimate is not finite: the last average is kept", stacklevel=3)
    return average


def roots_of(scaling: KroneckerScaling | None) -> tuple[Tensor, Tensor] | None:
    """Of the prior's scales, on the output and the input side; None for 1."""
    return None if scaling is None else scaling.roots
