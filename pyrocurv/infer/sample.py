"""The model at one sample of a guide's weights, and what a step takes from its graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv import engine
from pyrocurv.blocks import Block
from pyrocurv.curvature import Curvature
from pyrocurv.curvature.estimator import Part
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.engine import Numbers, Weights
from pyrocurv.infer.heat import Heat
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.run import Run, Runner, leaves
from pyrocurv.priors import BlockPrior
from pyrocurv.state import Carried, Noise
from pyrocurv.structures import Structure


@dataclass(frozen=True, eq=False)
class Sample:
    """A run at sampled weights, `noise` off the mean; at the mean itself it is None."""

    weights: Sequence[Weights]
    noise: Sequence[Noise] | None
    run: Run
    temperature: float
    priors: Sequence[BlockPrior]
    energy: Tensor

    @property
    def share(self) -> float:
        """B/N."""
        return self.run.batch / self.run.num_data

    def divergence(self, blocks: Sequence[Block], precisions: Sequence[Structure]) -> Tensor:
        """T times that of the guide from the priors, in nats."""
        return self.temperature * engine.divergence(
            blocks, self.weights, self.noise, precisions, self.priors
        )


def look(
    runner: Runner, weights: Sequence[Weights], noise: Sequence[Noise] | None, heat: Heat,
    known: KnownPriors, wanted: Curvature | None,
) -> Sample:
    """Run the model there, its ops watched where a curvature is `wanted` of it."""
    twice = wanted is not None and wanted.kind == "hessian"
    with runner.network(), twice_differentiable() if twice else nullcontext():
        run = runner(leaves(weights), wanted is not None)
    temperature = heat(run)
    return Sample(weights, noise, run, temperature, known.read(run), run.energy(temperature))


def observed(
    spec: Curvature, step: int, blocks: Sequence[Block], carried: Sequence[Carried],
    sample: Sample, numbers: Sequence[Numbers], part: Part,
) -> list[Carried]:
    """The carried states with the curvature of this run, which was watched, averaged in."""
    if not bool(torch.isfinite(sample.energy)):
        raise FloatingPointError(f"step {step}: the loss is {sample.energy.item()}")
    run = sample.run
    assert run.capture is not None
    run.check_apart(spec.kind)
    return engine.observe(
        spec, step, blocks, carried, run.observations, run.capture.calls, run.main.rows,
        sample.share, sample.priors, numbers, part,
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
            if engine.is_sensed(spec, block) else None
            for block, precision, noise, g in parts
        ]
    return Slopes(apart, found[len(weights):], curvature)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
