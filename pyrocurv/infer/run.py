"""One run of a model at given weights: what it costs and what else it wants trained."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.capture import Capture
from pyrocurv.curvature.pullback import Observation
from pyrocurv.graph import ancestors
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.replay import Replay, Site
from pyrocurv.infer.rest import Others
from pyrocurv.modules import modules, named_modules, still_frozen, unwrapped
from pyrocurv.precision import Autocast
from pyrocurv.priors import Source, as_normal


@dataclass(frozen=True, eq=False)
class Run:
    """A model run at `weights`, the leaves of its graph, and at a sample of the fallback guide."""

    weights: Mapping[str, Tensor]
    replay: Replay
    fallback: Any  # the fallback guide's trace, or None
    capture: Capture | None
    own_params: Mapping[str, Tensor]  # of the model's modules
    model_params: Mapping[str, Tensor]  # these and `pyro.param`s, unconstrained
    guide_params: Mapping[str, Tensor]  # of the fallback guide, unconstrained
    log_volume: Tensor | float = 0.0  # of the weights' images, where those are the latents

    @cached_property
    def data(self) -> list[Site]:
        """The observed sites whose likelihood the weights have a part in; factors have none.

        Which they are is read from the graph of a run with gradients.
        """
        sites = [site for site in self.replay.observed if site.batch]
        if len(sites) == 1:
            return sites
        leaves = {id(weight) for weight in self.weights.values()}
        return [site for site in sites if _goes_back_to(leaves, site.log_prob)] or sites

    @cached_property
    def main(self) -> Site:
        """The observed site that says what N is: the most numerous, one in a plate if any is."""
        data = [site for site in self.data if site.in_plate or not site.is_factor]
        if not data:
            raise ValueError(
                "the only likelihood is a factor outside of any plate, of how many data? Put it in "
                "their plate, or use FullGuide with curvature='hessian'"
            )
        return max(data, key=lambda site: (site.in_plate, site.num_data))

    def check_apart(self, kind: str) -> None:
        """Raises ValueError where one density is of several examples, whose parts `kind` takes."""
        if kind == "hessian":
            return
        main = self.main
        for site in self.data:
            beside = main.in_plate and not site.in_plate and site.rows != main.rows
            joint = not _innermost(site.fn).batch_shape and max(site.rows, main.rows) > 1
            if beside or joint:
                raise ValueError(
                    f"site {site.name!r} has one density for all examples, which "
                    f"curvature={kind!r} takes one by one: use 'hessian', or give the likelihood "
                    "an axis of examples"
                )

    @property
    def num_data(self) -> int:
        """N."""
        return self.main.num_data

    @property
    def has_finite_support(self) -> bool:
        """Whether all likelihoods are over finitely many values."""
        data = [site for site in self.data if site.in_plate or not site.is_factor]
        return all(_innermost(site.fn).has_enumerate_support for site in data)

    @property
    def batch(self) -> int:
        """B."""
        return self.main.batch

    @property
    def observations(self) -> list[Observation]:
        """The data as terms of the curvature per datum."""
        return [site.observation(self.num_data, self.main.rows) for site in self.data]

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The priors of the weights that had a part in the run."""
        latents = self.replay.latents.items()
        return {n: Source(site.fn, site.power) for n, site in latents if n in self.weights}

    @property
    def params(self) -> list[Tensor]:
        """All that is to be trained beside the weights, in the order of `others`."""
        return [*self.model_params.values(), *self.guide_params.values()]

    def others(self, gradients: Sequence[Tensor | None]) -> Others:
        """The `params` with their gradients."""
        return Others(self.model_params, self.guide_params, self.own_params.keys(), gradients)

    def energy(self, temperature: float) -> Tensor:
        """N nll, plus T (log q - log p) of the latents that the fallback guide has.

        Priors of the weights that hang on those latents, or on parameters, pull at them here,
        with no value: the weights' own KL is reckoned elsewhere, in closed form.
        """
        energy = -sum(site.log_prob for site in self.replay.observed)
        for name, (fn, power) in self.sources.items():
            normal = as_normal(fn)
            if normal is not None and (normal.loc.requires_grad or normal.scale.requires_grad):
                log_prior = power * normal.log_prob(self.weights[name].detach()).sum()
                energy = energy - temperature * (log_prior - log_prior.detach())
        if self.fallback is None:
            return energy  # type: ignore[return-value]
        latents = self.replay.latents.items()
        prior = sum(site.log_prob for name, site in latents if name not in self.weights)
        self.fallback.compute_log_prob()
        sites = [site for site in self.fallback.nodes.values() if site["type"] == "sample"]
        return energy + temperature * (sum(site["log_prob_sum"] for site in sites) - prior)

    def joint(self, temperature: float) -> Tensor:
        """-log p(y | z) - T (log p(z) + the log volume), of all latents z."""
        likelihood = torch.stack([site.log_prob for site in self.replay.observed]).sum()
        prior = sum((site.log_prob for site in self.replay.latents.values()), self.log_volume)
        return -likelihood - temperature * prior


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a loader gave as the arguments of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """With the model's modules in eval mode, in which no buffer moves."""
    training: list[nn.Module] = [module for module in modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def leaves(sample: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of all blocks, to take gradients in."""
    return {n: value.detach().requires_grad_() for part in sample for n, value in part.items()}


def run_model(
    model: Callable[..., Any], guide: StructuredGuide, weights: Mapping[str, Tensor], args: Any,
    kwargs: Any, watch: bool = False, rest: Mapping[str, Tensor] | None = None,
) -> Run:
    """Run the model at values of the guide's sites; `watch` its ops for curvature.

    The latents of the fallback guide are a sample from it, or the values in `rest`.

    Raises ValueError where nothing is observed.
    """
    values, log_volume = guide.image(weights)
    values, fallback = {**values, **(rest or {})}, None
    if guide.fallback_sites and rest is None:
        fallback = poutine.trace(_sample_rest).get_trace(guide, *args, **kwargs)
        values.update({n: s["value"] for n, s in fallback.nodes.items() if s["type"] == "sample"})
    capture = Capture(dict(weights)) if watch else None
    parts = named_modules(model)
    with still_frozen(parts.values()), Replay(values) as replay:
        with capture or nullcontext():
            model(*args, **kwargs)
    _check(replay)
    own = _own_params(model, parts)  # as they are now: the store may have put others in their place
    others = {n: p for n, p in replay.params.items() if p.requires_grad}
    params = _once({**own, **others})
    theirs = _params(guide, fallback)
    return Run(weights, replay, fallback, capture, own, params, theirs, log_volume)


@dataclass(frozen=True, eq=False)
class Runner:
    """A model and its guide on one batch; `network()` turns on the autocast to run it in."""

    model: Callable[..., Any]
    guide: StructuredGuide
    network: Autocast
    args: Any
    kwargs: Any

    def __call__(self, weights: Mapping[str, Tensor], watch: bool = False) -> Run:
        """As `run_model` has it.

        Raises ValueError where a plate is smaller than the batch in it, besides.
        """
        run = run_model(self.model, self.guide, weights, self.args, self.kwargs, watch)
        for site in run.replay.observed:
            if site.batch > site.num_data:
                raise ValueError(
                    f"site {site.name!r} has {site.batch} rows in a plate of size {site.num_data}: "
                    "the plate's size is the number of data in all"
                )
        return run


def _sample_rest(guide: StructuredGuide, *args: Any, **kwargs: Any) -> None:
    """The fallback latents, and which data the plates draw, for the model to follow."""
    guide._create_plates(*args, **kwargs)
    guide.fallback(*args, **kwargs)


def _own_params(
    model: Callable[..., Any], parts: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """The trainable parameters of a model that is a module; of a function they are the store's."""
    if not isinstance(unwrapped(model)[0], nn.Module):
        return {}
    return {
        f"{path}.{name}": p for path, part in parts.items()
        for name, p in part._parameters.items() if p is not None and p.requires_grad
    }


def _once(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each under its first name."""
    names: dict[int, str] = {}
    return {n: p for n, p in params.items() if names.setdefault(id(p), n) == n}


def _params(guide: StructuredGuide, fallback: Any) -> dict[str, Tensor]:
    """The fallback's parameters, by names that do not say how many guides there have been."""
    nodes = {} if fallback is None else fallback.nodes
    return {
        f"guide {name.removeprefix(guide._pyro_name)}": site["value"].unconstrained()
        for name, site in nodes.items() if site["type"] == "param"
    }


def _innermost(fn: Distribution) -> Distribution:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _goes_back_to(leaves: Container[int], value: Tensor) -> bool:
    """Whether the graph of a value has one of the leaves (ids) in it.

    Asked of the graph, as the parameters of a distribution may be anywhere: in a mixture's
    components, in a transform.
    """
    return any(id(getattr(node, "variable", None)) in leaves for node in ancestors(value))


def _check(replay: Replay) -> None:
    if not any(site.batch or site.is_factor for site in replay.observed):
        raise ValueError("the model has no observed site in this call: were the data left out?")
