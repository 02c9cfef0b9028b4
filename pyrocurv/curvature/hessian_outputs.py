"""Products with the Hessian in the outputs of one layer, and what a layer's block is made of.

At examples n and positions s, t of a layer with inputs a the Hessian in its outputs is H_n[s, t]
[O, O], and the layer's block

    C = sum_n sum_st H_n[s, t] ⊗ a_ns a_ntᵀ,   so   G = sum_n sum_s H_n[s, s] / S   for K-FAC,

beside A = sum_ns a aᵀ / B: the conventions of the Gauss-Newton matrix, which H is where the network
is piecewise linear. One product serves all examples at once. That holds as long as no example
reaches another's loss (batch norm in training mode does); and C leaves out, for a layer that runs
twice, that its later inputs move with its weights. G may be indefinite, and C too.

The groups Γ of a layer are like positions that do not meet in C.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.curvature import hessian_weights, layer_statistics
from pyrocurv.curvature.hessian_weights import (
    Units,
    complete_basis,
    eigenspace_means,
    identity,
    rademacher,
    symmetric,
    vector_hessian_products,
)
from pyrocurv.layers.calls import OpCall
from pyrocurv.structures import Kronecker, KroneckerEigen


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """g in the outputs of runs of a layer [*Γ, B, S, O], with its graph, and the inputs a.

    The examples are those of the first `count` that are `kept`, all if None.
    """

    calls: tuple[OpCall, ...]
    gradient: Tensor
    inputs: Tensor  # [*Γ, B, S, I]
    count: int
    kept: Tensor | None
    chunk: int  # vectors that go at once
    num_samples: int
    masked: Tensor | None = None  # [B, S], see `reduce.gather`

    @staticmethod
    def of(
        calls: Sequence[OpCall], gradients: Sequence[
            Tensor | None
        ], count: int, kept: Tensor | None,
        chunk: int, num_samples: int, masked: Tensor | None = None,
    ) -> OutputHessian:
        """From the gradients onto the outputs of some calls, joined along S."""
        inputs = _kept(torch.cat([call.input_rows(count) for call in calls], -2), kept)
        gradient = _arranged(calls, gradients, count, kept)
        masked = masked if masked is None or kept is None else masked[kept]
        return OutputHessian(
            tuple(calls), gradient, inputs, count, kept, chunk, num_samples, masked
        )

    @property
    def passes(self) -> int:
        """Γ·S·O, for all of H."""
        return self.gradient[..., 0, :, :].numel()

    def matvec(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, *Γ, B, S, O]."""
        edges = [call.edge for call in self.calls]
        found = vector_hessian_products(self.gradient, edges, vectors)
        return torch.stack([
            _arranged(self.calls, [None if part is None else part[number] for part in found],
                      self.count, self.kept)
            for number in range(len(vectors))
        ])

    def _along(self, place: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """H v for v = place [*Γ, B, S] times each column of [*Γ, O, N], some at a time."""
        rows = columns.movedim(-1, 0)[..., None, None, :]  # [N, *Γ, 1, 1, O]
        for start in range(0, len(rows), self.chunk):
            some = slice(start, start + self.chunk)
            yield some, self.matvec(place[..., None] * rows[some])

    def _places(self, apart: bool) -> Tensor | None:
        """One place after the other [N, *Γ, B, S]: 1 there, 0 elsewhere. None: they are too many.

        Places are groups and, where they are taken apart, positions.
        """
        *groups, examples, shared, outputs = self.gradient.shape
        axes = (*groups, 1, shared if apart else 1)
        count = math.prod(axes)
        if count > 1 and count * outputs > hessian_weights.PASSES:
            return None
        places = identity(self.gradient, count).view(count, *axes)
        return places.expand(count, *groups, examples, shared)

    def kronecker(self, sharing: str) -> Kronecker:
        """G ⊗ A. With sharing "reduce" G = sum_n sum_st H_n[s, t], and A is of the mean inputs."""
        pair = layer_statistics.LayerStatistics(
            self.inputs[None], self.gradient.detach()[None]
        ).without(self.masked)
        (rows,) = layer_statistics.apply_weight_sharing(pair, sharing).a
        rows, examples = rows.flatten(-3, -2), rows.shape[-3]
        return Kronecker(self.output(sharing), (rows.mT @ rows) / examples)

    def output(self, sharing: str) -> Tensor:
        """G [*Γ, O, O]."""
        apart = sharing == "expand"
        *groups, examples, shared, outputs = self.gradient.shape
        places, draws = self._places(apart), 1
        if places is None:  # signs that differ between places leave the terms of one place
            draws, axes = self.num_samples, (*groups, examples, shared if apart else 1)
            places = rademacher(
                draws, *axes, like=self.gradient
            ).expand(-1, *groups, examples, shared)
        total = self.gradient.new_zeros(*groups, outputs, outputs)
        columns = identity(self.gradient, outputs, *groups)
        for place in places:
            for some, product in self._along(place, columns):
                total[..., some] += torch.einsum("...bs,n...bso->...on", place, product)
        return symmetric(total) / (draws * (shared if apart else 1))

    def quadratic(self, columns: Tensor, along: Tensor) -> Tensor:
        """sum_n sum_st (uᵀ H_n[s, t] u) α_ns α_nt for columns u [*Γ, O, N], α [*Γ, B, S, J].

        [*Γ, N, J].
        """
        places, share = self._places(True), 1.0
        if places is not None:
            sides = torch.einsum("n...bs,...bsj->n...bj", places, along)
        else:  # signs that differ between the columns of α leave the terms of one column
            share = 1 / self.num_samples
            sides = rademacher(self.num_samples, *along.shape[:-2], along.shape[-1], like=along)
            places = torch.einsum("n...bj,...bsj->n...bs", sides, along)
        total = along.new_zeros(*along.shape[:-3], columns.shape[-1], along.shape[-1])
        rows = columns.movedim(-1, 0)[..., None, None, :]
        for place, side in zip(places, sides, strict=True):
            for some, product in self._along(place, columns):
                energy = (product * rows[some]).sum(-1)  # [N, *Γ, B, S]
                total[..., some, :] += share * torch.einsum(
                    "n...bs,...bsj,...bj->...nj", energy, along, side
                )
        return total

    def eigen(self, basis: KroneckerEigen, units: Units | None) -> KroneckerEigen:
        """The mean of C over the eigenspaces of a basis, in the units of a prior."""
        u, v = basis.output_basis, basis.input_basis
        columns, along = complete_basis(u), self.inputs
        if units is not None:
            columns, along = columns / units[0].unsqueeze(-1), along / units[1][..., None, None, :]
        leading = torch.einsum("...bsi,...ij->...bsj", along, v)
        if v.shape[-1] < v.shape[-2]:  # as with `complete_basis`, of which no product is formed
            leading = torch.cat([leading, along], -1)
        along = leading
        return eigenspace_means(self.quadratic(columns, along), u, v)

    def diagonal(self) -> Tensor:
        """diag C [P]."""
        *groups, _, _, outputs = self.gradient.shape
        return self.quadratic(identity(self.gradient, outputs, *groups), self.inputs).flatten()


def _arranged(
    calls: Sequence[OpCall], gradients: Sequence[Tensor | None], count: int, kept: Tensor | None
) -> Tensor:
    """Gradients onto the outputs of calls as rows [*Γ, B, S, O]."""
    parts = zip(calls, gradients, strict=True)
    rows = [call.output_gradient_rows(gradient, count) for call, gradient in parts]
    return _kept(torch.cat(rows, -2), kept)


def _kept(rows: Tensor, kept: Tensor | None) -> Tensor:
    return rows if kept is None else rows.index_select(-3, kept)
