"""The running average of a block's curvature over a training run.

The state of a block is a frozen value: `update` returns the next one and does not change the last,
so a step that fails has no effect. All structures here are a mean over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics, ForwardPass, assemble, collect
from pyrocurv.curvature.spec import Curvature
from pyrocurv.curvature.truncated_factor import TruncatedFactor, mean_squares, product
from pyrocurv.curvature.update_interval import UpdateInterval
from pyrocurv.layers import structure_spec
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_spec import KroneckerSpec, StructureSpec
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import serializable

BASIS_WARMUP = (1, 2, 4, 8, 16)  # estimates with an eigendecomposition at any interval
S = TypeVar("S", bound=Structure)


@serializable
@dataclass(frozen=True, eq=False)
class RunningCurvature:
    """The curvature of a block after `count` estimates, and what the next average is formed from.

    With `count` 0 the curvature is zero, and the first estimate replaces it. Kronecker blocks
    average their factors, or `truncated_factors` if a factor is truncated. `curvature` and
    `truncated_factors` are scaled by `scaling`, that of the prior at the last estimate. `interval`
    is used with `every="auto"`.

    The average of Hessians may be indefinite; `semidefinite` is the nearest matrix that can be part
    of a precision. The noise of single estimates cancels in the average before it is projected. A
    correction that keeps each estimate positive would add the variance of the noise instead, and is
    not known for factors.
    """

    count: int
    curvature: Structure
    interval: UpdateInterval = UpdateInterval()
    factors: Kronecker | None = None
    truncated_factors: tuple[TruncatedFactor, TruncatedFactor] | None = None  # output and input
    scaling: KroneckerScaling | None = None

    def semidefinite(self, kind: str) -> Structure:
        """The curvature, of this kind, as a positive semi-definite matrix."""
        return self.curvature.psd() if kind == "hessian" else self.curvature

    def is_in(self, scaling: KroneckerScaling | None) -> bool:
        """Whether `curvature` is scaled in this way."""
        old, new = _roots(self.scaling), _roots(scaling)
        if old is None or new is None:
            return old is new
        return torch.equal(old[0], new[0]) and torch.equal(old[1], new[1])


class DueBlock(NamedTuple):
    """A block that takes an estimate, its average so far, and the scaling of its prior."""

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
        """Whether it completes the estimate of the step."""
        return self.index == self.of - 1

    def count(self, average: RunningCurvature) -> int:
        """The number of the estimate that it belongs to, from 1."""
        return average.count + (self.index == 0) if average.count else 1

    def weight(self, average: RunningCurvature, decay: float) -> float:
        """The weight of its curvature in the average.

        The samples of a step have equal weights, max(1 - decay, 1/count) in total. The first sample
        of a block has weight 1, even if it is not the first of the step.
        """
        if average.count == 0:
            return 1.0
        total = max(1 - decay, 1 / self.count(average))
        return total / (self.of - (self.of - 1 - self.index) * total)


SINGLE_PARTICLE = Particle()


def update_curvature(
    spec: Curvature, step: int, due: Sequence[DueBlock], forward: ForwardPass,
    particle: Particle = SINGLE_PARTICLE,
) -> list[RunningCurvature]:
    """The averages of the blocks that are due, in their order, with one more estimate.

    Raises:
        ValueError: a layer that does not read the batch as its first axis, or a first estimate
            from a batch in which all examples are masked.
        FloatingPointError: a first estimate that is not finite.
    """
    if not due:
        return []
    rows = forward.rows if spec.batch is None else min(spec.batch, forward.rows)
    count, statistics = collect(spec, [block for block, *_ in due], forward, rows)
    if count == 0:
        if any(average.count == 0 for _, average, _ in due):
            raise ValueError("the mask leaves no example to compute the first curvature from")
        return [average for _, average, _ in due]
    with torch.no_grad():  # `map` lets go of the statistics of a block before the next ones
        return [*map(partial(_update_due, spec, step, rows, particle), due, statistics)]


def _update_due(
    spec: Curvature, step: int, rows: int, particle: Particle, due: DueBlock,
    statistics: BlockStatistics,
) -> RunningCurvature:
    """`update`, with the next interval of the block."""
    block, old, scaling = due
    refresh = particle.is_last and (
        particle.count(old) in BASIS_WARMUP or spec.is_basis_due(step, old.interval)
    )
    new = update(old, block, statistics, rows, spec.decay, refresh, scaling, particle)
    if spec.every != "auto" or not particle.is_last:
        return new
    if new is old:
        return replace(old, interval=old.interval.postpone(step))
    return replace(new, interval=old.interval.after_estimate(step, statistics.layers))


def has_statistics(spec: Curvature, block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether an estimate of a block can be computed from these calls of its layers."""
    called = {call.layer for call in calls}
    layers = [layer in called for layer in block.layers]
    return all(layers) if spec.kind == "hessian" else any(layers)


def zero_curvature(
    block: Block, like: Tensor, scaling: KroneckerScaling | None
) -> RunningCurvature:
    """The average before any estimate, with the dtype and the device of `like`."""
    return RunningCurvature(0, _zeros(block.structure, block, like), scaling=scaling)


@singledispatch
def _zeros(structure: StructureSpec, block: Block, like: Tensor) -> Structure:
    return Dense(like.new_zeros(block.size, block.size))


@_zeros.register
def _(structure: structure_spec.Diagonal, block: Block, like: Tensor) -> Structure:
    return Diagonal(like.new_zeros(block.size))


@_zeros.register
def _(structure: KroneckerSpec, block: Block, like: Tensor) -> Structure:
    *groups, outputs, inputs = block.layers[0].matrix_shape
    output_basis, input_basis = (
        torch.eye(size, rank, dtype=like.dtype, device=like.device).expand(*groups, size, rank)
        for size, rank in zip((outputs, inputs), block.ranks, strict=True)
    )
    spectrum = [rank + (rank < size) for *_, size, rank in (output_basis.shape, input_basis.shape)]
    return KroneckerEigen(output_basis, input_basis, like.new_zeros(*groups, *spectrum))


def update(
    old: RunningCurvature, block: Block, statistics: BlockStatistics, rows: int, decay: float,
    refresh: bool, scaling: KroneckerScaling | None = None, particle: Particle = SINGLE_PARTICLE,
) -> RunningCurvature:
    """The average with one more estimate, a sum over `rows` examples.

    `refresh` asks for new eigenvectors of Kronecker factors; truncated factors have new ones at
    every estimate. When the scaling changes, the eigenvalues of EK-FAC are kept. An estimate that
    is not finite is left out, with a warning.
    """
    count, weight = particle.count(old), particle.weight(old, decay)
    new = replace(old, count=count, factors=None, truncated_factors=None, scaling=scaling)
    if _is_truncated(block, statistics):
        return _update_truncated(new, old, block, statistics, rows, weight)
    value = assemble(block.structure, statistics).scale(1 / rows)
    if not bool(torch.isfinite(value.trace())):
        return _left_out(old)
    if not isinstance(value, Kronecker):
        return replace(new, curvature=average(_last(old), value, weight))
    factors = average(old.factors, value, weight)
    basis = _basis(old, block, factors, scaling, refresh)
    curvature: Structure = basis
    if block.structure.corrects_eigenvalues:
        eigenvalues = statistics.eigenvalues(basis, scaling).scale(1 / rows)
        curvature = average(_last(old), eigenvalues, weight)
    return replace(new, curvature=curvature, factors=factors)


def average(mean: S | None, value: S, weight: float) -> S:
    """The mean with one more value of this weight; the value itself if it is the first."""
    return value if mean is None else mean.lerp(value, weight)


def _last(average: RunningCurvature) -> Structure | None:
    return average.curvature if average.count else None


def _left_out(average: RunningCurvature) -> RunningCurvature:
    if average.count == 0:
        raise FloatingPointError("the first curvature estimate is not finite")
    warnings.warn("a curvature estimate is not finite: the last average is kept", stacklevel=3)
    return average


def eigenbasis(
    block: Block, factors: Kronecker, scaling: KroneckerScaling | None
) -> KroneckerEigen:
    """The factors, scaled by a prior, in the eigenbasis that the block's structure keeps."""
    if (roots := _roots(scaling)) is not None:
        factors = factors.rescaled(*roots)
    return factors.eigen(block.ranks, block.kronecker.cuts)


def _basis(
    old: RunningCurvature, block: Block, factors: Kronecker, scaling: KroneckerScaling | None,
    refresh: bool,
) -> KroneckerEigen:
    """The eigenbasis of the factors; the last one unless `refresh` asks for another."""
    last = _last(old) if old.is_in(scaling) else None
    if not isinstance(last, KroneckerEigen):
        return eigenbasis(block, factors, scaling).psd()
    if not refresh:
        return last
    try:
        return eigenbasis(block, factors, scaling).psd()
    except torch.linalg.LinAlgError as error:
        warnings.warn(f"the last eigenvectors are kept: {error}", stacklevel=3)
        return last


def _is_truncated(block: Block, statistics: BlockStatistics) -> bool:
    """Whether truncated factors are averaged, for which the complete ones are never formed."""
    structure, (layer, *_) = block.structure, block.layers
    if not structure.is_kronecker or block.kronecker.cuts != (1, 1) or layer.lead:
        return False
    if block.ranks == layer.matrix_shape:
        return False
    (uses,) = statistics.layers
    return len(uses) == 1 and len(uses[0].a) == 1  # not used transposed


def _update_truncated(
    new: RunningCurvature, old: RunningCurvature, block: Block, statistics: BlockStatistics,
    rows: int, weight: float,
) -> RunningCurvature:
    """`update` with truncated factors; G is a mean over positions, A a sum."""
    ((layer,),), sharing, scaling = statistics.layers, block.kronecker.sharing, new.scaling
    layer = layer.whiten(scaling)
    shared = layer.share_weights(sharing)
    a, g = shared.a[0], shared.g.flatten(0, 1)  # [B, S, I], [K·B, S, O]
    matrix = statistics.output_factor(sharing, scaling)  # [O, O]
    if matrix is not None:
        matrix = matrix / rows
    if not bool(torch.isfinite(a.sum() + (g if matrix is None else matrix).sum())):
        return _left_out(old)
    output, input = _truncated_factors(old, block, scaling, g, a)
    try:
        if matrix is None:
            output = output.average(g, 1 / (rows * a.shape[1]), weight)
        else:
            output = output.average_matrix(matrix, weight)
        input = input.average(a, 1 / len(a), weight)  # masks may have left fewer than `rows`
    except torch.linalg.LinAlgError as error:
        if old.count == 0:
            raise
        warnings.warn(f"the last curvature is kept: {error}", stacklevel=3)
        return old
    basis = product(output, input)
    curvature: Structure = basis
    if block.structure.corrects_eigenvalues:
        if matrix is None:
            eigenvalues = mean_squares(layer.a[0], layer.g, basis)
        else:
            eigenvalues = statistics.eigenvalues(basis, scaling)
        curvature = average(_last(old), eigenvalues.scale(1 / rows), weight)
    return replace(new, curvature=curvature, truncated_factors=(output, input))


def _truncated_factors(
    average: RunningCurvature, block: Block, scaling: KroneckerScaling | None, g: Tensor, a: Tensor
) -> tuple[TruncatedFactor, TruncatedFactor]:
    """The output and the input factor so far, scaled in another way."""
    if average.truncated_factors is None:
        outputs, inputs = block.ranks
        return TruncatedFactor.zeros(g, outputs), TruncatedFactor.zeros(a, inputs)
    output, input = average.truncated_factors
    if average.is_in(scaling):
        return output, input
    ones = torch.ones_like(output.diagonal), torch.ones_like(input.diagonal)
    old, new = _roots(average.scaling) or ones, _roots(scaling) or ones
    return output.rescaled(old[0] / new[0]), input.rescaled(old[1] / new[1])


def _roots(scaling: KroneckerScaling | None) -> tuple[Tensor, Tensor] | None:
    return None if scaling is None else scaling.roots
