"""Priors of weights: made by the word or number asked for, kept in the module, rescaled later."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from pyro import distributions as dist
from pyro.nn import PyroSample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.handlers.modules import named_modules
from pyrocurv.layers.module_types import NORMS, fan_in
from pyrocurv.runtime.distributions import as_normal, compact

PriorSpec = float | str | Callable[[nn.Module, str], Distribution]


def parse_prior(prior: PriorSpec) -> Callable[[nn.Module, str], Distribution]:
    """(module, parameter name) -> prior, by a word, a standard deviation or that very function."""
    if isinstance(prior, Distribution):
        raise TypeError(
            f"prior={prior!r}: a standard deviation is needed, or a callable (module, name) -> "
            "Distribution of the parameter's shape, as in lambda module, name: "
            "dist.Normal(0.0, 1.0).expand(getattr(module, name).shape)"
        )
    if callable(prior):
        return prior
    if prior == "fan_in":
        return lambda module, name: _normal(module, name, 1 / math.sqrt(fan_in(module) + 1))
    if isinstance(prior, str) or not prior > 0:
        raise ValueError(
            f"prior={prior!r}: 'fan_in', a positive standard deviation or a callable "
            "(module, name) -> Distribution is needed"
        )
    return lambda module, name: _normal(module, name, float(prior))


def _normal(module: nn.Module, name: str, scale: float) -> Distribution:
    like = getattr(module, name)
    loc = like.new_full((), float(isinstance(module, NORMS) and name == "weight"))
    return dist.Normal(loc, like.new_full((), scale)).expand(like.shape)


def set_prior(module: nn.Module, name: str, fn: Any, parameter: Tensor) -> None:
    """Make a latent of a parameter, which is its initial value."""
    initial = parameter.detach().clone()
    normal = as_normal(fn)
    if normal is None:
        if fn.event_dim < initial.dim():
            fn = fn.to_event(initial.dim() - fn.event_dim)
        fn.initial = initial
        setattr(module, name, PyroSample(fn))
        return
    loc, scale = compact(normal.loc.detach()), compact(normal.scale.detach())
    for part, value in (("loc", loc), ("scale", scale), ("initial", initial)):
        module.register_buffer(f"_{name}_{part}", value.to(initial).clone(), persistent=False)
    setattr(module, name, PyroSample(_NormalPrior(name)))


class _NormalPrior:
    """A normal prior whose numbers are buffers of the module, so they move with `.to`.

    The distribution is built anew only when the buffers have been moved; it carries the weight that
    it replaced as `.initial`, where guides start.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._parts = [f"_{name}_{part}" for part in ("loc", "scale", "initial")]
        self._made: tuple[tuple[Tensor, ...], Distribution] | None = None

    def __call__(self, module: nn.Module) -> Distribution:
        buffers: dict[str, Any] = module._buffers
        parts = tuple(buffers[part] for part in self._parts)
        made = self._made
        if made is None or not all(map(operator.is_, made[0], parts)):
            loc, scale, initial = parts
            fn = dist.Normal(loc.expand(initial.shape), scale.expand(initial.shape))
            fn = fn.to_event(initial.dim())
            fn.initial = initial
            made = self._made = parts, fn
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def rescale_prior(model: Any, site: str, factor: Tensor) -> bool:
    """Multiply the standard deviation of a bayesianized weight's prior by a number.

    False where the site is no weight that `bayesianize` gave a normal prior.
    """
    path, _, name = site.rpartition(".")
    module = named_modules(model).get(path)
    buffers: dict[str, Any] = {} if module is None else module._buffers
    scale = buffers.get(f"_{name}_scale")
    if scale is None:
        return False
    buffers[f"_{name}_scale"] = scale * factor.to(scale)
    return True
