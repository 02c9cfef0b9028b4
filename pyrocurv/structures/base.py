"""Structured symmetric matrices: immutable values with a dozen operations.

Every structure stands for a symmetric matrix M [P, P] and acts on the last axis of its arguments:

    M @ x, solve(x) = M⁻¹x, rsqrt(z) (covariance M⁻¹ when z ~ N(0, I)), logdet, trace, diag,
    inverse_diag, inverse_trace, eigenvalues, dense, scale(c) = cM, shift(δ) = M + diag(δ), lerp,
    psd, map
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyrocurv.structures.linalg import at_least_single
from pyrocurv.structures.operands import check_fields, check_operands
from pyrocurv.structures.serialization import from_state, map_tensors, serializable, to_state

S = TypeVar("S", bound="Structure")


@dataclass(frozen=True, eq=False)
class LazySolution:
    """M⁻¹x [P], kept as low-rank factors where that spares a pass over memory and a copy."""

    dot: Tensor  # <x, M⁻¹x>, a scalar
    factors: tuple[Tensor] | tuple[Tensor, Tensor]  # [P], or [O, k] and [k, I] with P = O·I

    def add_to(self, y: Tensor, alpha: float) -> Tensor:
        """y [P] after alpha · M⁻¹x has been added to it in place."""
        if len(self.factors) == 1:
            return y.add_(*self.factors, alpha=alpha)
        y.view(len(self.factors[0]), -1).addmm_(*self.factors, alpha=alpha)
        return y


Solution = LazySolution  # its former name


class Structure(ABC):
    """A symmetric matrix M [P, P] in a structured form. Subclasses are frozen dataclasses.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Diagonal, Structure
        >>> matrix: Structure = Diagonal(torch.tensor([1.0, 3.0]))
        >>> matrix.shift(1.0).solve(torch.ones(2))
        tensor([0.5000, 0.2500])
    """

    def __init_subclass__(cls) -> None:
        check_operands(cls)
        serializable(cls)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    @abstractmethod
    def size(self) -> int:
        """P, the number of rows."""

    @abstractmethod
    def __matmul__(self, x: Tensor) -> Tensor:
        """M x, for x [..., P]."""

    @abstractmethod
    def solve(self, x: Tensor) -> Tensor:
        """M⁻¹ x, for x [..., P]."""

    @abstractmethod
    def rsqrt(self, z: Tensor) -> Tensor:
        """R z with R Rᵀ = M⁻¹, for z [..., P]: samples when M is a precision and z ~ N(0, I)."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log det M, a scalar."""

    @abstractmethod
    def diag(self) -> Tensor:
        """The diagonal of M [P]."""

    @abstractmethod
    def inverse_diag(self) -> Tensor:
        """The diagonal of M⁻¹ [P]: the marginal variances when M is a precision."""

    @abstractmethod
    def scale(self: S, factor: float | Tensor) -> S:
        """factor · M, for a positive scalar."""

    @abstractmethod
    def shift(self, delta: float | Tensor) -> Structure:
        """M + diag(delta), for a scalar or, where the structure allows it, a vector [P]."""

    @abstractmethod
    def lerp(self: S, other: S, weight: float) -> S:
        """(1 - weight) M + weight · other, or an approximation of the same structure."""

    @abstractmethod
    def psd(self) -> Structure:
        """The nearest positive semi-definite matrix in the Frobenius norm."""

    def solution(self, x: Tensor) -> LazySolution:
        """M⁻¹x for x [P], which may be overwritten; not differentiable."""
        solved = self.solve(x)
        return LazySolution(torch.dot(x, solved), (solved,))

    def rsqrt_(self, z: Tensor) -> Tensor:
        """`rsqrt` of z [P], which may be overwritten; not differentiable."""
        return self.rsqrt(z)

    def eigenvalues(self) -> Tensor:
        """The eigenvalues of M [P], ascending."""
        matrix = self.dense()
        return torch.linalg.eigvalsh(at_least_single(matrix)).to(matrix.dtype)

    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar."""
        return self.diag().sum()

    def inverse_trace(self) -> Tensor:
        """The trace of M⁻¹, a scalar."""
        return self.inverse_diag().sum()

    def dense(self) -> Tensor:
        """M as a tensor [P, P]."""
        diagonal = self.diag()
        return self @ torch.eye(self.size, dtype=diagonal.dtype, device=diagonal.device)

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same structure with `function` applied to each of its tensors."""
        return map_tensors(self, function)

    def state(self) -> dict[str, Any]:
        """Plain dicts, lists and tensors for `torch.save`; `from_state` is the inverse."""
        return to_state(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Structure:
        """The structure that `state` describes; ValueError if it is of another class or version."""
        return from_state(state)


check_operands(Structure)  # of the operations that have a default
