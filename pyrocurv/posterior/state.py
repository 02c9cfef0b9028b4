"""The state of natural-gradient training: one immutable record for each block of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from pyrocurv.curvature.running_curvature import RunningCurvature
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.temperature import TemperatureState
from pyrocurv.structures import Structure
from pyrocurv.structures.serialization import cast, serializable


@serializable
@dataclass(frozen=True, eq=False)
class Perturbation:
    """A deviation from the mean, sign · direction with direction = Λ^-½ z [P], and |z|²."""

    direction: Tensor
    squared_norm: Tensor
    sign: float = 1.0

    @property
    def epsilon(self) -> Tensor:
        """The deviation itself [P]."""
        return self.sign * self.direction

    def mirrored(self) -> Perturbation:
        """The antithetic deviation."""
        other = Perturbation(self.direction, self.squared_norm, -self.sign)
        vars(other).update(_views=self._views)
        return other

    def views(self, block: Block) -> dict[str, Tensor]:
        """{name: direction [*shape]}."""
        if not self._views:
            self._views.update(block.strided_views(self.direction))
        return self._views

    @cached_property
    def _views(self) -> dict[str, Tensor]:
        return {}


@serializable
@dataclass(frozen=True, eq=False)
class SecondMoment:
    """The average of squared gradients over `count` steps, as a diagonal or in an eigenbasis."""

    count: int
    mean: Structure


@serializable
@dataclass(frozen=True, eq=False)
class BlockState:
    """One block of weights with posterior N(mean, precision⁻¹), between two steps."""

    block: Block
    prior: BlockPrior
    hyperparameters: Hyperparameters
    mean: Tensor  # M [P]; the store's own memory, unless the store holds an average
    curvature: RunningCurvature  # C, per datum
    precision: Structure  # Λ = (N/T)(C + e) + δ
    preconditioner: Structure  # C + e + δT/N + damping, of the step of the mean
    momentum: Tensor  # m [P]
    mirror: Perturbation | None = None  # to be used once more, with its sign turned
    averaged_precision: Structure | None = None  # with an average, whose mean is in the store
    second_moment: SecondMoment | None = None  # of updates that have one

    @cached_property
    def mean_views(self) -> dict[str, Tensor]:
        """{name: mean [*shape]}."""
        return self.block.strided_views(self.mean)

    def with_mean(self, mean: Tensor, views: dict[str, Tensor] | None = None) -> BlockState:
        """With another mean, and the `mean_views` of it if they are known."""
        state = replace(self, mean=mean)
        if views is not None:
            vars(state)["mean_views"] = views
        return state


@serializable
@dataclass(frozen=True, eq=False)
class Posterior:
    """Independent blocks after `step` steps."""

    step: int
    blocks: tuple[BlockState, ...]
    temperature: TemperatureState = TemperatureState()

    def map_blocks(self, function: Callable[[BlockState], BlockState]) -> Posterior:
        """With `function` applied to every block."""
        return replace(self, blocks=tuple(function(state) for state in self.blocks))

    def to(self, like: Tensor) -> Posterior:
        """On the device and in the dtype of `like`."""
        if all(b.momentum.device == like.device and b.momentum.dtype == like.dtype
               for b in self.blocks):
            return self
        return cast(self, like)

    def with_mirrors(self, mirrors: Sequence[Perturbation] | None) -> Posterior:
        """With the perturbations that the next sample mirrors; None: it is drawn anew."""
        pairs = zip_longest(self.blocks, mirrors or ())  # new blocks have none yet
        return replace(self, blocks=tuple(replace(state, mirror=m) for state, m in pairs))

    def without_means(self) -> Posterior:
        """For a checkpoint: a mean that the store holds is saved there."""
        return self.map_blocks(
            lambda state: state if state.averaged_precision is not None
            else replace(state, mean=torch.empty(0).to(state.mean))
        )


@torch.no_grad()
def checksums(posterior: Posterior, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers {name: scalar} that differ where the states of blocks or other parameters do."""
    return {name: x.detach().double().sum() for name, x in others.items()} | {
        state.block.name: torch.stack([
            state.mean.double().sum(), state.momentum.double().abs().sum(),
            state.precision.trace().double(),
        ]).sum() for state in posterior.blocks
    }
