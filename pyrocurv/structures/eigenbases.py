"""The eigenbases of several Kronecker products, from as few eigendecompositions as there are sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.kronecker import Kronecker, is_krylov, leading, truncated
from pyrocurv.structures.kronecker_eigen import KroneckerEigen
from pyrocurv.structures.linalg import at_least_single, without_rounding


class Factors(NamedTuple):
    """A product, and the arguments of its `eigen`."""

    product: Kronecker
    ranks: tuple[int, int]
    num_blocks: tuple[int, int]


class _Side(NamedTuple):
    """One factor [..., n, n], how many of its eigenvectors are kept, and its diagonal blocks."""

    matrix: Tensor
    rank: int
    num_blocks: int

    @property
    def cost(self) -> float:
        """n³ for each of the matrices."""
        return eigh_cost(self.matrix.shape)

    def outputs(self) -> tuple[Tensor, Tensor]:
        """NaN in the shapes of the result of `leading`."""
        *groups, rows, _ = self.matrix.shape
        shapes = (*groups, rows, self.rank), (*groups, self.rank + (self.rank < rows))
        vectors, values = (self.matrix.new_full(shape, torch.nan) for shape in shapes)
        return vectors, values


def eigenbases(several: Sequence[Factors], workers: Workers = ALONE) -> list[KroneckerEigen | None]:
    """The positive semi-definite parts of products in their eigenbases; None where one failed.

    Factors of one size are decomposed at once. The workers, who have the same products, share them
    out.
    """
    sides = [
        _Side(*side) for product, ranks, num_blocks in several
        for side in zip((product.output, product.input), ranks, num_blocks, strict=True)
    ]
    found = [side.outputs() for side in sides]

    def compute(items: Sequence[int]) -> None:
        for item, result in zip(items, _decompose([sides[item] for item in items]), strict=True):
            if result is not None:
                for target, value in zip(found[item], result, strict=True):
                    target.copy_(value)

    workers.share_out([side.cost for side in sides], found, compute)
    if not sides:
        return []
    sums = torch.stack([values.sum() for _, values in found]).isfinite().tolist()
    return [
        KroneckerEigen(output, input, outer(output_values, input_values)).psd() if first and second
        else None
        for (output, output_values), (input, input_values), first, second
        in zip(found[::2], found[1::2], sums[::2], sums[1::2], strict=True)
    ]


def eigh_cost(shape: Sequence[int]) -> float:
    """What an eigendecomposition of matrices [..., n, n] costs, up to a factor."""
    return math.prod(shape) * shape[-1]


def _decompose(sides: Sequence[_Side]) -> list[tuple[Tensor, Tensor] | None]:
    """The results of `leading`, those of whole matrices of one size from one decomposition."""
    results: dict[int, tuple[Tensor, Tensor] | None] = {}
    groups: dict[object, list[int]] = {}
    for index, (matrix, rank, num_blocks) in enumerate(sides):
        is_whole = num_blocks == 1 and not is_krylov(matrix, rank)
        kind = (matrix.shape[-1], matrix.dtype, matrix.device)
        groups.setdefault(kind if is_whole else index, []).append(index)
    for members in groups.values():
        whole = _whole([sides[index].matrix for index in members]) if len(members) > 1 else None
        for number, index in enumerate(members):
            one = sides[index]
            results[index] = (
                _attempt(one) if whole is None else _kept(one, *(x[number] for x in whole))
            )
    return [results[index] for index in range(len(sides))]


def _whole(matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
    """Eigenvectors and eigenvalues of matrices [..., n, n]; None if a decomposition fails."""
    size = matrices[0].shape[-1]
    flat = torch.cat([matrix.reshape(-1, size, size) for matrix in matrices])
    try:
        values, vectors = torch.linalg.eigh(at_least_single(flat))
    except (torch.linalg.LinAlgError, NotImplementedError):
        return None
    if not bool(vectors.isfinite().all()):
        return None
    counts = [matrix.numel() // size**2 for matrix in matrices]
    pairs = zip(vectors.split(counts), values.split(counts), matrices, strict=True)
    shaped = [(v.view(m.shape).to(m), x.view(m.shape[:-1]).to(m)) for v, x, m in pairs]
    return [v for v, _ in shaped], [x for _, x in shaped]


def _attempt(side: _Side) -> tuple[Tensor, Tensor] | None:
    try:
        return leading(*side)
    except torch.linalg.LinAlgError:
        return None


def _kept(side: _Side, vectors: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvectors that are kept, and their eigenvalues."""
    rows = values.shape[-1]
    values = without_rounding(values, rows, values.abs().amax(-1, keepdim=True))
    return truncated(vectors, values, side.rank)
