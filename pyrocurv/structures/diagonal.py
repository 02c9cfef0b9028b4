"""A diagonal matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure


@dataclass(frozen=True, eq=False)
class Diagonal(Structure):
    """diag(entries), with entries [P].

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Diagonal
        >>> Diagonal(torch.tensor([1.0, 4.0])).rsqrt(torch.ones(2))
        tensor([1.0000, 0.5000])
    """

    entries: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.entries.dim():
            raise ValueError("entries: a vector [P] is needed, got a scalar")

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self.entries.rsqrt()

    @cached_property
    def _logdet(self) -> Tensor:
        return self.entries.log().sum()

    @property
    def size(self) -> int:
        return self.entries.shape[-1]

    def __matmul__(self, x: Tensor) -> Tensor:
        return x * self.entries

    def solve(self, x: Tensor) -> Tensor:
        return x / self.entries

    def rsqrt(self, z: Tensor) -> Tensor:
        return z * self.entries.rsqrt()

    def rsqrt_(self, z: Tensor) -> Tensor:
        return z.mul_(self._inverse_root)

    def logdet(self) -> Tensor:
        return self._logdet

    def diag(self) -> Tensor:
        return self.entries

    def inverse_diag(self) -> Tensor:
        return self.entries.reciprocal()

    def eigenvalues(self) -> Tensor:
        return self.entries.sort().values

    def scale(self, factor: float | Tensor) -> Diagonal:
        return Diagonal(self.entries * factor)

    def shift(self, delta: float | Tensor) -> Diagonal:
        return Diagonal(self.entries + delta)

    def lerp(self, other: Diagonal, weight: float) -> Diagonal:
        return Diagonal(torch.lerp(self.entries, other.entries, weight))

    def psd(self) -> Diagonal:
        return Diagonal(self.entries.clamp(min=0))
