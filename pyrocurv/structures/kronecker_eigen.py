"""Kronecker eigenbases with free eigenvalues (EK-FAC): (U ⊗ V) diag(s) (U ⊗ V)ᵀ.

The conventions are those of `kronecker`. EK-FAC: George et al. 2018, arXiv:1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Solution, Structure

ROWS = 512  # of a matrix as wide as a side, at once


@dataclass(frozen=True, eq=False)
class _SpectralParts:
    """Eigenvalues [s', r'] as what is left of them in turn: of the rest, rows, columns and core."""

    rest: Tensor  # [1, 1]; 0 where a side is full
    rows: Tensor  # [s, 1], empty where the input side is full
    columns: Tensor  # [1, r], empty where the output side is full
    core: Tensor  # [s, r]

    @cached_property
    def number(self) -> float:
        """`rest` of one group, read from its device once."""
        return float(self.rest)


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Structure):
    """A function on the joint eigenspaces of two sides, each full or truncated.

    Args:
        output_basis: U [O, s], orthonormal columns; input_basis: V [I, r].
        spectrum: eigenvalues [s, r] of the u_i v_jᵀ. A side with fewer columns than rows has one
            entry more, its last: the eigenvalue of all that is orthogonal to its columns.

    All three may have one leading axis Γ, of groups. With U, V square the matrix is
    (U ⊗ V) diag(spectrum) (U ⊗ V)ᵀ. Closed under `shift` by a scalar, so a prior or a damping
    enters exactly (no π-damping). Truncated sides cost two thin products and one addition in place
    of four rotations.
    """

    output_basis: Tensor
    input_basis: Tensor
    spectrum: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        """O, I; or Γ, O, I."""
        return self.output_basis.shape[:-1] + self.input_basis.shape[-2:-1]

    @property
    def size(self) -> int:
        return self.shape.numel()

    @property
    def _is_thin(self) -> bool:
        """Whether both sides are truncated and there is one group."""
        (o, s), (i, r) = self.output_basis.shape[-2:], self.input_basis.shape[-2:]
        return s < o and r < i and self.spectrum.dim() == 2

    @property
    def _is_full(self) -> bool:
        """Whether no side is truncated."""
        return all(b.shape[-2] == b.shape[-1] for b in (self.output_basis, self.input_basis))

    @cached_property
    def _inverse(self) -> _SpectralParts:
        return self._parts(self.spectrum.reciprocal())

    @cached_property
    def _inverse_root(self) -> _SpectralParts:
        return self._parts(self.spectrum.rsqrt())

    def _parts(self, c: Tensor) -> _SpectralParts:
        s, r = self.output_basis.shape[-1], self.input_basis.shape[-1]
        rest = c[..., s:, r:].sum((-2, -1), keepdim=True)  # 0 where a side is full
        rows, columns = c[..., :s, r:], c[..., s:, :r]
        core = c[..., :s, :r]
        if rows.numel():
            core = core - rows
        if columns.numel():
            core = core - columns + rest
        return _SpectralParts(rest, rows - rest, columns - rest, core)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """UᵀX, UᵀXV and, where the output side is truncated, XV, for X [..., O, I]."""
        p = self.output_basis.mT @ x
        beside = self.output_basis.shape[-1] < self.output_basis.shape[-2]
        return p, p @ self.input_basis, x @ self.input_basis if beside else None

    def _factors(
        self, parts: _SpectralParts, p: Tensor, k: Tensor, q: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """left [..., O, k] and right [..., k, I], whose product is all that is beside rest·x."""
        u, v = self.output_basis, self.input_basis
        inner = (k * parts.core) @ v.mT
        if parts.rows.numel():
            inner = torch.addcmul(inner, parts.rows, p)
        if q is None:
            return u, inner
        lead = q.shape[:-2]
        left = torch.cat([u.expand(*lead, *u.shape[-2:]), q * parts.columns], -1)
        return left, torch.cat([inner, v.mT.expand(*lead, *v.mT.shape[-2:])], -2)

    def _product(self, x: Tensor, parts: _SpectralParts) -> Tensor:
        """The matrix of the same eigenspaces with the eigenvalues of `parts`, times x."""
        matrix = x.unflatten(-1, self.shape)
        left, right = self._factors(parts, *self._project(matrix))
        if not (parts.rows.numel() and parts.columns.numel()):
            return (left @ right).reshape(x.shape)
        rest = parts.rest * matrix
        if rest.dim() > 2:
            return (rest + left @ right).reshape(x.shape)
        return rest.addmm_(left, right).reshape(x.shape)  # one pass the less

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._product(x, self._parts(self.spectrum))

    def solve(self, x: Tensor) -> Tensor:
        return self._product(x, self._inverse)

    def solution(self, x: Tensor) -> Solution:
        if self.spectrum.dim() > 2:
            return super().solution(x)
        parts, matrix = self._inverse, x.view(self.shape)
        p, k, q = self._project(matrix)
        left, right = self._factors(parts, p, k, q)
        dot = torch.dot(p.view(-1), right[: len(p)].view(-1))
        if q is not None:
            dot = dot + (q * left[:, -q.shape[-1] :]).sum()
        if not self._is_thin:
            return Solution(dot, (left, right))
        dot = dot + parts.number * torch.dot(x, x)
        return Solution(dot, (matrix.addmm_(left, right, beta=parts.number).view(-1),))

    def rsqrt(self, z: Tensor) -> Tensor:
        if not self._is_full:
            return self._product(z, self._inverse_root)
        scaled = z.unflatten(-1, self.shape) * self._inverse_root.core  # z is as good in this basis
        return (self.output_basis @ scaled @ self.input_basis.mT).reshape(z.shape)

    def rsqrt_(self, z: Tensor) -> Tensor:
        if not self._is_thin:
            return self.rsqrt(z)
        parts, matrix = self._inverse_root, z.view(self.shape)
        left, right = self._factors(parts, *self._project(matrix))
        return matrix.addmm_(left, right, beta=parts.number).view(-1)

    @cached_property
    def _multiplicity(self) -> Tensor:
        """How many eigenvalues each entry of the spectrum stands for."""
        counts = outer(multiplicities(self.output_basis), multiplicities(self.input_basis))
        return counts.expand_as(self.spectrum)

    @cached_property
    def _logdet(self) -> Tensor:
        return (self._multiplicity * self.spectrum.log()).sum()

    def logdet(self) -> Tensor:
        return self._logdet

    def trace(self) -> Tensor:
        return (self._multiplicity * self.spectrum).sum()

    def _diag(self, spectrum: Tensor) -> Tensor:
        output, input = (_squared_basis(basis) for basis in (self.output_basis, self.input_basis))
        return (output @ spectrum @ input.mT).flatten()

    def diag(self) -> Tensor:
        return self._diag(self.spectrum)

    def inverse_diag(self) -> Tensor:
        return self._diag(self.spectrum.reciprocal())

    def eigenvalues(self) -> Tensor:
        counts = self._multiplicity.round().long().flatten()
        return self.spectrum.flatten().repeat_interleave(counts).sort().values

    def scale(self, factor: float | Tensor) -> KroneckerEigen:
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum * factor)

    def shift(self, delta: float | Tensor) -> KroneckerEigen:
        """M + delta·I for a scalar. Raises ValueError for a vector: the basis would be lost."""
        if isinstance(delta, Tensor) and delta.numel() > 1:
            raise ValueError(
                f"shift of a Kronecker structure takes a scalar, got shape {tuple(delta.shape)}; "
                "a diagonal p_i r_j is exact through Rescaled"
            )
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum + delta)

    def change_basis(self, output_basis: Tensor, input_basis: Tensor) -> KroneckerEigen:
        """The mean of M over the eigenspaces of another basis: exact when M is constant on them."""
        if output_basis is self.output_basis and input_basis is self.input_basis:
            return self
        turn_output = _squared_overlap(self.output_basis, output_basis)
        turn_input = _squared_overlap(self.input_basis, input_basis)
        return KroneckerEigen(
            output_basis, input_basis, turn_output.mT @ self.spectrum @ turn_input
        )

    def psd(self) -> KroneckerEigen:
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum.clamp(min=0))

    def lerp(self, other: KroneckerEigen, weight: float) -> KroneckerEigen:
        """In `other`'s basis, on whose eigenspaces this one is averaged: exact if they agree."""
        here = self.change_basis(other.output_basis, other.input_basis)
        return KroneckerEigen(
            other.output_basis, other.input_basis, torch.lerp(here.spectrum, other.spectrum, weight)
        )


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [..., n, m] of vectors [..., n] and [..., m]."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def squared_projections(rows: Tensor, basis: Tensor) -> Tensor:
    """(xᵀv)² for each column and, if truncated, the square of what is outside of them all.

    For x [..., n] and V [n, r] it is [..., r] or [..., r + 1]. The last is taken as a square
    itself: a difference of squares would have the rounding of the largest, and may be negative.
    """
    leading = rows @ basis
    if basis.shape[-1] == basis.shape[-2]:
        return leading.square()
    rest = (rows - leading @ basis.mT).square().sum(-1, keepdim=True)
    return torch.cat([leading.square(), rest], -1)


def _squared_basis(basis: Tensor) -> Tensor:
    """The `squared_projections` of all unit vectors, some at a time."""
    size = basis.shape[-2]
    if basis.shape[-1] == size:
        return basis.square()
    parts = []
    for start in range(0, size, ROWS):
        rows = basis.new_zeros(min(ROWS, size - start), size)
        rows.diagonal(start).fill_(1)
        parts.append(squared_projections(rows, basis))
    return torch.cat(parts, -2)


def multiplicities(basis: Tensor) -> Tensor:
    """Dimensions of the eigenspaces: one for each column and, if truncated, what is left."""
    rows, columns = basis.shape[-2:]
    counts = basis.new_ones(columns + (columns < rows))
    if columns < rows:
        counts[-1] = rows - columns
    return counts


def _squared_overlap(old: Tensor, new: Tensor) -> Tensor:
    """The share of each old eigenspace (row) in a unit vector of each new one (column)."""
    shares = (old.mT @ new).square()  # of the columns
    if old.shape[-2] > old.shape[-1]:
        shares = torch.cat([shares, 1 - shares.sum(-2, keepdim=True)], -2)
    rest = new.shape[-2] - new.shape[-1]
    if rest == 0:
        return shares
    left = (multiplicities(old) - shares.sum(-1)) / rest
    return torch.cat([shares, left.unsqueeze(-1)], -1)
