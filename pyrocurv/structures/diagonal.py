"""A diagonal matrix, and a diagonal change of units around any other structure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure


@dataclass(frozen=True, eq=False)
class Diagonal(Structure):
    """diag(entries), entries [P]."""

    entries: Tensor

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

    @cached_property
    def _inverse_root(self) -> Tensor:
        return self.entries.rsqrt()

    @cached_property
    def _logdet(self) -> Tensor:
        return self.entries.log().sum()

    def logdet(self) -> Tensor:
        return self._logdet

    def diag(self) -> Tensor:
        return self.entries

    def inverse_diag(self) -> Tensor:
        return self.entries.reciprocal()

    def eigenvalues(self) -> Tensor:
        return self.entries.sort().values

    def dense(self) -> Tensor:
        return torch.diag(self.entries)

    def scale(self, factor: float | Tensor) -> Diagonal:
        return Diagonal(self.entries * factor)

    def shift(self, delta: float | Tensor) -> Diagonal:
        return Diagonal(self.entries + delta)

    def lerp(self, other: Diagonal, weight: float) -> Diagonal:
        return Diagonal(torch.lerp(self.entries, other.entries, weight))

    def psd(self) -> Diagonal:
        return Diagonal(self.entries.clamp(min=0))


@dataclass(frozen=True, eq=False)
class Rescaled(Structure):
    """diag(root) · inner · diag(root), root [P] positive.

    This is how a prior whose precision root² is not the same for all weights of a Kronecker block
    stays exact: in the units root·w it is the same for all. `shift` adds to the diagonal of the
    whole matrix and so asks `inner` for a shift by delta / root².
    """

    inner: Structure
    root: Tensor

    @property
    def size(self) -> int:
        return self.inner.size

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.root * (self.inner @ (self.root * x))

    def solve(self, x: Tensor) -> Tensor:
        return self.inner.solve(x / self.root) / self.root

    def rsqrt(self, z: Tensor) -> Tensor:
        return self.inner.rsqrt(z) / self.root

    def rsqrt_(self, z: Tensor) -> Tensor:
        return self.inner.rsqrt_(z).div_(self.root)

    def logdet(self) -> Tensor:
        return self.inner.logdet() + 2 * self.root.log().sum()

    def diag(self) -> Tensor:
        return self.inner.diag() * self.root.square()

    def inverse_diag(self) -> Tensor:
        return self.inner.inverse_diag() / self.root.square()

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.dense())

    def scale(self, factor: float | Tensor) -> Rescaled:
        return Rescaled(self.inner.scale(factor), self.root)

    def shift(self, delta: float | Tensor) -> Rescaled:
        return Rescaled(self.inner.shift(delta / self.root.square()), self.root)

    def lerp(self, other: Rescaled, weight: float) -> Rescaled:
        """In `other`'s units, as `inner` lerps; exact where the units are the same."""
        return Rescaled(self.inner.lerp(other.inner, weight), other.root)

    def psd(self) -> Rescaled:
        """The nearest in the units that `inner` is in."""
        return Rescaled(self.inner.psd(), self.root)
