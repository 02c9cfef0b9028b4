"""The running average of Kronecker factors that keep their leading directions only."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics
from pyrocurv.curvature.running_curvature import (
    DueBlock,
    RunningCurvature,
    average,
    roots_of,
    without_estimate,
)
from pyrocurv.curvature.truncated_factor import TruncatedFactor, mean_squares, product
from pyrocurv.runtime.workers import Workers


def update_truncated(
    due: DueBlock, new: RunningCurvature, statistics: BlockStatistics, rows: float, weight: float,
    workers: Workers,
) -> RunningCurvature:
    """`update` with truncated factors; G is a mean over positions, A a sum."""
    block, old, scaling = due
    ((layer,),), sharing = statistics.layers, block.kronecker.sharing
    layer = layer.whiten(scaling)
    shared = layer.share_weights(sharing)
    a, g = shared.a[0], shared.g.flatten(0, 1)  # [B, S, I], [K·B, S, O]
    matrix = statistics.output_factor(sharing, scaling)  # [O, O]
    if matrix is not None:
        matrix = matrix / rows
    (total,) = workers.sums([a.sum() + (g if matrix is None else matrix).sum()])
    if not bool(torch.isfinite(total)):
        return without_estimate(old)
    output, input = _truncated_factors(due, g, a)
    try:
        if matrix is None:
            output = output.average(g, 1 / (rows * a.shape[1]), weight, workers)
        else:
            output = output.average_matrix(matrix, weight)
        count = workers.sum(len(a), a)  # masks may have left fewer than `rows`
        input = input.average(a, 1 / count, weight, workers)
    except torch.linalg.LinAlgError as error:
        if old.count == 0:
            raise
        warnings.warn(f"the last curvature is kept: {error}", stacklevel=3)
        return old
    basis = product(output, input)
    new = replace(new, curvature=basis, truncated_factors=(output, input))
    if not block.structure.corrects_eigenvalues:
        return new
    if matrix is None:
        eigenvalues = mean_squares(layer.a[0], layer.g, basis)
        (spectrum,) = workers.sums([eigenvalues.spectrum])
        eigenvalues = replace(eigenvalues, spectrum=spectrum)
    else:
        eigenvalues = statistics.eigenvalues(basis, scaling)
    return replace(new, curvature=average(old.known, eigenvalues.scale(1 / rows), weight))


def _truncated_factors(due: DueBlock, g: Tensor, a: Tensor) -> list[TruncatedFactor]:
    """The output and the input factor so far, in the scaling of the new rows g and a."""
    block, old, scaling = due
    if old.truncated_factors is None:
        return [*map(TruncatedFactor.zeros, (g, a), block.ranks)]
    if old.is_in(scaling):
        return [*old.truncated_factors]
    ones = [torch.ones_like(factor.diagonal) for factor in old.truncated_factors]
    roots = zip(roots_of(old.scaling) or ones, roots_of(scaling) or ones, strict=True)
    return [
        factor.rescaled(before / after)
        for factor, (before, after) in zip(old.truncated_factors, roots, strict=True)
    ]
