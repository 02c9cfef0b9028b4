"""The sum of a curvature and the precision of a correlated prior, in the curvature's structure.

It is exact for dense and diagonal matrices. A sum of Kronecker products is not one,

    S = Σ_k (U_k ⊗ V_k) diag(s_k) (U_k ⊗ V_k)ᵀ   ≈   (U ⊗ V) diag(s) (U ⊗ V)ᵀ,

and is approximated in the eigenbases U and V of its nearest Kronecker product G ⊗ A with
s = diag((U ⊗ V)ᵀ S (U ⊗ V)): of all matrices with these eigenvectors the nearest to S in the
Frobenius norm. It is exact where the terms have common eigenvectors. Power iterations find G and A:

    G ← Σ_ij A_ij S[:, i, :, j],   A ← Σ_ab G_ab S[a, :, b, :].

Nearest Kronecker products: Van Loan & Pitsianis 1993; sums of them over tasks: Ritter, Botev &
Barber 2018, "Online structured Laplace approximations", arXiv:1805.07810.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.dense import Dense
from pyrocurv.structures.diagonal import Diagonal
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.kronecker_eigen import KroneckerEigen
from pyrocurv.structures.linalg import eigh
from pyrocurv.structures.operands import check_sizes
from pyrocurv.structures.rescaled import Rescaled

ITERATIONS = 3  # from A = I; the bases hardly change after two


@singledispatch
def add(matrix: Structure, other: Structure) -> Structure:
    """matrix + other in the structure of the first, both positive semi-definite.

    Raises TypeError for a structure that has no such sum.
    """
    raise TypeError(
        f"{type(matrix).__name__} has no sum with the precision of a correlated prior: register "
        "one, pyrocurv.structures.sums.add.register"
    )


@add.register
def _(matrix: Dense, other: Structure) -> Dense:
    check_sizes(matrix, other)
    return Dense(matrix.matrix + other.dense())


@add.register
def _(matrix: Diagonal, other: Structure) -> Diagonal:
    """For independent Gaussians the diagonal is the best precision, whatever the correlations."""
    check_sizes(matrix, other)
    return Diagonal(matrix.entries + other.diag())


@add.register
def _(matrix: KroneckerEigen, other: Structure) -> KroneckerEigen:
    check_sizes(matrix, other)
    term = _term(other, matrix.shape)
    spans = [_span(a, b) for a, b in zip(_Eigen(matrix).bases, term.bases, strict=True)]
    output, input = _nearest_product(_Eigen(matrix).inside(spans), term.inside(spans))
    ranks = matrix.output_basis.shape[-1], matrix.input_basis.shape[-1]
    output, input = (
        _leading(factor, span, rank)
        for factor, span, rank in zip((output, input), spans, ranks, strict=True)
    )
    spectrum = matrix.change_basis(output, input).spectrum + term.spectrum(output, input)
    return KroneckerEigen(output, input, spectrum)


def relative_error(matrix: Structure, other: Structure) -> float:
    """|add(matrix, other) - (matrix + other)| / |matrix + other|, in Frobenius norms.

    For Kronecker structures it is a difference of squares, which are exact to half of the digits.
    """
    total = add(matrix, other)
    if isinstance(matrix, KroneckerEigen) and isinstance(total, KroneckerEigen):
        squares = _inner(matrix, matrix) + 2 * _inner(matrix, other) + _square(other)
        return float(((squares - _inner(total, total)).clamp(min=0) / squares).sqrt())
    exact = matrix.dense() + other.dense()
    return float((total.dense() - exact).norm() / exact.norm())


def _inner(matrix: KroneckerEigen, other: Structure) -> Tensor:
    """tr(matrix other)."""
    spectrum = _term(other, matrix.shape).spectrum(matrix.output_basis, matrix.input_basis)
    return (matrix.multiplicity * matrix.spectrum * spectrum).sum()


def _square(matrix: Structure) -> Tensor:
    """The squared Frobenius norm."""
    if isinstance(matrix, KroneckerEigen):
        return _inner(matrix, matrix)
    return matrix.dense().square().sum()


@singledispatch
def trace_ratio(matrix: Structure, other: Structure) -> Tensor:
    """tr(matrix⁻¹ other), a scalar, for a positive definite matrix."""
    return matrix.solve(other.dense()).diagonal().sum()


@trace_ratio.register
def _(matrix: Diagonal, other: Structure) -> Tensor:
    return (other.diag() / matrix.entries).sum()


@trace_ratio.register
def _(matrix: KroneckerEigen, other: Structure) -> Tensor:
    spectrum = _term(other, matrix.shape).spectrum(matrix.output_basis, matrix.input_basis)
    return (matrix.multiplicity * spectrum / matrix.spectrum).sum()


# ---- the terms of a sum of Kronecker matrices ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Eigen:
    """A Kronecker eigenbasis, between diagonal matrices p_i r_j if it has `roots` p and r."""

    eigen: KroneckerEigen
    roots: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def bases(self) -> Sequence[Tensor | None]:
        """The bases, None where the directions orthogonal to them are not all alike."""
        pair = zip((self.eigen.output_basis, self.eigen.input_basis), self.roots, strict=True)
        return [basis if root is None else None for basis, root in pair]

    def inside(self, spans: Sequence[Tensor | None]) -> _Eigen:
        """The same in the coordinates of a span of each side; None is the whole space."""
        pair = (self.eigen.output_basis, self.eigen.input_basis)
        output, input = (b if q is None else q.mT @ b for b, q in zip(pair, spans, strict=True))
        return _Eigen(KroneckerEigen(output, input, self.eigen.spectrum), self.roots)

    def contract(self, side: int, metric: Tensor) -> Tensor:
        """The matrix of one side (0: output), Σ_ij metric_ij S[:, i, :, j] for the output side."""
        pair = self.eigen.output_basis, self.eigen.input_basis
        basis, other = pair[side], pair[1 - side]
        root, other_root = self.roots[side], self.roots[1 - side]
        if other_root is not None:
            metric = outer(other_root, other_root) * metric
        sizes = (other * (metric @ other)).sum(-2)
        if other.shape[-1] < other.shape[-2]:
            rest = metric.diagonal(dim1=-2, dim2=-1).sum(-1) - sizes.sum(-1)
            sizes = torch.cat([sizes, rest.unsqueeze(-1)], -1)
        spectrum = self.eigen.spectrum.mT if side else self.eigen.spectrum
        matrix = _symmetric(basis, (spectrum @ sizes.unsqueeze(-1)).squeeze(-1))
        return matrix if root is None else outer(root, root) * matrix

    def spectrum(self, output: Tensor, input: Tensor) -> Tensor:
        """The diagonal in other bases, of a matrix in the coordinates of the whole space."""
        return self.eigen.change_basis(output, input, self.roots).spectrum


@dataclass(frozen=True, eq=False)
class _Dense:
    """Any matrix, as [..., O, I, O, I] with one for each group."""

    matrix: Tensor
    bases: Sequence[Tensor | None] = (None, None)

    def inside(self, spans: Sequence[Tensor | None]) -> _Dense:
        """Itself: the spans are the whole space."""
        return self

    def contract(self, side: int, metric: Tensor) -> Tensor:
        """As that of `_Eigen`."""
        equation = "...aibj,...ab->...ij" if side else "...aibj,...ij->...ab"
        return torch.einsum(equation, self.matrix, metric)

    def spectrum(self, output: Tensor, input: Tensor) -> Tensor:
        """The diagonal in other bases, averaged over what is orthogonal to a truncated one."""
        u, v = (torch.linalg.qr(basis, mode="complete").Q for basis in (output, input))
        diagonal = torch.einsum("...aibj,...as,...bs,...ir,...jr->...sr", self.matrix, u, u, v, v)
        for axis, basis in ((-2, output), (-1, input)):
            rows, rank = basis.shape[-2:]
            kept, rest = diagonal.split([rank, rows - rank], axis)
            if rank < rows:
                diagonal = torch.cat([kept, rest.mean(axis, keepdim=True)], axis)
        return diagonal


def _term(matrix: Structure, shape: torch.Size) -> _Eigen | _Dense:
    """A structure over weights [O, I] or [Γ, O, I]."""
    inner = matrix.inner if isinstance(matrix, Rescaled) else matrix
    if isinstance(inner, KroneckerEigen) and inner.shape == shape:
        if not isinstance(matrix, Rescaled):
            return _Eigen(inner)
        root = matrix.root.view(shape)
        return _Eigen(inner, (root[..., 0], root[..., 0, :] / root[..., 0, :1]))
    dense = matrix.dense().view(*shape, *shape)
    return _Dense(dense.diagonal(dim1=0, dim2=3).movedim(-1, 0) if len(shape) == 3 else dense)


def _span(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """A basis of two truncated ones, outside of which all directions are alike; None: of all."""
    if first is None or second is None:
        return None
    columns = first.shape[-1] + second.shape[-1]
    if first.dim() > 2 or columns >= first.shape[-2]:
        return None
    return torch.linalg.qr(torch.cat([first, second], -1)).Q


def _nearest_product(first: _Eigen, second: _Eigen | _Dense) -> tuple[Tensor, Tensor]:
    """G and A, up to positive factors."""
    basis = first.eigen.input_basis
    input = torch.eye(basis.shape[-2]).to(basis).expand(*basis.shape[:-2], -1, -1)
    for _ in range(ITERATIONS):
        output = _normalized(first.contract(0, input) + second.contract(0, input))
        input = _normalized(first.contract(1, output) + second.contract(1, output))
    return output, input


def _normalized(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _symmetric(basis: Tensor, values: Tensor) -> Tensor:
    """U diag(values) Uᵀ, with one more value for everything orthogonal to a truncated U."""
    rows, rank = basis.shape[-2:]
    if rank == rows:
        return (basis * values.unsqueeze(-2)) @ basis.mT
    rest = values[..., rank:]
    matrix = (basis * (values[..., :rank] - rest).unsqueeze(-2)) @ basis.mT
    return matrix + rest.unsqueeze(-1) * torch.eye(rows).to(basis)


def _leading(factor: Tensor, span: Tensor | None, rank: int) -> Tensor:
    """The leading eigenvectors [..., n, rank] of a factor in the coordinates of a span."""
    vectors = eigh(factor)[1][..., -rank:]
    return (vectors if span is None else span @ vectors).contiguous()
