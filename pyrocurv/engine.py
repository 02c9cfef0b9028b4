"""A natural-gradient step over all blocks, whoever runs the model.

A state and what was seen go in, a proposal comes out; nothing is changed here, the caller commits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.curvature import Curvature, estimator
from pyrocurv.curvature.estimator import ALONE, Part, Running
from pyrocurv.curvature.pullback import Observation
from pyrocurv.natural import calm, metric, noisy_curvature, slope, surplus, trust
from pyrocurv.priors import BlockPrior, Prior, kl
from pyrocurv.state import Carried, Noise, State
from pyrocurv.structures import Diagonal, Solution, Structure
from pyrocurv.uses import Call

Weights = Mapping[str, Tensor]  # {name: [*shape]}


@dataclass(frozen=True)
class Numbers:
    """A block's numbers: learning rate, its base (before a schedule), β, damping, κ, N and T."""

    lr: float
    base_lr: float
    momentum: float
    damping: float
    kl_clip: float | None
    num_data: float
    temperature: float

    @staticmethod
    def of(group: Mapping[str, Any], num_data: float, temperature: float) -> Numbers:
        """From a parameter group, whose learning rate a scheduler may have turned."""
        base = group.get("initial_lr", group["lr"])
        return Numbers(
            group["lr"], base, group["momentum"], group["damping"], group["kl_clip"], num_data,
            temperature,
        )

    @property
    def ratio(self) -> float:
        """N/T."""
        return self.num_data / self.temperature

    def unbiased(self, step: int) -> float:
        """1 - βᵗ, for t = step + 1."""
        return 1 - self.momentum ** (step + 1)


@dataclass(frozen=True, eq=False)
class Proposal:
    """A step that is ready to be made: each mean moves by -rate · direction.

    The directions are solutions that are not formed; `move` adds them to the means.
    """

    loss: float
    rates: list[float]
    directions: list[Solution]
    state: State

    def move(self, locs: Sequence[Tensor]) -> None:
        """Carry it out, in place."""
        for loc, rate, direction in zip(locs, self.rates, self.directions, strict=True):
            direction.add_to(loc, -rate)


def draw(
    precisions: Sequence[Structure | None], used: Sequence[Noise | None], like: Tensor,
    antithetic: bool,
) -> tuple[list[Noise] | None, list[Noise | None]]:
    """A sample's deviation from the mean, and what to mirror next; a list has one for each block.

    None for the deviation as long as there is no precision: the first step is at the mean.
    """
    nothing: list[Noise | None] = [None] * len(used)
    known = [precision for precision in precisions if precision is not None]
    mirrored = [noise.mirrored() for noise in used if noise is not None]
    if mirrored or not known:  # of all blocks, or of none
        return mirrored or None, nothing
    fresh = []
    for precision in known:
        z = torch.randn(precision.size, dtype=like.dtype, device=like.device)
        square = torch.dot(z, z)
        fresh.append(Noise(precision.rsqrt_(z), square))
    return fresh, [*fresh] if antithetic else nothing


def around(
    blocks: Sequence[Block], locs: Sequence[Tensor], noise: Sequence[Noise] | None
) -> list[Weights]:
    """The sampled weights of each block; the means themselves where there is no noise."""
    if noise is None:
        return [block.unpack(loc.clone()) for block, loc in zip(blocks, locs, strict=True)]
    parts = zip(noise, blocks, locs, strict=True)
    return [one.around(block, loc) for one, block, loc in parts]


def is_sensed(spec: Curvature, block: Block) -> bool:
    """Whether a block's curvature is known from the gradients at its samples alone."""
    return block.is_opaque or spec.kind == "noise"


def is_due(spec: Curvature, step: int, block: Block, carried: Carried) -> bool:
    """Whether `step` takes an estimate of a block."""
    if is_sensed(spec, block) and (spec.every == "auto" or spec.kind == "noise"):
        return carried.running is None  # every step has one, by itself
    if carried.running is not None and carried.running.count == 0 and not block.is_opaque:
        return True  # it has had no part in any run yet
    return spec.is_due(step, carried.clock)


def observe(
    spec: Curvature, step: int, blocks: Sequence[Block], carried: Sequence[Carried],
    terms: Sequence[Observation], calls: Sequence[Call], rows: int, share: float,
    priors: Sequence[BlockPrior], numbers: Sequence[Numbers], part: Part = ALONE,
) -> list[Carried]:
    """Average one more estimate of the curvature of the blocks that are due in; `share` is B/N.

    The initial curvature fades in all blocks, due or not; see `fading`. A block that has no part in
    this run keeps its curvature, none at first. Of several samples in a step each is a `part`.
    """
    now = [n for n, (block, one) in enumerate(zip(blocks, carried, strict=True))
           if is_due(spec, step, block, one) and not is_sensed(spec, block)
           and estimator.has_part(spec, block, calls)]
    found = [] if not now else estimator.observe(
        spec, step, [blocks[n] for n in now], [carried[n].running for n in now],
        [carried[n].clock for n in now], terms, calls, rows, [priors[n].units for n in now], part,
    )
    fresh = [
        one if n in now else started(spec, block, one, prior)
        for n, (block, one, prior) in enumerate(zip(blocks, carried, priors, strict=True))
    ]
    for number, (running, clock) in zip(now, found, strict=True):
        fresh[number] = replace(carried[number], running=running, clock=clock)
    return faded(spec, step, fresh, share, priors, numbers)


def faded(
    spec: Curvature, step: int, carried: Sequence[Carried], share: float,
    priors: Sequence[BlockPrior], numbers: Sequence[Numbers],
) -> list[Carried]:
    """Metrics with the initial curvature as faint as it is at `step`.

    A block whose prior has new units keeps its metric until its next estimate.
    """
    faint = fading(spec, step, share)
    return [
        replace(one, metric=metric(
            one.seen.semidefinite(spec.kind), faint, prior, number.ratio, number.damping
        )) if one.seen.is_in(prior.units) else one
        for one, prior, number in zip(carried, priors, numbers, strict=True)
    ]


def fading(spec: Curvature, step: int, share: float) -> float:
    """e = initial · (1 - ρ)^step with ρ = B/N, the `share`, but within [0.01, 0.05].

    It bridges the first hundreds of steps, in which the network changes faster than the average
    follows: with plenty of data an epoch would be far too long for that. An average that starts
    from it ("noise") needs no bridge.
    """
    if spec.kind == "noise":
        return 0.0
    return spec.initial * (1 - min(0.05, max(0.01, share))) ** step


def started(spec: Curvature, block: Block, carried: Carried, prior: BlockPrior) -> Carried:
    """With a curvature to start from, before any estimate."""
    if spec.kind == "noise" and block.kind != "diag":
        raise ValueError(f"curvature='noise' wants structure='diag', {block.name} is {block.label}")
    if carried.running is not None:
        return carried
    if not is_sensed(spec, block):
        roots = None if prior.units is None else prior.units.roots
        return replace(carried, running=estimator.nothing(block, prior.packed.precision, roots))
    start = spec.initial if spec.kind == "noise" else 0.0
    curvature = Diagonal(prior.packed.precision.new_full((block.size,), start))
    return replace(carried, running=Running(0, curvature))


def sense(
    spec: Curvature, step: int, carried: Sequence[Carried], estimates: Sequence[Tensor | None],
    share: float, priors: Sequence[BlockPrior], numbers: Sequence[Numbers],
) -> list[Carried]:
    """The curvature of some blocks from the step's own samples; `estimates` are means of Λ ε ∘ g.

    Every step counts, each as much less as an estimate every `spec.every` steps would count.
    """
    every = spec.every if isinstance(spec.every, int) else 20
    faint, result = fading(spec, step, share), list(carried)
    for place, (one, estimate) in enumerate(zip(carried, estimates, strict=True)):
        if estimate is None:
            continue
        assert one.running is not None
        prior, number = priors[place], numbers[place]
        curvature = noisy_curvature(
            one.running.curvature, estimate, (1 - spec.decay) / every, prior.packed, number.ratio
        )
        running = Running(one.running.count + 1, curvature)
        moved = metric(curvature, faint, prior, number.ratio, number.damping)
        result[place] = replace(one, running=running, metric=moved)
    return result


@torch.no_grad()
def divergence(
    blocks: Sequence[Block], sample: Sequence[Weights], noise: Sequence[Noise] | None,
    precisions: Sequence[Structure], priors: Sequence[BlockPrior],
) -> Tensor:
    """log q - log p of the sampled weights; without noise, the KL at the mean. In nats."""
    parts = [*zip(blocks, sample, precisions, priors, strict=True)]
    if noise is None:
        terms = [kl(block.pack(w), precision, prior.packed) for block, w, precision, prior in parts]
        return torch.stack(terms).sum()
    distances = [_distance(block, w, prior.packed) for block, w, _, prior in parts]
    squares = [one.square for one in noise]
    return surplus(distances, squares, precisions, [prior.packed for prior in priors])


def _distance(block: Block, weights: Weights, prior: Prior) -> Tensor:
    """Σ δ (w - M₀)²; packed only where the prior is not the same for all."""
    if prior.precision.dim() or prior.loc.dim():
        return prior.distance(block.pack(weights))
    return functools.reduce(
        torch.add, (prior.distance(weights[name].flatten()) for name in block.tensors)
    )


def propose(
    state: State, blocks: Sequence[Block], locs: Sequence[Tensor], gradients: list[Weights],
    priors: Sequence[BlockPrior], loss: Tensor, others: Sequence[Tensor | None],
    numbers: Sequence[Numbers], average: bool,
) -> Proposal:
    """The step from the gradients per datum, of which `gradients` lets go as they are used.

    `others` are gradients that must be finite too.

    Raises FloatingPointError when the loss or a gradient is not finite.
    """
    stepped, directions = [], []
    for one, block, loc, prior, number in zip(
        state.blocks, blocks, locs, priors, numbers, strict=True
    ):
        bias = number.unbiased(state.step)
        momentum = push(block, one.momentum, gradients.pop(0), number.momentum)
        h = slope(momentum, loc, prior.packed, number.ratio, bias)
        directions.append(one.known.preconditioner.solution(h))
        stepped.append(replace(one, momentum=momentum))
    value, *dots = _finite([loss, *(one.dot for one in directions)], others, state.step)
    power = sum(
        dot * (number.base_lr / number.unbiased(state.step)) ** 2
        for dot, number in zip(dots, numbers, strict=True)
    )
    rates = [
        number.lr * trust(power, number.kl_clip) / number.unbiased(state.step)
        for number in numbers
    ]
    for one, number in zip(stepped, numbers, strict=True):
        calm(one.momentum, power, number.kl_clip)  # type: ignore[arg-type]  # each has been pushed
    if average:
        stepped = [
            _averaged(one, direction.add_to(loc.clone(), -rate), state.step)
            for one, loc, direction, rate in zip(stepped, locs, directions, rates, strict=True)
        ]
    return Proposal(value, rates, directions, State(state.step + 1, tuple(stepped)))


def push(block: Block, momentum: Tensor | None, gradient: Weights, beta: float) -> Tensor:
    """The momentum m [P] with one more gradient in it; 0 was before the first."""
    if momentum is None:
        return (1 - beta) * block.pack(gradient)
    return block.lerp(momentum, gradient, 1 - beta)


def average_weight(step: int) -> float:
    """4 / (t + 4): of the iterate after step t in the running average."""
    return 4 / (step + 4)


def _averaged(one: Carried, loc: Tensor, step: int) -> Carried:
    precision = one.known.precision
    if one.average is not None:
        precision = one.average.lerp(precision, average_weight(step))
    return replace(one, iterate=loc, average=precision)


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
