"""Where a guide starts: at the network's own weights, at what its user says, or at a median."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_feasible,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from torch import Tensor
from torch.distributions import biject_to

from pyrocurv.guides.partition import LatentPartition
from pyrocurv.handlers.prototype import TraceSite, is_real
from pyrocurv.runtime.distributions import unwrap

FAR = 30.0  # of a real number that a constrained latent is the image of


def init_to_network(site: TraceSite) -> Tensor:
    """Start at the weight that `bayesianize` replaced (its prior's `initial`), or at a sample.

    Scales and single numbers start at their medians: the weights' priors may hang on them, and a
    draw of a heavy tail would be theirs for good.
    """
    initial = getattr(site["fn"], "initial", None)
    if initial is not None:
        return initial.detach()
    fn = site["fn"]
    is_weight = is_real(site) and (fn.batch_shape + fn.event_shape).numel() > 1
    if is_weight or fn.support.is_discrete:
        return init_to_sample(site)
    return init_to_prior_median(site)


def init_to_prior_median(site: TraceSite) -> Tensor:
    """Start at the prior's median: in closed form where that is known, else of a few samples.

    Of a prior as vague as Gamma(.001, .001) it is nowhere, a number like 1e-35: there, as Pyro's
    guides do, at the image of 0.
    """
    fn = unwrap(site["fn"])
    try:
        middle = fn.icdf(torch.tensor(0.5)).expand(fn.batch_shape)
    except NotImplementedError:
        middle = init_to_median(site)
    real = biject_to(site["fn"].support).inv(middle)
    limit = torch.inf if is_real(site) else FAR
    return middle if bool((real.abs() < limit).all()) else init_to_feasible(site)


def init_near_median(site: TraceSite) -> Tensor:
    """A tenth of the way from the prior's median to where `init_to_network` put the site.

    At the medians themselves the hidden units of a network are all the same, and would stay so.
    """
    middle = init_to_prior_median(site)
    if getattr(site["fn"], "initial", None) is not None:
        return site["value"]
    return middle + 0.1 * (site["value"] - middle).clamp(-1, 1) if is_real(site) else middle


def initial_values(
    plan: LatentPartition, latents: Mapping[str, TraceSite], uses_default_init: bool
) -> dict[str, Tensor]:
    """The real tensors that the blocks start at; `uses_default_init`, a whole model's are near
    medians."""
    names = {name for block in plan.blocks for name in block.tensors}
    sites = {name: site for name, site in latents.items() if name in names}
    if not plan.latents:
        return {name: site["value"].detach() for name, site in sites.items()}
    values = {n: init_near_median(s) if uses_default_init else s["value"] for n, s in sites.items()}
    return {name: plan.latents[name].transform.inv(v.detach()) for name, v in values.items()}


class InitSelected(InitMessenger):
    """Starts the latents `names` by a function of the site.

    What `init_to_value` does not name, is left; so are data that are not observed in this call.
    """

    def __init__(self, init_fn: Callable[[TraceSite], Tensor], names: Container[str]) -> None:
        super().__init__(init_fn)
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        options = getattr(self.init_fn, "keywords", {})
        others = options.get("fallback") is init_to_uniform  # its default, nobody's choice
        if "values" not in options or not others or msg["name"] in options["values"]:
            super()._pyro_sample(msg)
