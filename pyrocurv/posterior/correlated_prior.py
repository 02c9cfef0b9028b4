"""A prior whose weights are correlated, as the posterior of an earlier task is.

    p(w) = N(M₀, Λ₀⁻¹),   Λ = (N/T) C + Λ₀   in the structure of C, see `pyrocurv.structures.sums`
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Normal

from pyrocurv.layers.block import Block
from pyrocurv.layers.weight_gaussian import Share
from pyrocurv.structures import BlockDiagonal, Diagonal, Rescaled, Structure
from pyrocurv.structures.serialization import serializable
from pyrocurv.structures.sums import trace_ratio


@serializable
@dataclass(frozen=True, eq=False)
class CorrelatedPrior:
    """N(M₀, Λ₀⁻¹) over a block's weights, to a power s, which makes its `precision` s Λ₀."""

    loc: Tensor  # [P]
    precision: Structure
    power: Tensor | None = None  # None for 1

    @cached_property
    def _logdet(self) -> Tensor:
        value = self.precision.logdet()
        if self.power is None:
            return value
        normalizer = len(self.loc) * math.log(2 * math.pi)
        value = value - len(self.loc) * self.power.log()  # of Λ₀ itself
        return self.power * (value - normalizer) + normalizer

    def logdet(self, size: int) -> Tensor:
        """As `GaussianPrior.logdet`."""
        return self._logdet

    def to_power(self, power: Tensor) -> CorrelatedPrior:
        """This prior, of power 1, raised to `power`. Raises ValueError for several powers."""
        if power.dim():
            raise ValueError(
                "weights whose prior is correlated need one poutine.scale, got "
                f"{sorted(set(power.tolist()))}"
            )
        if bool(power == 1):
            return self
        return CorrelatedPrior(self.loc, self.precision.scale(power), power)

    def scaled(self, factors: Tensor) -> CorrelatedPrior:
        """With F^½ Λ₀ F^½ as precision, for factors F = diag(factors), or a scalar."""
        if factors.dim() == 0:
            return replace(self, precision=self.precision.scale(factors))
        return replace(self, precision=Rescaled(self.precision, factors.sqrt()))

    @property
    def base(self) -> CorrelatedPrior:
        """The normal itself, of power 1."""
        if self.power is None:
            return self
        return CorrelatedPrior(self.loc, self.precision.scale(1 / self.power))

    def by_tensor(self, block: Block) -> None:
        """No tensor has a prior of its own."""

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the precision [P]."""
        return self.precision.diag()

    def distance(self, weights: Tensor) -> Tensor:
        """(w - M₀)ᵀ Λ₀ (w - M₀), for weights [P]."""
        deviation = self.deviation(weights)
        return torch.dot(deviation, self.precision @ deviation)

    def deviation(self, weights: Tensor) -> Tensor:
        """w - M₀, for weights [P]."""
        return weights - self.loc

    def trace_over(self, precision: Structure) -> Tensor:
        """tr(Λ₀ Λ⁻¹), for a precision Λ of the same weights."""
        return trace_ratio(precision, self.precision)

    def expected_distance(self, mean: Tensor, precision: Structure) -> Tensor:
        """The mean of `distance` over N(mean, precision⁻¹)."""
        return self.trace_over(precision) + self.distance(mean)

    def add_gradient(self, other: Tensor, weights: Tensor, value: float) -> Tensor:
        """other + value · Λ₀ (w - M₀) [P]."""
        return other.add(self.precision @ self.deviation(weights), alpha=value)


def share_of(normal: Normal) -> Share | None:
    """The Gaussian that a prior is a marginal of; None for independent weights."""
    return getattr(normal, "share", None)


def join_shares(block: Block, normals: Mapping[str, Normal]) -> CorrelatedPrior:
    """The prior of a block, some of whose weights are correlated.

    Raises ValueError if one of them is correlated with a weight outside of the block.
    """
    loc = block.pack({name: normal.loc.detach() for name, normal in normals.items()})
    positions = block.unpack(torch.arange(block.size, device=loc.device))
    shares = {site: share for site, normal in normals.items() if (share := share_of(normal))}
    gaussians = {id(s.gaussian): (s.gaussian, site.removesuffix(s.name))
                 for site, s in shares.items()}
    index, precisions = [], list[Structure]()
    for gaussian, prefix in gaussians.values():
        sites = {name: f"{prefix}{name}" for name in gaussian.shapes}
        _check_inside(block, [*sites.values()])
        moved = gaussian.to(loc)
        index.append(moved.pack({name: positions[site] for name, site in sites.items()}))
        precisions.append(moved.precision)
    others = [site for site in normals if site not in shares]
    if others:
        index.append(torch.cat([positions[site].flatten() for site in others]))
        scale = torch.cat([normals[site].scale.detach().flatten() for site in others])
        precisions.append(Diagonal(scale.square().reciprocal()))
    if len(index) == 1 and torch.equal(index[0], index[0].sort().values):
        return CorrelatedPrior(loc, precisions[0])
    return CorrelatedPrior(loc, BlockDiagonal(tuple(precisions), tuple(index)))


def _check_inside(block: Block, sites: Sequence[str]) -> None:
    if outside := [site for site in sites if site not in block.tensors]:
        inside = [site for site in sites if site in block.tensors]
        raise ValueError(
            f"the prior of {', '.join(inside)} is correlated with {', '.join(outside)}, of which "
            f"the posterior of {block.name} ({block.label}) is independent: use the structure of "
            "the posterior that the prior is from, or give that one the structure of this"
        )
