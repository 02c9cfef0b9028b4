"""Kronecker-factored matrices G ⊗ A (K-FAC).

A layer's weights are one matrix W [O, I], bias as the last input column; a vector of its P = O·I
weights is W row-major. G [O, O] is the output side, A [I, I] the input side, everywhere:

    (G ⊗ A) vec(W) = vec(G W Aᵀ)

A layer of Γ groups that share nothing (a grouped convolution, the units of a norm layer) has a
product for each: with one leading axis Γ the matrix is block-diagonal, P = Γ·O·I, W is [Γ, O, I].

K-FAC: Martens & Grosse 2015, arXiv:1503.05671.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.kronecker_eigen import KroneckerEigen, outer
from pyrocurv.structures.linalg import eigh_blocks


@dataclass(frozen=True, eq=False)
class Kronecker(Structure):
    """output [O, O] ⊗ input [I, I], both symmetric; or each [Γ, ...].

    `solve`, `rsqrt` and `logdet` want both positive definite.
    """

    output: Tensor
    input: Tensor

    @cached_property
    def _choleskys(self) -> tuple[Tensor, Tensor]:
        return torch.linalg.cholesky(self.output), torch.linalg.cholesky(self.input)

    @property
    def shape(self) -> torch.Size:
        """O, I; or Γ, O, I."""
        return self.output.shape[:-1] + self.input.shape[-1:]

    @property
    def size(self) -> int:
        return self.shape.numel()

    def _matrix(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        return (self.output @ self._matrix(x) @ self.input).reshape(x.shape)

    def solve(self, x: Tensor) -> Tensor:
        output, input = self._choleskys
        half = torch.cholesky_solve(self._matrix(x), output)  # G⁻¹ X
        return torch.cholesky_solve(half.mT, input).mT.reshape(x.shape)  # (A⁻¹ (G⁻¹X)ᵀ)ᵀ

    def rsqrt(self, z: Tensor) -> Tensor:
        output, input = self._choleskys  # L_G⁻ᵀ Z L_A⁻¹ has covariance G⁻¹ ⊗ A⁻¹
        half = torch.linalg.solve_triangular(output.mT, self._matrix(z), upper=True)
        half = torch.linalg.solve_triangular(input, half, upper=False, left=False)
        return half.reshape(z.shape)

    def logdet(self) -> Tensor:
        output, input = (2 * _diagonal(factor).log().sum() for factor in self._choleskys)
        return self.input.shape[-1] * output + self.output.shape[-1] * input

    def diag(self) -> Tensor:
        return outer(_diagonal(self.output), _diagonal(self.input)).flatten()

    def inverse_diag(self) -> Tensor:
        output, input = (_diagonal(torch.cholesky_inverse(factor)) for factor in self._choleskys)
        return outer(output, input).flatten()

    def eigenvalues(self) -> Tensor:
        return self.eigen().eigenvalues()

    def dense(self) -> Tensor:
        if self.output.dim() == 2:
            return torch.kron(self.output, self.input)
        return torch.block_diag(*map(torch.kron, self.output, self.input))

    def scale(self, factor: float | Tensor) -> Kronecker:
        return Kronecker(self.output * factor, self.input)

    def shift(self, delta: float | Tensor) -> KroneckerEigen:
        """G ⊗ A + delta·I, exact for a scalar; the result lives in the joint eigenbasis."""
        return self.eigen().shift(delta)

    def psd(self) -> KroneckerEigen:
        return self.eigen().psd()

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """Factor by factor: the K-FAC average, not the average of the two matrices."""
        return Kronecker(
            torch.lerp(self.output, other.output, weight),
            torch.lerp(self.input, other.input, weight),
        )

    def nearest_kronecker_sum(self, other: Kronecker) -> Kronecker:
        """Of all Kronecker products the nearest to self + other in the Frobenius norm.

        With rows vec(G) vec(A)ᵀ instead of G ⊗ A the sum is a matrix X Yᵀ of rank 2, X = [g₁ g₂],
        Y = [a₁ a₂], and its best approximation of rank 1 is (X c)(Y d)ᵀ / (cᵀ d) with d = XᵀX c and
        c the leading eigenvector of (YᵀY)(XᵀX) [2, 2]. Its entries are not negative where the
        factors are positive semi-definite (Perron), and so the result is.

        Reference: Van Loan & Pitsianis 1993, "Approximation with Kronecker products".
        """
        outputs = torch.stack([self.output, other.output], -3)  # [..., 2, O, O]
        inputs = torch.stack([self.input, other.input], -3)
        gram = _gram(outputs)
        c = _leading_vector(_gram(inputs) @ gram)
        d = (gram @ c.unsqueeze(-1)).squeeze(-1)
        norm = (c * d).sum(-1, keepdim=True)
        d = torch.where(norm > 0, d / norm, d)  # zero stays zero
        return Kronecker(_combination(c, outputs), _combination(d, inputs))

    def rescaled(self, output_root: Tensor, input_root: Tensor) -> Kronecker:
        """In the units of a prior: G / (p pᵀ) ⊗ A / (r rᵀ), for p [..., O] and r [..., I]."""
        return Kronecker(
            self.output / outer(output_root, output_root),
            self.input / outer(input_root, input_root),
        )

    def eigen(
        self, ranks: tuple[int, int] | None = None, num_blocks: tuple[int, int] = (1, 1)
    ) -> KroneckerEigen:
        """In its eigenbasis: eigenvalues λ_G λ_Aᵀ, exactly.

        Args:
            ranks: of each side the largest ones alone. A truncated side keeps its trace: the rest
                of its eigenvalues are replaced by their mean.
            num_blocks: `cut` the output and the input side into so many diagonal blocks first.
        """
        ranks = ranks or (self.output.shape[-1], self.input.shape[-1])
        output_basis, output_values = _leading(self.output, ranks[0], num_blocks[0])
        input_basis, input_values = _leading(self.input, ranks[1], num_blocks[1])
        return KroneckerEigen(output_basis, input_basis, outer(output_values, input_values))


def automatic_ranks(outputs: int, inputs: int, rank: int | str = "auto") -> tuple[int, int]:
    """How many eigenvectors each side of a layer keeps.

    A number: that many, of a side that has more. "auto": all, where neither side is wider than 160;
    in a wider layer 16 of each side that has more than 64, since thin products are cheaper. Exact
    as long as no more directions than that carry curvature, as with fewer data than 16 at one
    position.
    """
    if isinstance(rank, int):
        return min(outputs, rank), min(inputs, rank)
    if max(outputs, inputs) <= 160:
        return outputs, inputs
    return (outputs if outputs <= 64 else 16), (inputs if inputs <= 64 else 16)


def _leading(factor: Tensor, rank: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors [..., n, rank], their eigenvalues and, if rank < n, the others' mean."""
    values, basis = eigh_blocks(factor, num_blocks)
    rest = values.shape[-1] - rank
    if rest == 0:
        return basis, values
    mean = values[..., :rest].mean(-1, keepdim=True)
    return basis[..., rest:].contiguous(), torch.cat([values[..., rest:], mean], -1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _gram(pair: Tensor) -> Tensor:
    """Inner products [..., 2, 2] of two matrices [..., 2, n, n], up to a common factor."""
    rows = pair.flatten(-2)
    rows = rows / rows.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows @ rows.mT


def _leading_vector(matrix: Tensor) -> Tensor:
    """Of the larger eigenvalue of matrices [..., 2, 2] whose eigenvalues are real, [..., 2]."""
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    half = (a - d) / 2
    root = (half.square() + b * c).clamp(min=0).sqrt()
    first = torch.where(half >= 0, half + root, b)  # of two forms the one without cancellation
    second = torch.where(half >= 0, c, root - half)
    every = (first == 0) & (second == 0)  # vector is one
    return torch.stack([first + every, second + every], -1)


def _combination(weights: Tensor, pair: Tensor) -> Tensor:
    """w₁ M₁ + w₂ M₂, for weights [..., 2] and matrices [..., 2, n, n]."""
    return (weights[..., None, None] * pair).sum(-3)
