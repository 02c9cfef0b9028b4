"""A dense symmetric matrix: no approximation, P² entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.linalg import at_least_single, cholesky, eigh_psd
from pyrocurv.structures.operands import check_square


@dataclass(frozen=True, eq=False)
class Dense(Structure):
    """The matrix itself [P, P]; `solve`, `rsqrt` and `logdet` need a positive definite one.

    Matrices of half precision are factorized in single precision.

    Raises `torch.linalg.LinAlgError` in these for a matrix that is far from it.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Dense
        >>> Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).eigenvalues()
        tensor([1., 3.])
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        check_square("matrix", self.matrix)

    @cached_property
    def _cholesky(self) -> Tensor:
        return cholesky(self.matrix)

    @property
    def size(self) -> int:
        return self.matrix.shape[-1]

    def __matmul__(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def solve(self, x: Tensor) -> Tensor:
        solved = torch.cholesky_solve(_columns(x), self._cholesky)
        return solved.mT.reshape(x.shape).to(x.dtype)

    def rsqrt(self, z: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self._cholesky.mT, _columns(z), upper=True)
        return half.mT.reshape(z.shape).to(z.dtype)

    def logdet(self) -> Tensor:
        return (2 * self._cholesky.diagonal().log().sum()).to(self.matrix.dtype)

    def diag(self) -> Tensor:
        return self.matrix.diagonal()

    def inverse_diag(self) -> Tensor:
        return torch.cholesky_inverse(self._cholesky).diagonal().to(self.matrix.dtype)

    def dense(self) -> Tensor:
        return self.matrix

    def scale(self, factor: float | Tensor) -> Dense:
        return Dense(self.matrix * factor)

    def shift(self, delta: float | Tensor) -> Dense:
        diagonal = torch.as_tensor(delta, dtype=self.matrix.dtype, device=self.matrix.device)
        return Dense(self.matrix + torch.diag(diagonal.expand(self.size)))

    def lerp(self, other: Dense, weight: float) -> Dense:
        return Dense(torch.lerp(self.matrix, other.matrix, weight))

    def psd(self) -> Dense:
        values, vectors = eigh_psd(self.matrix)
        return Dense((vectors * values) @ vectors.mT)


def _columns(x: Tensor) -> Tensor:
    """[..., P] -> [P, N]: one matrix of right-hand sides, so that the factor is not repeated."""
    return at_least_single(x).reshape(-1, x.shape[-1]).mT
