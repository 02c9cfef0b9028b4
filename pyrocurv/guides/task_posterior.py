"""The normals of Pyro's own guides in independent parts, as the prior of another task."""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrocurv.handlers.sites import is_real
from pyrocurv.layers.weight_gaussian import WeightGaussian, split_gaussian
from pyrocurv.structures import Diagonal


@torch.no_grad()
def normal_parts(guide: nn.Module) -> list[WeightGaussian]:
    """The unconstrained latents that each `AutoNormal` in a guide has."""
    parts = []
    for normal in (module for module in guide.modules() if isinstance(module, AutoNormal)):
        for name, site in normal.prototype_trace.iter_stochastic_nodes():
            if is_real(site):
                loc, scale = normal._get_loc_and_scale(name)
                precision = Diagonal(scale.flatten().square().reciprocal())
                parts += split_gaussian({name: tuple(loc.shape)}, loc.flatten(), precision)
    return parts
