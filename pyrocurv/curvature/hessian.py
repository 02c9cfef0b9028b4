"""The Hessian of the negative log likelihood, by backward passes through its gradient's graph.

With L = -sum_n log p(y_n) and g = ∇L, a vector v gives one product H v = ∇(gᵀv). In the weights
themselves this makes the matrix row by row, for any network. In the outputs of a layer, at examples
n and positions s, t, it gives H_n[s, t] [O, O], and the layer's block is

    C = sum_n sum_st H_n[s, t] ⊗ a_ns a_ntᵀ,   so   G = sum_n sum_s H_n[s, s] / S   for K-FAC,

beside A = sum_ns a aᵀ / B: the conventions of the Gauss-Newton matrix, which H is where the network
is piecewise linear. One product serves all examples at once. That holds as long as no example
reaches another's loss (batch norm in training mode does); and C leaves out, for a layer that runs
twice, that its later inputs move with its weights.

An answer that takes no more than `PASSES` backward passes is exact; past that it comes from
`num_samples` draws of random signs (Hutchinson 1989), without bias. G may be indefinite, and C too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyrocurv.blocks import Block, positions
from pyrocurv.capture import Call
from pyrocurv.curvature.pullback import Observation
from pyrocurv.curvature.reduce import gather
from pyrocurv.layers import Layer
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen, Structure

PASSES = 512  # backward passes for one layer's exact diagonal or output Hessians
NUMBERS = 2**22  # that the vectors of one batched pass, and all on their way, should not exceed


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


def products(
    gradient: Tensor, inputs: Sequence[Tensor | GradientEdge], vectors: Tensor
) -> list[Tensor | None]:
    """For each of vectors [N, *gradient.shape] the gradients of its product with `gradient`.

    One batched pass, or a loop where an op on the way has no batched form. None: no path.
    """
    if not gradient.requires_grad:  # L is linear
        return [None] * len(inputs)
    if len(vectors) > 1:
        try:
            return list(torch.autograd.grad(
                gradient, inputs, vectors, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            ))
        except RuntimeError:
            pass  # a true fault comes up again below
    rows = [
        torch.autograd.grad(gradient, inputs, v, retain_graph=True, allow_unused=True)
        for v in vectors
    ]
    return [None if part[0] is None else torch.stack(part) for part in zip(*rows, strict=True)]


def signs(*shape: int, like: Tensor) -> Tensor:
    """Independent entries ±1."""
    return torch.randint(2, shape, device=like.device).to(like.dtype) * 2 - 1


def _chunk(calls: Sequence[Call], size: int) -> int:
    """How many vectors of `size` to send at once."""
    return max(1, NUMBERS // max(size, *(call.output_shape.numel() for call in calls)))


@dataclass(frozen=True, eq=False)
class InWeights:
    """g in the weights of a block, packed [P], with its graph; the weights are its leaves."""

    block: Block
    gradient: Tensor
    leaves: tuple[Tensor, ...]
    chunk: int

    def times(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, P]."""
        found = products(self.gradient, self.leaves, vectors)
        parts = [
            vectors.new_zeros(len(vectors), leaf.numel()) if part is None else part.flatten(1)
            for part, leaf in zip(found, self.leaves, strict=True)
        ]
        (order,) = positions((self.block,), self.block.tensors)
        return torch.cat(parts, 1)[:, order.to(vectors.device)]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers [N] and those rows of H [N, P], some at a time."""
        numbers = torch.arange(self.block.size, device=self.gradient.device)
        for some in numbers.split(self.chunk):
            vectors = self.gradient.new_zeros(len(some), self.block.size)
            yield some, self.times(vectors.scatter_(1, some[:, None], 1.0))

    def matrix(self) -> Tensor:
        """H [P, P]."""
        return _symmetric(torch.cat([rows for _, rows in self.rows()]))

    def diagonal(self) -> Tensor:
        """diag H [P], in P passes."""
        return torch.cat([rows.gather(1, some[:, None])[:, 0] for some, rows in self.rows()])

    def probed_diagonal(self, num_samples: int) -> Tensor:
        """The mean of v ∘ H v over random signs; its variance is 2 sum_j≠i H_ij² / num_samples."""
        vectors = signs(num_samples, self.block.size, like=self.gradient)
        parts = [v * self.times(v) for v in vectors.split(self.chunk)]
        return torch.cat(parts).mean(0)


@dataclass(frozen=True, eq=False)
class InOutputs:
    """g in the outputs of all runs of a layer [*Γ, B, S, O], with its graph, and the inputs a.

    The examples are the rows `kept` of the first `count`.
    """

    calls: tuple[Call, ...]
    gradient: Tensor
    inputs: Tensor  # [*Γ, B, S, I]
    count: int
    kept: Tensor
    num_samples: int

    @property
    def spots(self) -> int:
        """Γ·S."""
        return self.gradient[..., 0, :, 0].numel()

    @property
    def is_exact(self) -> bool:
        """Whether it is cheap to take the positions one by one."""
        return self.spots == 1 or self.spots * self.gradient.shape[-1] <= PASSES

    def times(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, *Γ, B, S, O]."""
        edges = [call.edge for call in self.calls]
        found = products(self.gradient, edges, vectors)  # type: ignore[arg-type]
        rows = []
        for number in range(len(vectors)):
            parts = [
                call.gradients(None if part is None else part[number], self.count)
                for call, part in zip(self.calls, found, strict=True)
            ]
            rows.append(torch.cat(parts, -2).index_select(-3, self.kept))
        return torch.stack(rows)

    def along(self, place: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """H v for v = place [*Γ, B, S] times each column of [*Γ, O, N], some at a time."""
        rows = columns.movedim(-1, 0)[..., None, None, :]  # [N, *Γ, 1, 1, O]
        chunk = _chunk(self.calls, self.gradient.numel())
        for start in range(0, len(rows), chunk):
            some = slice(start, start + chunk)
            yield some, self.times(place[..., None] * rows[some])

    def places(self) -> Iterator[Tensor]:
        """One position after the other [*Γ, B, S]: 1 there, 0 elsewhere."""
        *groups, examples, shared, _ = self.gradient.shape
        one_hot = torch.eye(self.spots).to(self.gradient).view(-1, *groups, 1, shared)
        return iter(one_hot.expand(-1, *groups, examples, shared))

    def kronecker(self) -> Kronecker:
        """G ⊗ A."""
        *groups, examples, shared, outputs = self.gradient.shape
        total = self.gradient.new_zeros(*groups, outputs, outputs)
        if self.is_exact:
            places, draws = self.places(), 1
        else:  # signs that differ between positions leave the terms s = t
            shape, draws = self.gradient.shape[:-1], self.num_samples
            places = iter(signs(draws, *shape, like=self.gradient))
        columns = _identity(self.gradient, groups, outputs)
        for place in places:
            for some, product in self.along(place, columns):
                total[..., some] += torch.einsum("...bs,n...bso->...on", place, product)
        rows = self.inputs.flatten(-3, -2)
        return Kronecker(
            _symmetric(total) / (draws * shared), (rows.mT @ rows) / examples
        )

    def quadratic(self, columns: Tensor, along: Tensor) -> Tensor:
        """sum_n sum_st (uᵀ H_n[s, t] u) α_ns α_nt for columns u [*Γ, O, N], α [*Γ, B, S, J].

        [*Γ, N, J]; without the cross terms of groups.
        """
        total = along.new_zeros(*along.shape[:-3], columns.shape[-1], along.shape[-1])
        if self.is_exact:
            sides = (
                (place, torch.einsum("...bs,...bsj->...bj", place, along))
                for place in self.places()
            )
        else:  # signs that differ between the columns of α leave the terms of one column
            shape = *along.shape[:-2], along.shape[-1]
            sides = (
                (torch.einsum("...bj,...bsj->...bs", sign, along), sign / self.num_samples)
                for sign in signs(self.num_samples, *shape, like=along)
            )
        rows = columns.movedim(-1, 0)[..., None, None, :]
        for place, side in sides:
            for some, product in self.along(place, columns):
                energy = (product * rows[some]).sum(-1)  # [N, *Γ, B, S]
                total[..., some, :] += torch.einsum(
                    "n...bs,...bsj,...bj->...nj", energy, along, side
                )
        return total

    def eigen(
        self, basis: KroneckerEigen, units: tuple[Tensor, Tensor] | None = None
    ) -> KroneckerEigen:
        """The mean of C over the basis' eigenspaces, in the units p [*Γ, O] and r [*Γ, I]."""
        u, v = basis.output_basis, basis.input_basis
        columns, along = _spanning(u), self.inputs
        if units is not None:
            columns, along = columns / units[0].unsqueeze(-1), along / units[1][..., None, None, :]
        table = self.quadratic(columns, along @ _spanning(v))
        table = _means(_means(table, v).mT, u).mT
        return KroneckerEigen(u, v, table)

    def diagonal(self) -> Tensor:
        """diag C [P]."""
        *groups, _, _, outputs = self.gradient.shape
        return self.quadratic(_identity(self.gradient, groups, outputs), self.inputs).flatten()


def _identity(like: Tensor, groups: Sequence[int], size: int) -> Tensor:
    return torch.eye(size).to(like).expand(*groups, size, size)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _spanning(basis: Tensor) -> Tensor:
    """The columns of a basis; of a truncated one, and those of the identity beside them."""
    *groups, size, rank = basis.shape
    return basis if size == rank else torch.cat([basis, _identity(basis, groups, size)], -1)


def _means(table: Tensor, basis: Tensor) -> Tensor:
    """[..., N] over the columns of `_spanning` -> the basis' own and, if truncated, the rest."""
    size, rank = basis.shape[-2:]
    if size == rank:
        return table
    leading = table[..., :rank]
    rest = table[..., rank:].sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)
    return torch.cat([leading, rest / (size - rank)], -1)


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
        return InWeights(block, block.pack(gradients), held, _chunk(calls, block.size))

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
