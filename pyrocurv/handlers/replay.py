"""Running a Pyro model at given values of its latents, under one light messenger.

Tracing a model and scoring every site costs more than the network itself. A natural-gradient step
needs only the observed sites, the priors of the weights and the parameters; everything else has a
closed form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.handlers.sites import (
    ENUMERATION,
    check_data,
    check_latent,
    is_deterministic,
    prior_power,
)
from pyrocurv.handlers.support import check_support


@dataclass(frozen=True, eq=False)
class ObservedSite:
    """A sample statement of one run: its distribution, value, scale and mask."""

    name: str
    fn: Distribution
    value: Tensor
    scale: float | Tensor
    mask: Tensor | bool | None
    batch: int  # number of data in this call, over all plates
    num_data: int  # number of data in the data set, over all plates
    in_plate: bool

    @property
    def rows(self) -> int:
        """Length of the first axis of the likelihood, the examples."""
        return (*self.fn.batch_shape, *self.value.shape, 1)[0]

    @property
    def is_factor(self) -> bool:
        """Whether the site is a `pyro.factor`, whose value is empty."""
        return not self.fn.event_shape.numel()

    @property
    def power(self) -> float:
        """As `prior_power`; ValueError for a masked prior too."""
        if self.mask is not None and not bool(torch.as_tensor(self.mask).all()):
            raise ValueError(
                f"the prior of {self.name!r} is masked, and a flat prior has no KL: use a wide "
                "normal instead, or FullGuide with curvature='hessian'"
            )
        return prior_power(self.name, self.scale)

    @cached_property
    def each(self) -> Tensor:
        """The log density [*batch_shape], masked but not scaled."""
        log_prob = self.fn.log_prob(self.value)
        if self.mask is None:
            return log_prob
        return torch.where(torch.as_tensor(self.mask, device=log_prob.device), log_prob, 0.0)

    @cached_property
    def log_prob(self) -> Tensor:
        """The log density, masked, scaled and summed."""
        return (self.each * self.scale).sum()


class ReplayMessenger(Messenger):
    """Runs a model at given values and records its sample and param statements.

    `observed` lists the observed sites in the order of the model and `latents` holds the other
    sample sites by name; deterministic sites and plates are in neither. `params` are the
    unconstrained values of the `pyro.param` statements, under "param " and their names.

    Args:
        values: {site: tensor} of latents and of the subsamples of plates.
        partial: whether the model may sample latents that `values` lacks.
    """

    def __init__(self, values: Mapping[str, Tensor], partial: bool = False) -> None:
        super().__init__()
        self.values, self.partial = values, partial
        self.observed: list[ObservedSite] = []
        self.latents: dict[str, ObservedSite] = {}
        self.params: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and site_is_subsample(msg) and msg["value"] is not None:
            if not torch.equal(value, torch.as_tensor(msg["value"]).to(value.device)):
                raise ValueError(
                    f"the model subsamples plate {msg['name']!r} itself, and the guide drew its "
                    "latents for another subsample: pass `create_plates` to the guide, which makes "
                    "the same plate from the arguments"
                )
        elif value is not None:
            check_latent(msg)
            msg["value"], msg["done"] = value, True
        elif not (self.partial or msg["is_observed"] or site_is_subsample(msg)):
            raise ValueError(
                f"site {msg['name']!r} is neither observed in this call nor a latent of the guide, "
                f"whose latents are {', '.join(self.values) or 'none'}: was an argument left out?"
                + (f" If it is a latent: {ENUMERATION}" if msg["fn"].support.is_discrete else "")
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        if msg["is_observed"]:
            check_data(msg)
            check_support(msg)
            self.observed.append(_observed_site(msg))
        else:
            self.latents[msg["name"]] = _observed_site(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        param = msg["value"]
        unconstrained = param.unconstrained() if hasattr(param, "unconstrained") else param
        self.params[f"param {msg['name']}"] = unconstrained


def _observed_site(msg: Any) -> ObservedSite:
    plates, fn, value = msg["cond_indep_stack"], msg["fn"], msg["value"]
    batch = math.prod(plate.size for plate in plates)
    num_data = math.prod(plate.full_size or plate.size for plate in plates)
    if not plates and msg["is_observed"]:
        is_factor = not fn.event_shape.numel()  # whose value is empty
        batch = num_data = (*(fn.batch_shape if is_factor else value.shape), 1)[0]
    return ObservedSite(
        msg["name"], fn, value, msg["scale"], msg["mask"], batch, num_data, bool(plates)
    )
