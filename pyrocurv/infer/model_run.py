"""One run of a model at given weights: what it costs and what else it wants trained."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.modules import named_modules, unwrap_model
from pyrocurv.handlers.replay import ObservedSite, ReplayMessenger
from pyrocurv.infer.rest import AuxiliaryParameters
from pyrocurv.layers.autograd_graph import ancestors
from pyrocurv.layers.calls import LayerCall, UntracedWeight
from pyrocurv.layers.capture import Capture
from pyrocurv.posterior.prior import PriorSite
from pyrocurv.posterior.sampling import perturbed_weights
from pyrocurv.runtime.autocast import Autocast
from pyrocurv.runtime.distributions import as_normal
from pyrocurv.runtime.module_state import still_frozen
from pyrocurv.runtime.rng import isolated_rng


@dataclass(frozen=True, eq=False)
class ModelRun:
    """A model run at `weights`, the leaves of its graph, and at a sample of the fallback guide."""

    weights: Mapping[str, Tensor]
    replay: ReplayMessenger
    fallback: Any  # the fallback guide's trace, or None
    capture: Capture | None
    own_params: Mapping[str, Tensor]  # of the model's modules
    model_params: Mapping[str, Tensor]  # these and `pyro.param`s, unconstrained
    guide_params: Mapping[str, Tensor]  # of the fallback guide, unconstrained
    log_volume: Tensor | float = 0.0  # of the weights' images, where those are the latents

    @cached_property
    def data(self) -> list[ObservedSite]:
        """The observed sites whose likelihood the weights have a part in; factors have none.

        Which they are is read from the graph of a run with gradients.
        """
        sites = [site for site in self.replay.observed if site.batch]
        if len(sites) == 1:
            return sites
        require_grad = {id(weight) for weight in self.weights.values()}
        return [site for site in sites if _depends_on(require_grad, site.log_prob)] or sites

    @cached_property
    def primary_likelihood(self) -> ObservedSite:
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
        primary_likelihood = self.primary_likelihood
        for site in self.data:
            beside = primary_likelihood.in_plate and not site.in_plate
            beside = beside and site.rows != primary_likelihood.rows
            joint = not _innermost(site.fn).batch_shape and max(
                site.rows, primary_likelihood.rows
            ) > 1
            if beside or joint:
                raise ValueError(
                    f"site {site.name!r} has one density for all examples, which "
                    f"curvature={kind!r} takes one by one: use 'hessian', or give the likelihood "
                    "an axis of examples"
                )

    @property
    def num_data(self) -> int:
        """N."""
        return self.primary_likelihood.num_data

    @property
    def has_finite_support(self) -> bool:
        """Whether all likelihoods are over finitely many values."""
        data = [site for site in self.data if site.in_plate or not site.is_factor]
        return all(_innermost(site.fn).has_enumerate_support for site in data)

    @property
    def batch(self) -> int:
        """B."""
        return self.primary_likelihood.batch

    @property
    def observations(self) -> list[LikelihoodTerm]:
        """The data as terms of the curvature per datum."""
        rows = self.primary_likelihood.rows
        return [likelihood_term(site, self.num_data, rows) for site in self.data]

    @cached_property
    def prior_sites(self) -> dict[str, PriorSite]:
        """The priors of the weights that had a part in the run."""
        latents = self.replay.latents.items()
        return {n: PriorSite(site.fn, site.power) for n, site in latents if n in self.weights}

    @property
    def params(self) -> list[Tensor]:
        """All that is to be trained beside the weights, in the order of `others`."""
        return [*self.model_params.values(), *self.guide_params.values()]

    def others(self, gradients: Sequence[Tensor | None]) -> AuxiliaryParameters:
        """The `params` with their gradients."""
        return AuxiliaryParameters(
            self.model_params, self.guide_params, self.own_params.keys(), gradients
        )

    def energy(self, temperature: float) -> Tensor:
        """N nll, plus T (log q - log p) of the latents that the fallback guide has.

        Priors of the weights that hang on those latents, or on parameters, pull at them here,
        with no value: the weights' own KL is reckoned elsewhere, in closed form.
        """
        energy = -sum(site.log_prob for site in self.replay.observed)
        for name, (fn, power) in self.prior_sites.items():
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


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a loader gave as the arguments of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def require_grad(sample: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of all blocks, to take gradients in."""
    return {n: value.detach().requires_grad_() for part in sample for n, value in part.items()}


def run_model(
    model: Callable[..., Any], guide: StructuredGuide, weights: Mapping[str, Tensor], args: Any,
    kwargs: Any, watch: bool = False, rest: Mapping[str, Tensor] | None = None,
) -> ModelRun:
    """Run the model at values of the guide's sites; `watch` its ops for curvature.

    The latents of the fallback guide are a sample from it, or the values in `rest`.

    Raises ValueError where nothing is observed.
    """
    values, log_volume = guide.constrain(weights)
    values, fallback = {**values, **(rest or {})}, None
    if guide.fallback_sites and rest is None:
        fallback = poutine.trace(_sample_rest).get_trace(guide, *args, **kwargs)
        values.update({n: s["value"] for n, s in fallback.nodes.items() if s["type"] == "sample"})
    capture = Capture(dict(weights)) if watch else None
    parts = named_modules(model)
    with still_frozen(parts.values()), ReplayMessenger(values) as replay:
        with capture or nullcontext():
            model(*args, **kwargs)
    _check(replay)
    own = _own_params(model, parts)  # as they are now: the store may have put others in their place
    others = {n: p for n, p in replay.params.items() if p.requires_grad}
    params = _once({**own, **others})
    theirs = _params(guide, fallback)
    return ModelRun(weights, replay, fallback, capture, own, params, theirs, log_volume)


@dataclass(frozen=True, eq=False)
class BatchModel:
    """A model and its guide on one batch; `network()` turns on the autocast to run it in."""

    model: Callable[..., Any]
    guide: StructuredGuide
    network: Autocast
    args: Any
    kwargs: Any

    def __call__(self, weights: Mapping[str, Tensor], watch: bool = False) -> ModelRun:
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
    if not isinstance(unwrap_model(model)[0], nn.Module):
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


def _depends_on(require_grad: Container[int], value: Tensor) -> bool:
    """Whether the graph of a value has one of the leaves (ids) in it.

    Asked of the graph, as the parameters of a distribution may be anywhere: in a mixture's
    components, in a transform.
    """
    return any(id(getattr(node, "variable", None)) in require_grad for node in ancestors(value))


def _check(replay: ReplayMessenger) -> None:
    if not any(site.batch or site.is_factor for site in replay.observed):
        raise ValueError("the model has no observed site in this call: were the data left out?")


def setup_guide(guide: StructuredGuide, args: Any, kwargs: Any) -> None:
    """Have the guide meet its model, if it has not, at no cost of random numbers."""
    if guide.prototype_trace is None:
        with isolated_rng(torch.device("cpu")), poutine.block():
            guide._setup_prototype(*args, **kwargs)


def mean_weights(guide: StructuredGuide) -> dict[str, Tensor]:
    """The weights, to take gradients in."""
    locs = [family.raw_loc.detach() for family in guide.blocks]
    return require_grad(perturbed_weights([family.block for family in guide.blocks], locs, None))


def auxiliary_medians(guide: StructuredGuide, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The medians {site: value} of the fallback guide's latents."""
    return guide.fallback.median(*args, **kwargs) if guide.fallback_sites else {}


def layer_calls(
    guide: StructuredGuide, capture: Capture | None, weights: Mapping[str, Tensor], rows: int
) -> list[LayerCall]:
    """The ops of the guide's layers; weights that no supported op consumes are layers too."""
    assert capture is not None
    held = [family.block for family in guide.blocks]
    opaque = [layer for block in held if block.is_untraced for layer in block.layers]
    calls = capture.trace().calls
    return [*calls, *(UntracedWeight(one, weights[one.weight], rows) for one in opaque)]


def likelihood_term(site: ObservedSite, num_data: int, rows: int) -> LikelihoodTerm:
    """An observed site as a term of the curvature per datum: a mean over the run's `rows`."""
    fn, mask = site.fn, site.mask
    while isinstance(fn, MaskedDistribution):
        inner = torch.as_tensor(fn._mask)
        mask = inner if mask is None else inner & torch.as_tensor(mask)
        fn = fn.base_dist
    return LikelihoodTerm(fn, site.value, site.scale * (rows / num_data), mask)
