"""The posterior of a guide in independent parts, as the prior of another task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pyro.infer.autoguide import AutoNormal

from pyrocurv.handlers.sites import is_real
from pyrocurv.layers.weight_gaussian import WeightGaussian, split_gaussian
from pyrocurv.structures import Diagonal

if TYPE_CHECKING:
    from pyrocurv.guides.blockwise import BlockwiseGuide


@torch.no_grad()
def guide_parts(guide: BlockwiseGuide) -> list[WeightGaussian]:
    """The blocks of a guide, and the latents that its fallback guide has in an `AutoNormal`.

    Raises RuntimeError for a guide that is not initialized, ValueError for one that is not trained.
    """
    guide._ready()
    parts = []
    if guide.sites:
        if guide.has_initial_scale:
            raise ValueError(
                "prior: the guide still has its initial scale, which no data have changed: train "
                "it first, or give a standard deviation"
            )
        normal = guide.posterior
        parts = split_gaussian(normal.sites, normal.loc, normal.precision)
    return [*parts, *_fallback_parts(guide)]


def _fallback_parts(guide: BlockwiseGuide) -> list[WeightGaussian]:
    parts = []
    modules = guide.fallback.modules() if guide.fallback_sites else ()
    for fallback in (module for module in modules if isinstance(module, AutoNormal)):
        for name, site in fallback.prototype_trace.iter_stochastic_nodes():
            if is_real(site):
                loc, scale = fallback._get_loc_and_scale(name)
                precision = Diagonal(scale.flatten().square().reciprocal())
                shapes = {name: tuple(loc.shape)}
                parts += split_gaussian(shapes, loc.flatten(), precision)
    return parts
