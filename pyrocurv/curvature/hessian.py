"""The Hessian of the negative log likelihood, by backward passes through its gradient's graph.

"full", "block" and "diag" are exact for any network: a pass for each row, in the weights. Kronecker
structures go through the outputs of a layer, see `in_outputs`, and so does the diagonal of a layer
of more than `PASSES` weights that runs once at few positions. Where that too would take more than
`PASSES` passes the answer comes from `num_samples` draws of random signs (Hutchinson 1990), without
bias: for the diagonal, for G, and for the eigenvalues of EK-FAC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.capture import Call
from pyrocurv.curvature.in_outputs import PASSES, InOutputs
from pyrocurv.curvature.in_weights import InWeights, chunk_size
from pyrocurv.curvature.pullback import Observation
from pyrocurv.curvature.reduce import Pairs, gather, only
from pyrocurv.layers import Layer
from pyrocurv.structures import Dense, Diagonal, KroneckerEigen

IN_WEIGHTS = ("full", "block", "diag")


def energy(terms: Sequence[Observation], count: int) -> Tensor:
    """L of the first `count` examples, weights and masks applied."""
    return -sum(_log_prob(term, count) for term in terms)  # type: ignore[return-value]


def _log_prob(term: Observation, count: int) -> Tensor:
    log_prob = term.likelihood.log_prob(term.value)
    if term.mask is not None:
        mask = torch.as_tensor(term.mask, device=log_prob.device)
        log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
    log_prob = log_prob * term.weight
    return (log_prob[:count] if log_prob.dim() else log_prob).sum()


@dataclass(frozen=True, eq=False)
class BlockHessian:
    """What the graph of g says of one block, a SUM over the examples, in the block's structure."""

    plain: Any  # before any eigenbasis: Dense, Diagonal or Kronecker
    pairs: Pairs  # the inputs a and the gradients g of its layers, without their graph
    outputs: InOutputs | None  # of a block with a Kronecker structure

    def eigen(
        self, basis: KroneckerEigen, units: tuple[Tensor, Tensor] | None = None
    ) -> KroneckerEigen:
        """The nearest matrix to the block's Hessian on these eigenspaces."""
        assert self.outputs is not None
        return self.outputs.eigen(basis, units)


def hessians(
    blocks: Sequence[Block], terms: Sequence[Observation], calls: Sequence[Call], count: int,
    num_samples: int, kept: Tensor | None = None,
) -> list[BlockHessian]:
    """The Hessian of each block, from the first `count` examples; `kept` are those not masked.

    The graph of the forward pass is kept; nobody's `.grad` is touched.
    """
    edges = [call.edge for call in calls]
    if None in edges:
        raise RuntimeError("the forward pass ran without gradients: curvature needs its graph")
    dense = {name for block in blocks if block.structure in IN_WEIGHTS for name in block.tensors}
    leaves = {name: leaf for call in calls for name, leaf in call.leaves.items() if name in dense}
    loss, wanted = energy(terms, count), [*leaves.values(), *edges]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)  # type: ignore[arg-type]
    gradients = {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), found, strict=False)
    }
    arranged = [
        call.gradients(g, count).unsqueeze(0)
        for call, g in zip(calls, found[len(leaves):], strict=True)
    ]

    def in_weights(block: Block) -> InWeights:
        held = tuple(leaves[name] for name in block.tensors)
        return InWeights(block, block.pack(gradients), held, chunk_size(calls, block.size))

    def in_outputs(layer: Layer, inputs: Tensor, gradient: Tensor) -> InOutputs:
        mine = tuple(call for call in calls if call.layer == layer)
        return InOutputs(mine, gradient[0], inputs, count, kept, num_samples)

    def diagonal(layer: Layer, outputs: InOutputs) -> Tensor:
        weights = in_weights(Block((layer,), "diag"))
        if layer.size <= PASSES:
            return weights.diagonal()
        if len(outputs.calls) == 1 and outputs.passes <= PASSES:
            return outputs.diagonal()
        return weights.probed_diagonal(num_samples)

    def one(block: Block) -> BlockHessian:
        seen = only(gather(block, calls, arranged, count), kept)
        pairs = [(a, g.detach()) for a, g in seen]
        if block.structure in ("full", "block"):
            return BlockHessian(Dense(in_weights(block).matrix()), pairs, None)
        outputs = [
            in_outputs(layer, *pair) for layer, pair in zip(block.layers, seen, strict=True)
        ]
        if block.structure == "diag":
            parts = map(diagonal, block.layers, outputs)
            return BlockHessian(Diagonal(torch.cat(list(parts))), pairs, None)
        return BlockHessian(outputs[0].kronecker(), pairs, outputs[0])

    return [one(block) for block in blocks]
