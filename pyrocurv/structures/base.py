"""A structured symmetric matrix: an immutable value with a dozen verbs.

Every structure stands for one symmetric matrix M [P, P] and acts on the last axis of its arguments:

    M @ x, solve(x) = M⁻¹x, rsqrt(z) (covariance M⁻¹ when z ~ N(0, I)), logdet, trace, diag,
    inverse_diag, eigenvalues, dense, scale(c) = cM, shift(δ) = M + diag(δ), lerp, psd, map

Signs and verbs keep their algebra; where a result is an approximation the docstring says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyrocurv.structures.serialization import from_state, map_tensors, serializable, to_state

S = TypeVar("S", bound="Structure")


@dataclass(frozen=True, eq=False)
class Solution:
    """M⁻¹x to be added to something: a vector [P], or two factors [O, k], [k, I] of a matrix."""

    dot: Tensor  # <x, M⁻¹x>
    parts: tuple[Tensor] | tuple[Tensor, Tensor]

    def add_to(self, y: Tensor, alpha: float) -> Tensor:
        """y [P] with alpha · M⁻¹x added to it in place."""
        if len(self.parts) == 1:
            return y.add_(*self.parts, alpha=alpha)
        y.view(len(self.parts[0]), -1).addmm_(*self.parts, alpha=alpha)
        return y


class Structure(ABC):
    """A symmetric matrix [P, P] in a structured form. Subclasses are frozen dataclasses."""

    def __init_subclass__(cls) -> None:
        serializable(cls)

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
        """R z with R Rᵀ = M⁻¹, for z [..., P]: a sample when M is a precision and z ~ N(0, I)."""

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
    def eigenvalues(self) -> Tensor:
        """The eigenvalues of M [P], ascending."""

    @abstractmethod
    def scale(self: S, factor: float | Tensor) -> S:
        """factor · M, for a positive scalar."""

    @abstractmethod
    def shift(self, delta: float | Tensor) -> Structure:
        """M + diag(delta), for a scalar or, where the structure allows it, a vector [P]."""

    @abstractmethod
    def lerp(self: S, other: S, weight: float) -> S:
        """(1 - weight) M + weight · other, exactly or as near as the structure can come."""

    @abstractmethod
    def psd(self) -> Structure:
        """The nearest positive semi-definite matrix in the Frobenius norm."""

    def solution(self, x: Tensor) -> Solution:
        """M⁻¹x for x [P], whose memory may be used for it; without gradients."""
        solved = self.solve(x)
        return Solution(torch.dot(x, solved), (solved,))

    def rsqrt_(self, z: Tensor) -> Tensor:
        """`rsqrt` of z [P], whose memory may be used for it; without gradients."""
        return self.rsqrt(z)

    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar."""
        return self.diag().sum()

    def dense(self) -> Tensor:
        """M as a tensor [P, P]."""
        diagonal = self.diag()
        return self @ torch.eye(self.size, dtype=diagonal.dtype, device=diagonal.device)

    def map(self: S, function: Callable[[Tensor], Tensor]) -> S:
        """The same structure with `function` applied to each tensor it is made of."""
        return map_tensors(self, function)

    def state(self) -> dict[str, Any]:
        """Plain dicts, lists and tensors, for `torch.save`; `from_state` is the way back."""
        return to_state(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Structure:
        """The structure that `state` describes.

        Raises ValueError for a state of something else, or of another version.
        """
        return from_state(state)
