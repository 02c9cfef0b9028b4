"""The Hessian of the negative log likelihood, by backward passes through its gradient's graph.

"full", "block" and "diag" are exact for any network: a pass for each row, in the weights. Kronecker
factors go through the outputs of a layer, see `in_outputs`; the eigenvalues of EK-FAC too, unless
the layer runs more than once and has no more than `PASSES` weights: those come from its rows. The
diagonal of a layer of more weights goes through its outputs where that takes no more passes.

What would take more than `PASSES` passes for a layer comes from `num_samples` draws of random
signs, without bias: diagonals, the positions in G, the eigenvalues of EK-FAC. "full" and "block",
and the outputs of K-FAC at one position, are exact whatever it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyrocurv.curvature import hessian_weights, layer_statistics
from pyrocurv.curvature.hessian_outputs import OutputHessian
from pyrocurv.curvature.hessian_weights import Units, WeightHessian
from pyrocurv.curvature.layer_statistics import Pairs
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.layers import Layer, structure_spec
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, OpCall
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen

NUMBERS = 2**22  # that the vectors of one batched pass, and all on their way, should not exceed


def twice_differentiable() -> AbstractContextManager[None]:
    """For the forward pass: fused attention has no second derivative, the plain product has."""
    return sdpa_kernel(SDPBackend.MATH)


def energy(terms: Sequence[LikelihoodTerm], count: int) -> Tensor:
    """-log p of the first `count` examples, weights and masks applied."""
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
    """What the graph of a gradient says of one block, a SUM over the examples."""

    block: Block
    _graph: _GradientGraph
    _make: Callable[[], Dense | Diagonal | Kronecker]
    _source: WeightHessian | OutputHessian | None = None  # of the eigenvalues in a basis
    outputs: OutputHessian | None = None  # of a Kronecker block that is used one way

    @functools.cached_property
    def assemble(self) -> Any:
        """In the block's structure, before any eigenbasis: Dense, Diagonal or Kronecker."""
        return self._make()

    def eigen(self, basis: KroneckerEigen, units: Units | None = None) -> KroneckerEigen:
        """The nearest matrix to a layer's Hessian on these eigenspaces, in the units of a prior."""
        assert self._source is not None
        return self._source.eigen(basis, units)

    def output(self, units: Units | None) -> Tensor:
        """G alone, in the units of a prior."""
        assert self.outputs is not None
        matrix = self.outputs.output(self.block.kronecker.sharing)
        return matrix if units is None else matrix / torch.outer(units[0], units[0])

    @property
    def pairs(self) -> Pairs:
        """The inputs of the block's layers and the gradients in their outputs."""
        return self._graph.pairs(self.block)


BlockStatistics = Pairs | HessianStatistics


def assemble(block: Block, seen: BlockStatistics) -> Any:
    """In the block's structure, before any eigenbasis: a `Kronecker` for the Kronecker ones."""
    return seen.assemble if isinstance(
        seen, HessianStatistics
    ) else layer_statistics.assemble(block, seen)


def pairs(seen: BlockStatistics) -> Pairs:
    """The inputs of the block's layers and the gradients in their outputs."""
    return seen.pairs if isinstance(seen, HessianStatistics) else seen


def eigen(
    seen: BlockStatistics, basis: KroneckerEigen, units: Units | None = None
) -> KroneckerEigen:
    """The mean of a layer's curvature over the eigenspaces of a basis, in the units of a prior."""
    if isinstance(seen, HessianStatistics):
        return seen.eigen(basis, units)
    return layer_statistics.kronecker_eigen(layer_statistics.whiten(seen, units), basis)


def hessians(
    blocks: Sequence[Block], terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall],
    count: int, num_samples: int, kept: Tensor | None = None, masked: Tensor | None = None,
) -> list[HessianStatistics]:
    """The Hessian of each block, from the first `count` examples; `kept` are those not masked.

    `masked` [count, S] are positions that count for nothing; see `reduce.gather`.

    The graph of the forward pass is kept; nobody's `.grad` is touched.
    """
    seen = {call.layer for call in calls}
    for layer in (layer for block in blocks for layer in block.layers):
        if layer not in seen:
            raise ValueError(
                f"{layer.weight!r} took no part in this forward pass, or none with a gradient"
            )
    names = {name for block in blocks if _is_in_weights(block, calls) for name in block.tensors}
    graph = _GradientGraph.of(names, terms, calls, count, num_samples, kept, masked)
    return [graph.block(block) for block in blocks]


def _is_in_weights(block: Block, calls: Sequence[LayerCall]) -> bool:
    """Whether something of a block may be read from the rows of its weights."""
    (first, *more) = (call.transposed for call in calls if call.layer == block.layers[0])
    is_per_unit = block.layers[0].orientation == "per_unit"
    return not block.structure.is_kronecker or first or bool(more) or is_per_unit


@dataclass(frozen=True, eq=False)
class _GradientGraph:
    """The gradient with its graph, in weights that it is wanted in and in all outputs."""

    calls: Sequence[LayerCall]
    leaves: dict[str, Tensor]
    in_leaves: dict[str, Tensor]  # by name
    in_calls: dict[int, Tensor | None]  # by the call's id
    count: int
    num_samples: int
    kept: Tensor | None
    masked: Tensor | None
    widest: int

    @staticmethod
    def of(
        names: Container[str], terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall],
        count: int, num_samples: int, kept: Tensor | None, masked: Tensor | None,
    ) -> _GradientGraph:
        """One backward pass."""
        seen = [call for call in calls if isinstance(call, OpCall)]
        edges = [call.edge for call in seen]
        leaves = {
            name: leaf for call in calls for name, leaf in call.leaves.items() if name in names
        }
        loss, wanted = energy(terms, count), [*leaves.values(), *edges]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)  # type: ignore[arg-type]  # the stubs know no gradient edges
        in_leaves = {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), found, strict=False)
        }
        in_calls = {id(c): g for c, g in zip(seen, found[len(leaves):], strict=True)}
        widest = max(1 if g is None else g.numel() for g in found)
        return _GradientGraph(
            calls, leaves, in_leaves, in_calls, count, num_samples, kept, masked, widest
        )

    def _chunk(self, size: int) -> int:
        return max(1, NUMBERS // max(size, self.widest))

    def weights(self, block: Block) -> WeightHessian:
        """In the weights of a block."""
        return WeightHessian(
            block, block.pack(self.in_leaves), tuple(self.leaves[name] for name in block.tensors),
            self._chunk(block.size), self.num_samples,
        )

    def outputs(self, calls: Sequence[OpCall]) -> OutputHessian:
        """In the outputs of some calls of one layer."""
        gradients = [self.in_calls[id(call)] for call in calls]
        return OutputHessian.of(
            calls, gradients, self.count, self.kept, self._chunk(1), self.num_samples, self.masked
        )

    def uses(self, layer: Layer) -> list[OpCall]:
        """The calls of a layer that is no opaque one."""
        return [c for c in self.calls if isinstance(c, OpCall) and c.layer == layer]

    def block(self, block: Block) -> HessianStatistics:
        """In the block's structure."""
        if block.kind == "diag":
            parts = [self._diagonal(layer) for layer in block.layers]
            return HessianStatistics(block, self, lambda: Diagonal(torch.cat([p() for p in parts])))
        if not block.structure.is_kronecker:
            weights = self.weights(block)
            return HessianStatistics(block, self, lambda: Dense(weights.matrix()))
        sharing, (layer,) = block.kronecker.sharing, block.layers
        if layer.orientation == "per_unit":
            weights = self.weights(block)
            return HessianStatistics(
                block, self, lambda: _units(weights.groups(), self.count), weights
            )
        mine = self.uses(layer)
        straight, transposed = ([c for c in mine if c.transposed == f] for f in (False, True))
        if transposed:
            uses = [(self.outputs(straight), False)] if straight else []
            uses.append((self.outputs(transposed), True))
            return HessianStatistics(
                block, self, lambda: _both_ways(uses, sharing), self.weights(block)
            )
        outputs = self.outputs(mine)
        often = len(mine) > 1 and block.size <= hessian_weights.PASSES
        source = self.weights(block) if often else outputs
        return HessianStatistics(block, self, lambda: outputs.kronecker(sharing), source, outputs)

    def _diagonal(self, layer: Layer) -> Callable[[], Tensor]:
        weights, mine = self.weights(Block((layer,), structure_spec.Diagonal())), self.uses(layer)
        once = len(mine) == 1 and not mine[0].transposed and layer.orientation != "per_unit"
        if once and not weights.is_exact:
            outputs = self.outputs(mine)
            if outputs.passes <= hessian_weights.PASSES:
                return outputs.diagonal
        return weights.diagonal

    def pairs(self, block: Block) -> Pairs:
        """The inputs and the gradients of layers that are no opaque ones, without their graph."""
        calls = [call for layer in block.layers for call in self.uses(layer)]
        arranged = [
            call.output_gradient_rows(self.in_calls[id(call)], self.count).detach().unsqueeze(0)
            for call in calls
        ]
        found = layer_statistics.collect(block, calls, arranged, self.count, self.masked)
        return layer_statistics.select_examples(found, self.kept)


def _units(groups: Tensor, count: int) -> Kronecker:
    """Blocks [Γ, I, I] of groups that have one output: each is 1 ⊗ itself."""
    return Kronecker(groups.new_ones(len(groups), 1, 1) * count, groups / count)


def _both_ways(uses: Sequence[tuple[OutputHessian, bool]], sharing: str) -> Kronecker:
    """Of a matrix that is used transposed (True): the nearest product to the sum over its uses."""
    factors = []
    for outputs, transposed in uses:
        one = outputs.kronecker(sharing)
        factors.append(Kronecker(one.input, one.output) if transposed else one)
    return functools.reduce(Kronecker.nearest_kronecker_sum, factors)
