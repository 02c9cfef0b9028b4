"""The Hessian of the negative log likelihood, by backward passes through the graph of its gradient.

"full", "block" and "diag" are exact for any network: one pass for each row, in the weights.
Kronecker factors are computed in the outputs of a layer, see `hessian_outputs`. So are the
eigenvalues of EK-FAC, unless the layer runs more than once and has no more than `MAX_PASSES`
weights: then they are computed from its rows. The diagonal of a layer with more weights is computed
in its outputs if that takes no more passes.

Where a layer would take more than `MAX_PASSES` passes, `num_samples` draws of random signs give an
unbiased estimate: of diagonals, of the sum over positions in G, of the eigenvalues of EK-FAC.
"full", "block" and the outputs of K-FAC at one position are exact at any cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyrocurv.curvature import hessian_weights
from pyrocurv.curvature.hessian_outputs import OutputHessian
from pyrocurv.curvature.hessian_weights import WeightHessian
from pyrocurv.curvature.layer_statistics import LayerStatistics, gradient_statistics
from pyrocurv.curvature.likelihood import ExampleSelection, LikelihoodTerm
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, OpCall
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling

MAX_ELEMENTS = 2**22  # of the vectors of one batched pass at any point of the graph


def twice_differentiable() -> AbstractContextManager[None]:
    """For the forward pass: fused attention has no second derivative, the plain product has."""
    return sdpa_kernel(SDPBackend.MATH)


def negative_log_likelihood(terms: Sequence[LikelihoodTerm], count: int) -> Tensor:
    """-log p of the first `count` examples, with weights and masks."""
    return -torch.stack([_log_prob(term, count) for term in terms]).sum()


def _log_prob(term: LikelihoodTerm, count: int) -> Tensor:
    log_prob = term.log_prob(term.value) * term.weight
    return (log_prob[:count] if log_prob.dim() else log_prob).sum()


@dataclass(frozen=True, eq=False)
class _GradientGraph:
    """The gradient with its graph, in the weights where that is needed and in all outputs."""

    calls: dict[Layer, list[OpCall]]
    leaves: dict[str, Tensor]
    weight_gradients: dict[str, Tensor]
    output_gradients: dict[int, Tensor | None]  # by the id of the call
    examples: ExampleSelection
    num_samples: int
    largest: int  # elements of the largest gradient

    def chunk(self, size: int) -> int:
        """The number of vectors of `size` elements that one batched pass takes."""
        return max(1, MAX_ELEMENTS // max(size, self.largest))


@dataclass(frozen=True, eq=False)
class HessianStatistics:
    """The Hessian of one block, a SUM over the examples, from the graph of a gradient."""

    block: Block
    graph: _GradientGraph

    @cached_property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]:
        """The inputs of the block's layers and the gradients in their outputs."""
        graph, examples = self.graph, self.graph.examples
        calls = [call for layer in self.block.layers for call in graph.calls.get(layer, ())]
        gradients = [
            call.output_gradient_rows(graph.output_gradients[id(call)], examples.count).detach()
            for call in calls
        ]
        vectors = [gradient.unsqueeze(0) for gradient in gradients]
        return gradient_statistics(self.block, calls, vectors, examples).layers

    @cached_property
    @torch.enable_grad()
    def _in_weights(self) -> WeightHessian:
        graph, block = self.graph, self.block
        return WeightHessian(
            block, block.pack(graph.weight_gradients),
            tuple(graph.leaves[name] for name in block.tensors), graph.chunk(block.size),
            graph.num_samples,
        )

    @cached_property
    def _in_outputs(self) -> dict[bool, OutputHessian]:
        """In the outputs of the calls that use the matrix, and of those that use its transpose."""
        graph, hessians = self.graph, {}
        for transposed in (False, True):
            calls = [call for call in self._calls if call.transposed == transposed]
            if calls:
                gradients = [graph.output_gradients[id(call)] for call in calls]
                hessians[transposed] = OutputHessian(
                    calls, gradients, graph.examples, graph.chunk(1), graph.num_samples
                )
        return hessians

    @property
    def _calls(self) -> Sequence[OpCall]:
        """Of the layer of a block that has one."""
        (layer,) = self.block.layers
        return self.graph.calls.get(layer, ())

    @property
    def _is_per_unit(self) -> bool:
        return self.block.layers[0].orientation == "per_unit"

    def dense(self) -> Dense:
        """The Hessian itself."""
        return Dense(self._in_weights.matrix())

    def diagonal(self) -> Diagonal:
        """Its diagonal, layer by layer."""
        blocks = (Block((layer,), self.block.structure) for layer in self.block.layers)
        layers = [HessianStatistics(block, self.graph)._layer_diagonal() for block in blocks]
        return Diagonal(torch.cat(layers))

    def _layer_diagonal(self) -> Tensor:
        has_one_use = [call.transposed for call in self._calls] == [False]
        if has_one_use and not self._in_weights.is_exact and not self._is_per_unit:
            outputs = self._in_outputs[False]
            if outputs.num_passes <= hessian_weights.MAX_PASSES:
                return outputs.diagonal()
        return self._in_weights.diagonal()

    def kronecker(self, sharing: str) -> list[Kronecker]:
        """G ⊗ A of each use."""
        count = self.graph.examples.size
        if self._is_per_unit:
            return [self._in_weights.kronecker(count)]
        products = [outputs.kronecker(sharing) for outputs in self._in_outputs.values()]
        return [
            Kronecker(x.input * count, x.output / count) if transposed else x
            for transposed, x in zip(self._in_outputs, products, strict=True)
        ]

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        """The nearest matrix to a layer's Hessian, scaled by a prior, on these eigenspaces."""
        is_reused = len(self._calls) > 1 and self.block.size <= hessian_weights.MAX_PASSES
        if self._is_per_unit or is_reused or True in self._in_outputs:
            return self._in_weights.eigenvalues(basis, scaling)
        return self._in_outputs[False].eigenvalues(basis, scaling)

    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> Tensor:
        """G alone, scaled by a prior, of a layer that is not used transposed."""
        matrix = self._in_outputs[False].output_factor(sharing)
        if scaling is None or scaling.roots is None:
            return matrix
        root, _ = scaling.roots
        return matrix / torch.outer(root, root)


def hessians(
    blocks: Sequence[Block], terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall],
    examples: ExampleSelection, num_samples: int,
) -> Iterator[HessianStatistics]:
    """The Hessian of each block, from the selected examples.

    One backward pass; the graph of the forward pass is kept, and no `.grad` is changed.
    """
    called = {call.layer for call in calls}
    for layer in (layer for block in blocks for layer in block.layers):
        if layer not in called:
            raise ValueError(
                f"{layer.weight!r} was not used in this forward pass, or only without a gradient"
            )
    names = {name for block in blocks if _uses_weights(block, calls) for name in block.tensors}
    leaves = {name: leaf for call in calls for name, leaf in call.leaves.items() if name in names}
    traced = [call for call in calls if isinstance(call, OpCall)]
    by_layer: dict[Layer, list[OpCall]] = {}
    for call in traced:
        by_layer.setdefault(call.layer, []).append(call)
    loss = negative_log_likelihood(terms, examples.count)
    edges = [*map(get_gradient_edge, leaves.values()), *(call.edge for call in traced)]
    gradients: Sequence[Tensor | None] = [None] * len(edges)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
    graph = _GradientGraph(
        by_layer, leaves,
        {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=False)
        },
        {id(call): g for call, g in zip(traced, gradients[len(leaves):], strict=True)},
        examples, num_samples, max(1 if g is None else g.numel() for g in gradients),
    )
    return (HessianStatistics(block, graph) for block in blocks)


def _uses_weights(block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether part of a block may be computed in its weights."""
    layer = block.layers[0]
    uses = [call.transposed for call in calls if call.layer == layer]
    is_per_unit = layer.orientation == "per_unit"
    return not block.structure.is_kronecker or uses != [False] or is_per_unit
