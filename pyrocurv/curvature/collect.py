"""The statistics of one forward pass that the curvature of each block is computed from."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from functools import reduce, singledispatch
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyrocurv.curvature.hessian import hessians
from pyrocurv.curvature.layer_statistics import LayerStatistics, gradient_statistics
from pyrocurv.curvature.likelihood import ExampleSelection, LikelihoodTerm
from pyrocurv.curvature.output_gradients import pullback
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers import structure_spec
from pyrocurv.layers.batch_axis import mixing_calls
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, MixedRowsCall, OpCall
from pyrocurv.layers.structure_spec import KroneckerSpec, StructureSpec
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling


class ForwardPass(NamedTuple):
    """The likelihood terms of a forward pass over `rows` examples, and the calls of its layers.

    The examples are those of this process, one of the `workers`.
    """

    terms: Sequence[LikelihoodTerm]
    calls: Sequence[LayerCall]
    rows: int
    workers: Workers = ALONE

    def with_mixed_rows(self) -> ForwardPass:
        """With a backward pass for each example where as many rows affect other examples.

        Two backward passes find out, unless the graph keeps rows apart in an obvious way.
        """
        log_probs = [term.log_prob(term.value) for term in self.terms]
        of_each = [p for p in log_probs if p.shape[:1] == (self.rows,)]
        densities = [p.reshape(self.rows, -1).sum(1) for p in of_each]
        calls = [c for c in self.calls if isinstance(c, OpCall) and c.batch_size == self.rows]
        if not densities or self.rows == 1:
            return self
        mixing = {id(call) for call in mixing_calls(calls, torch.stack(densities).sum(0))}
        return self._replace(calls=by_example(self.calls, self.rows, mixing)) if mixing else self


class BlockStatistics(Protocol):
    """One block's curvature, a SUM over the examples, in whichever structure is asked for.

    `layers` are the inputs and output gradients of its layers. For a block of one layer,
    `kronecker` has G ⊗ A for each use of its matrix, G a sum over examples and A a mean;
    `eigenvalues` is the mean over the eigenspaces of a basis, and `output_factor` is G if it is
    not to be computed from `layers`; both are scaled by a prior.
    """

    @property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]: ...
    def dense(self) -> Dense: ...
    def diagonal(self) -> Diagonal: ...
    def kronecker(self, sharing: str) -> list[Kronecker]: ...
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
    return nearest_product(statistics.kronecker(structure.sharing))


def nearest_product(uses: Sequence[Kronecker]) -> Kronecker:
    """The nearest Kronecker product to the sum over all uses of a matrix."""
    return reduce(Kronecker.nearest_kronecker_sum, uses)


def collect(
    spec: Curvature, blocks: Sequence[Block], forward: ForwardPass, count: int
) -> tuple[int, Iterable[BlockStatistics]]:
    """The statistics of each block, and the number of examples that they are sums over.

    These are the first `count` examples that are not masked. The statistics are computed while they
    are iterated over, so that the rows of one layer are in memory at a time. No gradient is taken
    onto the ops of other layers.

    A layer whose rows are not the examples takes a backward pass for each example, with a warning.

    Raises ValueError for Kronecker factors of a Hessian of such a layer.
    """
    layers = {layer for block in blocks for layer in block.layers}
    calls = [call for call in forward.calls if call.layer in layers]
    calls = by_example(calls, forward.rows)
    if spec.kind == "hessian":
        _check_hessian(blocks, calls)
    examples = ExampleSelection.of(forward.terms, count)
    if examples.size == 0:
        return 0, ()
    if spec.kind == "hessian":
        return examples.size, hessians(blocks, forward.terms, calls, examples, spec.num_samples)
    gradients = pullback(
        spec.kind, forward.terms, calls, count, spec.num_samples, forward.rows
    )
    return examples.size, (
        gradient_statistics(block, calls, gradients, examples) for block in blocks
    )


def by_example(
    calls: Sequence[LayerCall], batch_size: int, mixing: Container[int] = ()
) -> list[LayerCall]:
    """The calls, with those whose rows are not the examples by a backward pass for each example.

    These have another number of rows, or are `mixing` (ids).
    """
    mixed = {id(c) for c in calls if c.batch_size != batch_size or id(c) in mixing}
    if mixed:
        names = ", ".join(dict.fromkeys(c.layer.weight for c in calls if id(c) in mixed))
        warn_user(
            f"{names}: the rows of the layer's input are not the examples, so that its curvature "
            "takes a backward pass for each example"
        )
    return [
        MixedRowsCall(call, batch_size) if id(call) in mixed and isinstance(call, OpCall) else call
        for call in calls
    ]


def _check_hessian(blocks: Sequence[Block], calls: Sequence[LayerCall]) -> None:
    """Raise ValueError for Kronecker factors of a Hessian in rows that are not the examples."""
    kronecker = {b.layers[0] for b in blocks if b.structure.is_kronecker}
    for call in calls:
        if isinstance(call, MixedRowsCall) and call.layer in kronecker:
            raise ValueError(
                f"{call.layer.weight!r} reads {call.inner.batch_size} rows where there are "
                f"{call.batch_size} examples, and curvature='hessian' has no Kronecker factors "
                "there: use 'ggn' or 'fisher', a dense or diagonal structure for this layer, or "
                "keep the batch as the first axis of its input"
            )
