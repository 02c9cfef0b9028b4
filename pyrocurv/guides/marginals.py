"""What a guide's Gaussians say of its sites together: draws, marginals, quantiles, KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pyro import distributions as dist
from torch import Tensor

from pyrocurv.guides.families import Family
from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.guides.unconstrained import UnconstrainedLatent
from pyrocurv.layers.block import BlockIndices
from pyrocurv.posterior.prior import GaussianPrior
from pyrocurv.structures import BlockDiagonal


@dataclass(frozen=True, eq=False)
class BlockwisePosterior:
    """Independent Gaussians, one for each block, over `sites` {name: shape of the real tensor}.

    Where `latents` are given, the sites' values are images of real tensors.
    """

    families: Sequence[Family]
    sites: Mapping[str, tuple[int, ...]]
    latents: Mapping[str, UnconstrainedLatent]

    def normal(self) -> StructuredNormal:
        """As one Gaussian over the real tensors [P], in the order of the sites."""
        device = self.families[0].loc.device
        index = BlockIndices([family.block for family in self.families], self.sites, device)
        precision = BlockDiagonal(tuple(family.precision() for family in self.families), index)
        return StructuredNormal(precision.join([f.loc for f in self.families]), precision)

    def sample(self, n: int) -> dict[str, Tensor]:
        """{site: [n, *shape]}."""
        return self._values([f.distribution().sample((n,)) for f in self.families])

    def median(self) -> dict[str, Tensor]:
        """{site: [*shape]}."""
        return self._values([family.loc.clone() for family in self.families])

    def quantiles(self, levels: float | Sequence[float]) -> dict[str, Tensor]:
        """{site: [len(levels), *shape]}; ValueError for a level outside of [0, 1]."""
        if not bool(((0 <= torch.as_tensor(levels)) & (torch.as_tensor(levels) <= 1)).all()):
            raise ValueError(f"quantiles: numbers in [0, 1] are needed, got {levels}")
        found = {}
        for name in self.sites:
            marginal = self._marginal(name)
            each = torch.as_tensor(levels).to(marginal.loc)
            real = marginal.icdf(each.reshape(-1, *[1] * marginal.loc.dim()))
            found[name] = self._image(name, real)
        return found

    def marginal(self, site: str) -> dist.TorchDistribution:
        """Independent normals [*shape], or their image. Raises ValueError for an unknown site."""
        marginal = self._marginal(site)
        if self.latents and not self.latents[site].is_real:
            return dist.TransformedDistribution(marginal, [self.latents[site].transform])
        return marginal.to_event(marginal.loc.dim())

    def kl(self, priors: Sequence[GaussianPrior]) -> Tensor:
        """KL(q ‖ prior) in nats, with a prior for each block."""
        parts = zip(self.families, priors, strict=True)
        return torch.stack([
            StructuredNormal(family.loc, family.precision()).kl(prior.loc, prior.precision)
            for family, prior in parts
        ]).sum()

    def _marginal(self, site: str) -> dist.Normal:
        """Of the real tensor."""
        for family in self.families:
            if site in family.block.tensors:
                deviations = family.block.unpack(family.precision().inverse_diag().sqrt())[site]
                loc = family.block.unpack(family.loc)[site]
                return dist.Normal(loc, deviations)
        raise ValueError(f"no site {site!r} here: {', '.join(self.sites)} exist")

    def _values(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        real: dict[str, Tensor] = {}
        for family, part in zip(self.families, packed, strict=True):
            real.update(family.block.unpack(part))
        return {name: self._image(name, real[name]) for name in self.sites}

    def _image(self, site: str, real: Tensor) -> Tensor:
        return self.latents[site].transform(real) if self.latents else real
