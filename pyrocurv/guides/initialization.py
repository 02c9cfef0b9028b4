"""Initial values of the latents: the network's own weights, a user's values, or medians."""

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
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyrocurv.guides.partition import LatentPartition
from pyrocurv.handlers.sites import TraceSite, is_real
from pyrocurv.handlers.support import outside_support
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.validation import check_distribution, check_is, check_tensor

MAX_UNCONSTRAINED = 30.0  # size of an unconstrained value beyond which a median is not used


def init_to_network(site: TraceSite) -> Tensor:
    """Initialize to the weight that `bayesianize` replaced (its prior's `initial`).

    Where the prior rules that out, a negative number for instance, it is the prior's median. Other
    weights are sampled. Scales and single numbers are initialized to their medians: priors of
    weights may depend on them, and a sample from a heavy tail would fix those for good.
    """
    check_is("site", site, Mapping, "a site of a trace, a mapping,")
    check_distribution('site["fn"]', site.get("fn"))
    initial = getattr(site["fn"], "initial", None)
    if initial is not None:
        return _inside_support(site, initial.detach())
    fn = site["fn"]
    is_weight = is_real(site) and (fn.batch_shape + fn.event_shape).numel() > 1
    if is_weight or fn.support.is_discrete:
        return init_to_sample(site)
    return init_to_prior_median(site)


def init_to_prior_median(site: TraceSite) -> Tensor:
    """Initialize to the prior's median, in closed form or from a few samples.

    The median of a prior as vague as Gamma(.001, .001) is meaningless, a number like 1e-35: such a
    site is initialized as in Pyro's guides, to the transform of 0.
    """
    fn = unwrap(site["fn"])
    try:
        median = fn.icdf(torch.tensor(0.5)).expand(fn.batch_shape)
    except NotImplementedError:
        median = init_to_median(site)
    u = biject_to(site["fn"].support).inv(median)
    limit = torch.inf if is_real(site) else MAX_UNCONSTRAINED
    return median if bool((u.abs() < limit).all()) else init_to_feasible(site)


def _inside_support(site: TraceSite, value: Tensor) -> Tensor:
    """The value, or the prior's median where the value is not in the prior's support."""
    outside = outside_support(site, value)
    return value if outside is None else torch.where(outside, init_to_prior_median(site), value)


def checked_value(init_fn: Callable[[TraceSite], Tensor], site: TraceSite) -> Tensor:
    """The initial value that `init_loc_fn` gives a site.

    Raises TypeError if it is no tensor, ValueError for a shape that the site has not.
    """
    value = init_fn(site)
    name = f"the value of init_loc_fn for site {site['name']!r}"
    check_tensor(name, value)
    if value.shape != (shape := site["fn"].shape()):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, the site {tuple(shape)}")
    return value


def init_near_median(site: TraceSite) -> Tensor:
    """Initialize a tenth of the way from the prior's median to the value of `init_to_network`.

    At the medians the hidden units of a network are all the same, and would remain so.
    """
    median = init_to_prior_median(site)
    if getattr(site["fn"], "initial", None) is not None:
        return site["value"]
    return median + 0.1 * (site["value"] - median).clamp(-1, 1) if is_real(site) else median


def initial_values(
    partition: LatentPartition, sites: Mapping[str, TraceSite], near_medians: bool
) -> dict[str, Tensor]:
    """The initial means of the blocks, {site: unconstrained tensor}.

    `near_medians` applies to a joint block only.
    """
    init = init_near_median if near_medians and partition.is_joint else _traced_value
    return {
        name: latent.transform.inv(init(sites[name]).detach())
        for name, latent in partition.latents.items()
    }


def _traced_value(site: TraceSite) -> Tensor:
    return site["value"]


def fallback_model(
    model: Callable[..., Any], init_loc_fn: Callable[[TraceSite], Tensor], names: Container[str],
    at_median: bool,
) -> Callable[..., Any]:
    """The model of a fallback guide, whose latents a user's function initializes, or the median."""
    if init_loc_fn is not init_to_network:
        return InitSelected(init_loc_fn, names)(model)
    return InitSelected(init_to_prior_median, names)(model) if at_median else model


class InitInside(InitMessenger):
    """`InitMessenger` that raises ValueError for a start outside of the support of a prior."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        value = msg["value"]
        if value is None or msg["is_observed"] or site_is_subsample(msg):
            return
        outside = outside_support(msg, value)
        if outside is not None:
            found = (value[outside] if outside.dim() else value).flatten()[:3].tolist()
            raise ValueError(
                f"init_loc_fn: latent {msg['name']!r} has its values in {msg['fn'].support}, and "
                f"would start at {found}"
            )


class InitSelected(InitInside):
    """Initializes the latents in `names` by a function of the site.

    Latents that an `init_to_value` with a default fallback does not name are left alone, as are
    data that are not observed in this call.
    """

    def __init__(self, init_fn: Callable[[TraceSite], Tensor], names: Container[str]) -> None:
        super().__init__(init_fn)
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        options = getattr(self.init_fn, "keywords", {})
        has_default = options.get("fallback") is init_to_uniform
        if "values" not in options or not has_default or msg["name"] in options["values"]:
            super()._pyro_sample(msg)
