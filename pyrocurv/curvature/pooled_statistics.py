"""The statistics of blocks over the data of all processes: sums of those of each.

What the structures of the blocks are assembled from is summed in one bucket. Structures that ask
for something else have it summed when they do, in the same order on all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics
from pyrocurv.curvature.layer_statistics import GradientStatistics, LayerStatistics
from pyrocurv.layers.block import Block
from pyrocurv.runtime.workers import Workers
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling


def _kronecker(local: BlockStatistics, sharing: str) -> list[Tensor]:
    """G, Σ a aᵀ and the number of inputs, for each use."""
    (layer,) = local.layers
    parts: list[Tensor] = []
    for use, product in zip(layer, local.kronecker(sharing), strict=True):
        count = product.input.new_ones(()) * use.num_inputs(sharing)
        parts += [product.output, product.input * count, count]
    return parts


PARTS: dict[str, Callable[[BlockStatistics, str], list[Tensor]]] = {
    "dense": lambda local, _: [local.dense().matrix],
    "diagonal": lambda local, _: [local.diagonal().entries],
    "kronecker": _kronecker,
}


class PooledStatistics:
    """`BlockStatistics` over all processes; `layers` are those of this one."""

    def __init__(self, local: BlockStatistics, workers: Workers) -> None:
        self.local, self.workers = local, workers
        self.sums: dict[tuple[str, str], Sequence[Tensor]] = {}

    @property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]:
        return self.local.layers

    def _sums(self, what: str, sharing: str = "") -> Sequence[Tensor]:
        if (what, sharing) not in self.sums:
            self.sums[what, sharing] = self.workers.sums(PARTS[what](self.local, sharing))
        return self.sums[what, sharing]

    def dense(self) -> Dense:
        return Dense(*self._sums("dense"))

    def diagonal(self) -> Diagonal:
        return Diagonal(*self._sums("diagonal"))

    def kronecker(self, sharing: str) -> list[Kronecker]:
        sums = self._sums("kronecker", sharing)
        uses = zip(sums[::3], sums[1::3], sums[2::3], strict=True)
        return [Kronecker(output, input / count) for output, input, count in uses]

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        (spectrum,) = self.workers.sums([self.local.eigenvalues(basis, scaling).spectrum])
        return KroneckerEigen(basis.output_basis, basis.input_basis, spectrum)

    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> Tensor | None:
        matrix = self.local.output_factor(sharing, scaling)
        return None if matrix is None else self.workers.sums([matrix])[0]


def pool(
    blocks: Sequence[Block], statistics: Sequence[BlockStatistics], workers: Workers
) -> list[PooledStatistics]:
    """The statistics over all processes of blocks that all of them have."""
    pooled = [PooledStatistics(local, workers) for local in statistics]
    wanted = [_wanted(block, local) for block, local in zip(blocks, statistics, strict=True)]
    parts = [
        PARTS[key[0]](local, key[1]) if key else []
        for key, local in zip(wanted, statistics, strict=True)
    ]
    sums = iter(workers.sums([part for some in parts for part in some]))
    for key, one, some in zip(wanted, pooled, parts, strict=True):
        if key:
            one.sums[key] = [next(sums) for _ in some]
    return pooled


def eigenvalues(
    several: Sequence[tuple[BlockStatistics, KroneckerEigen, KroneckerScaling | None]],
    workers: Workers,
) -> list[KroneckerEigen]:
    """The `eigenvalues` of each, of all processes, in one bucket."""
    found = [
        (
            one.local if isinstance(one, PooledStatistics) and not workers.is_alone else one
        ).eigenvalues(basis, scaling) for one, basis, scaling in several
    ]
    spectra = workers.sums([one.spectrum for one in found])
    return [
        KroneckerEigen(one.output_basis, one.input_basis, spectrum)
        for one, spectrum in zip(found, spectra, strict=True)
    ]


def _wanted(block: Block, statistics: BlockStatistics) -> tuple[str, str] | None:
    """What the structure of a block is assembled from; None if that is not known yet."""
    if block.kind in ("full", "block"):
        return "dense", ""
    if block.kind == "diag":
        return "diagonal", ""
    if not block.structure.is_kronecker or is_truncated(block, statistics):
        return None
    return "kronecker", block.kronecker.sharing


def is_truncated(block: Block, statistics: BlockStatistics) -> bool:
    """Whether truncated factors are averaged, for which the complete ones are never formed."""
    layer = block.layers[0]
    if not block.structure.is_kronecker or block.ranks == layer.matrix_shape or layer.lead:
        return False
    if block.kronecker.cuts != (1, 1):
        return False
    (uses,) = statistics.layers
    return len(uses) == 1 and len(uses[0].a) == 1  # not used transposed


def no_statistics(blocks: Sequence[Block], like: Tensor) -> list[GradientStatistics]:
    """Those of a process all of whose examples are masked."""
    return [
        GradientStatistics([[LayerStatistics.zeros(x, like, 0)] for x in block.layers])
        for block in blocks
    ]
