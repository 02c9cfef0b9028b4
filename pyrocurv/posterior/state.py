"""What natural-gradient training carries from step to step, as one immutable value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyrocurv.curvature.running_average import RunningCurvature
from pyrocurv.posterior.natural_gradient import Metric
from pyrocurv.posterior.sampling import Perturbation
from pyrocurv.structures import Structure
from pyrocurv.structures.serialization import map_tensors, serializable


@serializable
@dataclass(frozen=True, eq=False)
class BlockState:
    """What one block carries; the lists of a state have one for each."""

    running: RunningCurvature | None = None
    metric: Metric | None = None
    momentum: Tensor | None = None
    noise: Perturbation | None = None  # used once already: the next sample is its mirror image
    mean: Tensor | None = None  # the mean that training is at, when the guide holds an average
    average: Structure | None = None  # the averaged precision

    @property
    def known(self) -> Metric:
        """The metric, which every block has from the first step on."""
        assert self.metric is not None
        return self.metric

    @property
    def seen(self) -> RunningCurvature:
        """The running curvature, which every block has from the first step on."""
        assert self.running is not None
        return self.running


@serializable
@dataclass(frozen=True, eq=False)
class Posterior:
    """After `step` steps."""

    step: int
    blocks: tuple[BlockState, ...]

    def to(self, like: Tensor) -> Posterior:
        """On the device and in the dtype of `like`."""
        held = next((block.momentum for block in self.blocks if block.momentum is not None), like)
        if held.device == like.device and held.dtype == like.dtype:
            return self
        return map_tensors(self, lambda tensor: tensor.to(like))
