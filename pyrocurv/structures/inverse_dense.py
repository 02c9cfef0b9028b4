"""A dense symmetric matrix that is given by a Cholesky factor of its inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.dense import Dense
from pyrocurv.structures.linalg import at_least_single, scale_tril
from pyrocurv.structures.operands import check_square


@dataclass(frozen=True, eq=False)
class InverseDense(Structure):
    """(L Lᵀ)⁻¹ for a lower triangular L [P, P], the `scale_tril` of a Gaussian with this precision.

    `solve` and `rsqrt` are products; everything that needs the matrix itself inverts L Lᵀ.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import InverseDense
        >>> InverseDense(2 * torch.eye(2)).diag()
        tensor([0.2500, 0.2500])
    """

    scale_tril: Tensor

    def __post_init__(self) -> None:
        check_square("scale_tril", self.scale_tril)

    @property
    def size(self) -> int:
        return self.scale_tril.shape[-1]

    def __matmul__(self, x: Tensor) -> Tensor:
        return x @ self.dense()

    def solve(self, x: Tensor) -> Tensor:
        return x @ self.scale_tril @ self.scale_tril.mT

    def rsqrt(self, z: Tensor) -> Tensor:
        return z @ self.scale_tril.mT

    def logdet(self) -> Tensor:
        return -2 * self.scale_tril.diagonal().log().sum()

    def diag(self) -> Tensor:
        return self.dense().diagonal()

    def inverse_diag(self) -> Tensor:
        return self.scale_tril.square().sum(-1)

    def dense(self) -> Tensor:
        root = self.scale_tril
        return torch.cholesky_inverse(at_least_single(root)).to(root.dtype)

    def scale(self, factor: float | Tensor) -> InverseDense:
        return InverseDense(self.scale_tril / factor**0.5)

    def shift(self, delta: float | Tensor) -> Dense:
        return Dense(self.dense()).shift(delta)

    def lerp(self, other: InverseDense, weight: float) -> InverseDense:
        return InverseDense(scale_tril(torch.lerp(self.dense(), other.dense(), weight)))

    def psd(self) -> InverseDense:
        return self
