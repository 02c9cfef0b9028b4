"""A structured matrix between two diagonal ones, and the Kronecker scaling of a prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.serialization import serializable


@serializable
@dataclass(frozen=True, eq=False)
class KroneckerScaling:
    """A prior precision taken apart as delta · p_i · r_j; `roots` are sqrt(p), sqrt(r).

    They are [O] and [I], or [Γ, O] and [Γ, I].
    In the units sqrt(p_i r_j) · W a Kronecker block has one prior precision, `delta`.
    """

    delta: Tensor
    roots: tuple[Tensor, Tensor] | None = None  # None where p = r = 1

    @property
    def root(self) -> Tensor | None:
        """sqrt(p_i r_j) as [P], if they are not one."""
        if self.roots is None:
            return None
        return (self.roots[0].unsqueeze(-1) * self.roots[1].unsqueeze(-2)).flatten()


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
