"""Priors of weights: specified by a name or a number, stored in the module, rescaled later."""

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
from pyrocurv.nn.posterior_prior import CorrelatedNormal, CorrelatedWeight
from pyrocurv.runtime.choices import FanIn
from pyrocurv.runtime.distributions import as_normal, compact
from pyrocurv.runtime.validation import as_number, check_is, check_tensor, is_number, shown

PriorSpec = float | FanIn | Callable[[nn.Module, str], Distribution] | nn.Module | Distribution


def parse_prior(prior: PriorSpec) -> Callable[[nn.Module, str], Distribution]:
    """The function (module, parameter name) -> prior for a name, a number or that function."""
    if isinstance(prior, Distribution):
        raise TypeError(
            f"prior={prior!r}: a standard deviation is needed, or a callable (module, name) -> "
            "Distribution of the parameter's shape, as in lambda module, name: "
            "dist.Normal(0.0, 1.0).expand(getattr(module, name).shape)"
        )
    if callable(prior):
        return prior
    if isinstance(prior, str) and prior == "fan_in":
        return lambda module, name: _normal(module, name, 1 / math.sqrt(fan_in(module) + 1))
    scale = as_number(prior)
    if not (is_number(scale) and scale > 0):
        raise ValueError(
            f"prior={shown(prior)}: 'fan_in', a positive standard deviation, a callable "
            "(module, name) -> Distribution or a trained guide is needed"
        )
    return lambda module, name: _normal(module, name, float(scale))


def _normal(module: nn.Module, name: str, scale: float) -> Distribution:
    like = getattr(module, name)
    loc = like.new_full((), float(isinstance(module, NORMS) and name == "weight"))
    return dist.Normal(loc, like.new_full((), scale)).expand(like.shape)


def latent_names(module: nn.Module) -> list[str]:
    """The parameters of a module that `bayesianize` has made latents of."""
    priors = module.__dict__.get("_pyro_samples", {})
    return [name for name in priors if _initial(module, name) is not None]


def initial_value(module: nn.Module, name: str) -> Tensor:
    """A parameter, or the value that it had before it became a latent."""
    initial = _initial(module, name)
    return getattr(module, name) if initial is None else initial


def _initial(module: nn.Module, name: str) -> Tensor | None:
    prior = module.__dict__.get("_pyro_samples", {}).get(name)
    return module._buffers.get(prior_buffers(name)[2], getattr(prior, "initial", None))


def set_prior(module: nn.Module, name: str, fn: Any, initial: Tensor) -> None:
    """Replace a parameter by a latent, with its initial value in a guide."""
    initial = initial.detach().clone()
    if isinstance(fn, CorrelatedNormal):
        *others, buffer = prior_buffers(name)
        for other in others:  # of a normal prior that it replaces
            module._buffers.pop(other, None)
        module.register_buffer(buffer, initial, persistent=False)
        setattr(module, name, PyroSample(CorrelatedWeight(*fn.share, buffer)))
        return
    normal = as_normal(fn)
    if normal is None:
        if fn.event_dim < initial.dim():
            fn = fn.to_event(initial.dim() - fn.event_dim)
        fn.initial = initial
        setattr(module, name, PyroSample(fn))
        return
    loc, scale = compact(normal.loc.detach()), compact(normal.scale.detach())
    for buffer, value in zip(prior_buffers(name), (loc, scale, initial), strict=True):
        module.register_buffer(buffer, value.to(initial).clone(), persistent=False)
    setattr(module, name, PyroSample(_NormalPrior(name)))


def prior_buffers(name: str) -> tuple[str, str, str]:
    """The buffers of a parameter's prior: its loc and scale, and the parameter's initial value."""
    return f"_{name}_loc", f"_{name}_scale", f"_{name}_initial"


class _NormalPrior:
    """A normal prior whose parameters are buffers of the module, so that they move with `.to`.

    The distribution is built again only after the buffers were replaced. Guides start at its
    attribute `initial`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._cache: tuple[tuple[Tensor, ...], Distribution] | None = None

    def __call__(self, module: nn.Module) -> Distribution:
        stored: dict[str, Any] = module._buffers
        buffers = tuple(stored[name] for name in prior_buffers(self.name))
        if self._cache is not None and all(map(operator.is_, self._cache[0], buffers)):
            return self._cache[1]
        loc, scale, initial = buffers
        fn = dist.Normal(loc.expand(initial.shape), scale.expand(initial.shape))
        fn = fn.to_event(initial.dim())
        fn.initial = initial
        self._cache = buffers, fn
        return fn

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


def rescale_prior(model: Any, site: str, factor: Tensor) -> bool:
    """Multiply the standard deviation of the prior of a bayesianized weight.

    Args:
        model: a network, or a model around one.
        site: the name of the weight's site.
        factor: a positive scalar.

    Returns:
        Whether it was done: False if `bayesianize` did not give the site a normal prior.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import bayesianize, rescale_prior
        >>> net = bayesianize(torch.nn.Linear(4, 3), prior=2.0)
        >>> rescale_prior(net, "weight", torch.tensor(0.5)), rescale_prior(net, "w", torch.ones(()))
        (True, False)
    """
    check_is("site", site, str, "the name of a site")
    if not is_number(factor):
        check_tensor("factor", factor)
    value = as_number(factor)
    if not (is_number(value) and value > 0):
        raise ValueError(f"factor={shown(factor)}: a positive scalar is needed")
    path, _, name = site.rpartition(".")
    module = named_modules(model).get(path)
    buffers: dict[str, Any] = {} if module is None else module._buffers
    _, scale_name, _ = prior_buffers(name)
    scale = buffers.get(scale_name)
    if scale is None:
        return False
    number = factor.to(scale) if isinstance(factor, Tensor) else float(factor)
    buffers[scale_name] = scale * number
    return True
