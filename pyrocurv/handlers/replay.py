"""One run of a Pyro model with given latents, seen by one light messenger.

Tracing a model and scoring all of it costs more than the network; a natural-gradient step needs the
observed sites, the priors of the weights and the parameters, and takes the rest in closed form.
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

from pyrocurv.handlers.prototype import check_data, is_deterministic


@dataclass(frozen=True, eq=False)
class ObservedSite:
    """What a sample statement said: its distribution, value, scale and mask."""

    name: str
    fn: Distribution
    value: Tensor
    scale: float | Tensor
    mask: Tensor | bool | None
    batch: int  # data in this call, over all plates
    num_data: int  # data in all, over all plates
    in_plate: bool

    @property
    def rows(self) -> int:
        """Length of the likelihood's first axis, the examples."""
        return (*self.fn.batch_shape, *self.value.shape, 1)[0]

    @property
    def is_factor(self) -> bool:
        """Whether it is a `pyro.factor`, whose value is nothing."""
        return not self.fn.event_shape.numel()

    @property
    def power(self) -> float:
        """The scale of a weight's prior; ValueError where it is masked or no single number."""
        if self.mask is not None and not bool(torch.as_tensor(self.mask).all()):
            raise ValueError(
                f"the prior of {self.name!r} is masked, a flat one has no KL: give it a wide "
                "normal, or use FullGuide with curvature='hessian'"
            )
        if isinstance(self.scale, Tensor) and self.scale.numel() > 1:
            raise ValueError(
                f"site {self.name!r} has a scale of shape {tuple(self.scale.shape)}: the prior of "
                "a weight takes one number"
            )
        return float(self.scale)

    @cached_property
    def each(self) -> Tensor:
        """The log density [*batch_shape], masked but not scaled."""
        log_prob = self.fn.log_prob(self.value)
        if self.mask is None:
            return log_prob
        mask = torch.as_tensor(self.mask, device=log_prob.device)
        return torch.where(mask, log_prob, torch.zeros_like(log_prob))

    @cached_property
    def log_prob(self) -> Tensor:
        """The scaled and masked log density, summed."""
        return (self.each * self.scale).sum()



class ReplayMessenger(Messenger):
    """Runs a model at `values` {site: tensor} and keeps what the model said.

    Raises ValueError for a latent that `values` does not have, and for a plate over other data than
    those that `values` has latents of.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.observed: list[ObservedSite] = []
        self.latents: dict[str, ObservedSite] = {}
        self.params: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and site_is_subsample(msg) and msg["value"] is not None:
            if not torch.equal(value, torch.as_tensor(msg["value"]).to(value.device)):
                raise ValueError(
                    f"plate {msg['name']!r} is over data that the model chose, and the guide drew "
                    "its latents for others: give the guide `create_plates`, the same plate made "
                    "from the arguments"
                )
        elif value is not None:
            msg["value"], msg["done"] = value, True
        elif not msg["is_observed"] and not site_is_subsample(msg):
            raise ValueError(
                f"site {msg['name']!r} is neither observed in this call nor a latent of the guide, "
                f"which knows {', '.join(self.values) or 'none'}: was an argument left out?"
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or is_deterministic(msg):
            return
        if msg["is_observed"]:
            check_data(msg)
        sizes = [(frame.size, frame.full_size or frame.size) for frame in msg["cond_indep_stack"]]
        in_plate = bool(sizes)
        if not in_plate and msg["is_observed"]:
            rows = len(msg["value"]) if msg["value"].dim() else 1
            if not msg["fn"].event_shape.numel():  # a factor, whose value is nothing
                rows = (*msg["fn"].batch_shape, 1)[0]
            sizes = [(rows, rows)]
        site = ObservedSite(
            msg["name"], msg["fn"], msg["value"], msg["scale"], msg["mask"],
            math.prod(size for size, _ in sizes), math.prod(full for _, full in sizes),
            in_plate,
        )
        if msg["is_observed"]:
            self.observed.append(site)
        else:
            self.latents[msg["name"]] = site

    def _pyro_post_param(self, msg: Any) -> None:
        param = msg["value"]
        free = param.unconstrained() if hasattr(param, "unconstrained") else param
        self.params[f"param {msg['name']}"] = free
