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

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.capture import Call
from pyrocurv.curvature.in_outputs import PASSES, InOutputs
from pyrocurv.curvature.in_weights import InWeights, chunk_size
from pyrocurv.curvature.pullback import Observation
from pyrocurv.curvature.reduce import gather
from pyrocurv.layers import Layer
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure


def energy(terms: Sequence[Observation], count: int) -> Tensor:
    """L of the first `count` examples, weights and masks applied."""
    total = torch.zeros(())
    for term in terms:
        log_prob = term.likelihood.log_prob(term.value)
        if term.mask is not None:
            mask = torch.as_tensor(term.mask, device=log_prob.device)
            log_prob = torch.where(mask, log_prob, torch.zeros_like(log_prob))
        log_prob = log_prob * term.weight
        total = total.to(log_prob.device) - (log_prob[:count] if log_prob.dim() else log_prob).sum()
    return total


@dataclass(frozen=True, eq=False)
class BlockHessian:
    """What the graph of g says of one block, a SUM over the examples, in the block's structure."""

    plain: Structure  # before any eigenbasis
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
    loss = energy(terms, count)
    edges = [call.edge for call in calls]
    leaves = {name: leaf for call in calls for name, leaf in call.leaves.items()}
    if None in edges:
        raise RuntimeError("the forward pass ran without gradients: curvature needs its graph")
    wanted = [*leaves.values(), *edges]
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

    def in_outputs(layer: Layer) -> InOutputs:
        ((inputs, gradient),) = gather(Block((layer,), "kfac"), calls, arranged, count)
        rows = torch.arange(count, device=inputs.device) if kept is None else kept
        mine = tuple(call for call in calls if call.layer == layer)
        return InOutputs(
            mine, gradient[0].index_select(-3, rows), inputs.index_select(-3, rows), count, rows,
            num_samples,
        )

    def diagonal(layer: Layer) -> Tensor:
        if layer.size > PASSES and sum(call.layer == layer for call in calls) == 1:
            outputs = in_outputs(layer)
            if outputs.is_exact and outputs.spots * layer.rows <= PASSES:
                return outputs.diagonal()
        weights = in_weights(Block((layer,), "diag"))
        return weights.diagonal() if layer.size <= PASSES else weights.probed_diagonal(num_samples)

    def one(block: Block) -> BlockHessian:
        if block.structure == "diag":
            return BlockHessian(Diagonal(torch.cat([diagonal(layer) for layer in block.layers])), None)
        if block.structure in ("full", "block"):
            return BlockHessian(Dense(in_weights(block).matrix()), None)
        (layer,) = block.layers
        outputs = in_outputs(layer)
        return BlockHessian(outputs.kronecker(), outputs)

    return [one(block) for block in blocks]
