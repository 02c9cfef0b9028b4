"""A structured matrix between two diagonal ones, and the Kronecker scaling of a prior precision."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyrocurv.structures.base import Structure
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.serialization import serializable


@serializable
@dataclass(frozen=True, eq=False)
class KroneckerScaling:
    """A prior precision delta · p_i · r_j of weights W_ij: delta for all sqrt(p_i r_j) W_ij."""

    delta: Tensor
    roots: tuple[Tensor, Tensor] | None = None  # sqrt(p) [*Γ, O], sqrt(r) [*Γ, I]; None: p = r = 1

    @property
    def root(self) -> Tensor | None:
        """sqrt(p_i r_j) as a vector [P], or None where p = r = 1."""
        return None if self.roots is None else outer(*self.roots).flatten()


@dataclass(frozen=True, eq=False)
class Rescaled(Structure):
    """diag(root) · inner · diag(root), with root [P] positive.

    It keeps a prior exact whose precision root² differs between the weights w of a Kronecker block:
    that of the rescaled weights root · w is the same for all.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Dense, Rescaled
        >>> Rescaled(Dense(torch.ones(2, 2)), torch.tensor([1.0, 3.0])).dense()
        tensor([[1., 3.],
                [3., 9.]])
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

    def scale(self, factor: float | Tensor) -> Rescaled:
        return Rescaled(self.inner.scale(factor), self.root)

    def shift(self, delta: float | Tensor) -> Rescaled:
        return Rescaled(self.inner.shift(delta / self.root.square()), self.root)

    def lerp(self, other: Rescaled, weight: float) -> Rescaled:
        """The `lerp` of the inner structures with the root of `other`; exact for equal roots."""
        return Rescaled(self.inner.lerp(other.inner, weight), other.root)

    def psd(self) -> Rescaled:
        """The nearest to `inner`, in the Frobenius norm, before it is rescaled."""
        return Rescaled(self.inner.psd(), self.root)
