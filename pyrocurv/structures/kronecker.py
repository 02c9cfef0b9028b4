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

    def eigen(self) -> KroneckerEigen:
        """The same matrix in its eigenbasis: Q_G ⊗ Q_A with eigenvalues λ_G λ_Aᵀ."""
        output_values, output_basis = eigh_psd(self.output)
        input_values, input_basis = eigh_psd(self.input)
        return KroneckerEigen(output_basis, input_basis, torch.outer(output_values, input_values))


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Structure):
    """(Q_G ⊗ Q_A) diag(spectrum) (Q_G ⊗ Q_A)ᵀ; orthogonal Q_G [O, O], Q_A [I, I], spectrum [O, I].

    Closed under `shift` by a scalar, so a prior or a damping enters exactly (no π-damping).
    """

    output_basis: Tensor
    input_basis: Tensor
    spectrum: Tensor

    @property
    def size(self) -> int:
        return self.spectrum.numel()

    def _spectral(self, x: Tensor, coefficients: Tensor) -> Tensor:
        """Q_G (coefficients ∘ (Q_Gᵀ X Q_A)) Q_Aᵀ: a function of the matrix applied to X."""
        x = x.unflatten(-1, self.spectrum.shape)
        rotated = self.output_basis.mT @ x @ self.input_basis
        return (self.output_basis @ (rotated * coefficients) @ self.input_basis.mT).flatten(-2)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._spectral(x, self.spectrum)

    def solve(self, x: Tensor) -> Tensor:
        return self._spectral(x, self.spectrum.reciprocal())

    def rsqrt(self, z: Tensor) -> Tensor:
        z = z.unflatten(-1, self.spectrum.shape) * self.spectrum.rsqrt()
        return (self.output_basis @ z @ self.input_basis.mT).flatten(-2)

    def logdet(self) -> Tensor:
        return self.spectrum.log().sum()

    def trace(self) -> Tensor:
        return self.spectrum.sum()

    def _diag(self, spectrum: Tensor) -> Tensor:
        return (self.output_basis.square() @ spectrum @ self.input_basis.square().mT).flatten()

    def diag(self) -> Tensor:
        return self._diag(self.spectrum)

    def inverse_diag(self) -> Tensor:
        return self._diag(self.spectrum.reciprocal())

    def eigenvalues(self) -> Tensor:
        return self.spectrum.flatten().sort().values

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
        """The diagonal of M in another basis: exact when M is diagonal there."""
        if output_basis is self.output_basis and input_basis is self.input_basis:
            return self
        turn_output = (self.output_basis.mT @ output_basis).square()
        turn_input = (self.input_basis.mT @ input_basis).square()
        return KroneckerEigen(
            output_basis, input_basis, turn_output.mT @ self.spectrum @ turn_input
        )

    def lerp(self, other: KroneckerEigen, weight: float) -> KroneckerEigen:
        """In `other`'s basis, where only the diagonal of this one is kept: exact if they agree."""
        here = self.rotated(other.output_basis, other.input_basis)
        return KroneckerEigen(
            other.output_basis, other.input_basis, torch.lerp(here.spectrum, other.spectrum, weight)
        )
