"""The posterior of one task as the prior of the next: each weight has a share of one Gaussian.

    log p(w) = Σ_k log p_k,   log p_k = ½ (ln det Λ₀ / P - ln 2π) - d_k ∘ [Λ₀ (½ d_k + Σ_j d_j)]_k

with d_k = w_k - M₀ₖ of the k-th weight that a run of the network samples, and j the earlier ones. A
term is not a conditional density; their sum is the density of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.layers.weight_gaussian import Share, WeightGaussian, match_names


class CorrelatedNormal(dist.Normal):
    """One weight of a Gaussian over several, given the weights that a run has sampled before.

    `loc` and `scale` are those of its marginal.
    """

    share: Share
    sampled: Mapping[str, Tensor]  # {name: value} of others

    @staticmethod
    def of(
        part: WeightGaussian, name: str, like: Tensor, sampled: Mapping[str, Tensor] | None = None
    ) -> CorrelatedNormal:
        """The prior of one of the weights, in the dtype and on the device of `like`."""
        loc, scale = part.means[name].to(like), part.scales[name].to(like)
        normal = CorrelatedNormal(loc, scale, validate_args=False)
        normal.share, normal.sampled = Share(part, name), sampled or {}
        return normal

    def log_prob(self, value: Tensor) -> Tensor:
        """The terms [*shape] of the log density that its entries add."""
        part, weight = self.share.gaussian.to(self.loc), self.share.name
        means = part.means
        deviations = {name: other - means[name] for name, other in self.sampled.items()}
        own = value - means[weight]
        product = part.precision @ part.pack({**deviations, weight: own / 2})
        constant = part.precision.logdet() / len(part.loc) - math.log(2 * math.pi)
        return constant / 2 - own * part.unpack(product)[weight]

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Samples [*sample_shape, *shape] given the weights that were sampled before.

        The weights u that were not: w_u = z_u - Λ_uu⁻¹ [Λ (known - z)]_u with a draw z of all.
        """
        if sample_shape:
            draws = [self.rsample() for _ in range(math.prod(sample_shape))]
            return torch.stack(draws).reshape(*sample_shape, *self.loc.shape)
        part, weight = self.share.gaussian.to(self.loc), self.share.name
        z = part.loc + part.precision.rsqrt(torch.randn_like(part.loc))
        drawn = part.unpack(z)
        if self.sampled:
            shift = {name: value - drawn[name] for name, value in self.sampled.items()}
            known = part.pack({n: torch.ones_like(x) for n, x in self.sampled.items()}) > 0
            rows = torch.eye(len(known)).to(z)[~known]
            inner = (part.precision @ rows)[:, ~known]  # Λ_uu
            z[~known] -= torch.linalg.solve(inner, (part.precision @ part.pack(shift))[~known])
        return part.unpack(z)[weight]

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """As `rsample`; the distribution has no parameters that could have gradients."""
        return self.rsample(sample_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Not possible: raises ValueError."""
        raise ValueError(
            f"the prior of {self.share.name!r} is correlated with that of other weights: it cannot "
            "be in a plate"
        )


class CorrelatedWeight:
    """The prior of one weight of a module, for `PyroSample`: a `CorrelatedNormal` in each run."""

    def __init__(self, part: WeightGaussian, weight: str, initial: str) -> None:
        self._part, self._weight, self._initial = part, weight, initial  # names in net and module

    def __call__(self, module: Any) -> Distribution:
        context, sampled = module._pyro_context, {}
        if context.active:  # otherwise the module is read outside of a run
            full = module._pyro_get_fullname(self._weight.rpartition(".")[2])
            prefix = full.removesuffix(self._weight)
            values = {name: context.get(f"{prefix}{name}") for name in self._part.shapes}
            sampled = {name: value for name, value in values.items() if value is not None}
        initial = module._buffers[self._initial]
        fn: Any = CorrelatedNormal.of(self._part, self._weight, initial, sampled)
        fn = fn.to_event(initial.dim())
        fn.initial = initial
        return fn


def posterior_priors(
    net: nn.Module, parts: Sequence[WeightGaussian],
    weights: Mapping[tuple[nn.Module, str], Tensor],
) -> dict[tuple[nn.Module, str], dist.Normal]:
    """The priors of weights {(module, name): value} from a posterior in independent parts.

    Raises ValueError for a posterior of another network, or without one of the weights.
    """
    paths = {module: path for path, module in net.named_modules()}
    names = {key: f"{paths[key[0]]}.{key[1]}".lstrip(".") for key in weights}
    matches = match_names(parts, {names[key]: tuple(x.shape) for key, x in weights.items()})
    own = [part.renamed(matches) for part in parts if part.shapes.keys() & matches.keys()]
    owners = {name: part for part in own for name in part.shapes}
    if missing := [name for name in names.values() if name not in owners]:
        raise ValueError(
            f"prior: it has no posterior of {', '.join(missing)}: choose the other layers with "
            "layers=, and make latents of these in a second call, with another prior"
        )
    return {key: _prior(owners[name], name, weights[key]) for key, name in names.items()}


def _prior(part: WeightGaussian, name: str, like: Tensor) -> dist.Normal:
    if not part.is_independent:
        return CorrelatedNormal.of(part, name, like)
    return dist.Normal(part.means[name].to(like), part.scales[name].to(like))
