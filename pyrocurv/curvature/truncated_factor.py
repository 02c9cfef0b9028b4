"""The leading part of a wide running second moment, kept up from rows; no n x n matrix is formed.

The running average of a Kronecker factor over estimates t, each a sum over rows x [n],

    A_t = (1 - w) A_{t-1} + w c Σ x xᵀ

is kept as r orthonormal columns V [n, r], what A carries along them, λ [r], and the diagonal of A.
With the rows of Y = [ sqrt((1-w) λ) Vᵀ ; sqrt(w c) x ], r + rows of them, the next leading part is
that of YᵀY, read from the eigenvectors of the small Y Yᵀ. All else is one eigenvalue, the mean that
the trace leaves, so the operator V diag(λ) Vᵀ + α (I - V Vᵀ) has A's trace at all times.

Exact while all rows so far span at most r directions. After that a direction that has left the
leading ones is forgotten but for its share of the trace, so λ are lower bounds of A's eigenvalues,
and weak directions that keep coming back are found late. The idea is that of incremental principal
components (Levy & Lindenbaum 2000) with a forgetting factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures import KroneckerEigen
from pyrocurv.structures.linalg import eigh_psd
from pyrocurv.structures.serialization import serializable

ROWS = 256  # of one estimate: more positions than that are sampled


@serializable
@dataclass(frozen=True, eq=False)
class TruncatedFactor:
    """V, λ and diag A, in the units of the prior: the rows are x / root there."""

    basis: Tensor  # [n, r], orthonormal columns
    values: Tensor  # [r], descending
    diagonal: Tensor  # [n], of the whole of A

    @staticmethod
    def zeros(like: Tensor, rank: int) -> TruncatedFactor:
        """A = 0, for rows like `like` [..., n]."""
        size = like.shape[-1]
        basis = torch.eye(size, rank, dtype=like.dtype, device=like.device)
        return TruncatedFactor(basis, basis.new_zeros(rank), basis.new_zeros(size))

    @property
    def spectrum(self) -> Tensor:
        """λ and, where r < n, the eigenvalue of all that is orthogonal to V."""
        rest = self.basis.shape[0] - self.basis.shape[1]
        if rest == 0:
            return self.values
        left = (self.diagonal.sum() - self.values.sum()).clamp(min=0) / rest
        return torch.cat([self.values, left[None]])

    def average(self, x: Tensor, scale: float, weight: float) -> TruncatedFactor:
        """(1 - weight) A + weight · scale · Σ x xᵀ, for x [N, S, n].

        Of more than `ROWS` rows some positions of each example are drawn, from torch's global
        generator, and scaled to the trace of all; the diagonal always is that of all.
        """
        diagonal = x.square().sum((0, 1)) * scale
        rows = _some(x)
        energy = rows.square().sum()
        share = torch.where(energy > 0, diagonal.sum() / energy, energy)
        past = ((1 - weight) * self.values).sqrt()[:, None] * self.basis.mT
        y = torch.cat([past, (weight * share).sqrt() * rows])
        basis = _directions(y, len(self.values))
        values = (y @ basis).square().sum(0)
        return TruncatedFactor(basis, values, torch.lerp(self.diagonal, diagonal, weight))

    def average_matrix(self, matrix: Tensor, weight: float) -> TruncatedFactor:
        """(1 - weight) A + weight · matrix [n, n], which may be indefinite: A's trace is exact, and
        of its eigenvalues the largest are kept, none below zero."""
        past = (self.basis * self.values) @ self.basis.mT
        values, vectors = eigh_psd(torch.lerp(past, matrix, weight))
        rank = len(self.values)
        diagonal = torch.lerp(self.diagonal, matrix.diagonal(), weight)
        return TruncatedFactor(vectors[:, -rank:].flip(-1), values[-rank:].flip(-1), diagonal)

    def rescaled(self, ratio: Tensor) -> TruncatedFactor:
        """In other units, with rows x · ratio [n]: the leading part and the diagonal are carried
        over exactly, only the rest is spread evenly again."""
        y = self.values.sqrt()[:, None] * self.basis.mT * ratio
        basis = _directions(y, len(self.values))
        values = (y @ basis).square().sum(0)
        return TruncatedFactor(basis, values, self.diagonal * ratio.square())


def product(output: TruncatedFactor, input: TruncatedFactor) -> KroneckerEigen:
    """G ⊗ A of two such sides, each one's rest at its mean."""
    spectrum = torch.outer(output.spectrum, input.spectrum)
    return KroneckerEigen(output.basis, input.basis, spectrum)


def _some(x: Tensor) -> Tensor:
    """Rows [M, n] of x [N, S, n]: all of them, or as many positions of each example as fit."""
    examples, positions = x.shape[:2]
    count = max(1, ROWS // examples)
    if positions <= count:
        return x.flatten(0, 1)
    chosen = torch.rand(examples, positions, device=x.device).topk(count).indices
    each = torch.arange(examples, device=x.device)[:, None]
    return x[each, chosen].flatten(0, 1)


def _directions(y: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of y [M, n], as orthonormal columns [n, rank].

    Where y has fewer, QR fills up with some that are orthogonal to it.
    """
    if len(y) >= y.shape[1]:
        return eigh_psd(y.mT @ y)[1][:, -rank:].flip(-1)
    _, vectors = eigh_psd(y @ y.mT)
    found = y.mT @ vectors[:, -rank:].flip(-1)
    return torch.linalg.qr(found).Q


def mean_squares(a: Tensor, g: Tensor, basis: KroneckerEigen) -> KroneckerEigen:
    """The mean of sum_kn vec(J) vec(J)ᵀ over the basis' eigenspaces, J_kn = sum_s g_kns a_nsᵀ.

    For inputs a [B, S, I] and gradients g [K, B, S, O]; no J [O, I] of a wide layer is formed,
    since |uᵀJ|², |J v|² and |J|² are enough for what lies outside the columns.
    """
    u, v = basis.output_basis, basis.input_basis
    (outputs, s), (inputs, r) = u.shape, v.shape
    spectrum = torch.zeros_like(basis.spectrum)
    projected = a @ v  # [B, S, r]
    for gradient in g:
        transposed = gradient @ u  # [B, S, s]
        spectrum[:s, :r] += (transposed.mT @ projected).square().sum(0)
        if r < inputs:
            spectrum[:s, r] += (transposed.mT @ a).square().sum((0, 2))
        if s < outputs:
            spectrum[s, :r] += (gradient.mT @ projected).square().sum((0, 1))
        if r < inputs and s < outputs:
            spectrum[s, r] += _square_norm(gradient, a)
    if r < inputs:  # so far the last column is of whole rows
        spectrum[:, r] -= spectrum[:, :r].sum(1)
        spectrum[:, r] /= inputs - r
    if s < outputs:
        spectrum[s] -= spectrum[:s].sum(0)
        spectrum[s] /= outputs - s
    return KroneckerEigen(u, v, spectrum.clamp(min=0))


def _square_norm(g: Tensor, a: Tensor) -> Tensor:
    """sum_n |g_nᵀ a_n|², for g [B, S, O] and a [B, S, I]."""
    if a.shape[1] ** 2 > g.shape[2] * a.shape[2]:
        return torch.bmm(g.mT, a).square().sum()
    return (torch.bmm(g, g.mT) * torch.bmm(a, a.mT)).sum()
