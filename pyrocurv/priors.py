"""What a model says of its weights before the data: normal priors, read from their sample sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from pyrocurv.blocks import Block
from pyrocurv.notice import notice
from pyrocurv.structures import Structure

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)
LOG_TWO_PI = math.log(2 * math.pi)


class Source(NamedTuple):
    """Of a weight's prior: its distribution, to the power that `poutine.scale` raises it to."""

    fn: Distribution
    power: float = 1.0


@dataclass(frozen=True, eq=False)
class Prior:
    """Independent normals over a block's weights, each to a power; tensors are scalars or [P].

    N(M₀, 1/δ) to the power s is, but for its mass, a normal of `precision` s δ.
    """

    loc: Tensor
    precision: Tensor
    centred: bool = False  # loc is known to be 0
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

    def to(self, power: Tensor) -> Prior:
        """This prior, of power 1, raised to `power`."""
        if power.dim() == 0 and bool(power == 1):
            return self
        return Prior(self.loc, self.precision * power, self.centred, power)

    @property
    def base(self) -> Prior:
        """The normals themselves, to no power."""
        if self.power is None:
            return self
        return Prior(self.loc, self.precision / self.power, self.centred)

    def distance(self, weights: Tensor) -> Tensor:
        """Σ δ (w - M₀)², for weights [P]."""
        deviation = self.deviation(weights)
        if self.precision.dim() == 0:
            return self.precision * torch.dot(deviation, deviation)
        return torch.dot(deviation * self.precision, deviation)

    def deviation(self, weights: Tensor) -> Tensor:
        """w - M₀, for weights [P]."""
        return weights if self.centred else weights - self.loc


@dataclass(frozen=True, eq=False)
class Units:
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


def kl(loc: Tensor, precision: Structure, prior: Prior) -> Tensor:
    """KL(N(M, Λ⁻¹) ‖ prior) in nats: ½ (Σ [δ (σ² + (M - M₀)²) - 1] - ln det δ + ln det Λ)."""
    spread = precision.inverse_diag() + (loc - prior.loc).square()
    terms = prior.precision * spread - 1
    return (terms.sum() - prior.logdet(precision.size) + precision.logdet()) / 2


def as_normal(prior: Distribution) -> Normal | None:
    """The normal under `Independent`, or None where the prior is no normal."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    return prior if isinstance(prior, Normal) else None


def compact(value: Tensor) -> Tensor:
    """A tensor expanded from one number, as that number."""
    axes = zip(value.stride(), value.shape, strict=True)
    if all(stride == 0 or size == 1 for stride, size in axes):
        return value[(0,) * value.dim()]
    return value


def fan_in(module: nn.Module) -> int:
    """How many inputs an output adds up."""
    if isinstance(module, TRANSPOSED):
        weight = module.weight
        return weight.numel() // (weight.shape[1] * module.groups)
    if isinstance(module, (nn.Embedding, *NORMS)):
        return 1
    matrices = [p[0].numel() for p in module.parameters(recurse=False) if p.dim() > 1]
    return max(matrices, default=1)


def read_prior(block: Block, priors: Mapping[str, Distribution]) -> Prior:
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
    centred = loc.dim() == 0 and bool(loc == 0)
    return Prior(loc, _pack(block, scales).square().reciprocal(), centred)


def _pack(block: Block, values: Mapping[str, Tensor]) -> Tensor:
    numbers = [compact(value) for value in values.values()]
    if all(n.dim() == 0 and bool(n == numbers[0]) for n in numbers):
        return numbers[0]
    return block.pack({name: values[name].expand(shape) for name, shape in block.tensors.items()})


def units(block: Block, prior: Prior) -> Units:
    """The precision as delta · p_i · r_j, the geometric mean in `delta`.

    Exact where the precision has that form (one for each layer, each input, each output, weight and
    bias apart); otherwise the nearest of that form in the logarithm, with a warning.
    """
    if prior.precision.dim() == 0:
        return Units(prior.precision)
    (layer,) = block.layers
    log = prior.precision.log().view(layer.matrix_shape)
    mean = log.mean()
    output = log.mean(-1) - mean
    input = log.mean(-2) - log.mean((-2, -1)).unsqueeze(-1)
    product = mean + output.unsqueeze(-1) + input.unsqueeze(-2)
    if not torch.allclose(product, log, rtol=0, atol=1e-5):
        notice(
            f"the prior precision of {layer.weight!r} is no product of one for each output and one "
            "for each input: the nearest product stands for it in the posterior"
        )
    return Units(mean.exp(), ((output / 2).exp(), (input / 2).exp()))


@dataclass(frozen=True, eq=False)
class BlockPrior:
    """A block's prior: packed, and taken apart where the block is a Kronecker product."""

    sources: Mapping[str, Source]
    packed: Prior
    units: Units | None
    fixed: bool  # whether it cannot have changed as long as the sources are these

    @staticmethod
    def read(block: Block, sources: Mapping[str, Source]) -> BlockPrior:
        """From what the block's sites have."""
        packed = read_prior(block, {name: source.fn for name, source in sources.items()})
        powers = {n: packed.precision.new_tensor(source.power) for n, source in sources.items()}
        packed = packed.to(_pack(block, powers))
        apart = units(block, packed) if block.kind in ("kfac", "ekfac") else None
        fixed = not any(_varies(source.fn) for source in sources.values())
        return BlockPrior(sources, packed, apart, fixed)

    def still_holds(self, sources: Mapping[str, Source]) -> bool:
        """Whether it was read from these very distributions, and they cannot have changed since."""
        return self.fixed and all(
            old.fn is sources[name].fn and old.power == sources[name].power
            for name, old in self.sources.items()
        )


def _varies(prior: Distribution) -> bool:
    normal = as_normal(prior)
    return normal is None or normal.loc.requires_grad or normal.scale.requires_grad
