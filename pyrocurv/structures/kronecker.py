"""Kronecker-factored matrices G ⊗ A (K-FAC).

The weights of a layer are one matrix W [O, I], with the bias as its last column; a vector of its
P = O·I weights is W in row-major order. G [O, O] is the output side and A [I, I] the input side:

    (G ⊗ A) vec(W) = vec(G W Aᵀ)

A layer of Γ groups that share nothing (a grouped convolution, the units of a norm layer) has one
product for each group: with a leading axis Γ the matrix is block-diagonal, P = Γ·O·I, W [Γ, O, I].

K-FAC: Martens & Grosse 2015, arXiv:1503.05671.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.kronecker_eigen import KroneckerEigen
from pyrocurv.structures.linalg import at_least_single, eigh_blocks, leading_eigh, without_rounding
from pyrocurv.structures.operands import check_count, check_other, check_square, is_count

MIN_KRYLOV = 1000  # rows from which on a few leading eigenvectors are computed alone


@dataclass(frozen=True, eq=False)
class Kronecker(Structure):
    """The Kronecker product output ⊗ input.

    `solve`, `rsqrt` and `logdet` need positive definite factors.

    Args:
        output: G, symmetric [O, O] or [Γ, O, O].
        input: A, symmetric [I, I] or [Γ, I, I].

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Kronecker
        >>> matrix = Kronecker(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> matrix @ torch.tensor([1.0, 0.0, 0.0, 1.0])
        tensor([2., 1., 1., 2.])
        >>> matrix.shift(1.0).eigenvalues()
        tensor([2., 2., 4., 4.])
    """

    output: Tensor
    input: Tensor

    def __post_init__(self) -> None:
        check_square("output", self.output)
        check_square("input", self.input)

    @cached_property
    def _choleskys(self) -> tuple[Tensor, Tensor]:
        output, input = map(at_least_single, (self.output, self.input))
        return torch.linalg.cholesky(output), torch.linalg.cholesky(input)

    @property
    def shape(self) -> torch.Size:
        """The shape of W: [O, I] or [Γ, O, I]."""
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
        half = torch.cholesky_solve(at_least_single(self._matrix(x)), output)  # G⁻¹ X
        solved = torch.cholesky_solve(half.mT, input).mT  # (A⁻¹ (G⁻¹X)ᵀ)ᵀ
        return solved.reshape(x.shape).to(x.dtype)

    def rsqrt(self, z: Tensor) -> Tensor:
        output, input = self._choleskys  # L_G⁻ᵀ Z L_A⁻¹ has covariance G⁻¹ ⊗ A⁻¹
        z_matrix = at_least_single(self._matrix(z))
        half = torch.linalg.solve_triangular(output.mT, z_matrix, upper=True)
        half = torch.linalg.solve_triangular(input, half, upper=False, left=False)
        return half.reshape(z.shape).to(z.dtype)

    def logdet(self) -> Tensor:
        output, input = (2 * _diagonal(factor).log().sum() for factor in self._choleskys)
        total = self.input.shape[-1] * output + self.output.shape[-1] * input
        return total.to(self.output.dtype)

    def diag(self) -> Tensor:
        return outer(_diagonal(self.output), _diagonal(self.input)).flatten()

    def inverse_diag(self) -> Tensor:
        output, input = (_diagonal(torch.cholesky_inverse(factor)) for factor in self._choleskys)
        return outer(output, input).flatten().to(self.output.dtype)

    def eigenvalues(self) -> Tensor:
        return self.eigen().eigenvalues()

    def scale(self, factor: float | Tensor) -> Kronecker:
        return Kronecker(self.output * factor, self.input)

    def shift(self, delta: float | Tensor) -> KroneckerEigen:
        """G ⊗ A + delta·I for a scalar, in the joint eigenbasis; ValueError for a vector."""
        return self.eigen().shift(delta)

    def psd(self) -> KroneckerEigen:
        return self.eigen().psd()

    def lerp(self, other: Kronecker, weight: float) -> Kronecker:
        """The average of each factor, as in K-FAC; not the average of the two matrices."""
        output = torch.lerp(self.output, other.output, weight)
        return Kronecker(output, torch.lerp(self.input, other.input, weight))

    def nearest_kronecker_sum(self, other: Kronecker) -> Kronecker:
        """The Kronecker product that is nearest to self + other in the Frobenius norm.

        Rearranged to vec(G) vec(A)ᵀ, the sum of products G ⊗ A is a matrix X Yᵀ of rank 2 with
        X = [g₁ g₂], Y = [a₁ a₂]. Its best approximation of rank 1 is (X c)(Y d)ᵀ / (cᵀ d), where c
        is the leading eigenvector of (YᵀY)(XᵀX) [2, 2] and d = XᵀX c. For positive semi-definite
        factors the entries of c and d are not negative (Perron), so the result is positive
        semi-definite too.

        Reference: Van Loan & Pitsianis 1993, "Approximation with Kronecker products".
        """
        check_other(self, other)
        outputs = torch.stack([self.output, other.output], -3)  # [..., 2, O, O]
        inputs = torch.stack([self.input, other.input], -3)
        gram = _gram(outputs)
        c = _leading_vector(_gram(inputs) @ gram)[..., None, None]  # [..., 2, 1, 1]
        d = (gram @ c.squeeze(-1)).unsqueeze(-1)
        norm = (c * d).sum(-3, keepdim=True)
        d = torch.where(norm > 0, d / norm, d)  # avoids 0/0
        return Kronecker((c * outputs).sum(-3), (d * inputs).sum(-3))

    def rescaled(self, output_root: Tensor, input_root: Tensor) -> Kronecker:
        """G / (p pᵀ) ⊗ A / (r rᵀ), for roots p [..., O] and r [..., I] of a prior precision."""
        _check_roots(self, output_root, input_root)
        output = self.output / outer(output_root, output_root)
        return Kronecker(output, self.input / outer(input_root, input_root))

    def eigen(
        self, ranks: tuple[int, int] | None = None, num_blocks: tuple[int, int] = (1, 1)
    ) -> KroneckerEigen:
        """The same matrix in its eigenbasis, with eigenvalues λ_G λ_Aᵀ.

        Args:
            ranks: numbers of leading eigenvectors to keep, of the output and the input side. A
                truncated side keeps its trace: its other eigenvalues are replaced by their mean.
            num_blocks: numbers of diagonal blocks that both sides are `cut` to before.
        """
        sizes = self.output.shape[-1], self.input.shape[-1]
        ranks = sizes if ranks is None else ranks
        _check_counts("ranks", ranks, sizes)
        _check_counts("num_blocks", num_blocks, None)
        output_basis, output_values = leading(self.output, ranks[0], num_blocks[0])
        input_basis, input_values = leading(self.input, ranks[1], num_blocks[1])
        return KroneckerEigen(output_basis, input_basis, outer(output_values, input_values))


def automatic_ranks(outputs: int, inputs: int, rank: int | str = "auto") -> tuple[int, int]:
    """The number of eigenvectors that each side of a layer keeps.

    Args:
        outputs, inputs: O and I, the inputs including the bias.
        rank: the largest number to keep. "auto" keeps all where no side is wider than 160; in a
            wider layer 16 of each side that is wider than 64, because products with thin factors
            are cheaper.

    The truncation is exact as long as no more directions than that carry curvature, as for up to 16
    data at one position each.

    Example:
        >>> from pyrocurv.structures import automatic_ranks
        >>> automatic_ranks(512, 785), automatic_ranks(10, 85), automatic_ranks(512, 785, rank=64)
        ((16, 16), (10, 85), (64, 64))
    """
    check_count("outputs", outputs)
    check_count("inputs", inputs)
    check_count("rank", rank, "auto")
    if isinstance(rank, int):
        return min(outputs, rank), min(inputs, rank)
    if max(outputs, inputs) <= 160:
        return outputs, inputs
    return (outputs if outputs <= 64 else 16), (inputs if inputs <= 64 else 16)


def _check_roots(matrix: Kronecker, *roots: Tensor) -> None:
    wanted = matrix.output.shape[:-1], matrix.input.shape[:-1]
    for name, root, shape in zip(("output_root", "input_root"), roots, wanted, strict=True):
        if not isinstance(root, Tensor) or root.shape[-1:] != shape[-1:]:
            got = tuple(root.shape) if isinstance(root, Tensor) else type(root).__name__
            raise ValueError(f"{name}: a tensor {list(shape)} is needed, got {got}")


def _check_counts(name: str, counts: Any, largest: tuple[int, int] | None) -> None:
    """Raise ValueError unless they are two positive integers, at most the largest."""
    limits = largest or (math.inf, math.inf)
    if not isinstance(counts, Sequence) or len(counts) != 2 or not all(
        is_count(n) and n <= limit for n, limit in zip(counts, limits, strict=True)
    ):
        bound = "" if largest is None else f" of at most {largest}"
        raise ValueError(f"{name}={counts!r}: two positive integers{bound} are needed")


def is_krylov(factor: Tensor, rank: int) -> bool:
    """Whether `rank` leading eigenvectors are computed alone."""
    rows = factor.shape[-1]
    return factor.dim() == 2 and rows > MIN_KRYLOV and rank <= rows // 32


def leading(factor: Tensor, rank: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors [..., n, rank], their eigenvalues and, if rank < n, the others' mean."""
    rows = factor.shape[-1]
    if num_blocks == 1 and is_krylov(factor, rank):
        values, basis = leading_eigh(factor, rank)
        rest = (factor.diagonal().sum() - values.sum())[None]
        mean = without_rounding(rest, rows, values.abs().amax()) / (rows - rank)
        return basis, torch.cat([values, mean])
    values, basis = eigh_blocks(factor, num_blocks)
    return truncated(basis, values, rank)


def truncated(basis: Tensor, values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The last `rank` of ascending eigenvectors, with the mean of the others' eigenvalues."""
    others = values.shape[-1] - rank
    if others == 0:
        return basis, values
    mean = values[..., :others].mean(-1, keepdim=True)
    return basis[..., others:].contiguous(), torch.cat([values[..., others:], mean], -1)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _gram(matrices: Tensor) -> Tensor:
    """Inner products [..., 2, 2] of two matrices [..., 2, n, n], up to a common factor."""
    rows = matrices.flatten(-2)
    rows = rows / rows.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return rows @ rows.mT


def _leading_vector(matrix: Tensor) -> Tensor:
    """Eigenvectors [..., 2] of the larger eigenvalue of [..., 2, 2], whose eigenvalues are real."""
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    half = (a - d) / 2
    root = (half.square() + b * c).clamp(min=0).sqrt()
    first = torch.where(half >= 0, half + root, b)  # of two formulas the one without cancellation
    second = torch.where(half >= 0, c, root - half)
    is_any = (first == 0) & (second == 0)  # every vector is an eigenvector
    return torch.stack([first + is_any, second + is_any], -1)
