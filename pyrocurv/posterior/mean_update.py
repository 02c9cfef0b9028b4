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

from pyrocurv.posterior.natural_gradient import regularized_gradient
from pyrocurv.posterior.state import BlockState
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
        return self._with_prior(self.momentum, self.bias_correction)

    @property
    def gradient(self) -> Tensor:
        """h [P]."""
        return self.scaled_gradient / self.bias_correction

    @property
    def last_gradient(self) -> Tensor:
        """The gradient of this step alone, with the prior's [P]."""
        weight = 1 - self.state.hyperparameters.momentum
        return self._with_prior(self.last_momentum.lerp(self.state.momentum, 1 / weight), 1.0)

    def _with_prior(self, gradient: Tensor, scale: float) -> Tensor:
        state = self.state
        return regularized_gradient(
            gradient, state.mean, state.prior.gaussian, state.hyperparameters.likelihood_weight,
            scale,
        )


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
    """Compute the `scaled_gradient` of all blocks with priors N(0, 1/δ) at once."""
    _look_ahead([push for push in pushes if push.is_ahead])
    simple = [push for push in pushes if push.state.prior.gaussian.is_centered]
    if simple:
        states = [push.state for push in simple]
        sums = torch._foreach_addcmul(
            [push.momentum for push in simple], [state.mean for state in states],
            [state.prior.gaussian.diagonal for state in states],
            [push.bias_correction / push.state.hyperparameters.likelihood_weight
             for push in simple],
        )
        for push, total in zip(simple, sums, strict=True):
            vars(push)["scaled_gradient"] = total


def _look_ahead(pushes: Sequence[Push]) -> None:
    """Compute Nesterov's `momentum` of all blocks at once."""
    groups: dict[float, list[Push]] = {}
    for push in pushes:
        groups.setdefault(push.state.hyperparameters.momentum, []).append(push)
    for beta, members in groups.items():
        ahead = torch._foreach_lerp(
            [push.last_momentum for push in members],
            [push.state.momentum for push in members], 1 + beta,
        )
        for push, momentum in zip(members, ahead, strict=True):
            vars(push)["momentum"] = momentum


def _natural_direction(push: Push, solution: LazySolution) -> Direction:
    """The natural gradient of one block, in the trust region."""
    numbers, correction = push.state.hyperparameters, push.bias_correction
    return Direction(push.state, solution, numbers.lr / correction, numbers.base_lr / correction)
