"""Guides for latents without a Gaussian: point estimates, fixed values, and a user's choice."""

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

from pyrocurv.runtime.validation import check_is, check_iterable


class AutoPoint(AutoDelta):
    """Point estimates that start at given values; the prior acts as a penalty."""

    def __init__(self, model: Callable[..., Any], values: Mapping[str, Tensor]) -> None:
        super().__init__(model, init_loc_fn=partial(_value_of, dict(values)))

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The point estimate, for each quantile."""
        points = self.median(*args, **kwargs)
        return {name: torch.stack([value] * len(quantiles)) for name, value in points.items()}


def _value_of(values: Mapping[str, Tensor], site: Mapping[str, Any]) -> Tensor:
    return values[site["name"]].detach().clone()


class AutoFixed(AutoGuide):
    """Fixed values, which nothing trains."""

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
        """The value, for each quantile."""
        return {n: torch.stack([v] * len(quantiles)) for n, v in self._values().items()}


def checked_plates(create_plates: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The plates that a user's function makes; TypeError if it returns something else."""
    plates = create_plates(*args, **kwargs)
    needed = "a pyro.plate, or a list of them,"
    if isinstance(plates, pyro.plate):
        return [plates]
    check_iterable("the value of create_plates", plates, needed)
    for plate in (made := [*plates]):
        check_is("the value of create_plates", plate, pyro.plate, needed)
    return made


def make_auxiliary_guide(
    model: Callable[..., Any], values: Mapping[str, Tensor], excluded: Mapping[str, str],
    others: Sequence[str], fallback: Callable[[Any], AutoGuide],
) -> AutoGuide:
    """One guide for all sites without a Gaussian.

    Args:
        model: the model of all sites.
        values: {site: value} that the excluded sites start at.
        excluded: {site: "point" or "frozen"}.
        others: the sites of the guide that `fallback` makes.
        fallback: model -> guide.
    """
    guides: list[AutoGuide] = []
    for kind, make in (("point", AutoPoint), ("frozen", AutoFixed)):
        names = [name for name in excluded if excluded[name] == kind]
        if names:
            exposed = poutine.block(model, expose=names)
            guides.append(make(exposed, {name: values[name] for name in names}))
    if others:
        guides.append(fallback(poutine.block(model, expose=list(others))))
    if len(guides) == 1:
        return guides[0]
    combined = AutoGuideList(poutine.block(model, expose=[*excluded, *others]))
    for guide in guides:
        combined.append(guide)
    return combined
