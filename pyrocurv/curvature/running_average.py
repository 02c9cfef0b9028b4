"""The running average of a block's curvature over a training run.

A block's state is a frozen value; `update` gives the next one and leaves the old as it was, so a
step that fails has changed nothing. All structures here are per datum: a mean over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrocurv.curvature import hessian, layer_statistics
from pyrocurv.curvature.collect import (
    ForwardPass,
    check_batch,
    collect_statistics,
    unmasked_examples,
)
from pyrocurv.curvature.hessian import BlockStatistics, HessianStatistics
from pyrocurv.curvature.spec import Curvature
from pyrocurv.curvature.truncated_factor import TruncatedFactor, mean_squares, product
from pyrocurv.curvature.update_interval import UpdateInterval, tick
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_spec import EKFAC, KroneckerSpec
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import serializable

BASIS_WARMUP = (1, 2, 4, 8, 16)  # estimates that have an eigendecomposition whatever the interval


@serializable
@dataclass(frozen=True, eq=False)
class RunningCurvature:
    """The curvature of a block after `count` estimates, with what the next average is formed from.

    `count` 0 is a block without an estimate: its curvature is zero, and the first estimate replaces
    it. Kronecker blocks average their factors; where a side is truncated, `truncated_factors` are
    averaged instead. `curvature` and `truncated_factors` are scaled by the prior of the last
    estimate, `scaling`. `interval` is used where the curvature has `every="auto"`.

    Hessians are averaged as they are, and the average may be indefinite; `semidefinite` is the
    nearest matrix that can be part of a precision. Noise of either sign cancels in the average
    before it is projected. A correction that keeps each estimate positive would add the variance of
    the noise instead, and is not known for factors.
    """

    count: int
    curvature: Structure
    interval: UpdateInterval = UpdateInterval()
    factors: Kronecker | None = None
    truncated_factors: tuple[TruncatedFactor, TruncatedFactor] | None = None  # output and input
    scaling: KroneckerScaling | None = None

    def semidefinite(self, kind: str) -> Structure:
        """The curvature of this kind, positive semi-definite."""
        return self.curvature.psd() if kind == "hessian" else self.curvature

    def is_in(self, scaling: KroneckerScaling | None) -> bool:
        """Whether `curvature` is scaled by the same roots."""
        return _same(_roots(self.scaling), _roots(scaling))


class DueBlock(NamedTuple):
    """A block that takes an estimate now, its average so far, and the scaling of its prior."""

    block: Block
    average: RunningCurvature
    scaling: KroneckerScaling | None


@dataclass(frozen=True)
class Particle:
    """Sample number `index` of the `of` samples whose curvatures a step averages."""

    index: int = 0
    of: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the step's estimate is complete with it."""
        return self.index == self.of - 1

    def count(self, average: RunningCurvature) -> int:
        """The number of the estimate that is being formed, from 1."""
        return average.count + (self.index == 0) if average.count else 1

    def weight(self, average: RunningCurvature, decay: float) -> float:
        """The weight of this sample: those of a step have equal ones, max(1 - decay, 1/count) in
        all.

        It is 1 for the first sample that a block is estimated from, be it a later one of a step.
        """
        if average.count == 0:
            return 1.0
        whole = max(1 - decay, 1 / self.count(average))
        return whole / (self.of - (self.of - 1 - self.index) * whole)


SINGLE_PARTICLE = Particle()


def update_curvature(
    spec: Curvature, step: int, due: Sequence[DueBlock], forward: ForwardPass,
    particle: Particle = SINGLE_PARTICLE,
) -> list[RunningCurvature]:
    """The averages of the blocks that are due with one more estimate, in their order.

    No gradient is taken onto the ops of other layers. The eigenbasis of a Kronecker block is that
    of its scaled factors; when the scaling changes, the eigenvalues of EK-FAC are carried over.

    Raises:
        ValueError: a layer that does not read the batch as its first axis, or a first estimate
            from a pass whose examples are all masked.
        FloatingPointError: a first estimate that is not finite.
    """
    if not due:
        return []
    count = forward.rows if spec.batch is None else min(spec.batch, forward.rows)
    layers = {layer for block, *_ in due for layer in block.layers}
    calls = [call for call in forward.calls if call.layer in layers]
    check_batch(calls, forward.rows)
    kept = unmasked_examples(forward.terms, count)
    if kept is not None and len(kept) == 0:
        if any(average.count == 0 for _, average, _ in due):
            raise ValueError("the mask leaves no example to take the first curvature from")
        return [average for _, average, _ in due]
    blocks = [block for block, *_ in due]
    statistics = collect_statistics(spec, blocks, forward.terms, calls, count, kept)
    with torch.no_grad():
        return [
            _estimate(spec, step, one, seen, count, particle)
            for one, seen in zip(due, statistics, strict=True)
        ]


def _estimate(
    spec: Curvature, step: int, due: DueBlock, seen: BlockStatistics, rows: int, particle: Particle
) -> RunningCurvature:
    """The average of one block with its estimate, and with its next interval."""
    block, average, scaling = due
    refresh = particle.is_last and (
        particle.count(average) in BASIS_WARMUP or spec.is_basis_due(step, average.interval)
    )
    new = update(average, block, seen, rows, spec.decay, refresh, scaling, particle)
    if spec.every != "auto" or not particle.is_last:
        return new
    if new is average:
        return replace(new, interval=average.interval.postponed(step))
    pairs = seen.pairs if isinstance(seen, HessianStatistics) else seen
    return replace(new, interval=tick(average.interval, step, pairs))


def has_statistics(spec: Curvature, block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether an estimate of a block can be taken from these calls of its layers."""
    called = {call.layer for call in calls}
    parts = [layer in called for layer in block.layers]
    return all(parts) if spec.kind == "hessian" else any(parts)


def zero_curvature(
    block: Block, like: Tensor, scaling: KroneckerScaling | None
) -> RunningCurvature:
    """The average before any estimate: zero, of the dtype and on the device of `like`."""
    if block.kind == "diag":
        return RunningCurvature(0, Diagonal(like.new_zeros(block.size)))
    if not block.structure.is_kronecker:
        return RunningCurvature(0, Dense(like.new_zeros(block.size, block.size)))
    *groups, outputs, inputs = block.layers[0].matrix_shape
    sides = [*zip((outputs, inputs), block.ranks, strict=True)]
    output_basis, input_basis = (
        torch.eye(size, rank, dtype=like.dtype, device=like.device).expand(*groups, size, rank)
        for size, rank in sides
    )
    spectrum = like.new_zeros(*groups, *(rank + (rank < size) for size, rank in sides))
    return RunningCurvature(0, KroneckerEigen(output_basis, input_basis, spectrum), scaling=scaling)


def update(
    average: RunningCurvature, block: Block, seen: BlockStatistics, rows: int, decay: float,
    refresh: bool, scaling: KroneckerScaling | None = None, particle: Particle = SINGLE_PARTICLE,
) -> RunningCurvature:
    """Average one more estimate in, from `rows` data, with weight max(1 - decay, 1/count).

    That is the weight of all samples of a step, of which this may be one `particle`.

    `refresh` asks for new eigenvectors of Kronecker factors. Sides that are truncated by `rank` are
    kept as their leading part, and have new eigenvectors at every estimate. An estimate that is not
    finite is left out, with a warning.
    """
    weight, first = particle.weight(average, decay), average.count == 0
    if _is_thin(block, seen):
        return _thin(average, block, seen, rows, scaling, particle.count(average), weight)
    new = hessian.assemble(block, seen).scale(1 / rows)
    if not bool(torch.isfinite(new.trace())):
        return _left_out(average)
    result = replace(average, count=particle.count(average), truncated_factors=None)
    if not isinstance(new, Kronecker):
        return replace(result, curvature=new if first else average.curvature.lerp(new, weight))
    factors = new if average.factors is None else average.factors.lerp(new, weight)
    if first or refresh or not average.is_in(scaling):
        curvature = _eigen(block, factors, scaling, average)
    else:
        curvature = average.curvature  # type: ignore[assignment]  # and a KroneckerEigen
    if isinstance(block.structure, EKFAC):
        moment = hessian.eigen(seen, curvature, _roots(scaling)).scale(1 / rows)
        curvature = moment if first else average.curvature.lerp(moment, weight)  # type: ignore[assignment]  # the same
    return replace(result, curvature=curvature, factors=factors, scaling=scaling)


def _left_out(average: RunningCurvature) -> RunningCurvature:
    if average.count == 0:
        raise FloatingPointError("the first curvature estimate is not finite")
    warnings.warn("a curvature estimate is not finite: the last one stays", stacklevel=3)
    return average


def _is_thin(block: Block, seen: BlockStatistics) -> bool:
    """Whether leading parts of the factors are kept up from rows, without the factors."""
    spec, (layer, *_) = block.structure, block.layers
    if not isinstance(spec, KroneckerSpec) or spec.cuts != (1, 1) or layer.lead:
        return False
    uses = hessian.pairs(seen)[0]
    if len(uses) > 1 or len(uses[0].a) > 1:  # used transposed too
        return False
    return block.ranks != layer.matrix_shape


def _thin(
    average: RunningCurvature, block: Block, seen: BlockStatistics, rows: int,
    scaling: KroneckerScaling | None, count: int, weight: float,
) -> RunningCurvature:
    """`update` of a layer with a truncated side; G is averaged over positions, A summed."""
    roots = _roots(scaling)
    ((pair,),) = layer_statistics.whiten(hessian.pairs(seen), roots)
    shared = layer_statistics.apply_weight_sharing(pair, block.kronecker.sharing)
    a, g = shared.a[0], shared.g.flatten(0, 1)  # [B, S, I], [K·B, S, O]
    matrix = seen.output(roots) / rows if isinstance(seen, HessianStatistics) else None
    if not bool(torch.isfinite(a.sum() + (g if matrix is None else matrix).sum())):
        return _left_out(average)
    if average.truncated_factors is None:
        output, input = (
            TruncatedFactor.zeros(x, n) for x, n in zip((g, a), block.ranks, strict=True)
        )
    else:
        output, input = _rescaled(average.truncated_factors, _roots(average.scaling), roots)
    try:
        if matrix is None:
            output = output.average(g, 1 / (rows * a.shape[1]), weight)
        else:
            output = output.average_matrix(matrix, weight)
        input = input.average(a, 1 / len(a), weight)  # masks may have left fewer than `rows`
    except torch.linalg.LinAlgError as error:
        if average.count == 0:
            raise
        warnings.warn(f"the curvature stays as it is: {error}", stacklevel=3)
        return average
    curvature = product(output, input)
    if isinstance(block.structure, EKFAC):
        if isinstance(seen, HessianStatistics):
            moment = seen.eigen(curvature, roots).scale(1 / rows)
        else:
            moment = mean_squares(pair.a[0], pair.g, curvature).scale(1 / rows)
        curvature = moment if average.count == 0 else average.curvature.lerp(moment, weight)  # type: ignore[assignment]  # the same
    return RunningCurvature(
        count, curvature, average.interval, None, (output, input), scaling
    )


def _rescaled(
    factors: tuple[TruncatedFactor, TruncatedFactor],
    old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor] | None,
) -> tuple[TruncatedFactor, TruncatedFactor]:
    """The factors of the output and the input, from one scaling to another."""
    if _same(new, old):
        return factors
    output, input = factors
    old = old or (torch.ones_like(output.diagonal), torch.ones_like(input.diagonal))
    new = new or (torch.ones_like(old[0]), torch.ones_like(old[1]))
    return output.rescaled(old[0] / new[0]), input.rescaled(old[1] / new[1])


def _eigen(
    block: Block, factors: Kronecker, scaling: KroneckerScaling | None, average: RunningCurvature
) -> KroneckerEigen:
    roots = _roots(scaling)
    try:
        factors = factors if roots is None else factors.rescaled(*roots)
        return factors.eigen(block.ranks, block.kronecker.cuts).psd()
    except torch.linalg.LinAlgError as error:
        if average.count == 0 or not average.is_in(scaling):
            raise
        warnings.warn(f"the eigenvectors stay as they are: {error}", stacklevel=3)
        return average.curvature  # type: ignore[return-value]  # a KroneckerEigen


def _roots(scaling: KroneckerScaling | None) -> tuple[Tensor, Tensor] | None:
    return None if scaling is None else scaling.roots


def _same(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
