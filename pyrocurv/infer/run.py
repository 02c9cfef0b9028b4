"""One run of a model at given weights: what it costs and what else it wants trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.capture import Capture
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.replay import Replay, Site
from pyrocurv.priors import as_normal
from pyrocurv.prototype import modules, still_frozen


@dataclass(frozen=True, eq=False)
class Run:
    """A model run at `weights`, the leaves of its graph, and at a sample of the fallback guide."""

    weights: Mapping[str, Tensor]
    replay: Replay
    fallback: Any  # the fallback guide's trace, or None
    capture: Capture | None
    own_params: list[Tensor]  # of the model's modules
    model_params: list[Tensor]  # these and `pyro.param`s, unconstrained

    @cached_property
    def data(self) -> list[Site]:
        """The observed sites whose likelihood the weights have a part in; factors have none."""
        sites = [site for site in self.replay.observed if site.batch]
        return [site for site in sites if _hangs_on_graph(site.fn)] or sites

    @property
    def num_data(self) -> int:
        """N."""
        return max(site.num_data for site in self.data)

    @property
    def has_finite_support(self) -> bool:
        """Whether all likelihoods are over finitely many values."""
        return all(_innermost(site.fn).has_enumerate_support for site in self.data)

    @property
    def batch(self) -> int:
        """B."""
        return max(site.batch for site in self.data)

    def energy(self, temperature: float) -> Tensor:
        """N nll, plus T (log q - log p) of the latents that the fallback guide has.

        Priors of the weights that hang on those latents, or on parameters, pull at them here,
        with no value: the weights' own KL is reckoned elsewhere, in closed form.
        """
        energy = -sum(site.log_prob() for site in self.replay.observed)
        for name in self.weights:
            site = self.replay.latents[name]
            normal = as_normal(site.fn)
            if normal is not None and (normal.loc.requires_grad or normal.scale.requires_grad):
                log_prior = normal.log_prob(site.value.detach()).sum()
                energy = energy - temperature * (log_prior - log_prior.detach())
        if self.fallback is None:
            return energy  # type: ignore[return-value]
        latents = self.replay.latents.items()
        prior = sum(site.log_prob() for name, site in latents if name not in self.weights)
        self.fallback.compute_log_prob()
        sites = [site for site in self.fallback.nodes.values() if site["type"] == "sample"]
        return energy + temperature * (sum(site["log_prob_sum"] for site in sites) - prior)

    def guide_params(self) -> list[Tensor]:
        """The fallback guide's parameters, unconstrained."""
        nodes = [] if self.fallback is None else self.fallback.nodes.values()
        return [site["value"].unconstrained() for site in nodes if site["type"] == "param"]


def run_model(
    model: Callable[..., Any], guide: StructuredGuide, sample: Sequence[Mapping[str, Tensor]],
    args: Any, kwargs: Any, watch: bool = False,
) -> Run:
    """Run the model at weights for each of the guide's blocks; `watch` its ops for curvature.

    Raises ValueError where nothing is observed, or a plate is smaller than the batch in it.
    """
    weights = {
        name: value.detach().requires_grad_() for part in sample for name, value in part.items()
    }
    values, fallback = dict(weights), None
    if guide.fallback_sites:
        guide._create_plates(*args, **kwargs)
        fallback = poutine.trace(guide.fallback).get_trace(*args, **kwargs)
        values.update({n: s["value"] for n, s in fallback.nodes.items() if s["type"] == "sample"})
    capture = Capture(dict(weights)) if watch else None
    with still_frozen(modules(model)) as own, Replay(values) as replay:
        with capture or nullcontext():
            model(*args, **kwargs)
    _check(replay)
    params = [*own, *(p for p in replay.params if p.requires_grad)]
    params = list({id(p): p for p in params}.values())
    return Run(weights, replay, fallback, capture, list(own), params)


def _innermost(fn: Distribution) -> Distribution:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _hangs_on_graph(fn: Distribution) -> bool:
    fn = _innermost(fn)
    parameters = (getattr(fn, name, None) for name in fn.arg_constraints)
    return any(isinstance(value, Tensor) and value.requires_grad for value in parameters)


def _check(replay: Replay) -> None:
    if not any(site.batch for site in replay.observed):
        raise ValueError("the model has no observed site in this call: were the data left out?")
    for site in replay.observed:
        if site.batch > site.num_data:
            raise ValueError(
                f"site {site.name!r} has {site.batch} rows in a plate of size {site.num_data}: the "
                "plate's size is the number of data in all"
            )
