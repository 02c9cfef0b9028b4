"""The statistics of one forward pass that the curvature of each block is computed from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import singledispatch
from typing import NamedTuple, Protocol

from torch import Tensor

from pyrocurv.curvature.hessian import hessians
from pyrocurv.curvature.layer_statistics import LayerStatistics, gradient_statistics
from pyrocurv.curvature.likelihood import ExampleSelection, LikelihoodTerm
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

    `layers` are the inputs and output gradients of its layers. For a block of one layer,
    `eigenvalues` is the mean over the eigenspaces of a basis, and `output_factor` is G if it is
    not to be computed from `layers`; both are scaled by a prior.
    """

    @property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]: ...
    def dense(self) -> Dense: ...
    def diagonal(self) -> Diagonal: ...
    def kronecker(self, sharing: str) -> Kronecker: ...
    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen: ...
    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> Tensor | None: ...


@singledispatch
def assemble(structure: StructureSpec, statistics: BlockStatistics) -> Structure:
    """The curvature of a block in its structure; Kronecker factors without an eigenbasis.

    Raises TypeError for a structure that nothing is registered for.
    """
    raise TypeError(
        f"no curvature is assembled for {type(structure).__name__}: register a function with "
        "pyrocurv.curvature.collect.assemble.register"
    )


@assemble.register(structure_spec.Full)
@assemble.register(structure_spec.Block)
def _(structure: StructureSpec, statistics: BlockStatistics) -> Structure:
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


def check_batch(calls: Sequence[LayerCall], batch_size: int) -> None:
    """Raise ValueError for a layer whose input does not have the examples as its first axis."""
    for call in calls:
        if call.batch_size != batch_size:
            raise ValueError(
                f"{call.layer.weight!r} reads {call.batch_size} rows where there are {batch_size} "
                "examples: keep the batch as the first axis of the layer's input, other axes "
                "behind it"
            )
