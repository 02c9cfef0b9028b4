"""What a model says of its weights before the data: normal priors, read from their sample sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.layers.block import Block
from pyrocurv.runtime.distributions import as_normal, compact
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures import Structure
from pyrocurv.structures.rescaled import KroneckerScaling

LOG_TWO_PI = math.log(2 * math.pi)


class PriorSite(NamedTuple):
    """Of a weight's prior: its distribution, to the power that `poutine.scale` raises it to."""

    fn: Distribution
    power: float = 1.0


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Independent normals over a block's weights, each to a power; tensors are scalars or [P].

    N(M₀, 1/δ) to the power s is, but for its mass, a normal of `precision` s δ.
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
        """log det of the precision over `size` weights; of powers, what their mass makes of it."""
        return self._log_sum if self.precision.dim() else self._log_sum * size

    def to(self, power: Tensor) -> GaussianPrior:
        """This prior, of power 1, raised to `power`."""
        if power.dim() == 0 and bool(power == 1):
            return self
        return GaussianPrior(self.loc, self.precision * power, self.zero_mean, power)

    @property
    def base(self) -> GaussianPrior:
        """The normals themselves, to no power."""
        if self.power is None:
            return self
        return GaussianPrior(self.loc, self.precision / self.power, self.zero_mean)

    def distance(self, weights: Tensor) -> Tensor:
        """Σ δ (w - M₀)², for weights [P]."""
        deviation = self.deviation(weights)
        if self.precision.dim() == 0:
            return self.precision * torch.dot(deviation, deviation)
        return torch.dot(deviation * self.precision, deviation)

    def deviation(self, weights: Tensor) -> Tensor:
        """w - M₀, for weights [P]."""
        return weights if self.zero_mean else weights - self.loc


def kl(loc: Tensor, precision: Structure, prior: GaussianPrior) -> Tensor:
    """KL(N(M, Λ⁻¹) ‖ prior) in nats: ½ (Σ [δ (σ² + (M - M₀)²) - 1] - ln det δ + ln det Λ)."""
    spread = precision.inverse_diag() + (loc - prior.loc).square()
    terms = prior.precision * spread - 1
    return (terms.sum() - prior.logdet(precision.size) + precision.logdet()) / 2


def read_prior(block: Block, priors: Mapping[str, Distribution]) -> GaussianPrior:
    """The priors of a block's sites, packed; scalars where all weights share one."""
    normals = {name: as_normal(priors[name]) for name in block.tensors}
    for name, normal in normals.items():
        if normal is None:
            raise ValueError(
                f"latent {name!r} has a {type(priors[name]).__name__} prior, a normal is needed: "
                "for a model without a network NGVI(model, guide, curvature='hessian', "
                "num_particles=0) ends in the Laplace approximation"
            )
    locs = {name: normal.loc.detach() for name, normal in normals.items()}  # type: ignore[union-attr]
    scales = {name: normal.scale.detach() for name, normal in normals.items()}  # type: ignore[union-attr]
    loc = _pack(block, locs)
    zero_mean = loc.dim() == 0 and bool(loc == 0)
    return GaussianPrior(loc, _pack(block, scales).square().reciprocal(), zero_mean)


def _pack(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    numbers = [compact(value) for value in values.values()]
    if all(n.dim() == 0 and bool(n == numbers[0]) for n in numbers):
        return numbers[0]
    return block.pack({name: values[name].expand(shape) for name, shape in block.tensors.items()})


def units(block: Block, prior: GaussianPrior) -> KroneckerScaling:
    """The precision as delta · p_i · r_j, the geometric mean in `delta`.

    Exact where the precision has that form (one for each layer, each input, each output, weight and
    bias apart); otherwise the nearest of that form in the logarithm, with a warning.
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
            f"the prior precision of {layer.weight!r} is no product of one for each output and one "
            "for each input: the nearest product stands for it in the posterior"
        )
    return KroneckerScaling(mean.exp(), ((output / 2).exp(), (input / 2).exp()))


@dataclass(frozen=True, eq=False)
class BlockPrior:
    """A block's prior: packed, and taken apart where the block is a Kronecker product."""

    prior_sites: Mapping[str, PriorSite]
    packed: GaussianPrior
    units: KroneckerScaling | None
    fixed: bool  # whether it cannot have changed as long as the sources are these

    @staticmethod
    def read(block: Block, prior_sites: Mapping[str, PriorSite]) -> BlockPrior:
        """From what the block's sites have."""
        packed = read_prior(block, {name: source.fn for name, source in prior_sites.items()})
        powers = {n: packed.precision.new_tensor(source.power) for n, source in prior_sites.items()}
        packed = packed.to(_pack(block, powers))
        apart = units(block, packed) if block.kind in ("kfac", "ekfac") else None
        fixed = not any(_varies(source.fn) for source in prior_sites.values())
        return BlockPrior(prior_sites, packed, apart, fixed)

    def still_holds(self, prior_sites: Mapping[str, PriorSite]) -> bool:
        """Whether it was read from these very distributions, and they cannot have changed since."""
        return self.fixed and all(
            old.fn is prior_sites[name].fn and old.power == prior_sites[name].power
            for name, old in self.prior_sites.items()
        )


def _varies(prior: Distribution) -> bool:
    normal = as_normal(prior)
    return normal is None or normal.loc.requires_grad or normal.scale.requires_grad
