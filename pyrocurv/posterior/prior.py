"""Normal priors of a block's weights: read from sample sites, packed, and taken apart.

A Kronecker block needs a precision of the form delta · p_i · r_j, see `KroneckerScaling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from pyrocurv.layers.block import Block
from pyrocurv.posterior.correlated_prior import CorrelatedPrior, join_shares, share_of
from pyrocurv.runtime.distributions import as_normal, compact
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures import Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import serializable

LOG_TWO_PI = math.log(2 * math.pi)


class PriorSite(NamedTuple):
    """The prior of one weight: a distribution, to the power that `poutine.scale` gives it."""

    fn: Distribution
    power: float = 1.0


@serializable
@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Independent normals over a block's weights, each to a power; tensors are scalars or [P].

    N(M₀, 1/δ) to the power s is, up to its mass, a normal of `precision` s δ.
    """

    loc: Tensor
    precision: Tensor
    zero_mean: bool = False  # loc is known to be 0
    power: Tensor | None = None  # None where all are 1

    @cached_property
    def _log_sum(self) -> Tensor:
        log = self.precision.log()
        if self.power is not None:
            log = self.power * (log - self.power.log() - LOG_TWO_PI) + LOG_TWO_PI
        return log.sum()

    def logdet(self, size: int) -> Tensor:
        """log det of the precision over `size` weights, corrected for the mass of powers."""
        if self.precision.dim():
            return self._log_sum
        if size not in self._logdets:
            self._logdets[size] = self._log_sum * size
        return self._logdets[size]

    @cached_property
    def _logdets(self) -> dict[int, Tensor]:
        return {}

    def to_power(self, power: Tensor) -> GaussianPrior:
        """This prior, of power 1, raised to `power`."""
        if power.dim() == 0 and bool(power == 1):
            return self
        return GaussianPrior(self.loc, self.precision * power, self.zero_mean, power)

    def scaled(self, factors: Tensor) -> GaussianPrior:
        """With the precision times factors, a scalar or [P]."""
        return replace(self, precision=self.precision * factors)

    @property
    def base(self) -> GaussianPrior:
        """The normals themselves, of power 1."""
        if self.power is None:
            return self
        return GaussianPrior(self.loc, self.precision / self.power, self.zero_mean)

    def by_tensor(self, block: Block) -> Tensor | None:
        """δ of each of the block's tensors, if their priors are N(0, 1/δ); else None."""
        if not self.zero_mean or self.loc.dim():
            return None
        if block not in self._by_tensor:
            self._by_tensor[block] = self._constants(block)
        return self._by_tensor[block]

    def _constants(self, block: Block) -> Tensor | None:
        """The precision of each tensor, if it has only one."""
        if self.precision.dim() == 0:
            return self.precision.expand(len(block.tensors))
        values = [x.flatten() for x in block.views(self.precision).values()]
        is_constant = torch.stack([(x == x[:1]).all() for x in values]).all()
        return torch.cat([x[:1] for x in values]) if is_constant else None

    @cached_property
    def _by_tensor(self) -> dict[Block, Tensor | None]:
        return {}

    @property
    def diagonal(self) -> Tensor:
        """The diagonal of the precision [P], or a scalar."""
        return self.precision

    def distance(self, weights: Tensor) -> Tensor:
        """Σ δ (w - M₀)², for weights [P]."""
        deviation = self.deviation(weights)
        if self.precision.dim() == 0:
            return self.precision * torch.dot(deviation, deviation)
        return torch.dot(deviation * self.precision, deviation)

    def deviation(self, weights: Tensor) -> Tensor:
        """w - M₀, for weights [P]."""
        return weights if self.zero_mean else weights - self.loc

    def expected_distance(self, mean: Tensor, precision: Structure) -> Tensor:
        """The mean of `distance` over N(mean, precision⁻¹)."""
        return (self.precision * (precision.inverse_diag() + self.deviation(mean).square())).sum()


Prior = GaussianPrior | CorrelatedPrior


@serializable
@dataclass(frozen=True, eq=False)
class BlockPrior:
    """A block's prior, and its precision taken apart if the block is a Kronecker product."""

    gaussian: Prior
    scaling: KroneckerScaling | None = None


class PriorCache:
    """Priors of blocks, read again only when their distributions may have changed."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[dict[str, PriorSite], BlockPrior, bool]] = {}

    @property
    def sites(self) -> dict[str, PriorSite]:
        """The prior sites that were read last, of all weights."""
        return {n: site for sites, *_ in self._entries.values() for n, site in sites.items()}

    def read(self, block: Block, sites: Mapping[str, PriorSite]) -> BlockPrior:
        """The prior of a block."""
        known, prior, is_static = self._entries.get(block.name, ({}, None, False))
        sites = {name: sites[name] for name in block.tensors}
        unchanged = known.keys() == sites.keys() and all(
            _is_same(old, sites[name]) for name, old in known.items()
        )
        if prior is None or not (is_static and unchanged):
            prior = read_block_prior(block, sites)
            is_static = not any(_requires_grad(site.fn) for site in sites.values())
            self._entries[block.name] = sites, prior, is_static
        return prior


def _is_same(old: PriorSite, new: PriorSite) -> bool:
    """Whether a prior is the same object, or a share of the same Gaussian."""
    if old.fn is new.fn or old.power != new.power:
        return old.power == new.power
    before, now = as_normal(old.fn), as_normal(new.fn)
    if before is None or now is None or share_of(now) is None:
        return False
    is_moved = before.loc.device != now.loc.device or before.loc.dtype != now.loc.dtype
    return not is_moved and share_of(before) == share_of(now)


def kl(loc: Tensor, precision: Structure, prior: Prior) -> Tensor:
    """KL(N(M, Λ⁻¹) ‖ prior) in nats: ½ (tr(δ Λ⁻¹) + Σ δ (M - M₀)² - P - ln det δ + ln det Λ)."""
    terms = prior.expected_distance(loc, precision) - prior.logdet(precision.size)
    return (terms - precision.size + precision.logdet()) / 2


def read_block_prior(block: Block, sites: Mapping[str, PriorSite]) -> BlockPrior:
    """The prior of a block from its sites.

    Raises ValueError for a prior that is not normal.
    """
    gaussian = read_prior(block, {name: site.fn for name, site in sites.items()})
    powers = {n: gaussian.loc.new_tensor(site.power) for n, site in sites.items()}
    gaussian = gaussian.to_power(_pack(block, powers))
    if isinstance(gaussian, CorrelatedPrior) or not block.structure.is_kronecker:
        return BlockPrior(gaussian)
    return BlockPrior(gaussian, kronecker_scaling(block, gaussian))


def read_prior(block: Block, priors: Mapping[str, Distribution]) -> Prior:
    """The normals of a block's sites, packed; scalars where all weights share one.

    Raises ValueError for a prior that is not normal, or correlated with one of another block.
    """
    normals = {name: _normal(name, priors[name]) for name in block.tensors}
    if any(map(share_of, normals.values())):
        return join_shares(block, normals)
    loc = _pack(block, {name: normal.loc.detach() for name, normal in normals.items()})
    scale = _pack(block, {name: normal.scale.detach() for name, normal in normals.items()})
    zero_mean = loc.dim() == 0 and bool(loc == 0)
    return GaussianPrior(loc, scale.square().reciprocal(), zero_mean)


def _normal(name: str, prior: Distribution) -> Normal:
    normal = as_normal(prior)
    if normal is None:
        raise ValueError(
            f"latent {name!r} has a {type(prior).__name__} prior, but a normal is needed: for a "
            "model without a network NGVI(model, guide, curvature='hessian', num_particles=0) "
            "ends in the Laplace approximation"
        )
    return normal


def _pack(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    """A scalar where all values are equal, else [P]."""
    compacted = [compact(value) for value in values.values()]
    if all(n.dim() == 0 and bool(n == compacted[0]) for n in compacted):
        return compacted[0]
    return block.pack({name: values[name].expand(shape) for name, shape in block.tensors.items()})


def kronecker_scaling(block: Block, prior: GaussianPrior) -> KroneckerScaling:
    """The precision as delta · p_i · r_j, with the geometric mean in `delta`.

    Exact where the precision has that form (one for each layer, each input, each output, weight and
    bias separately); otherwise the nearest of that form in the logarithm, with a warning.
    """
    if prior.precision.dim() == 0:
        return KroneckerScaling(prior.precision)
    (layer,) = block.layers
    log = prior.precision.log().view(layer.matrix_shape)
    mean = log.mean()
    output = log.mean(-1) - mean
    input = log.mean(-2) - log.mean((-2, -1)).unsqueeze(-1)
    product = mean + output.unsqueeze(-1) + input.unsqueeze(-2)
    if not torch.allclose(product, log, rtol=0, atol=1e-5):
        warn_user(
            f"the prior precision of {layer.weight!r} is not a product of one factor for each "
            "output and one for each input: the posterior uses the nearest product"
        )
    return KroneckerScaling(mean.exp(), ((output / 2).exp(), (input / 2).exp()))


def _requires_grad(prior: Distribution) -> bool:
    """Whether the values of a prior may change while its distribution stays the same object."""
    normal = as_normal(prior)
    return normal is None or normal.loc.requires_grad or normal.scale.requires_grad
