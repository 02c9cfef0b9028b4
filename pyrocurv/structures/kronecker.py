"""Kronecker-factored matrices G ⊗ A (K-FAC), and their eigenbasis with free eigenvalues (EK-FAC).

A layer's weights are one matrix W [O, I], bias as the last input column; a vector of its P = O·I
weights is W row-major. G [O, O] is the output side, A [I, I] the input side, everywhere:

    (G ⊗ A) vec(W) = vec(G W Aᵀ)

K-FAC: Martens & Grosse 2015, arXiv:1503.05671. EK-FAC: George et al. 2018, arXiv:1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.linalg import eigh_psd


@dataclass(frozen=True, eq=False)
class Kronecker(Structure):
    """output [O, O] ⊗ input [I, I], both symmetric positive semi-definite."""

    output: Tensor
    input: Tensor

    @cached_property
    def _choleskys(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.cholesky(self.output), torch.linalg.cholesky(self.input)

    @property
    def size(self) -> int:
        return self.output.shape[-1] * self.input.shape[-1]

    def _matrix(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.output.shape[-1], self.input.shape[-1]))

    def __matmul__(self, x: Tensor) -> Tensor:
        return (self.output @ self._matrix(x) @ self.input).flatten(-2)

    def solve(self, x: Tensor) -> Tensor:
        output, input = self._choleskys
        half = torch.cholesky_solve(self._matrix(x), output)  # G⁻¹ X
        return torch.cholesky_solve(half.mT, input).mT.flatten(-2)  # (A⁻¹ (G⁻¹X)ᵀ)ᵀ

    def rsqrt(self, z: Tensor) -> Tensor:
        output, input = self._choleskys  # L_G⁻ᵀ Z L_A⁻¹ has covariance G⁻¹ ⊗ A⁻¹
        half = torch.linalg.solve_triangular(output.mT, self._matrix(z), upper=True)
        return torch.linalg.solve_triangular(input, half, upper=False, left=False).flatten(-2)

    def logdet(self) -> Tensor:
        output, input = (2 * factor.diagonal().log().sum() for factor in self._choleskys)
        return self.input.shape[-1] * output + self.output.shape[-1] * input

    def diag(self) -> Tensor:
        return torch.outer(self.output.diagonal(), self.input.diagonal()).flatten()

    def inverse_diag(self) -> Tensor:
        output, input = (torch.cholesky_inverse(factor).diagonal() for factor in self._choleskys)
        return torch.outer(output, input).flatten()

    def eigenvalues(self) -> Tensor:
        return self.eigen().eigenvalues()

    def dense(self) -> Tensor:
        return torch.kron(self.output, self.input)

    def scale(self, factor: float | Tensor) -> Kronecker:
        return Kronecker(self.output * factor, self.input)

    def shift(self, delta: float | Tensor) -> KroneckerEigen:
        """G ⊗ A + delta·I, exact for a scalar; the result lives in the joint eigenbasis."""
        return self.eigen().shift(delta)

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """Factor by factor: the K-FAC average, not the average of the two matrices."""
        return Kronecker(
            torch.lerp(self.output, other.output, weight),
            torch.lerp(self.input, other.input, weight),
        )

    def rescaled(self, output_root: Tensor, input_root: Tensor) -> Kronecker:
        """In the units of a prior: G / (p pᵀ) ⊗ A / (r rᵀ), for p [O] and r [I]."""
        return Kronecker(
            self.output / torch.outer(output_root, output_root),
            self.input / torch.outer(input_root, input_root),
        )

    def eigen(self, ranks: tuple[int, int] | None = None) -> KroneckerEigen:
        """In its eigenbasis: eigenvalues λ_G λ_Aᵀ, exactly; or the leading `ranks` of each side.

        A truncated side keeps its trace: the rest of its eigenvalues are replaced by their mean.
        """
        ranks = ranks or (len(self.output), len(self.input))
        output_basis, output_values = _leading(self.output, ranks[0])
        input_basis, input_values = _leading(self.input, ranks[1])
        return KroneckerEigen(output_basis, input_basis, torch.outer(output_values, input_values))


def automatic_ranks(outputs: int, inputs: int) -> tuple[int, int]:
    """How many eigenvectors each side of a layer keeps.

    All, where neither side is wider than 160; in a wider layer 32 of each side that has more than
    64, since thin products are cheaper. Exact as long as no more directions than that carry
    curvature, as with fewer data than 32 at one position.
    """
    if max(outputs, inputs) <= 160:
        return outputs, inputs
    return (outputs if outputs <= 64 else 32), (inputs if inputs <= 64 else 32)


def _leading(factor: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors [n, rank], their eigenvalues and, if rank < n, the mean of the rest."""
    values, basis = eigh_psd(factor)
    rest = len(values) - rank
    if rest == 0:
        return basis, values
    return basis[:, rest:].contiguous(), torch.cat([values[rest:], values[:rest].mean()[None]])


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Structure):
    """A function on the joint eigenspaces of two sides, each full or truncated.

    Args:
        output_basis: U [O, s], orthonormal columns; input_basis: V [I, r].
        spectrum: eigenvalues [s, r] of the u_i v_jᵀ. A side with fewer columns than rows has one
            entry more, its last: the eigenvalue of all that is orthogonal to its columns.

    With U, V square the matrix is (U ⊗ V) diag(spectrum) (U ⊗ V)ᵀ. Closed under `shift` by a
    scalar, so a prior or a damping enters exactly (no π-damping). Truncated sides cost two thin
    products and one addition in place of four rotations.
    """

    output_basis: Tensor
    input_basis: Tensor
    spectrum: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """O, I."""
        return self.output_basis.shape[0], self.input_basis.shape[0]

    @property
    def size(self) -> int:
        return self.output_basis.shape[0] * self.input_basis.shape[0]

    @cached_property
    def _inverse(self) -> tuple[Tensor, ...]:
        return self._parts(self.spectrum.reciprocal())

    @cached_property
    def _inverse_root(self) -> tuple[Tensor, ...]:
        return self._parts(self.spectrum.rsqrt())

    def _parts(self, c: Tensor) -> tuple[Tensor, ...]:
        """Eigenvalues c as what is left of them in turn: the rest, rows, columns and core."""
        s, r = self.output_basis.shape[1], self.input_basis.shape[1]
        rest = c[s:, r:].sum()  # of no element, 0, where a side is full
        rows, columns = c[:s, r:], c[s:, :r]
        core = c[:s, :r]
        if rows.numel():
            core = core - rows
        if columns.numel():
            core = core - columns + rest
        return rest, rows - rest, columns - rest, core

    def _spectral(self, x: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The matrix of the same eigenspaces with the eigenvalues of `parts`, times x."""
        u, v, (rest, rows, columns, core) = self.output_basis, self.input_basis, parts
        x = x.unflatten(-1, self.shape)
        p = u.mT @ x  # [s, I]
        inner = ((p @ v) * core) @ v.mT
        if rows.numel():
            inner = inner + rows * p
        if not columns.numel():  # the output side is full
            return (u @ inner).flatten(-2)
        left = (x @ v) * columns  # [O, r]
        if x.dim() > 2 or not rows.numel():
            return (u @ inner + left @ v.mT + rest * x).flatten(-2)
        return (rest * x).addmm_(u, inner).addmm_(left, v.mT).flatten()  # one pass the less, twice

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._spectral(x, self._parts(self.spectrum))

    def solve(self, x: Tensor) -> Tensor:
        return self._spectral(x, self._inverse)

    def rsqrt(self, z: Tensor) -> Tensor:
        if self.spectrum.shape != self.shape:
            return self._spectral(z, self._inverse_root)
        z = z.unflatten(-1, self.shape) * self._inverse_root[-1]  # z is as good in this basis
        return (self.output_basis @ z @ self.input_basis.mT).flatten(-2)

    @cached_property
    def _multiplicity(self) -> Tensor:
        """How many eigenvalues each entry of the spectrum stands for."""
        sides = (self.output_basis, self.input_basis)
        counts = [_with_rest(self.spectrum.new_ones(b.shape[1]), b, len(b)) for b in sides]
        return torch.outer(*counts)

    @cached_property
    def _logdet(self) -> Tensor:
        return (self._multiplicity * self.spectrum.log()).sum()

    def logdet(self) -> Tensor:
        return self._logdet

    def trace(self) -> Tensor:
        return (self._multiplicity * self.spectrum).sum()

    def _diag(self, spectrum: Tensor) -> Tensor:
        output, input = (
            torch.cat([b.square(), 1 - b.square().sum(1, keepdim=True)], 1)
            for b in (self.output_basis, self.input_basis)
        )
        rows, columns = spectrum.shape
        return (output[:, :rows] @ spectrum @ input[:, :columns].mT).flatten()

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


def _with_rest(values: Tensor, basis: Tensor, total: float | Tensor) -> Tensor:
    """Values [r, ...] of the columns of a basis and, if it is truncated, what is left of total."""
    if basis.shape[0] == basis.shape[1]:
        return values
    return torch.cat([values, (total - values.sum(0, keepdim=True))])


def _overlap(old: Tensor, new: Tensor) -> Tensor:
    """The share of each old eigenspace (row) in a unit vector of each new one (column)."""
    shares = _with_rest((old.mT @ new).square(), old, 1.0)  # of the new columns
    if new.shape[0] == new.shape[1]:
        return shares
    counts = _with_rest(shares.new_ones(old.shape[1]), old, len(old))
    rest = (counts - shares.sum(1)) / (new.shape[0] - new.shape[1])
    return torch.cat([shares, rest[:, None]], 1)
