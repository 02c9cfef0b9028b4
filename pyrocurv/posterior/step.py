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

from pyrocurv.layers import packing
from pyrocurv.posterior.mean_update import NATURAL, Direction, MeanUpdate, Push
from pyrocurv.posterior.natural_gradient import clip_momentum, trust_region_scale
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.foreach import magnitudes
from pyrocurv.runtime.undo import Undo, complete
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Solution


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The model at one or several samples: means over them."""

    posterior: Posterior  # with the curvature at the samples averaged in
    loss: Tensor  # at full-data scale, in nats
    gradients: dict[str, Tensor]  # {name: gradient per datum [*shape]}; `step` empties it
    auxiliary: Sequence[Tensor | None] = ()  # gradients of everything without a Gaussian
    nll: Tensor | None = None  # the loss without the KL divergence, of the data alone
    workers: Workers = ALONE  # who share out the work on matrices
    owners: Workers = ALONE  # each of whom has blocks of its own


@dataclass(frozen=True, eq=False)
class Move:
    """A block that moves: its mean by -rate · direction; `state` is complete but for that."""

    state: BlockState
    direction: Solution
    rate: float

    def moved(self, mean: Tensor) -> Tensor:
        """`mean` [P], moved in place."""
        return self.direction.add_to(mean, -self.rate)


def apply(moves: Sequence[tuple[Tensor, Move]]) -> None:
    """Move each of the means [P], in place; those of one rate at once."""
    groups: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for mean, move in moves:
        if len(move.direction.factors) == 1:
            groups.setdefault(move.rate, []).append((mean, move.direction.factors[0]))
        else:
            move.moved(mean)
    for rate, pairs in groups.items():
        means, vectors = zip(*pairs, strict=True)
        torch._foreach_add_(means, vectors, alpha=-rate)
        for mean in means:  # which says that it has moved, under a `TorchDispatchMode` too
            torch.autograd.graph.increment_version(mean)


@dataclass(frozen=True, eq=False)
class Update:
    """A step that is ready to be committed."""

    loss: float
    posterior: Posterior  # after the step, but for means that are not averaged
    moves: Sequence[Move]
    before: Posterior
    nll: float  # that of the evaluation, or the loss
    num_data: float | None = None  # N, where it is known


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


def step(
    before: Posterior, evaluation: Evaluation, average: bool = False,
    mean_update: MeanUpdate = NATURAL,
) -> Update:
    """The step of all blocks that have a gradient; with `average` also the running averages.

    `before` is the posterior that the samples are from. Raises FloatingPointError if the loss or a
    gradient is not finite, or a mean would not be.
    """
    posterior = evaluation.posterior
    pushed = _pushes(posterior, evaluation.gradients, mean_update.uses_momentum)
    pushes = [push for push in pushed if push is not None]
    nll = evaluation.loss if evaluation.nll is None else evaluation.nll
    owners = evaluation.owners
    with owners.together(evaluation.loss), disable_autocast(evaluation.loss.device):
        directions = mean_update.directions(pushes, evaluation.workers)
        loss, data_loss, *dots = _finite(
            [evaluation.loss, nll, *(direction.solution.dot for direction in directions)],
            evaluation.auxiliary, posterior.step,
        )
    energy = owners.sum(sum(
        dot * direction.energy_rate * direction.energy_rate  # a power would raise on overflow
        for dot, direction in zip(dots, directions, strict=True)
        if direction.energy_rate is not None
    ), evaluation.loss)
    _clip_momenta(directions, energy)
    with owners.together(evaluation.loss):
        moves = [_move(direction, energy) for direction in directions]
        _add_decays(moves)
        for move, dot in zip(moves, dots, strict=True):
            _check_overflow(move, dot, posterior.step)
        if average:
            moves = [_averaged(move, posterior.step) for move in moves]
    moved = iter(moves)
    blocks = tuple(
        old if new is None else next(moved).state
        for old, new in zip(posterior.blocks, pushed, strict=True)
    )
    after = replace(posterior, step=posterior.step + 1, blocks=blocks)
    return Update(loss, after, moves, before, data_loss)


def _pushes(
    posterior: Posterior, gradients: dict[str, Tensor], uses_momentum: bool
) -> list[Push | None]:
    """The blocks with one more gradient in their momenta; None for those without a gradient."""
    found: dict[int, Push] = {}
    groups: dict[float, list[int]] = {}  # of blocks with the same momentum
    for index, state in enumerate(posterior.blocks):
        if not gradients.keys().isdisjoint(state.block.tensors):
            momentum = state.hyperparameters.momentum if uses_momentum else 0.0
            groups.setdefault(momentum, []).append(index)
    for momentum, members in groups.items():
        states = [posterior.blocks[index] for index in members]
        before = [state.momentum for state in states]
        complete = {
            name: before[0].new_zeros(shape) if (gradient := gradients.pop(name, None)) is None
            else gradient
            for state in states for name, shape in state.block.tensors.items()
        }
        after = packing.lerp([state.block for state in states], before, complete, 1 - momentum)
        for index, state, old, new in zip(members, states, before, after, strict=True):
            if not uses_momentum:
                numbers = replace(state.hyperparameters, momentum=0.0)
                state = replace(state, hyperparameters=numbers)
            found[index] = Push(replace(state, momentum=new), old, posterior.step)
    return [found.get(index) for index in range(len(posterior.blocks))]


def _clip_momenta(directions: Sequence[Direction], energy: float) -> None:
    """Shorten the momenta of the blocks in the trust region."""
    clipped: dict[float | None, list[Tensor]] = {}
    for direction in directions:
        if direction.energy_rate is not None:
            kl_clip = direction.state.hyperparameters.kl_clip
            clipped.setdefault(kl_clip, []).append(direction.state.momentum)
    for kl_clip, momenta in clipped.items():
        clip_momentum(momenta, energy, kl_clip)


def _move(direction: Direction, energy: float) -> Move:
    """The move of a block, shortened where it is in the trust region."""
    state, rate = direction.state, direction.rate
    if direction.energy_rate is not None:
        kl_clip = state.hyperparameters.kl_clip
        rate *= trust_region_scale(energy, kl_clip)
    return Move(state, direction.solution, rate)


def _add_decays(moves: list[Move]) -> None:
    """Let the weights of layers decay to the prior's mean, M - lr λ (M - M₀), outside of the
    objective.

    Loshchilov & Hutter 2019, "Decoupled weight decay regularization", arXiv:1711.05101.
    """
    groups: dict[float, list[tuple[int, Tensor]]] = {}
    for index, move in enumerate(moves):
        numbers = move.state.hyperparameters
        if numbers.decay and move.rate and (deviation := _deviation(move.state)) is not None:
            share = numbers.lr * numbers.decay / move.rate
            groups.setdefault(share, []).append((index, deviation))
    for share, members in groups.items():
        directions = [moves[index].direction for index, _ in members]
        vectors = [
            one.factors[0] if len(one.factors) == 1 else one.add_to(torch.zeros_like(decay), 1.0)
            for one, (_, decay) in zip(directions, members, strict=True)
        ]
        sums = torch._foreach_add(vectors, [decay for _, decay in members], alpha=share)
        for (index, _), one, total in zip(members, directions, sums, strict=True):
            moves[index] = replace(moves[index], direction=Solution(one.dot, (total,)))


def _deviation(state: BlockState) -> Tensor | None:
    """M - M₀ [P] with zeros for scales and embeddings; None if there is nothing else."""
    layers = [layer for layer in state.block.layers if layer.is_matrix]
    names = {name for layer in layers for name in layer.tensors}
    if not names:
        return None
    deviation = state.prior.gaussian.deviation(state.mean)
    if len(layers) == len(state.block.layers):
        return deviation
    return state.block.pack({
        name: value if name in names else torch.zeros_like(value)
        for name, value in state.block.views(deviation).items()
    })


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
    largest = magnitudes([g for g in gradients if g is not None], values[0])
    floats = torch.stack([*values, *largest]).tolist()
    if not all(map(math.isfinite, floats)):
        is_loss_finite = math.isfinite(floats[0])
        what = "a gradient is not finite" if is_loss_finite else f"the loss is {floats[0]}"
        raise FloatingPointError(f"step {step}: {what}")
    return floats[: len(values)]


def _check_overflow(move: Move, dot: float, step: int) -> None:
    """Raise FloatingPointError if a mean would overflow.

    With d the direction, M the preconditioner and λ its least eigenvalue, |d|² ≤ <d, M d> / λ, and
    λ is at least the smallest positive number: without extreme numbers nothing has to be computed.
    A decay of the weights by lr λ ≤ 1 does not enlarge them.
    """
    state, limits = move.state, torch.finfo(move.state.mean.dtype)
    rate = abs(move.rate)
    least = math.sqrt(limits.tiny * limits.eps)
    is_small = rate * (math.sqrt(abs(dot)) / least) < limits.max / 4  # its square may overflow
    if is_small and state.hyperparameters.lr * state.hyperparameters.decay <= 1:
        return
    if not (rate < limits.max and bool(torch.isfinite(move.moved(state.mean.clone())).all())):
        lr = state.hyperparameters.lr
        raise FloatingPointError(f"step {step}: the means overflow, with a learning rate of {lr:g}")
