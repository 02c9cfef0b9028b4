"""A natural-gradient step over all blocks, whoever runs the model.

A state and what was seen go in, a proposal comes out; nothing is changed here, the caller commits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature, running_average
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.running_average import (
    SINGLE_PARTICLE,
    DueBlock,
    Particle,
    RunningCurvature,
    zero_curvature,
)
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.natural_gradient import (
    clip_momentum,
    posterior_precision,
    price_hessian_update,
    regularized_gradient,
    trust_region_scale,
)
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.sampling import Weights
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.structures import Diagonal, Solution


@dataclass(frozen=True, eq=False)
class Proposal:
    """A step that is ready to be made: each mean moves by -rate · direction.

    The directions are solutions that are not formed; `move` adds them to the means.
    """

    loss: float
    rates: list[float]
    directions: list[Solution]
    state: Posterior

    def move(self, locs: Sequence[Tensor]) -> None:
        """Carry it out, in place."""
        for loc, rate, direction in zip(locs, self.rates, self.directions, strict=True):
            direction.add_to(loc, -rate)


def uses_sample_gradients(spec: Curvature, block: Block) -> bool:
    """Whether a block's curvature is known from the gradients at its samples alone."""
    return block.is_untraced or spec.uses_sample_gradients


def is_due(spec: Curvature, step: int, block: Block, carried: BlockState) -> bool:
    """Whether `step` takes an estimate of a block."""
    if uses_sample_gradients(spec, block) and (
        spec.every == "auto" or spec.uses_sample_gradients
    ):
        return carried.running is None  # every step has one, by itself
    if carried.running is None:
        return spec.is_due(step)
    if carried.running.count == 0 and not block.is_untraced:
        return True  # it has had no part in any run yet
    return spec.is_due(step, carried.running.interval)


def update_curvature(
    spec: Curvature, step: int, blocks: Sequence[Block], carried: Sequence[BlockState],
    terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall], rows: int, batch_fraction: float,
    priors: Sequence[BlockPrior], numbers: Sequence[
        Hyperparameters
    ], part: Particle = SINGLE_PARTICLE,
) -> list[BlockState]:
    """Average one more estimate of the curvature of the blocks that are due in; `batch_fraction`
    is B/N.

    The initial curvature fades in all blocks, due or not; see `decayed_initial_curvature`. A block
    that has no part in
    this run keeps its curvature, none at first. Of several samples in a step each is a `part`.
    """
    now = [n for n, (block, one) in enumerate(zip(blocks, carried, strict=True))
           if is_due(spec, step, block, one) and not uses_sample_gradients(spec, block)
           and running_average.has_statistics(spec, block, calls)]
    due = [
        DueBlock(blocks[n], carried[n].running or _zero(blocks[n], priors[n]), priors[n].units)
        for n in now
    ]
    found = running_average.update_curvature(
        spec, step, due, ForwardPass(terms, calls, rows), part
    )
    fresh = [
        one if n in now else init_curvature(spec, block, one, prior)
        for n, (block, one, prior) in enumerate(zip(blocks, carried, priors, strict=True))
    ]
    for number, running in zip(now, found, strict=True):
        fresh[number] = replace(carried[number], running=running)
    return refresh_precision(spec, step, fresh, batch_fraction, priors, numbers)


def _zero(block: Block, prior: BlockPrior) -> RunningCurvature:
    return zero_curvature(block, prior.packed.precision, prior.units)


def refresh_precision(
    spec: Curvature, step: int, carried: Sequence[BlockState], batch_fraction: float,
    priors: Sequence[BlockPrior], numbers: Sequence[Hyperparameters],
) -> list[BlockState]:
    """Metrics with the initial curvature as faint as it is at `step`.

    A block whose prior has new units keeps its metric until its next estimate.
    """
    initial_curvature = decayed_initial_curvature(spec, step, batch_fraction)
    return [
        replace(one, metric=posterior_precision(
            one.seen.semidefinite(spec.kind), initial_curvature, prior, number.likelihood_weight,
            number.damping
        )) if one.seen.is_in(prior.units) else one
        for one, prior, number in zip(carried, priors, numbers, strict=True)
    ]


def decayed_initial_curvature(spec: Curvature, step: int, batch_fraction: float) -> float:
    """e = initial · (1 - ρ)^step with ρ = B/N, the `batch_fraction`, but within [0.01, 0.05].

    It bridges the first hundreds of steps, in which the network changes faster than the average
    follows: with plenty of data an epoch would be far too long for that. An average that starts
    from it ("noise") needs no bridge.
    """
    if spec.uses_sample_gradients:
        return 0.0
    return spec.initial * (1 - min(0.05, max(0.01, batch_fraction))) ** step


def init_curvature(
    spec: Curvature, block: Block, carried: BlockState, prior: BlockPrior
) -> BlockState:
    """With a curvature to start from, before any estimate."""
    if spec.uses_sample_gradients and block.kind != "diag":
        raise ValueError(f"curvature='noise' wants structure='diag', {block.name} is {block.label}")
    if carried.running is not None:
        return carried
    if not uses_sample_gradients(spec, block):
        return replace(carried, running=_zero(block, prior))
    start = spec.initial if spec.uses_sample_gradients else 0.0
    curvature = Diagonal(prior.packed.precision.new_full((block.size,), start))
    return replace(carried, running=RunningCurvature(0, curvature))


def update_from_sample_gradients(
    spec: Curvature, step: int, carried: Sequence[BlockState], estimates: Sequence[Tensor | None],
    batch_fraction: float, priors: Sequence[BlockPrior], numbers: Sequence[Hyperparameters],
) -> list[BlockState]:
    """The curvature of some blocks from the step's own samples; `estimates` are means of Λ ε ∘ g.

    Every step counts, each as much less as an estimate every `spec.every` steps would count.
    """
    every = spec.every if isinstance(spec.every, int) else 20
    initial_curvature, result = decayed_initial_curvature(spec, step, batch_fraction), list(carried)
    for place, (one, estimate) in enumerate(zip(carried, estimates, strict=True)):
        if estimate is None:
            continue
        assert one.running is not None
        prior, number = priors[place], numbers[place]
        curvature = price_hessian_update(
            one.running.curvature, estimate, (
                1 - spec.decay
            ) / every, prior.packed, number.likelihood_weight
        )
        running = RunningCurvature(one.running.count + 1, curvature)
        moved = posterior_precision(
            curvature, initial_curvature, prior, number.likelihood_weight, number.damping
        )
        result[place] = replace(one, running=running, metric=moved)
    return result


def compute_update(
    state: Posterior, blocks: Sequence[Block], locs: Sequence[Tensor], gradients: list[Weights],
    priors: Sequence[BlockPrior], loss: Tensor, others: Sequence[Tensor | None],
    numbers: Sequence[Hyperparameters], average: bool,
) -> Proposal:
    """The step from the gradients per datum, of which `gradients` lets go as they are used.

    `others` are gradients that must be finite too.

    Raises FloatingPointError when the loss or a gradient is not finite.
    """
    stepped, directions = [], []
    for one, block, loc, prior, number in zip(
        state.blocks, blocks, locs, priors, numbers, strict=True
    ):
        bias = number.bias_correction(state.step)
        momentum = update_momentum(block, one.momentum, gradients.pop(0), number.momentum)
        h = regularized_gradient(momentum, loc, prior.packed, number.likelihood_weight, bias)
        directions.append(one.known.preconditioner.solution(h))
        stepped.append(replace(one, momentum=momentum))
    value, *dots = _finite([loss, *(one.dot for one in directions)], others, state.step)
    power = sum(
        dot * (number.base_lr / number.bias_correction(state.step)) ** 2
        for dot, number in zip(dots, numbers, strict=True)
    )
    rates = [
        number.lr * trust_region_scale(power, number.kl_clip) / number.bias_correction(state.step)
        for number in numbers
    ]
    for one, number in zip(stepped, numbers, strict=True):
        clip_momentum(one.momentum, power, number.kl_clip)  # type: ignore[arg-type]  # each has been pushed
    if average:
        stepped = [
            _averaged(one, direction.add_to(loc.clone(), -rate), state.step)
            for one, loc, direction, rate in zip(stepped, locs, directions, rates, strict=True)
        ]
    return Proposal(value, rates, directions, Posterior(state.step + 1, tuple(stepped)))


def update_momentum(
    block: Block, momentum: Tensor | None, gradient: Weights, beta: float
) -> Tensor:
    """The momentum m [P] with one more gradient in it; 0 was before the first."""
    if momentum is None:
        return (1 - beta) * block.pack(gradient)
    return block.lerp(momentum, gradient, 1 - beta)


def average_weight(step: int) -> float:
    """4 / (t + 4): of the iterate after step t in the running average."""
    return 4 / (step + 4)


def _averaged(one: BlockState, loc: Tensor, step: int) -> BlockState:
    precision = one.known.precision
    if one.average is not None:
        precision = one.average.lerp(precision, average_weight(step))
    return replace(one, mean=loc, average=precision)


def _finite(
    numbers: Sequence[Tensor], gradients: Sequence[Tensor | None], step: int
) -> list[float]:
    """The numbers as floats: the one synchronisation of a step."""
    sums = [g.sum().to(numbers[0]) for g in gradients if g is not None]
    values = torch.stack([*numbers, *sums]).tolist()
    if not all(map(math.isfinite, values)):
        known = math.isfinite(values[0])
        what = "a gradient is not finite" if known else f"the loss is {values[0]}"
        raise FloatingPointError(f"step {step}: {what}")
    return values[: len(numbers)]
