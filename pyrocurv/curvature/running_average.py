"""The running average of a block's curvature over a training run.

A block's state is a frozen value; `update` gives the next one and leaves the old as it was, so a
step that fails has changed nothing. All structures here are per datum: a mean over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrocurv.curvature import hessian, layer_statistics
from pyrocurv.curvature.collect import check_batch, collect_statistics, unmasked_examples
from pyrocurv.curvature.hessian import BlockStatistics, HessianStatistics
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.spec import Curvature
from pyrocurv.curvature.truncated_factor import TruncatedFactor, mean_squares, product
from pyrocurv.curvature.update_interval import UpdateInterval, tick
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_spec import EKFAC, KroneckerSpec
from pyrocurv.structures import Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import serializable

BASIS_WARMUP = (1, 2, 4, 8, 16)  # estimates that have an eigendecomposition whatever the interval


@serializable
@dataclass(frozen=True, eq=False)
class RunningCurvature:
    """After `count` estimates: the curvature, and for Kronecker structures the averaged factors.

    Where a side is truncated `truncated_factors` are kept instead of factors. `curvature` and
    `truncated_factors` are in
    the units of the prior that held at the last estimate, `units`, if any.

    Of Hessians it is the mean as it is, which may be indefinite; `semidefinite` is the nearest
    matrix that can be part of a precision. Noise of either sign cancels in the mean before it is
    projected; a correction of each estimate that keeps it positive would add the noise's variance
    instead, and is not known for factors.
    """

    count: int
    curvature: Structure
    factors: Kronecker | None = None
    units: tuple[Tensor, Tensor] | None = None  # the roots p [O] and r [I]
    truncated_factors: tuple[TruncatedFactor, TruncatedFactor] | None = None  # output and input

    def semidefinite(self, kind: str) -> Structure:
        """The curvature of this kind, positive semi-definite."""
        return self.curvature.psd() if kind == "hessian" else self.curvature

    def is_in(self, units: KroneckerScaling | None) -> bool:
        """Whether these are the units of `curvature` still."""
        return _same(self.units, None if units is None else units.roots)


@dataclass(frozen=True)
class Particle:
    """Sample number `index` of the `of` samples whose curvatures a step averages."""

    index: int = 0
    of: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the step's estimate is complete with it."""
        return self.index == self.of - 1

    def count(self, running: RunningCurvature | None) -> int:
        """The number of the estimate that is being formed, from 1."""
        known = 0 if running is None else running.count
        return known + (self.index == 0) if known else 1

    def weight(self, running: RunningCurvature | None, decay: float) -> float:
        """Of this sample; all of a step have, each as much, max(1 - decay, 1/count) together.

        All of it where nothing was known before, be it the first sample or a later one.
        """
        if running is None or running.count == 0:
            return 1.0
        whole = max(1 - decay, 1 / self.count(running))
        return whole / (self.of - (self.of - 1 - self.index) * whole)


SINGLE_PARTICLE = Particle()


def update_curvature(
    spec: Curvature, step: int, blocks: Sequence[Block], running: Sequence[RunningCurvature | None],
    clocks: Sequence[
        UpdateInterval | None
    ], terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall], rows: int,
    units: Sequence[KroneckerScaling | None], part: Particle = SINGLE_PARTICLE,
) -> list[tuple[RunningCurvature, UpdateInterval | None]]:
    """The running curvature of blocks with one more estimate averaged in, and their clocks then.

    There are clocks where `every="auto"`, from the first estimate on.

    Args:
        blocks: those that are due; no gradient is taken onto the ops of others.
        terms, calls: the likelihood and the layers' ops of one forward pass over `rows` examples.
        units: of the blocks' priors. The eigenbasis of a block that has any is reckoned in them;
            when they change, the eigenvalues of EK-FAC are carried over as they were.
    """
    if not blocks:
        return []
    count = rows if spec.batch is None else min(spec.batch, rows)
    layers = {layer for block in blocks for layer in block.layers}
    calls = [call for call in calls if call.layer in layers]
    check_batch(calls, rows)
    kept = unmasked_examples(terms, count)
    fresh: list[tuple[RunningCurvature, UpdateInterval | None]] = []
    if kept is not None and len(kept) == 0:
        return list(zip(_without(running), clocks, strict=True))
    found = collect_statistics(spec, blocks, terms, calls, count, kept)
    every = zip(blocks, running, clocks, units, found, strict=True)
    with torch.no_grad():
        for block, old, clock, unit, seen in every:
            refresh = part.is_last and (
                part.count(old) in BASIS_WARMUP or spec.is_basis_due(step, clock)
            )
            roots = None if unit is None else unit.roots
            new = update(old, block, seen, count, spec.decay, refresh, roots, part)
            if spec.every == "auto" and part.is_last:
                clock = clock or UpdateInterval()
                pairs = seen.pairs if isinstance(seen, HessianStatistics) else seen
                clock = clock.postponed(step) if new is old else tick(clock, step, pairs)
            fresh.append((new, clock))
    return fresh


def has_statistics(spec: Curvature, block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether an estimate of a block can be taken from these calls of its layers."""
    called = {call.layer for call in calls}
    parts = [layer in called for layer in block.layers]
    return all(parts) if spec.kind == "hessian" else any(parts)


def zero_curvature(
    block: Block, like: Tensor, units: tuple[Tensor, Tensor] | None
) -> RunningCurvature:
    """Zero curvature with count 0, for a block that has had no part in any run."""
    pairs = [layer_statistics.zeros(layer, like, 1) for layer in block.layers]
    return replace(update(None, block, pairs, 1, 0.0, True, units), count=0)


def _without(running: Sequence[RunningCurvature | None]) -> list[RunningCurvature]:
    """All rows were masked: what was there stays."""
    if any(one is None for one in running):
        raise ValueError("the mask leaves no example to take the first curvature from")
    return list(running)  # type: ignore[arg-type]  # no None is left


def update(
    running: RunningCurvature | None, block: Block, seen: BlockStatistics, rows: int, decay: float,
    refresh: bool, units: tuple[Tensor, Tensor] | None = None, part: Particle = SINGLE_PARTICLE,
) -> RunningCurvature:
    """Average one more estimate in, from `rows` data, with weight max(1 - decay, 1/count).

    So much for all samples of a step, of which this may be a `part`.

    `refresh` asks for new eigenvectors of Kronecker factors. Sides that are truncated by `rank` are
    kept as their leading part, and have new eigenvectors at every estimate. An estimate that is not
    finite is left out, with a warning.
    """
    count = part.count(running)
    weight = part.weight(running, decay)
    if _is_thin(block, seen):
        return _thin(running, block, seen, rows, count, weight, units)
    new = hessian.assemble(block, seen).scale(1 / rows)
    if not bool(torch.isfinite(new.trace())):
        return _left_out(running)
    if not isinstance(new, Kronecker):
        return RunningCurvature(
            count, new if running is None else running.curvature.lerp(new, weight)
        )
    factors = new if running is None else running.factors.lerp(new, weight)  # type: ignore[union-attr]  # a Kronecker block has factors
    if running is None or refresh or not _same(units, running.units):
        curvature = _eigen(block, factors, units, running)
    else:
        curvature = running.curvature  # type: ignore[assignment]  # and a KroneckerEigen
    if isinstance(block.structure, EKFAC):
        moment = hessian.eigen(seen, curvature, units).scale(1 / rows)
        curvature = moment if running is None else running.curvature.lerp(moment, weight)  # type: ignore[assignment]  # the same
    return RunningCurvature(count, curvature, factors, units)


def _left_out(running: RunningCurvature | None) -> RunningCurvature:
    if running is None:
        raise FloatingPointError("the first curvature estimate is not finite")
    warnings.warn("a curvature estimate is not finite: the last one stays", stacklevel=3)
    return running


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
    running: RunningCurvature | None, block: Block, seen: BlockStatistics, rows: int, count: int,
    weight: float,
    units: tuple[Tensor, Tensor] | None,
) -> RunningCurvature:
    """`update` of a layer with a truncated side; G is averaged over positions, A summed."""
    ((pair,),) = layer_statistics.whiten(hessian.pairs(seen), units)
    shared = layer_statistics.apply_weight_sharing(pair, block.kronecker.sharing)
    a, g = shared.a[0], shared.g.flatten(0, 1)  # [B, S, I], [K·B, S, O]
    matrix = seen.output(units) / rows if isinstance(seen, HessianStatistics) else None
    if not bool(torch.isfinite(a.sum() + (g if matrix is None else matrix).sum())):
        return _left_out(running)
    if running is None:
        output, input = (
            TruncatedFactor.zeros(x, n) for x, n in zip((g, a), block.ranks, strict=True)
        )
    else:
        output, input = _sides_in(units, running)
    try:
        if matrix is None:
            output = output.average(g, 1 / (rows * a.shape[1]), weight)
        else:
            output = output.average_matrix(matrix, weight)
        input = input.average(a, 1 / len(a), weight)  # masks may have left fewer than `rows`
    except torch.linalg.LinAlgError as error:
        if running is None:
            raise
        warnings.warn(f"the curvature stays as it is: {error}", stacklevel=3)
        return running
    curvature = product(output, input)
    if isinstance(block.structure, EKFAC):
        if isinstance(seen, HessianStatistics):
            moment = seen.eigen(curvature, units).scale(1 / rows)
        else:
            moment = mean_squares(pair.a[0], pair.g, curvature).scale(1 / rows)
        curvature = moment if running is None else running.curvature.lerp(moment, weight)  # type: ignore[assignment]  # the same
    return RunningCurvature(count, curvature, None, units, (output, input))


def _sides_in(
    units: tuple[Tensor, Tensor] | None, running: RunningCurvature
) -> tuple[TruncatedFactor, TruncatedFactor]:
    """The sides, from the units that they were kept in to these."""
    assert running.truncated_factors is not None
    output, input = running.truncated_factors
    if _same(units, running.units):
        return output, input
    old = running.units or tuple(torch.ones_like(side.diagonal) for side in (output, input))
    new = units or tuple(map(torch.ones_like, old))
    return output.rescaled(old[0] / new[0]), input.rescaled(old[1] / new[1])


def _eigen(
    block: Block, factors: Kronecker, units: tuple[
        Tensor, Tensor
    ] | None, running: RunningCurvature | None
) -> KroneckerEigen:
    try:
        factors = factors if units is None else factors.rescaled(*units)
        return factors.eigen(block.ranks, block.kronecker.cuts).psd()
    except torch.linalg.LinAlgError as error:
        if running is None or not _same(units, running.units):
            raise
        warnings.warn(f"the eigenvectors stay as they are: {error}", stacklevel=3)
        return running.curvature  # type: ignore[return-value]  # a KroneckerEigen


def _same(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
