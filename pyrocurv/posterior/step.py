"""One natural-gradient step over all blocks, independent of who runs the model.

A front end evaluates the model at samples of the posterior and hands over an `Evaluation`; `step`
returns an `Update` and changes nothing; a store of the weights commits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyrocurv.posterior.natural_gradient import (
    clip_momentum,
    regularized_gradient,
    trust_region_scale,
)
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.runtime.undo import Undo, complete
from pyrocurv.structures import Solution


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The model at one or several samples: means over them."""

    posterior: Posterior  # with the curvature at the samples averaged in
    loss: Tensor  # at full-data scale, in nats
    gradients: dict[str, Tensor]  # {name: gradient per datum [*shape]}; `step` empties it
    auxiliary: Sequence[Tensor | None] = ()  # gradients of everything without a Gaussian


@dataclass(frozen=True, eq=False)
class Move:
    """A block that moves: its mean by -rate · direction; `state` is complete but for that."""

    state: BlockState
    direction: Solution
    rate: float

    def moved(self, mean: Tensor) -> Tensor:
        """`mean` [P], moved in place."""
        return self.direction.add_to(mean, -self.rate)


@dataclass(frozen=True, eq=False)
class Update:
    """A step that is ready to be committed."""

    loss: float
    posterior: Posterior  # after the step, but for means that are not averaged
    moves: Sequence[Move]
    before: Posterior


class WeightStore(Protocol):
    """Where the weights live: the families of a guide, or the parameters of a network."""

    def load(self, posterior: Posterior) -> Posterior:
        """The posterior with the means that the store has now."""

    def prepare(self, update: Update) -> Callable[[], None]:
        """A function that writes the update, and may be called again if it is interrupted.

        Everything that may fail is done before it is returned.
        """


def commit(
    update: Update, store: WeightStore, undo: Undo, assign: Callable[[], None]
) -> None:
    """Write an update into its store, and call `assign` for what else changes with it.

    Until all is prepared an exception changes nothing; from then on the step is completed before an
    interrupt is raised again, and `undo` restores nothing.
    """
    write = store.prepare(update)

    def finish() -> None:
        undo.forget()
        write()
        assign()

    complete(finish)


def step(before: Posterior, evaluation: Evaluation, average: bool = False) -> Update:
    """The step of all blocks that have a gradient; with `average` also the running averages.

    `before` is the posterior that the samples are from. Raises FloatingPointError if the loss or a
    gradient is not finite, or a mean would not be.
    """
    posterior = evaluation.posterior
    pushed = [_push(state, evaluation.gradients) for state in posterior.blocks]
    moving = [state for state in pushed if state is not None]
    directions = [_direction(state, posterior.step) for state in moving]
    loss, *dots = _finite(
        [evaluation.loss, *(direction.dot for direction in directions)], evaluation.auxiliary,
        posterior.step,
    )
    pairs = [*zip(moving, directions, strict=True)]
    base_rates = [
        _bias_corrected(state.hyperparameters.base_lr, state, posterior.step) for state in moving
    ]
    energy = sum(
        dot * lr * lr  # no power, which raises where a product overflows to inf
        for dot, lr in zip(dots, base_rates, strict=True)
    )
    moves = []
    for (state, direction), dot in zip(pairs, dots, strict=True):
        kl_clip = state.hyperparameters.kl_clip
        lr = _bias_corrected(state.hyperparameters.lr, state, posterior.step)
        move = Move(state, direction, lr * trust_region_scale(energy, kl_clip))
        _check_overflow(move, dot, posterior.step)
        clip_momentum(state.momentum, energy, kl_clip)
        moves.append(_averaged(move, posterior.step) if average else move)
    moved = iter(moves)
    blocks = tuple(
        old if new is None else next(moved).state
        for old, new in zip(posterior.blocks, pushed, strict=True)
    )
    return Update(loss, Posterior(posterior.step + 1, blocks), moves, before)


def _push(state: BlockState, gradients: dict[str, Tensor]) -> BlockState | None:
    """The block with one more gradient in its momentum; None if there is no gradient."""
    names = state.block.tensors
    if gradients.keys().isdisjoint(names):
        return None
    views = state.block.strided_views(state.momentum)
    gradient = {n: gradients.pop(n, None) for n in names}
    complete = {n: torch.zeros_like(views[n]) if g is None else g for n, g in gradient.items()}
    weight = 1 - state.hyperparameters.momentum
    return replace(state, momentum=state.block.lerp(state.momentum, complete, weight))


def _direction(state: BlockState, step: int) -> Solution:
    numbers = state.hyperparameters
    h = regularized_gradient(
        state.momentum, state.mean, state.prior.gaussian, numbers.likelihood_weight,
        numbers.bias_correction(step),
    )
    return state.preconditioner.solution(h)


def _bias_corrected(lr: float, state: BlockState, step: int) -> float:
    return lr / state.hyperparameters.bias_correction(step)


def average_weight(step: int) -> float:
    """4 / (t + 4), the weight of the iterate after step t in the running average."""
    return 4 / (step + 4)


def _averaged(move: Move, step: int) -> Move:
    """The move with the mean after it and the running average of the precision."""
    state = move.state
    precision = state.precision
    if state.averaged_precision is not None:
        precision = state.averaged_precision.lerp(precision, average_weight(step))
    mean = move.moved(state.mean.clone())
    return replace(move, state=replace(state, mean=mean, averaged_precision=precision))


def _finite(values: Sequence[Tensor], gradients: Sequence[Tensor | None], step: int) -> list[float]:
    """The values as floats, checked together with the gradients in one synchronization."""
    sums = [g.sum().to(values[0]) for g in gradients if g is not None]
    floats = torch.stack([*values, *sums]).tolist()
    if not all(map(math.isfinite, floats)):
        is_loss_finite = math.isfinite(floats[0])
        what = "a gradient is not finite" if is_loss_finite else f"the loss is {floats[0]}"
        raise FloatingPointError(f"step {step}: {what}")
    return floats[: len(values)]


def _check_overflow(move: Move, dot: float, step: int) -> None:
    """Raise FloatingPointError if a mean would overflow.

    With d the direction, M the preconditioner and λ its least eigenvalue, |d|² ≤ <d, M d> / λ, and
    λ is at least the smallest positive number: without extreme numbers nothing has to be computed.
    """
    state, limits = move.state, torch.finfo(move.state.mean.dtype)
    rate = abs(move.rate)
    if rate * math.sqrt(abs(dot) / (limits.tiny * limits.eps)) < limits.max / 4:
        return
    if not (rate < limits.max and bool(torch.isfinite(move.moved(state.mean.clone())).all())):
        lr = state.hyperparameters.lr
        raise FloatingPointError(f"step {step}: the means overflow, with a learning rate of {lr:g}")
