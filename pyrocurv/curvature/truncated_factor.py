"""The leading eigenvectors of a wide running second moment, without any n x n matrix.

The running average of a Kronecker factor over estimates t, each a sum over rows x [n],

    A_t = (1 - w) A_{t-1} + w c Σ x xᵀ

is represented by r orthonormal columns V [n, r], the values λ [r] of A along them, and the diagonal
of A. With the rows Y = [ sqrt((1-w) λ) Vᵀ ; sqrt(w c) x ], the next V and λ are those of YᵀY, from
the eigenvectors of the small matrix Y Yᵀ. All other directions share one eigenvalue α, the mean of
the remaining trace, so the operator V diag(λ) Vᵀ + α (I - V Vᵀ) always has the trace of A.

Exact while all rows so far span at most r directions. After that, a direction that leaves the
leading ones is forgotten except for its share of the trace, so λ are lower bounds of the
eigenvalues of A, and weak directions that recur are found late. The idea is that of incremental
principal components (Levy & Lindenbaum 2000) with a forgetting factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import KroneckerEigen
from pyrocurv.structures.linalg import eigh_psd
from pyrocurv.structures.serialization import serializable

MAX_ROWS = 256  # rows of one estimate; positions beyond that are subsampled


@serializable
@dataclass(frozen=True, eq=False)
class TruncatedFactor:
    """V, λ and diag A, of rows that are scaled by the prior."""

    basis: Tensor  # [n, r], orthonormal columns
    values: Tensor  # [r], descending
    diagonal: Tensor  # [n], of A

    @staticmethod
    def zeros(like: Tensor, rank: int) -> TruncatedFactor:
        """A = 0, for rows [..., n]."""
        size = like.shape[-1]
        basis = torch.eye(size, rank, dtype=like.dtype, device=like.device)
        return TruncatedFactor(basis, basis.new_zeros(rank), basis.new_zeros(size))

    @property
    def spectrum(self) -> Tensor:
        """λ and, where r < n, the eigenvalue α."""
        rest = self.basis.shape[0] - self.basis.shape[1]
        if rest == 0:
            return self.values
        mean = (self.diagonal.sum() - self.values.sum()).clamp(min=0) / rest
        return torch.cat([self.values, mean[None]])

    def average(
        self, x: Tensor, scale: float, weight: float, workers: Workers = ALONE
    ) -> TruncatedFactor:
        """(1 - weight) A + weight · scale · Σ x xᵀ, for x [N, S, n] of all workers.

        If there are more than `MAX_ROWS` rows, some positions of each example are drawn, from
        torch's global generator, and scaled to the trace of all rows; the diagonal is of all rows.
        """
        (diagonal,) = workers.sums([x.square().sum((0, 1)) * scale])
        with workers.local_noise(x.device):
            rows = workers.rows(_subsample(x, MAX_ROWS // workers.size))
        norm = rows.square().sum()
        share = torch.where(norm > 0, diagonal.sum() / norm, norm)
        past = ((1 - weight) * self.values).sqrt()[:, None] * self.basis.mT
        y = torch.cat([past, (weight * share).sqrt() * rows])
        basis = _directions(y, len(self.values))
        values = (y @ basis).square().sum(0)
        return TruncatedFactor(basis, values, torch.lerp(self.diagonal, diagonal, weight))

    def average_matrix(self, matrix: Tensor, weight: float) -> TruncatedFactor:
        """(1 - weight) A + weight · matrix, for a matrix [n, n] that may be indefinite.

        The trace of A is exact; its largest eigenvalues are kept, negative ones as zero.
        """
        past = (self.basis * self.values) @ self.basis.mT
        values, vectors = eigh_psd(torch.lerp(past, matrix, weight))
        rank = len(self.values)
        diagonal = torch.lerp(self.diagonal, matrix.diagonal(), weight)
        return TruncatedFactor(vectors[:, -rank:].flip(-1), values[-rank:].flip(-1), diagonal)

    def rescaled(self, ratio: Tensor) -> TruncatedFactor:
        """The factor of rows x · ratio [n]: V, λ and the diagonal are exact, α is a mean again."""
        y = self.values.sqrt()[:, None] * self.basis.mT * ratio
        basis = _directions(y, len(self.values))
        values = (y @ basis).square().sum(0)
        return TruncatedFactor(basis, values, self.diagonal * ratio.square())


def product(output: TruncatedFactor, input: TruncatedFactor) -> KroneckerEigen:
    """G ⊗ A of two truncated factors."""
    spectrum = torch.outer(output.spectrum, input.spectrum)
    return KroneckerEigen(output.basis, input.basis, spectrum)


def _subsample(x: Tensor, limit: int) -> Tensor:
    """Rows [M, n] of x [N, S, n]: all of them, or equally many random positions of each example."""
    examples, positions = x.shape[:2]
    count = max(1, limit // max(1, examples))
    if positions <= count:
        return x.flatten(0, 1)
    chosen = torch.rand(examples, positions, device=x.device).topk(count).indices
    return x[torch.arange(examples, device=x.device)[:, None], chosen].flatten(0, 1)


def _directions(y: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors of y [M, n], as orthonormal columns [n, rank].

    Where y has fewer, QR adds columns that are orthogonal to it.
    """
    if len(y) >= y.shape[1]:
        return eigh_psd(y.mT @ y)[1][:, -rank:].flip(-1)
    _, vectors = eigh_psd(y @ y.mT)
    return torch.linalg.qr(y.mT @ vectors[:, -rank:].flip(-1)).Q


def mean_squares(a: Tensor, g: Tensor, basis: KroneckerEigen) -> KroneckerEigen:
    """The mean of sum_kn vec(J) vec(J)ᵀ over the basis' eigenspaces, J_kn = sum_s g_kns a_nsᵀ.

    For inputs a [B, S, I] and gradients g [K, B, S, O]. No J [O, I] of a wide layer is formed:
    |uᵀJ|², |J v|² and |J|² suffice for the directions outside of the columns.
    """
    u, v = basis.output_basis, basis.input_basis
    (outputs, s), (inputs, r) = u.shape, v.shape
    spectrum = torch.zeros_like(basis.spectrum)
    projected = a @ v  # [B, S, r]
    for gradient in g:
        leading = gradient @ u  # [B, S, s]
        spectrum[:s, :r] += (leading.mT @ projected).square().sum(0)
        if r < inputs:
            spectrum[:s, r] += (leading.mT @ a).square().sum((0, 2))
        if s < outputs:
            spectrum[s, :r] += (gradient.mT @ projected).square().sum((0, 1))
        if r < inputs and s < outputs:
            spectrum[s, r] += _squared_norm(gradient, a)
    if r < inputs:  # so far the last column holds the sums over all inputs
        spectrum[:, r] -= spectrum[:, :r].sum(1)
        spectrum[:, r] /= inputs - r
    if s < outputs:
        spectrum[s] -= spectrum[:s].sum(0)
        spectrum[s] /= outputs - s
    return KroneckerEigen(u, v, spectrum.clamp(min=0))


def _squared_norm(g: Tensor, a: Tensor) -> Tensor:
    """sum_n |g_nᵀ a_n|², for g [B, S, O] and a [B, S, I]."""
    if a.shape[1] ** 2 > g.shape[2] * a.shape[2]:
        return torch.bmm(g.mT, a).square().sum()
    return (torch.bmm(g, g.mT) * torch.bmm(a, a.mT)).sum()
