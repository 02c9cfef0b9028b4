"""The step of a Gaussian over the layers of a network, block by block.

Every sample's run gives gradients and, when they are due, estimates of the curvature; of their
means `pyrocurv.engine` makes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyrocurv import engine
from pyrocurv.blocks import Block
from pyrocurv.curvature import Curvature
from pyrocurv.curvature.estimator import Part
from pyrocurv.engine import Numbers, Proposal, Weights
from pyrocurv.families import Family
from pyrocurv.infer.heat import Heat
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.rest import Others
from pyrocurv.infer.run import Runner
from pyrocurv.infer.sample import Sample, Slopes, look, observed, slopes
from pyrocurv.priors import BlockPrior
from pyrocurv.state import State


@dataclass(frozen=True, eq=False)
class Settings:
    """Of a step; `group` is the optimizer's, with the numbers that a scheduler may turn."""

    curvature: Curvature
    group: Mapping[str, Any]
    temperature: Heat
    samples: int
    antithetic: bool
    average: bool

    def numbers(self, sample: Sample, blocks: int) -> list[Numbers]:
        """The same for all blocks."""
        return [Numbers.of(self.group, sample.run.num_data, sample.temperature)] * blocks


@dataclass(frozen=True, eq=False)
class Seen:
    """What the runs of the model in a step gave."""

    loss: Tensor
    gradients: list[Weights]
    others: Others
    numbers: Sequence[Numbers]
    priors: Sequence[BlockPrior]
    state: State  # with the new curvature and the next noise


def see(
    state: State, locs: Sequence[Tensor], settings: Settings, runner: Runner, known: KnownPriors
) -> Seen:
    """Run the model at samples around `locs`, and take from the graphs all that is wanted."""
    families, spec, count = runner.guide.blocks, settings.curvature, max(1, settings.samples)
    blocks, carried = [family.block for family in families], list(state.blocks)
    pairs = [*zip(blocks, carried, strict=True)]
    due = any(engine.is_due(spec, state.step, block, one) for block, one in pairs)
    precisions = [one.metric.precision if one.metric else None for one in carried]
    held = [q or family.precision() for q, family in zip(precisions, families, strict=True)]
    noises = [one.noise for one in carried]
    loss, total = locs[0].new_zeros(()), Slopes([], [], [])
    for number in range(count):
        noise = None
        if settings.samples:
            noise, noises = engine.draw(precisions, noises, locs[0], settings.antithetic)
        weights = engine.around(blocks, locs, noise)
        wanted = spec if due else None
        sample = look(runner, weights, noise, settings.temperature, known, wanted)
        numbers = settings.numbers(sample, len(blocks))
        if due:
            part = Part(number, count)
            carried = observed(spec, state.step, blocks, carried, sample, numbers, part)
        found = slopes(spec, blocks, held, sample, count)
        total = total.plus(found) if number else found
        loss = loss + sample.energy.detach() + sample.divergence(blocks, held)
    if not due and spec.fades(state.step):
        carried = engine.faded(spec, state.step, carried, sample.share, sample.priors, numbers)
    carried = engine.sense(
        spec, state.step, carried, total.curvature, sample.share, sample.priors, numbers
    )
    carried = [replace(one, noise=n) for one, n in zip(carried, noises, strict=True)]
    return Seen(
        loss / count, total.weights, sample.run.others(total.others), numbers, sample.priors,
        replace(state, blocks=tuple(carried)),
    )


@dataclass(frozen=True, eq=False)
class Step:
    """A step that is ready to be made."""

    proposal: Proposal
    others: Others
    before: State
    average: bool
    num_data: float

    @property
    def loss(self) -> float:
        """Before the step."""
        return self.proposal.loss

    @property
    def state(self) -> State:
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
                if new.iterate is not None:
                    loc = loc.lerp(new.iterate, engine.average_weight(self.before.step))
                if new.iterate is not None or precision is not None:
                    family.write(loc, precision)

        return write


def propose(state: State, settings: Settings, runner: Runner, known: KnownPriors) -> Step:
    """Look at S samples, or at the mean, and step."""
    locs = [
        family.raw_loc.detach() if one.iterate is None else one.iterate
        for family, one in zip(runner.guide.blocks, state.blocks, strict=True)
    ]
    seen = see(state, locs, settings, runner, known)
    blocks = [family.block for family in runner.guide.blocks]
    proposal = engine.propose(
        seen.state, blocks, locs, seen.gradients, seen.priors, seen.loss, seen.others.gradients,
        seen.numbers, settings.average,
    )
    num_data = seen.numbers[0].num_data
    return Step(proposal, seen.others, state, settings.average, num_data)


def check_samples(spec: Curvature, blocks: Sequence[Block], samples: int) -> None:
    """Raises ValueError where there are none, and the curvature of a block needs them."""
    blind = [block.name for block in blocks if engine.is_sensed(spec, block)]
    if blind and not samples:
        raise ValueError(
            f"num_particles=0, but the curvature of {', '.join(blind)} is known from samples "
            'alone: leave them out (structure={...: "point"}) or take another curvature'
        )
