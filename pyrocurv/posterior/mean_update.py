"""How the mean of a block moves, given the gradient of the tempered objective.

With m the momentum of the gradient per datum at the samples, β its decay, δ the prior precision,

    h = m / (1-βᵗ) + (δT/N)(M - M₀),   M ← M - η d(h)

or, by Nesterov's momentum, with mₜ + β (mₜ - mₜ₋₁) and βᵗ⁺¹ in place of m and βᵗ.

Any d that vanishes with h alone has the fixed points of E_q[loss] + T KL(q ‖ prior): the rule
decides how fast one is reached. Directions of fixed length, as those of orthogonalized momentum,
come to rest there as the learning rate η falls to 0. The natural gradient is

    d = ν (C + e + δT/N + damping)⁻¹ h,   ν one trust region over all blocks

see `pyrocurv.posterior.natural_gradient`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrocurv.posterior.prior import GaussianPrior
from pyrocurv.posterior.state import BlockState
from pyrocurv.runtime import foreach
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import LazySolution
from pyrocurv.structures.stack import solutions


@dataclass(frozen=True, eq=False)
class Push:
    """A block whose momentum has one more gradient, and the momentum before; `step` is from 0."""

    state: BlockState
    last_momentum: Tensor  # [P]
    step: int
    is_ahead: bool = False  # Nesterov's

    def ahead(self) -> Push:
        """The same with Nesterov's momentum."""
        return replace(self, is_ahead=True)

    @property
    def bias_correction(self) -> float:
        """1 - βᵗ."""
        return self.state.hyperparameters.bias_correction(self.step + self.is_ahead)

    @cached_property
    def momentum(self) -> Tensor:
        """(1 - βᵗ) times a mean of the gradients [P]."""
        new = self.state.momentum
        if not self.is_ahead:
            return new
        return self.last_momentum.lerp(new, 1 + self.state.hyperparameters.momentum)

    @cached_property
    def scaled_gradient(self) -> Tensor:
        """(1 - βᵗ) h [P]."""
        return _with_priors([self], [self.momentum], [self.bias_correction])[0]


@dataclass(frozen=True, eq=False)
class Direction:
    """The mean of a block moves by -rate · solution; `state` is the block with its new moments.

    The steps of all blocks in the trust region are shortened together. `energy_rate` is the rate
    that counts there, that without a schedule.
    """

    state: BlockState
    solution: LazySolution
    rate: float
    energy_rate: float | None = None  # None: outside of the trust region

    @staticmethod
    def of(push: Push, vector: Tensor, rate: float, state: BlockState | None = None) -> Direction:
        """A direction [P] outside of the trust region."""
        solution = LazySolution(torch.dot(push.scaled_gradient, vector), (vector,))
        return Direction(push.state if state is None else state, solution, rate)


class MeanUpdate:
    """A rule from gradients to directions. The natural gradient: Khan & Rue 2023, arXiv:2107.04562.
    """

    name = "natural"
    default_lr = 0.02  # of a posterior
    uses_momentum = True  # False: the rule has a momentum of its own

    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        """The direction of each block; nothing is changed that `keep` does not keep.

        The workers, who have the same blocks, may share out what takes long.
        """
        add_priors(pushes)
        solved = solutions(
            [push.state.preconditioner for push in pushes],
            [push.scaled_gradient for push in pushes],
        )
        return [*map(_natural_direction, pushes, solved)]

    def costs(self, states: Sequence[BlockState]) -> dict[str, float]:
        """What is shared out among workers, in order: multiplications by block or tensor name."""
        return {}

    def keep(self, undo: Undo) -> None:
        """Have `undo` keep what `directions` changes."""

    def state_dict(self) -> dict[str, Any]:
        """What is not in the blocks, in plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""


NATURAL = MeanUpdate()


def add_priors(pushes: Sequence[Push]) -> None:
    """Compute the `scaled_gradient` of all blocks that do not have it yet, at once."""
    pushes = [push for push in pushes if "scaled_gradient" not in vars(push)]
    ahead = [push for push in pushes if push.is_ahead]
    betas = [push.state.hyperparameters.momentum for push in ahead]
    for push, momentum in zip(ahead, _momenta(ahead, [1 + beta for beta in betas]), strict=True):
        vars(push)["momentum"] = momentum
    corrections = [push.bias_correction for push in pushes]
    sums = _with_priors(pushes, [push.momentum for push in pushes], corrections)
    for push, total in zip(pushes, sums, strict=True):
        vars(push)["scaled_gradient"] = total


def gradients(pushes: Sequence[Push]) -> list[Tensor]:
    """h [P] of each block."""
    if not pushes:
        return []
    add_priors(pushes)
    scaled = [push.scaled_gradient for push in pushes]
    return [*torch._foreach_div(scaled, [push.bias_correction for push in pushes])]


def last_gradients(pushes: Sequence[Push]) -> list[Tensor]:
    """The gradient of this step alone, with the prior's [P], of each block."""
    betas = [push.state.hyperparameters.momentum for push in pushes]
    momenta = _momenta(pushes, [1 / (1 - beta) for beta in betas])
    return _with_priors(pushes, momenta, [1.0] * len(pushes))


def _momenta(pushes: Sequence[Push], weights: Sequence[float]) -> list[Tensor]:
    """mₜ₋₁ + weight · (mₜ - mₜ₋₁) of each block."""
    before = [push.last_momentum for push in pushes]
    return foreach.lerp(before, [push.state.momentum for push in pushes], weights)


def _with_priors(
    pushes: Sequence[Push], momenta: Sequence[Tensor], corrections: Sequence[float]
) -> list[Tensor]:
    """m + correction · (δT/N)(M - M₀) of each block; at once where weights are independent."""
    scales = [
        correction / push.state.hyperparameters.likelihood_weight
        for push, correction in zip(pushes, corrections, strict=True)
    ]
    priors = [push.state.prior.gaussian for push in pushes]
    found = {
        index: prior.add_gradient(momenta[index], pushes[index].state.mean, scales[index])
        for index, prior in enumerate(priors) if not isinstance(prior, GaussianPrior)
    }
    others = [index for index in range(len(pushes)) if index not in found]
    if others:
        sums = torch._foreach_addcmul(
            [momenta[index] for index in others], _deviations([pushes[index] for index in others]),
            [priors[index].diagonal for index in others], [scales[index] for index in others],
        )
        found.update(zip(others, sums, strict=True))
    return [found[index] for index in range(len(pushes))]


def _deviations(pushes: Sequence[Push]) -> list[Tensor]:
    """M - M₀ of blocks with independent weights."""
    means = [push.state.mean for push in pushes]
    priors = [push.state.prior.gaussian for push in pushes]
    shifted = [
        index for index, prior in enumerate(priors)
        if isinstance(prior, GaussianPrior) and not prior.zero_mean
    ]
    if shifted:
        differences = torch._foreach_sub(
            [means[index] for index in shifted], [priors[index].loc for index in shifted]
        )
        for index, difference in zip(shifted, differences, strict=True):
            means[index] = difference
    return means


def _natural_direction(push: Push, solution: LazySolution) -> Direction:
    """The natural gradient of one block, in the trust region."""
    numbers, correction = push.state.hyperparameters, push.bias_correction
    return Direction(push.state, solution, numbers.lr / correction, numbers.base_lr / correction)
