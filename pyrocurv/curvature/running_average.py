"""The running average of a block's curvature over a training run.

The state of a block is a frozen value: `update` returns the next one and does not change the last,
so a step that fails has no effect. All structures here are a mean over examples.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics, ForwardPass, assemble, collect
from pyrocurv.curvature.layer_statistics import GradientStatistics, LayerStatistics
from pyrocurv.curvature.particle import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.pooled_statistics import (
    eigenvalues,
    is_truncated,
    no_statistics,
    pool,
)
from pyrocurv.curvature.running_curvature import (
    DueBlock,
    RunningCurvature,
    average,
    roots_of,
    without_estimate,
)
from pyrocurv.curvature.spec import Curvature
from pyrocurv.curvature.truncated_average import update_truncated
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Kronecker, KroneckerEigen
from pyrocurv.structures.eigenbases import Factors, eigenbases
from pyrocurv.structures.rescaled import KroneckerScaling

BASIS_WARMUP = (1, 2, 4, 8, 16)  # estimates with an eigendecomposition at any interval
NO_EXAMPLE = "the mask leaves no example to compute the first curvature from"


def update_curvature(
    spec: Curvature, step: int, due: Sequence[DueBlock], forward: ForwardPass,
    particle: Particle = SINGLE_PARTICLE,
) -> list[RunningCurvature]:
    """The averages of the blocks that are due, in their order, with one more estimate.

    Raises:
        ValueError: a Hessian in layers whose rows are not the examples, or a first estimate
            from a batch in which all examples are masked.
        FloatingPointError: a first estimate that is not finite.
    """
    if not due:
        return []
    rows, statistics = _collect_all(spec, due, forward)
    if rows == 0:
        if any(average.count == 0 for _, average, _ in due):
            raise ValueError(NO_EXAMPLE)
        return [average for _, average, _ in due]
    with torch.no_grad():
        # `map` lets go of the statistics of a block before the next ones, if they are used up
        begin = partial(_begin, spec, step, rows, particle, forward.workers)
        return finish_updates([*map(begin, due, statistics)], rows, forward.workers)


def _collect_all(
    spec: Curvature, due: Sequence[DueBlock], forward: ForwardPass
) -> tuple[float, Iterable[BlockStatistics]]:
    """The statistics of each block, and the number of rows; 0 if a mask leaves no example.

    They are those of all workers, each of which takes its part of the examples of an estimate.
    """
    workers, blocks = forward.workers, [one.block for one in due]
    limit = forward.rows if spec.batch is None else math.ceil(spec.batch / workers.size)
    rows = min(limit, forward.rows)
    if workers.is_alone:
        count, statistics = collect(spec, blocks, forward, rows)
        return rows if count else 0, statistics
    like = due[0].average.curvature.diag()
    with workers.local_noise(like.device):
        count, found = collect(spec, blocks, forward, rows)
        local = [*found] if count else no_statistics(blocks, like)
        total, total_rows = workers.sums([*like.new_tensor([count, rows])])
        pooled = pool(blocks, local, workers) if total else ()
    return float(total_rows) if total else 0, pooled


def is_basis_due(
    spec: Curvature, step: int, average: RunningCurvature, particle: Particle
) -> bool:
    """Whether an estimate has an eigendecomposition of Kronecker factors."""
    return particle.is_last and (
        particle.count(average) in BASIS_WARMUP or spec.is_basis_due(step, average.interval)
    )


def has_statistics(spec: Curvature, block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether an estimate of a block can be computed from these calls of its layers."""
    called = {call.layer for call in calls}
    layers = [layer in called for layer in block.layers]
    return all(layers) if spec.kind == "hessian" else any(layers)


def zero_curvature(
    block: Block, like: Tensor, scaling: KroneckerScaling | None
) -> RunningCurvature:
    """The average before any estimate, with the dtype and the device of `like`."""
    if not block.structure.is_kronecker:
        zeros = GradientStatistics([[LayerStatistics.zeros(x, like, 1)] for x in block.layers])
        return RunningCurvature(0, assemble(block.structure, zeros))
    *groups, outputs, inputs = block.layers[0].matrix_shape
    sides = [*zip((outputs, inputs), block.ranks, strict=True)]
    output_basis, input_basis = (
        torch.eye(size, rank, dtype=like.dtype, device=like.device).expand(*groups, size, rank)
        for size, rank in sides
    )
    spectrum = like.new_zeros(*groups, *(rank + (rank < size) for size, rank in sides))
    return RunningCurvature(0, KroneckerEigen(output_basis, input_basis, spectrum), scaling=scaling)


@dataclass(frozen=True, eq=False)
class UpdatedAverage:
    """The average of a block with one more estimate, as far as it does without new eigenvectors.

    `factors` are those of a block that wants them; `weight` and `statistics` are for the
    eigenvalues of a block that corrects them.
    """

    due: DueBlock
    average: RunningCurvature
    factors: Kronecker | None = None
    weight: float = 0.0
    statistics: BlockStatistics | None = None


def _begin(
    spec: Curvature, step: int, rows: float, particle: Particle, workers: Workers, due: DueBlock,
    statistics: BlockStatistics,
) -> UpdatedAverage:
    """One more estimate, a sum over `rows` examples of all workers, and the next interval.

    Truncated factors have new eigenvectors at every estimate. When the scaling changes, the
    eigenvalues of EK-FAC are kept. An estimate that is not finite is left out, with a warning.
    """
    old, refresh = due.average, is_basis_due(spec, step, due.average, particle)
    estimate = begin_update(due, statistics, rows, spec.decay, refresh, particle, workers)
    if spec.every != "auto" or not particle.is_last:
        return estimate
    if estimate.average is old:
        return replace(estimate, average=replace(old, interval=old.interval.postpone(step)))
    interval = old.interval.after_estimate(step, statistics.layers, workers)
    return replace(estimate, average=replace(estimate.average, interval=interval))


def begin_update(
    due: DueBlock, statistics: BlockStatistics, rows: float, decay: float, refresh: bool,
    particle: Particle = SINGLE_PARTICLE, workers: Workers = ALONE,
) -> UpdatedAverage:
    """The same without the interval; `refresh` asks for new eigenvectors of Kronecker factors."""
    block, old, scaling = due
    count, weight = particle.count(old), particle.weight(old, decay)
    positions = statistics.layers[0][0].a.shape[-2]
    new = replace(
        old, count=count, factors=None, truncated_factors=None, scaling=scaling,
        positions=positions,
    )
    if is_truncated(block, statistics):
        new = update_truncated(due, new, statistics, rows, weight, workers)
        return UpdatedAverage(due, new)
    value = assemble(block.structure, statistics).scale(1 / rows)
    if not bool(torch.isfinite(value.trace())):
        return UpdatedAverage(due, without_estimate(old))
    if not isinstance(value, Kronecker):
        return UpdatedAverage(due, replace(new, curvature=average(old.known, value, weight)))
    factors = average(old.factors, value, weight)
    new = replace(new, factors=factors)
    corrected = statistics if block.structure.corrects_eigenvalues else None
    last = _last_basis(due)
    if last is None or refresh:
        return UpdatedAverage(due, new, factors, weight, corrected)
    new = replace(new, curvature=last)
    if corrected is not None and workers.is_alone:  # whose rows are not needed any longer
        spectrum = statistics.eigenvalues(last, scaling).scale(1 / rows)
        return UpdatedAverage(due, replace(new, curvature=average(old.known, spectrum, weight)))
    return UpdatedAverage(due, new, None, weight, corrected)


def finish_updates(
    begun: Sequence[UpdatedAverage], rows: float, workers: Workers
) -> list[RunningCurvature]:
    """With the eigenvectors of all blocks that want new ones, then the eigenvalues in them."""
    bases = iter(eigenbases([
        eigen_factors(one.due.block, one.factors, one.due.scaling)
        for one in begun if one.factors is not None
    ], workers))
    averages = [
        one.average if one.factors is None
        else replace(one.average, curvature=_checked(next(bases), _last_basis(one.due)))
        for one in begun
    ]
    corrected = [
        (index, one.statistics) for index, one in enumerate(begun) if one.statistics is not None
    ]
    spectra = eigenvalues([
        (statistics, cast(KroneckerEigen, averages[index].curvature), begun[index].due.scaling)
        for index, statistics in corrected
    ], workers)
    for (index, _), spectrum in zip(corrected, spectra, strict=True):
        one, known = begun[index], begun[index].due.average.known
        curvature = average(known, spectrum.scale(1 / rows), one.weight)
        averages[index] = replace(averages[index], curvature=curvature)
    return averages


def eigen_factors(
    block: Block, factors: Kronecker, scaling: KroneckerScaling | None
) -> Factors:
    """The factors, scaled by a prior, for the eigenbasis that the block's structure keeps."""
    if (roots := roots_of(scaling)) is not None:
        factors = factors.rescaled(*roots)
    return Factors(factors, block.ranks, block.kronecker.cuts)


def eigenbasis(
    block: Block, factors: Kronecker, scaling: KroneckerScaling | None
) -> KroneckerEigen:
    """The factors in that eigenbasis."""
    product, ranks, num_blocks = eigen_factors(block, factors, scaling)
    return product.eigen(ranks, num_blocks)


def _last_basis(due: DueBlock) -> KroneckerEigen | None:
    """The eigenbasis of the average so far, in the scaling of the prior as it is now."""
    last = due.average.known if due.average.is_in(due.scaling) else None
    return last if isinstance(last, KroneckerEigen) else None


def _checked(basis: KroneckerEigen | None, last: KroneckerEigen | None) -> KroneckerEigen:
    """A new eigenbasis; the last one if its computation failed."""
    if basis is not None:
        return basis
    failure = "eigh found no finite eigenvectors"
    if last is None:
        raise torch.linalg.LinAlgError(failure)
    warnings.warn(f"the last eigenvectors are kept: {failure}", stacklevel=3)
    return last
