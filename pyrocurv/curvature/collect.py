"""The statistics of one forward pass that the curvature of each block is computed from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import NamedTuple, Protocol

from torch import Tensor

from pyrocurv.curvature.examples import ExampleSelection, check_batch
from pyrocurv.curvature.hessian import hessians
from pyrocurv.curvature.layer_statistics import LayerStatistics, gradient_statistics
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.output_gradients import pullback
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers import structure_spec
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_spec import KroneckerSpec, StructureSpec
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling


class ForwardPass(NamedTuple):
    """The likelihood terms of a forward pass over `rows` examples, and the calls of its layers."""

    terms: Sequence[LikelihoodTerm]
    calls: Sequence[LayerCall]
    rows: int


class BlockStatistics(Protocol):
    """One block's curvature, a SUM over the examples, in whichever structure is asked for.

    A block with Kronecker factors has one layer.
    """

    @property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]:
        """Inputs and output gradients; two for a layer whose matrix is also used transposed."""

    def dense(self) -> Dense:
        """The matrix itself."""

    def diagonal(self) -> Diagonal:
        """Its diagonal."""

    def kronecker(self, sharing: str) -> Kronecker:
        """Its Kronecker factors."""

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        """The mean of the matrix, scaled by a prior, over the eigenspaces of a basis."""

    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> Tensor | None:
        """G, scaled by a prior; None where it is to be computed from the rows of `layers`."""


@singledispatch
def assemble(structure: StructureSpec, statistics: BlockStatistics) -> Structure:
    """The curvature of a block in its structure; Kronecker factors without an eigenbasis."""
    return statistics.dense()


@assemble.register
def _(structure: structure_spec.Diagonal, statistics: BlockStatistics) -> Structure:
    return statistics.diagonal()


@assemble.register
def _(structure: KroneckerSpec, statistics: BlockStatistics) -> Structure:
    return statistics.kronecker(structure.sharing)


def collect(
    spec: Curvature, blocks: Sequence[Block], forward: ForwardPass, count: int
) -> tuple[int, Iterable[BlockStatistics]]:
    """The statistics of each block, and the number of examples that they are sums over.

    These are the first `count` examples that are not masked. The statistics are computed while they
    are iterated over, so that the rows of one layer are in memory at a time. No gradient is taken
    onto the ops of other layers.

    Raises ValueError for a layer that does not read the batch as its first axis.
    """
    layers = {layer for block in blocks for layer in block.layers}
    calls = [call for call in forward.calls if call.layer in layers]
    check_batch(calls, forward.rows)
    examples = ExampleSelection.of(forward.terms, count)
    if examples.size == 0:
        return 0, ()
    if spec.kind == "hessian":
        return examples.size, hessians(blocks, forward.terms, calls, examples, spec.num_samples)
    gradients = pullback(spec.kind, forward.terms, calls, count, spec.num_samples)
    return examples.size, (
        gradient_statistics(block, calls, gradients, examples) for block in blocks
    )
