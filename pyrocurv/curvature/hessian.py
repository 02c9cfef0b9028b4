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

import functools
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyrocurv.curvature import hessian_weights
from pyrocurv.curvature.examples import ExampleSelection
from pyrocurv.curvature.hessian_outputs import OutputHessian
from pyrocurv.curvature.hessian_weights import WeightHessian
from pyrocurv.curvature.layer_statistics import LayerStatistics, gradient_statistics
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, UntracedWeight
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
    log_prob = term.likelihood.log_prob(term.value)
    if term.mask is not None:
        mask = torch.as_tensor(term.mask, device=log_prob.device)
        log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    log_prob = log_prob * term.weight
    return (log_prob[:count] if log_prob.dim() else log_prob).sum()


@dataclass(frozen=True, eq=False)
class HessianStatistics:
    """The Hessian of one block, a SUM over the examples, from the graph of a gradient."""

    block: Block
    graph: _GradientGraph

    @functools.cached_property
    def layers(self) -> Sequence[Sequence[LayerStatistics]]:
        """The inputs of the block's layers and the gradients in their outputs."""
        return self.graph.layer_statistics(self.block)

    @functools.cached_property
    @torch.enable_grad()
    def _in_weights(self) -> WeightHessian:
        return self.graph.weights(self.block)

    @functools.cached_property
    @torch.enable_grad()
    def _in_outputs(self) -> dict[bool, OutputHessian]:
        """In the outputs of the calls that use the matrix as it is (False) and transposed (True).
        """
        return {
            transposed: self.graph.outputs(calls) for transposed in (False, True)
            if (calls := [call for call in self._calls if call.transposed == transposed])
        }

    @property
    def _layer(self) -> Layer:
        (layer,) = self.block.layers
        return layer

    @property
    def _calls(self) -> list[LayerCall]:
        return self.graph.calls_of(self._layer)

    @property
    def _source(self) -> WeightHessian | OutputHessian:
        """Where the eigenvalues of EK-FAC are computed."""
        several = len(self._calls) > 1 and self.block.size <= hessian_weights.MAX_PASSES
        if self._layer.form == "units" or several or True in self._in_outputs:
            return self._in_weights
        return self._in_outputs[False]

    def dense(self) -> Dense:
        """The Hessian itself."""
        return Dense(self._in_weights.matrix())

    def diagonal(self) -> Diagonal:
        """Its diagonal, layer by layer."""
        layers = (Block((layer,), self.block.structure) for layer in self.block.layers)
        return Diagonal(torch.cat([
            HessianStatistics(layer, self.graph)._layer_diagonal() for layer in layers
        ]))

    def _layer_diagonal(self) -> Tensor:
        weights, calls = self._in_weights, self._calls
        one_way = len(calls) == 1 and not calls[0].transposed and self._layer.form != "units"
        if one_way and not weights.is_exact:
            outputs = self._in_outputs[False]
            if outputs.num_passes <= hessian_weights.MAX_PASSES:
                return outputs.diagonal()
        return weights.diagonal()

    def kronecker(self, sharing: str) -> Kronecker:
        """G ⊗ A; the nearest product to the sum where a matrix is also used transposed."""
        if self._layer.form == "units":
            return self._in_weights.kronecker(self.graph.examples.count)
        factors = []
        for transposed, outputs in self._in_outputs.items():
            product = outputs.kronecker(sharing)
            factors.append(Kronecker(product.input, product.output) if transposed else product)
        return functools.reduce(Kronecker.nearest_kronecker_sum, factors)

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        """The nearest matrix to a layer's Hessian, scaled by a prior, on these eigenspaces."""
        return self._source.eigenvalues(basis, scaling)

    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> Tensor:
        """G alone, scaled by a prior, of a layer that is used in one way."""
        matrix = self._in_outputs[False].output_factor(sharing)
        if scaling is None or scaling.roots is None:
            return matrix
        root, _ = scaling.roots
        return matrix / torch.outer(root, root)


def hessians(
    blocks: Sequence[Block], terms: Sequence[LikelihoodTerm],
    calls: Sequence[LayerCall | UntracedWeight], examples: ExampleSelection, num_samples: int,
) -> Iterator[HessianStatistics]:
    """The Hessian of each block, from the selected examples.

    The graph of the forward pass is kept, and the `.grad` of all tensors is left alone.
    """
    called = {call.layer for call in calls}
    for layer in (layer for block in blocks for layer in block.layers):
        if layer not in called:
            raise ValueError(
                f"{layer.weight!r} was not used in this forward pass, or only without a gradient"
            )
    names = {name for block in blocks if _is_in_weights(block, calls) for name in block.tensors}
    graph = _GradientGraph.of(names, terms, calls, examples, num_samples)
    return (HessianStatistics(block, graph) for block in blocks)


def _is_in_weights(block: Block, calls: Sequence[LayerCall | UntracedWeight]) -> bool:
    """Whether part of a block may be computed from the rows of its weights."""
    first, *more = (call.transposed for call in calls if call.layer == block.layers[0])
    return (
        not block.structure.is_kronecker or first or bool(more) or block.layers[0].form == "units"
    )


@dataclass(frozen=True, eq=False)
class _GradientGraph:
    """The gradient with its graph, in the weights where that is needed and in all outputs."""

    calls: Sequence[LayerCall]
    leaves: dict[str, Tensor]
    weight_gradients: dict[str, Tensor]  # by name
    output_gradients: dict[int, Tensor | None]  # by the call's id
    examples: ExampleSelection
    num_samples: int
    largest: int  # elements of the largest gradient

    @staticmethod
    def of(
        names: Container[str], terms: Sequence[LikelihoodTerm],
        calls: Sequence[LayerCall | UntracedWeight], examples: ExampleSelection, num_samples: int,
    ) -> _GradientGraph:
        """One backward pass, onto the weights of these names and the outputs of all calls."""
        traced = [call for call in calls if isinstance(call, LayerCall)]
        leaves = {
            name: leaf for call in calls for name, leaf in call.leaves.items() if name in names
        }
        loss = negative_log_likelihood(terms, examples.count)
        edges = [*map(get_gradient_edge, leaves.values()), *(call.edge for call in traced)]
        gradients: Sequence[Tensor | None] = [None] * len(edges)
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
        return _GradientGraph(
            traced, leaves,
            {
                name: torch.zeros_like(leaf) if g is None else g
                for (name, leaf), g in zip(leaves.items(), gradients, strict=False)
            },
            {id(c): g for c, g in zip(traced, gradients[len(leaves):], strict=True)},
            examples, num_samples, max(1 if g is None else g.numel() for g in gradients),
        )

    def _chunk(self, size: int) -> int:
        return max(1, MAX_ELEMENTS // max(size, self.largest))

    def calls_of(self, layer: Layer) -> list[LayerCall]:
        """The calls of a layer."""
        return [call for call in self.calls if call.layer == layer]

    def weights(self, block: Block) -> WeightHessian:
        """The Hessian in the weights of a block."""
        return WeightHessian(
            block, block.pack(self.weight_gradients),
            tuple(self.leaves[name] for name in block.tensors), self._chunk(block.size),
            self.num_samples,
        )

    def outputs(self, calls: Sequence[LayerCall]) -> OutputHessian:
        """The Hessian in the outputs of some calls of one layer."""
        gradients = [self.output_gradients[id(call)] for call in calls]
        return OutputHessian.of(
            calls, gradients, self.examples, self._chunk(1), self.num_samples
        )

    def layer_statistics(self, block: Block) -> Sequence[Sequence[LayerStatistics]]:
        """The inputs and the gradients of the layers of a block, without their graph."""
        calls = [call for layer in block.layers for call in self.calls_of(layer)]
        count = self.examples.count
        gradients = [
            call.gradients(self.output_gradients[id(call)], count).detach().unsqueeze(0)
            for call in calls
        ]
        return gradient_statistics(block, calls, gradients, self.examples).layers
