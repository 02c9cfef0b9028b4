"""Samples, marginals, quantiles and KL divergence of the Gaussians of a guide, by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor

from pyrocurv.guides.families import Family
from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.guides.unconstrained import UnconstrainedLatent
from pyrocurv.layers.block import BlockIndices
from pyrocurv.posterior.prior import Prior, kl
from pyrocurv.runtime.validation import check_is, shown
from pyrocurv.structures import BlockDiagonal
from pyrocurv.structures.serialization import map_tensors


@dataclass(frozen=True, eq=False)
class BlockwisePosterior:
    """Independent Gaussians, one for each block, over the unconstrained `latents`."""

    families: Sequence[Family]
    latents: Mapping[str, UnconstrainedLatent]

    def normal(self) -> StructuredNormal:
        """One Gaussian over the unconstrained tensors [P], in the order of the latents."""
        device = self.families[0].loc.device
        shapes = {name: latent.shape for name, latent in self.latents.items()}
        index = BlockIndices([family.block for family in self.families], shapes, device)
        copies = [map_tensors(family.precision(), torch.clone) for family in self.families]
        precision = BlockDiagonal(tuple(copies), index)  # training writes the bases in place
        loc = precision.join([family.loc for family in self.families])
        return StructuredNormal(loc, precision, sites=shapes)

    def sample(self, n: int) -> dict[str, Tensor]:
        """{site: [n, *shape]}."""
        return self._values([f.distribution().sample((n,)) for f in self.families])

    def median(self) -> dict[str, Tensor]:
        """{site: [*shape]}."""
        return self._values([family.loc.clone() for family in self.families])

    def quantiles(self, levels: float | Sequence[float]) -> dict[str, Tensor]:
        """{site: [len(levels), *shape]}; ValueError for a level outside of [0, 1]."""
        column = _column(levels)  # [L]
        quantiles = {}
        for name, latent in self.latents.items():
            marginal = self._unconstrained_marginal(name)
            column = column.to(marginal.loc)
            u = marginal.icdf(column.reshape(-1, *[1] * marginal.loc.dim()))
            quantiles[name] = latent.transform(u)
        return quantiles

    def marginal(self, site: str) -> dist.TorchDistribution:
        """Independent normals [*shape], or their transform. ValueError for an unknown site."""
        marginal = self._unconstrained_marginal(site)
        if self.latents[site].is_real:
            return marginal.to_event(marginal.loc.dim())
        return dist.TransformedDistribution(marginal, [self.latents[site].transform])

    def kl(self, priors: Sequence[Prior]) -> Tensor:
        """KL(q ‖ prior) in nats, with a prior for each block."""
        return torch.stack([
            kl(family.loc, family.precision(), prior)
            for family, prior in zip(self.families, priors, strict=True)
        ]).sum()

    def _unconstrained_marginal(self, site: str) -> dist.Normal:
        check_is("site", site, str, "the name of a site")
        for family in self.families:
            if site in family.block.tensors:
                scale = family.block.unpack(family.precision().inverse_diag().sqrt())[site]
                return dist.Normal(family.block.unpack(family.loc)[site], scale)
        raise ValueError(f"no site {site!r} here: {', '.join(self.latents)} exist")

    def _values(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        """Packed vectors [..., P] of the families as the latents' values."""
        unconstrained: dict[str, Tensor] = {}
        for family, vector in zip(self.families, packed, strict=True):
            unconstrained.update(family.block.unpack(vector))
        return {n: latent.transform(unconstrained[n]) for n, latent in self.latents.items()}


def _column(levels: Any) -> Tensor:
    """Quantile levels as a tensor [L]; ValueError for what is no number in [0, 1]."""
    try:
        column = torch.as_tensor(levels).detach().cpu().double().reshape(-1)
        is_level = bool(((column >= 0) & (column <= 1)).all())
    except (TypeError, ValueError, RuntimeError):  # NotImplementedError of meta tensors too
        is_level = False
    if not is_level:
        raise ValueError(f"quantiles: numbers in [0, 1] are needed, got {shown(levels)}")
    return column
