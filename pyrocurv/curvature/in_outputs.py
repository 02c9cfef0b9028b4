"""Products with the Hessian in the outputs of one layer, and what a layer's block is made of.

At examples n and positions s, t of a layer with inputs a the Hessian in its outputs is H_n[s, t]
[O, O], and the layer's block

    C = sum_n sum_st H_n[s, t] ⊗ a_ns a_ntᵀ,   so   G = sum_n sum_s H_n[s, s] / S   for K-FAC,

beside A = sum_ns a aᵀ / B: the conventions of the Gauss-Newton matrix, which H is where the network
is piecewise linear. One product serves all examples at once. That holds as long as no example
reaches another's loss (batch norm in training mode does); and C leaves out, for a layer that runs
twice, that its later inputs move with its weights. G may be indefinite, and C too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.capture import Call
from pyrocurv.curvature.in_weights import chunk_size, products, signs, symmetric
from pyrocurv.structures import Kronecker, KroneckerEigen

PASSES = 512  # backward passes that an exact answer may take for one layer


@dataclass(frozen=True, eq=False)
class InOutputs:
    """g in the outputs of all runs of a layer [*Γ, B, S, O], with its graph, and the inputs a.

    The examples are those of the first `count` that are `kept`, all if None.
    """

    calls: tuple[Call, ...]
    gradient: Tensor
    inputs: Tensor  # [*Γ, B, S, I]
    count: int
    kept: Tensor | None
    num_samples: int

    @property
    def spots(self) -> int:
        """Γ·S."""
        return self.gradient[..., 0, :, 0].numel()

    @property
    def passes(self) -> int:
        """Γ·S·O, for all of H."""
        return self.spots * self.gradient.shape[-1]

    @property
    def is_exact(self) -> bool:
        """Whether the positions are taken one by one."""
        return self.spots == 1 or self.passes <= PASSES

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
            rows.append(torch.cat(parts, -2))
        found_rows = torch.stack(rows)
        return found_rows if self.kept is None else found_rows.index_select(-3, self.kept)

    def along(self, place: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """H v for v = place [*Γ, B, S] times each column of [*Γ, O, N], some at a time."""
        rows = columns.movedim(-1, 0)[..., None, None, :]  # [N, *Γ, 1, 1, O]
        chunk = chunk_size(self.calls, self.gradient.numel())
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
            symmetric(total) / (draws * shared), (rows.mT @ rows) / examples
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
