"""Kronecker eigenbases with free eigenvalues (EK-FAC): (U ⊗ V) diag(s) (U ⊗ V)ᵀ.

The conventions are those of `pyrocurv.structures.kronecker`. A side may be truncated to its leading
eigenvectors; all directions orthogonal to them then share one eigenvalue.

EK-FAC: George et al. 2018, arXiv:1806.03884.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import LazySolution, Structure
from pyrocurv.structures.eigenspaces import (
    multiplicities,
    outer,
    squared_basis,
    squared_overlap,
)


@dataclass(frozen=True, eq=False)
class _SpectralParts:
    """Eigenvalues as a sum: rest everywhere, plus rows and columns, plus core on both bases.

    The matrix with eigenvalues c is then rest · X + U (rows ∘ P) + (Q ∘ columns) Vᵀ +
    U (core ∘ K) Vᵀ in the projections P = UᵀX, Q = XV and K = UᵀXV of X.
    """

    rest: Tensor  # [1, 1]; 0 where a side is full
    rows: Tensor  # [s, 1]; empty where the input side is full
    columns: Tensor  # [1, r]; empty where the output side is full
    core: Tensor  # [s, r]

    @cached_property
    def rest_value(self) -> float:
        return float(self.rest)


@dataclass(frozen=True, eq=False)
class KroneckerEigen(Structure):
    """A matrix given by its joint eigenvectors u_i v_jᵀ and its eigenvalues.

    A `shift` by a scalar keeps the bases, so a prior or a damping is exact (no π-damping). With two
    truncated sides a product costs two thin products and an addition, instead of four rotations.

    Args:
        output_basis: U, orthonormal columns [O, s] or [Γ, O, s] for Γ groups.
        input_basis: V, orthonormal columns [I, r] or [Γ, I, r].
        spectrum: eigenvalues [s, r] or [Γ, s, r]. A side with fewer columns than rows has one more
            entry, the last: the eigenvalue of everything that is orthogonal to its columns.

    Reference: George et al. 2018, arXiv:1806.03884.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import KroneckerEigen
        >>> leading = torch.tensor([[1.0], [0.0], [0.0]])  # one of three directions
        >>> KroneckerEigen(torch.ones(1, 1), leading, torch.tensor([[5.0, 2.0]])).diag()
        tensor([5., 2., 2.])
    """

    output_basis: Tensor
    input_basis: Tensor
    spectrum: Tensor

    @cached_property
    def shape(self) -> torch.Size:
        """The shape of W: [O, I] or [Γ, O, I]."""
        return self.output_basis.shape[:-1] + self.input_basis.shape[-2:-1]

    @property
    def size(self) -> int:
        return self.shape.numel()

    @property
    def _truncated(self) -> tuple[bool, bool]:
        """Whether the output and the input side are truncated."""
        (o, s), (i, r) = self.output_basis.shape[-2:], self.input_basis.shape[-2:]
        return s < o, r < i

    @cached_property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """Uᵀ and Vᵀ."""
        return self.output_basis.mT, self.input_basis.mT

    @cached_property
    def _inverse(self) -> _SpectralParts:
        return self._parts(self.spectrum.reciprocal())

    @cached_property
    def _inverse_root(self) -> _SpectralParts:
        return self._parts(self.spectrum.rsqrt())

    @property
    def inverse_root(self) -> Tensor:
        """The inverse square roots of the eigenvalues of complete bases, [..., s, r]."""
        return self._inverse_root.core

    def _parts(self, c: Tensor) -> _SpectralParts:
        """Of eigenvalues c [..., s, r], each side with one more entry if it is truncated."""
        s, r = self.output_basis.shape[-1], self.input_basis.shape[-1]
        rest = c[..., s:, r:].sum((-2, -1), keepdim=True)  # 0 where a side is full
        rows, columns = c[..., :s, r:], c[..., s:, :r]
        core = c[..., :s, :r]
        if rows.numel():
            core = core - rows
        if columns.numel():
            core = core - columns + rest
        return _SpectralParts(rest, rows - rest, columns - rest, core)

    @property
    def is_complete(self) -> bool:
        """Whether no side is truncated."""
        return not any(self._truncated)

    def project(self, x: Tensor) -> Tensor:
        """UᵀXV [..., s, r], for x [P]."""
        return matmul(matmul(self.transposed[0], x.view(self.shape)), self.input_basis)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """UᵀX, UᵀXV and, where the output side is truncated, XV, for X [..., O, I]."""
        p = matmul(self.transposed[0], x)
        q = matmul(x, self.input_basis) if self._truncated[0] else None
        return p, matmul(p, self.input_basis), q

    def _terms(
        self, parts: _SpectralParts, p: Tensor, k: Tensor, q: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """inner and outer, for rest · X + U inner + outer Vᵀ; no outer where U is complete."""
        inner = matmul(k * parts.core, self.transposed[1])
        if parts.rows.numel():
            inner = torch.addcmul(inner, parts.rows, p)
        return inner, None if q is None else q * parts.columns

    def _factors(self, inner: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor]:
        """left [..., O, k] and right [..., k, I], whose product is U inner + outer Vᵀ."""
        u, v_transposed = self.output_basis, self.transposed[1]
        if outer is None:
            return u, inner
        if outer.dim() > u.dim():
            batch = outer.shape[:-2]
            u = u.expand(*batch, *u.shape[-2:])
            v_transposed = v_transposed.expand(*batch, *v_transposed.shape[-2:])
        return torch.cat([u, outer], -1), torch.cat([inner, v_transposed], -2)

    def _product(self, x: Tensor, parts: _SpectralParts) -> Tensor:
        """The matrix with the eigenvalues of `parts`, times x [..., P]."""
        matrix = x.unflatten(-1, self.shape)
        left, right = self._factors(*self._terms(parts, *self._project(matrix)))
        product = matmul(left, right)
        if all(self._truncated):
            product = torch.addcmul(product, parts.rest, matrix)
        return product.reshape(x.shape)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._product(x, self._parts(self.spectrum))

    def solve(self, x: Tensor) -> Tensor:
        return self._product(x, self._inverse)

    def solution(self, x: Tensor) -> LazySolution:
        if self.spectrum.dim() > 2 or all(self._truncated):
            solved, dots = self.solve_(x)
            return LazySolution(dots if dots.dim() == 0 else dots.sum(), (solved,))
        left, right, dot = self._solution(x.view(self.shape))
        return LazySolution(dot, (left, right))

    def solve_(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """M⁻¹x for x [P], which may be overwritten, and <x, M⁻¹x> of each group [Γ] or ()."""
        parts, matrix = self._inverse, x.view(self.shape)
        if all(self._truncated):
            square = torch.linalg.vector_norm(matrix, dim=(-2, -1)).square_()
            left, right, dots = self._solution(matrix)
            dots = torch.addcmul(dots, parts.rest.view(square.shape), square)
            return self._add_rest_(parts, matrix, left, right).view(-1), dots
        left, right, dots = self._solution(matrix)
        return matmul(left, right).view(-1), dots

    def _solution(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`_factors` of the inverse, and the part of <X, M⁻¹X> that they have, for X [..., O, I].
        """
        parts, axes = self._inverse, (-2, -1)
        p, k, q = self._project(x)
        inner, outer = self._terms(parts, p, k, q)
        dots = (p * inner).sum(axes)
        if q is not None and outer is not None:
            dots = dots + (q * outer).sum(axes)
        return *self._factors(inner, outer), dots

    def _add_rest_(self, parts: _SpectralParts, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """rest · X + left right, in the memory of X [..., O, I]."""
        if x.dim() > 2:
            return x.mul_(parts.rest).baddbmm_(left, right)
        if x.device.type == "cpu":  # where a number can be read without waiting
            return x.addmm_(left, right, beta=parts.rest_value)
        return x.mul_(parts.rest).addmm_(left, right)

    def rsqrt(self, z: Tensor) -> Tensor:
        if any(self._truncated):
            return self._product(z, self._inverse_root)
        # no rotation into the basis first: z has the same distribution there
        scaled = z.unflatten(-1, self.shape) * self._inverse_root.core
        half = matmul(self.output_basis, scaled)
        return matmul(half, self.transposed[1]).reshape(z.shape)

    def rsqrt_(self, z: Tensor) -> Tensor:
        if not all(self._truncated):
            return self.rsqrt(z)
        parts, matrix = self._inverse_root, z.view(self.shape)
        left, right = self._factors(*self._terms(parts, *self._project(matrix)))
        return self._add_rest_(parts, matrix, left, right).view(-1)

    @cached_property
    def multiplicity(self) -> Tensor:
        """The number of eigenvalues that each entry of the spectrum stands for."""
        counts = outer(multiplicities(self.output_basis), multiplicities(self.input_basis))
        return counts.expand_as(self.spectrum)

    @cached_property
    def _logdet(self) -> Tensor:
        return (self.multiplicity * self.spectrum.log()).sum()

    def logdet(self) -> Tensor:
        return self._logdet

    def trace(self) -> Tensor:
        return (self.multiplicity * self.spectrum).sum()

    def _diag(self, spectrum: Tensor) -> Tensor:
        output, input = (squared_basis(basis) for basis in (self.output_basis, self.input_basis))
        return (output @ spectrum @ input.mT).flatten()

    def diag(self) -> Tensor:
        return self._diag(self.spectrum)

    def inverse_diag(self) -> Tensor:
        return self._diag(self.spectrum.reciprocal())

    def inverse_trace(self) -> Tensor:
        return (self.multiplicity / self.spectrum).sum()

    def eigenvalues(self) -> Tensor:
        counts = self.multiplicity.round().long().flatten()
        return self.spectrum.flatten().repeat_interleave(counts).sort().values

    def scale(self, factor: float | Tensor) -> KroneckerEigen:
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum * factor)

    def shift(self, delta: float | Tensor) -> KroneckerEigen:
        """M + delta·I for a scalar. Raises ValueError for a vector, which changes the basis."""
        if isinstance(delta, Tensor) and delta.numel() > 1:
            raise ValueError(
                f"shift of a Kronecker structure takes a scalar, got shape {tuple(delta.shape)}; "
                "use Rescaled for a diagonal of the form p_i r_j"
            )
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum + delta)

    def map_eigenvalues(self, function: Callable[[Tensor], Tensor]) -> KroneckerEigen:
        """The matrix with `function` applied to its eigenvalues."""
        return KroneckerEigen(self.output_basis, self.input_basis, function(self.spectrum))

    def mean_squares(self, x: Tensor) -> KroneckerEigen:
        """With the mean square of the projections of x [P] onto each eigenspace as eigenvalue."""
        u, v, matrix = self.output_basis, self.input_basis, x.view(self.shape)
        left = [u.mT @ matrix, matrix - u @ (u.mT @ matrix)][: 1 + self._truncated[0]]
        rows = []
        for part, is_rest in zip(left, (False, True), strict=False):
            k = part @ v
            pieces = [k.square(), (part - k @ v.mT).square().sum(-1, keepdim=True)]
            row = torch.cat(pieces[: 1 + self._truncated[1]], -1)
            rows.append(row.sum(-2, keepdim=True) if is_rest else row)
        return KroneckerEigen(u, v, torch.cat(rows, -2) / self.multiplicity)

    @cached_property
    def _input_factor(self) -> Tensor:
        """The eigenvalues [..., r] of the trace over the outputs, with a mean of 1.

        Those of the positive semi-definite part, which a Hessian is not itself.
        """
        counts = multiplicities(self.input_basis)
        trace = multiplicities(self.output_basis) @ self.spectrum.clamp(min=0)
        mean = (trace * counts).sum(-1, keepdim=True) / counts.sum()
        return torch.where(mean > 0, trace / mean, torch.ones_like(trace))

    def whiten_input(self, x: Tensor, power: int = 1, *, ridge: float) -> Tensor:
        """X Wᵖ for X [..., k, I] and W = (A + ridge · I)^-½, up to a positive factor of W for each
        group; in the dtype of X.

        A is the trace of M over the outputs, scaled to a mean of 1: for G ⊗ A it is A so scaled.
        """
        if (power, ridge) not in self._whitening:
            self._whitening[power, ridge] = self._whiten(power, ridge)
        core = self._whitening[power, ridge].to(x.dtype)
        if not self._truncated[1]:
            return matmul(x, core)
        add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
        return add_product(x, matmul(x, core), self.transposed[1].to(x.dtype))

    @cached_property
    def _whitening(self) -> dict[tuple[int, float], Tensor]:
        return {}

    def _whiten(self, power: int, ridge: float) -> Tensor:
        """B with Wᵖ = r (I + B Vᵀ), or B itself if V is complete."""
        root, v = (self._input_factor + ridge) ** (-power / 2), self.input_basis
        if not self._truncated[1]:
            return (v * root.unsqueeze(-2)) @ v.mT
        leading, rest = root.split((v.shape[-1], 1), -1)
        return v * (leading / rest - 1).unsqueeze(-2)

    def change_basis(
        self, output_basis: Tensor, input_basis: Tensor,
        roots: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> KroneckerEigen:
        """M averaged over the eigenspaces of other bases: exact if M is constant on them.

        With `roots` p [..., O] and r [..., I] it is M between two diagonal matrices p_i r_j.
        """
        bases = output_basis, input_basis, *roots
        if all(map(operator.is_, bases, (self.output_basis, self.input_basis, None, None))):
            return self
        output_overlap = squared_overlap(self.output_basis, output_basis, roots[0])
        input_overlap = squared_overlap(self.input_basis, input_basis, roots[1])
        spectrum = output_overlap.mT @ self.spectrum @ input_overlap
        return KroneckerEigen(output_basis, input_basis, spectrum)

    def psd(self) -> KroneckerEigen:
        return KroneckerEigen(self.output_basis, self.input_basis, self.spectrum.clamp(min=0))

    def lerp(self, other: KroneckerEigen, weight: float) -> KroneckerEigen:
        """In the basis of `other`, see `change_basis`: exact if both bases agree."""
        changed = self.change_basis(other.output_basis, other.input_basis)
        spectrum = torch.lerp(changed.spectrum, other.spectrum, weight)
        return KroneckerEigen(other.output_basis, other.input_basis, spectrum)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, without the views that this takes for two batches of matrices; into `out`, if given.
    """
    is_batch = a.dim() == b.dim() == 3 and len(a) == len(b)
    return torch.bmm(a, b, out=out) if is_batch else torch.matmul(a, b, out=out)
