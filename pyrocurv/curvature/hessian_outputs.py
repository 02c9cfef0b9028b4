"""Products with the Hessian in the outputs of one layer, and the layer's block computed from them.

For examples n, positions s, t and inputs a, the Hessian in the outputs of a layer is H_n[s, t]
[O, O], and the layer's block is

    C = sum_n sum_st H_n[s, t] ⊗ a_ns a_ntᵀ,   so   G = sum_n sum_s H_n[s, s] / S   for K-FAC,

with A = sum_ns a aᵀ / B: the conventions of the Gauss-Newton matrix, which H is where the network
is piecewise linear. One product serves all examples at once. This holds if no example affects the
loss of another (batch norm in training mode violates it); and for a layer that runs twice, C
ignores that its later inputs depend on its weights. G may be indefinite, and C too.

The groups Γ of a layer are like positions with H_n[s, t] = 0 for s ≠ t.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.curvature import hessian_weights
from pyrocurv.curvature.hessian_weights import (
    complete_basis,
    eigenspace_means,
    identity,
    rademacher,
    symmetric,
    vector_hessian_products,
)
from pyrocurv.curvature.layer_statistics import LayerStatistics
from pyrocurv.curvature.likelihood import ExampleSelection
from pyrocurv.layers.calls import OpCall
from pyrocurv.structures import Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling


@dataclass(frozen=True, eq=False)
class OutputHessian:
    """The Hessian in the outputs of calls of a layer, from the gradients there and their graph."""

    calls: Sequence[OpCall]
    gradients: Sequence[Tensor | None]
    examples: ExampleSelection
    chunk: int  # vectors of one batched pass
    num_samples: int

    @cached_property
    @torch.enable_grad()
    def gradient(self) -> Tensor:
        """The gradients of the selected examples, concatenated along S [*Γ, B, S, O]."""
        return self._rows(self.gradients)

    @cached_property
    def inputs(self) -> Tensor:
        """The inputs a [*Γ, B, S, I]."""
        rows = [call.input_rows(self.examples.count) for call in self.calls]
        return self.examples.select(torch.cat(rows, -2))

    def _rows(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients onto the outputs of the calls as rows [*Γ, B, S, O]."""
        rows = [
            call.output_gradient_rows(gradient, self.examples.count)
            for call, gradient in zip(self.calls, gradients, strict=True)
        ]
        return self.examples.select(torch.cat(rows, -2))

    @property
    def num_passes(self) -> int:
        """Γ·S·O, the backward passes that all of H takes."""
        return self.gradient[..., 0, :, :].numel()

    def matvec(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, *Γ, B, S, O]."""
        edges = [call.edge for call in self.calls]
        products = vector_hessian_products(self.gradient, edges, vectors)
        return torch.stack([
            self._rows([None if product is None else product[number] for product in products])
            for number in range(len(vectors))
        ])

    def _products(self, probe: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """H v for v = probe [*Γ, B, S] times each column of [*Γ, O, N], chunk by chunk."""
        rows = columns.movedim(-1, 0)[..., None, None, :]  # [N, *Γ, 1, 1, O]
        for start in range(0, len(rows), self.chunk):
            chunk = slice(start, start + self.chunk)
            yield chunk, self.matvec(probe[..., None] * rows[chunk])

    def _probes(self, each_position: bool) -> Tensor | None:
        """Indicators [N, *Γ, B, S] of one group, and of one position if `each_position`.

        None if they are too many.
        """
        *groups, examples, positions, outputs = self.gradient.shape
        axes = (*groups, 1, positions if each_position else 1)
        count = math.prod(axes)
        if count > 1 and count * outputs > hessian_weights.MAX_PASSES:
            return None
        probes = identity(self.gradient, count).view(count, *axes)
        return probes.expand(count, *groups, examples, positions)

    def kronecker(self, sharing: str) -> Kronecker:
        """G ⊗ A. With sharing "reduce" G = sum_n sum_st H_n[s, t], and A is of the mean inputs."""
        statistics = LayerStatistics(self.inputs[None], self.gradient.detach()[None])
        masked = self.examples.masked_positions
        if masked is not None and self.examples.index is not None:
            masked = masked[self.examples.index]
        (a,) = statistics.without(masked).share_weights(sharing).a
        rows, batch_size = a.flatten(-3, -2), a.shape[-3]
        return Kronecker(self.output_factor(sharing), (rows.mT @ rows) / batch_size)

    def output_factor(self, sharing: str) -> Tensor:
        """G [*Γ, O, O]."""
        each_position = sharing == "expand"
        *groups, examples, positions, outputs = self.gradient.shape
        probes, draws = self._probes(each_position), 1
        if probes is None:  # the expectation over independent signs leaves the terms with s = t
            draws = self.num_samples
            axes = (*groups, examples, positions if each_position else 1)
            probes = rademacher(
                draws, *axes, like=self.gradient
            ).expand(-1, *groups, examples, positions)
        total = self.gradient.new_zeros(*groups, outputs, outputs)
        columns = identity(self.gradient, outputs, *groups)
        for probe in probes:
            for chunk, product in self._products(probe, columns):
                total[..., chunk] += torch.einsum("...bs,n...bso->...on", probe, product)
        return symmetric(total) / (draws * (positions if each_position else 1))

    def quadratic(self, columns: Tensor, inputs: Tensor) -> Tensor:
        """sum_n sum_st (uᵀ H_n[s, t] u) α_ns α_nt for columns u [*Γ, O, N], α [*Γ, B, S, J].

        [*Γ, N, J].
        """
        probes, share = self._probes(True), 1.0
        if probes is not None:
            sides = torch.einsum("n...bs,...bsj->n...bj", probes, inputs)
        else:  # the expectation over independent signs leaves the terms of one column of α
            share = 1 / self.num_samples
            sides = rademacher(self.num_samples, *inputs.shape[:-2], inputs.shape[-1], like=inputs)
            probes = torch.einsum("n...bj,...bsj->n...bs", sides, inputs)
        total = inputs.new_zeros(*inputs.shape[:-3], columns.shape[-1], inputs.shape[-1])
        rows = columns.movedim(-1, 0)[..., None, None, :]
        for probe, side in zip(probes, sides, strict=True):
            for chunk, product in self._products(probe, columns):
                energy = (product * rows[chunk]).sum(-1)  # [N, *Γ, B, S]
                total[..., chunk, :] += share * torch.einsum(
                    "n...bs,...bsj,...bj->...nj", energy, inputs, side
                )
        return total

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None
    ) -> KroneckerEigen:
        """The mean of C, scaled by a prior, over the eigenspaces of a basis."""
        u, v = basis.output_basis, basis.input_basis
        columns, inputs = complete_basis(u), self.inputs
        if scaling is not None and scaling.roots is not None:
            p, r = scaling.roots
            columns, inputs = columns / p.unsqueeze(-1), inputs / r[..., None, None, :]
        projected = torch.einsum("...bsi,...ij->...bsj", inputs, v)
        if v.shape[-1] < v.shape[-2]:  # as with `complete_basis`, without forming that product
            projected = torch.cat([projected, inputs], -1)
        return eigenspace_means(self.quadratic(columns, projected), u, v)

    def diagonal(self) -> Tensor:
        """diag C [P]."""
        *groups, _, _, outputs = self.gradient.shape
        return self.quadratic(identity(self.gradient, outputs, *groups), self.inputs).flatten()
