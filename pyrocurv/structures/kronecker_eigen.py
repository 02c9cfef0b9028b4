"""Kronecker eigenbases with free eigenvalues (EK-FAC): (U ⊗ V) diag(s) (U ⊗ V)ᵀ.

The conventions are those of `kronecker`. EK-FAC: George et al. 2018, arXiv:1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure


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

    @property
    def shape(self) -> torch.Size:
        """O, I; or Γ, O, I."""
        return self.output_basis.shape[:-1] + self.input_basis.shape[-2:-1]

    @property
    def size(self) -> int:
        return self.shape.numel()

    @cached_property
    def _inverse(self) -> tuple[Tensor, ...]:
        return self._parts(self.spectrum.reciprocal())

    @cached_property
    def _inverse_root(self) -> tuple[Tensor, ...]:
        return self._parts(self.spectrum.rsqrt())

    def _parts(self, c: Tensor) -> tuple[Tensor, ...]:
        """Eigenvalues c as what is left of them in turn: the rest, rows, columns and core."""
        s, r = self.output_basis.shape[-1], self.input_basis.shape[-1]
        rest = c[..., s:, r:].sum((-2, -1), keepdim=True)  # 0 where a side is full
        rows, columns = c[..., :s, r:], c[..., s:, :r]
        core = c[..., :s, :r]
        if rows.numel():
            core = core - rows
        if columns.numel():
            core = core - columns + rest
        return rest, rows - rest, columns - rest, core

    def _spectral(self, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The matrix of the same eigenspaces with the eigenvalues of `parts`, times x."""
        u, v, (rest, rows, columns, core) = self.output_basis, self.input_basis, parts
        shape, x = x.shape, x.unflatten(-1, self.shape)
        p = u.mT @ x  # [..., s, I]
        inner = ((p @ v) * core) @ v.mT
        if rows.numel():
            inner = inner + rows * p
        if not columns.numel():  # the output side is full
            return (u @ inner).reshape(shape)
        left = (x @ v) * columns  # [..., O, r]
        if x.dim() > 2 or not rows.numel():
            return (u @ inner + left @ v.mT + rest * x).reshape(shape)
        return (rest * x).addmm_(u, inner).addmm_(left, v.mT).flatten()  # one pass the less, twice

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._spectral(x, self._parts(self.spectrum))

    def solve(self, x: Tensor) -> Tensor:
        return self._spectral(x, self._inverse)

    def rsqrt(self, z: Tensor) -> Tensor:
        if self.spectrum.shape != self.shape:
            return self._spectral(z, self._inverse_root)
        scaled = z.unflatten(-1, self.shape) * self._inverse_root[-1]  # z is as good in this basis
        return (self.output_basis @ scaled @ self.input_basis.mT).reshape(z.shape)

    @cached_property
    def _multiplicity(self) -> Tensor:
        """How many eigenvalues each entry of the spectrum stands for."""
        counts = outer(_counts(self.output_basis), _counts(self.input_basis))
        return counts.expand_as(self.spectrum)

    @cached_property
    def _logdet(self) -> Tensor:
        return (self._multiplicity * self.spectrum.log()).sum()

    def logdet(self) -> Tensor:
        return self._logdet

    def trace(self) -> Tensor:
        return (self._multiplicity * self.spectrum).sum()

    def _diag(self, spectrum: Tensor) -> Tensor:
        output, input = (
            torch.cat([b.square(), 1 - b.square().sum(-1, keepdim=True)], -1)
            for b in (self.output_basis, self.input_basis)
        )
        rows, columns = spectrum.shape[-2:]
        return (output[..., :rows] @ spectrum @ input[..., :columns].mT).flatten()

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

    def rotated(self, output_basis: Tensor, input_basis: Tensor) -> KroneckerEigen:
        """The mean of M over the eigenspaces of another basis: exact when M is constant on them."""
        if output_basis is self.output_basis and input_basis is self.input_basis:
            return self
        turn_output = _overlap(self.output_basis, output_basis)
        turn_input = _overlap(self.input_basis, input_basis)
        return KroneckerEigen(
            output_basis, input_basis, turn_output.mT @ self.spectrum @ turn_input
        )

    def lerp(self, other: KroneckerEigen, weight: float) -> KroneckerEigen:
        """In `other`'s basis, on whose eigenspaces this one is averaged: exact if they agree."""
        here = self.rotated(other.output_basis, other.input_basis)
        return KroneckerEigen(
            other.output_basis, other.input_basis, torch.lerp(here.spectrum, other.spectrum, weight)
        )


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [..., n, m] of vectors [..., n] and [..., m]."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _counts(basis: Tensor) -> Tensor:
    """Dimensions of the eigenspaces: one for each column and, if truncated, what is left."""
    rows, columns = basis.shape[-2:]
    counts = basis.new_ones(columns + (columns < rows))
    if columns < rows:
        counts[-1] = rows - columns
    return counts


def _overlap(old: Tensor, new: Tensor) -> Tensor:
    """The share of each old eigenspace (row) in a unit vector of each new one (column)."""
    shares = (old.mT @ new).square()  # of the columns
    if old.shape[-2] > old.shape[-1]:
        shares = torch.cat([shares, 1 - shares.sum(-2, keepdim=True)], -2)
    rest = new.shape[-2] - new.shape[-1]
    if rest == 0:
        return shares
    left = (_counts(old) - shares.sum(-1)) / rest
    return torch.cat([shares, left.unsqueeze(-1)], -1)
