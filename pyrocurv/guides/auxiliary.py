"""Guides for what has no Gaussian: points that are trained, frozen values, all other latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList
from torch import Tensor


class AutoPoint(AutoDelta):
    """Point estimates, from given values on; the prior counts as a penalty."""

    def __init__(self, model: Callable[..., Any], values: Mapping[str, Tensor]) -> None:
        super().__init__(model, init_loc_fn=partial(_value_of, dict(values)))

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The point itself, for each quantile."""
        points = self.median(*args, **kwargs)
        return {name: torch.stack([value] * len(quantiles)) for name, value in points.items()}


def _value_of(values: Mapping[str, Tensor], site: Mapping[str, Any]) -> Tensor:
    return values[site["name"]].detach().clone()


class AutoFixed(AutoGuide):
    """Fixed values."""

    def __init__(self, model: Callable[..., Any], values: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._names = list(values)
        for number, value in enumerate(values.values()):
            self.register_buffer(f"value_{number}", value.detach().clone())

    def _values(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"value_{i}") for i, name in enumerate(self._names)}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return {
            name: pyro.sample(name, dist.Delta(value, event_dim=value.dim()))
            for name, value in self._values().items()
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The values."""
        return self._values()

    def quantiles(
        self, quantiles: Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The value itself, for each quantile."""
        return {n: torch.stack([v] * len(quantiles)) for n, v in self._values().items()}


def make_auxiliary_guide(
    model: Callable[..., Any], values: Mapping[str, Tensor], excluded: Mapping[str, str],
    left: Sequence[str], fallback: Callable[[Any], AutoGuide],
) -> AutoGuide:
    """One guide for the sites left out {site: "point" or "frozen"}, at `values`, and those left."""
    parts: list[AutoGuide] = []
    for kind, make in (("point", AutoPoint), ("frozen", AutoFixed)):
        names = [name for name in excluded if excluded[name] == kind]
        if names:
            part = make(poutine.block(model, expose=names), {name: values[name] for name in names})
            parts.append(part)
    if left:
        parts.append(fallback(poutine.block(model, expose=list(left))))
    if len(parts) == 1:
        return parts[0]
    joint = AutoGuideList(poutine.block(model, expose=[*excluded, *left]))
    for part in parts:
        joint.append(part)
    return joint
