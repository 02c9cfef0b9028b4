"""The step of a Gaussian over the layers of a network, block by block.

Every sample's run gives gradients and, when they are due, estimates of the curvature; of their
means `pyrocurv.engine` makes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.running_average import Particle
from pyrocurv.guides.families import Family
from pyrocurv.infer.heat import TemperatureRule
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.model_run import BatchModel, ModelRun, require_grad
from pyrocurv.infer.rest import AuxiliaryParameters
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.sampling import (
    Perturbation,
    Weights,
    estimate_kl,
    perturbed_weights,
    sample_perturbations,
)
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import (
    Proposal,
    average_weight,
    compute_update,
    is_due,
    refresh_precision,
    update_curvature,
    update_from_sample_gradients,
    uses_sample_gradients,
)
from pyrocurv.structures import Structure


@dataclass(frozen=True, eq=False)
class Settings:
    """Of a step; `group` is the optimizer's, with the numbers that a scheduler may turn."""

    curvature: Curvature
    group: Mapping[str, Any]
    temperature: TemperatureRule
    samples: int
    antithetic: bool
    average: bool

    def numbers(self, sample: Sample, blocks: int) -> list[Hyperparameters]:
        """The same for all blocks."""
        return [Hyperparameters.of(self.group, sample.run.num_data, sample.temperature)] * blocks


@dataclass(frozen=True, eq=False)
class BlockStatistics:
    """What the runs of the model in a step gave."""

    loss: Tensor
    gradients: list[Weights]
    others: AuxiliaryParameters
    numbers: Sequence[Hyperparameters]
    priors: Sequence[BlockPrior]
    state: Posterior  # with the new curvature and the next noise


def see(
    state: Posterior, locs: Sequence[Tensor], settings: Settings, runner: BatchModel,
    known: KnownPriors
) -> BlockStatistics:
    """Run the model at samples around `locs`, and take from the graphs all that is wanted."""
    families, spec, count = runner.guide.blocks, settings.curvature, max(1, settings.samples)
    blocks, carried = [family.block for family in families], list(state.blocks)
    pairs = [*zip(blocks, carried, strict=True)]
    due = any(is_due(spec, state.step, block, one) for block, one in pairs)
    precisions = [one.metric.precision if one.metric else None for one in carried]
    held = [q or family.precision() for q, family in zip(precisions, families, strict=True)]
    noises = [one.noise for one in carried]
    loss, total = locs[0].new_zeros(()), Slopes([], [], [])
    for number in range(count):
        noise = None
        if settings.samples:
            noise, noises = sample_perturbations(precisions, noises, locs[0], settings.antithetic)
        weights = perturbed_weights(blocks, locs, noise)
        wanted = spec if due else None
        sample = look(runner, weights, noise, settings.temperature, known, wanted)
        numbers = settings.numbers(sample, len(blocks))
        if due:
            part = Particle(number, count)
            carried = observed(spec, state.step, blocks, carried, sample, numbers, part)
        found = slopes(spec, blocks, held, sample, count)
        total = total.plus(found) if number else found
        loss = loss + sample.energy.detach() + sample.divergence(blocks, held)
    if not due and spec.decays_at(state.step):
        carried = refresh_precision(
            spec, state.step, carried, sample.batch_fraction, sample.priors, numbers
        )
    carried = update_from_sample_gradients(
        spec, state.step, carried, total.curvature, sample.batch_fraction, sample.priors, numbers
    )
    carried = [replace(one, noise=n) for one, n in zip(carried, noises, strict=True)]
    return BlockStatistics(
        loss / count, total.weights, sample.run.others(total.others), numbers, sample.priors,
        replace(state, blocks=tuple(carried)),
    )


@dataclass(frozen=True, eq=False)
class Step:
    """A step that is ready to be made."""

    proposal: Proposal
    others: AuxiliaryParameters
    before: Posterior
    average: bool
    num_data: float

    @property
    def loss(self) -> float:
        """Before the step."""
        return self.proposal.loss

    @property
    def state(self) -> Posterior:
        """After it."""
        return self.proposal.state

    def writer(self, families: Sequence[Family]) -> Callable[[], None]:
        """What puts it into the guide; all that may fail is done before."""
        parts = [*zip(families, self.before.blocks, self.state.blocks, strict=True)]
        encoded = [
            family.encode(new.average or new.known.precision)
            if self.average or new.metric is not old.metric else None
            for family, old, new in parts
        ]

        def write() -> None:
            if not self.average:
                self.proposal.move([family.raw_loc for family in families])
            for (family, _, new), precision in zip(parts, encoded, strict=True):
                loc = family.raw_loc
                if new.mean is not None:
                    loc = loc.lerp(new.mean, average_weight(self.before.step))
                if new.mean is not None or precision is not None:
                    family.write(loc, precision)

        return write


def propose(state: Posterior, settings: Settings, runner: BatchModel, known: KnownPriors) -> Step:
    """Look at S samples, or at the mean, and step."""
    locs = [
        family.raw_loc.detach() if one.mean is None else one.mean
        for family, one in zip(runner.guide.blocks, state.blocks, strict=True)
    ]
    seen = see(state, locs, settings, runner, known)
    blocks = [family.block for family in runner.guide.blocks]
    proposal = compute_update(
        seen.state, blocks, locs, seen.gradients, seen.priors, seen.loss, seen.others.gradients,
        seen.numbers, settings.average,
    )
    num_data = seen.numbers[0].num_data
    return Step(proposal, seen.others, state, settings.average, num_data)


def check_samples(spec: Curvature, blocks: Sequence[Block], samples: int) -> None:
    """Raises ValueError where there are none, and the curvature of a block needs them."""
    blind = [block.name for block in blocks if uses_sample_gradients(spec, block)]
    if blind and not samples:
        raise ValueError(
            f"num_particles=0, but the curvature of {', '.join(blind)} is known from samples "
            'alone: leave them out (structure={...: "point"}) or take another curvature'
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """A run at sampled weights, `noise` off the mean; at the mean itself it is None."""

    weights: Sequence[Weights]
    noise: Sequence[Perturbation] | None
    run: ModelRun
    temperature: float
    priors: Sequence[BlockPrior]
    energy: Tensor

    @property
    def batch_fraction(self) -> float:
        """B/N."""
        return self.run.batch / self.run.num_data

    def divergence(self, blocks: Sequence[Block], precisions: Sequence[Structure]) -> Tensor:
        """T times that of the guide from the priors, in nats."""
        return self.temperature * estimate_kl(
            blocks, self.weights, self.noise, precisions, self.priors
        )


def look(
    runner: BatchModel, weights: Sequence[Weights], noise: Sequence[
        Perturbation
    ] | None, heat: TemperatureRule,
    known: KnownPriors, wanted: Curvature | None,
) -> Sample:
    """Run the model there, its ops watched where a curvature is `wanted` of it."""
    twice = wanted is not None and wanted.kind == "hessian"
    with runner.network(), twice_differentiable() if twice else nullcontext():
        run = runner(require_grad(weights), wanted is not None)
    temperature = heat(run)
    return Sample(weights, noise, run, temperature, known.read(run), run.energy(temperature))


def observed(
    spec: Curvature, step: int, blocks: Sequence[Block], carried: Sequence[BlockState],
    sample: Sample, numbers: Sequence[Hyperparameters], part: Particle,
) -> list[BlockState]:
    """The carried states with the curvature of this run, which was watched, averaged in."""
    if not bool(torch.isfinite(sample.energy)):
        raise FloatingPointError(f"step {step}: the loss is {sample.energy.item()}")
    run = sample.run
    assert run.capture is not None
    run.check_apart(spec.kind)
    return update_curvature(
        spec, step, blocks, carried, run.observations, run.capture.trace().calls,
        run.primary_likelihood.rows,
        sample.batch_fraction, sample.priors, numbers, part,
    )


@dataclass(frozen=True, eq=False)
class Slopes:
    """Gradients of the energy per datum, and estimates of the curvature that are made of them."""

    weights: list[Weights]  # of each block
    others: Sequence[Tensor | None]  # of the run's `params`
    curvature: Sequence[Tensor | None]  # of blocks that have no other estimate

    def plus(self, more: Slopes) -> Slopes:
        """The sums over samples."""
        others = self.others or [None] * len(more.others)
        return Slopes(
            [{name: a[name] + b[name] for name in a}
             for a, b in zip(self.weights, more.weights, strict=True)],
            [*map(_sum, others, more.others)], [*map(_sum, self.curvature, more.curvature)],
        )


def slopes(
    spec: Curvature, blocks: Sequence[Block], precisions: Sequence[Structure], sample: Sample,
    count: int,
) -> Slopes:
    """What one of `count` samples adds to the means; its graph is used up."""
    run = sample.run
    found = torch.autograd.grad(
        sample.energy / (run.num_data * count), [*run.weights.values(), *run.params],
        allow_unused=True,
    )
    pairs = zip(run.weights.items(), found, strict=False)
    weights = {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}
    apart: list[Weights] = [{name: weights[name] for name in block.tensors} for block in blocks]
    curvature: list[Tensor | None] = [None] * len(blocks)
    if sample.noise is not None:
        parts = zip(blocks, precisions, sample.noise, apart, strict=True)
        curvature = [
            precision.diag() * noise.epsilon * block.pack(g)
            if uses_sample_gradients(spec, block) else None
            for block, precision, noise, g in parts
        ]
    return Slopes(apart, found[len(weights):], curvature)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
