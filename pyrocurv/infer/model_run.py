"""One run of a model at given weights: its loss, its curvature terms, its other parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from torch import Tensor, nn

from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.modules import named_modules, unwrap_model
from pyrocurv.handlers.replay import ObservedSite, ReplayMessenger
from pyrocurv.layers.autograd_graph import ancestors
from pyrocurv.layers.calls import LayerCall, UntracedWeight
from pyrocurv.layers.capture import Capture
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.prior import PriorSite
from pyrocurv.runtime.autocast import Autocast
from pyrocurv.runtime.distributions import as_normal, unwrap
from pyrocurv.runtime.module_state import still_frozen
from pyrocurv.runtime.rng import isolated_rng

# Defaults of Adam for the parameters of the model and of the fallback guide. A noise scale's first
# gradients, with the weights far from their optimum, are so large that a longer memory for squares
# would shrink its steps for thousands of them.
MODEL_OPTIONS = {"lr": 2e-3, "betas": (0.9, 0.99)}
GUIDE_OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99)}


@dataclass(frozen=True, eq=False)
class ModelRun:
    """A model run at `weights`, the leaves of its graph, and at a sample of the fallback guide."""

    weights: Mapping[str, Tensor]
    replay: ReplayMessenger
    fallback: Any  # the fallback guide's trace, or None
    calls: Sequence[LayerCall]  # of the layers, if the run was captured
    own_params: Mapping[str, Tensor]  # of the model's modules
    model_params: Mapping[str, Tensor]  # these and `pyro.param`s, unconstrained
    guide_params: Mapping[str, Tensor]  # of the fallback guide, unconstrained
    log_volume: Tensor | float = 0.0  # of the transforms of the latents, for a joint guide

    # ---- the data -------------------------------------------------------------------------------

    @cached_property
    def data(self) -> list[ObservedSite]:
        """The observed sites whose likelihood depends on the weights.

        With several sites they are found in the graph, which needs a run with gradients.
        """
        sites = [site for site in self.replay.observed if site.batch]
        if len(sites) == 1:
            return sites
        leaves = {id(weight) for weight in self.weights.values()}
        return [site for site in sites if _depends_on(leaves, site.log_prob)] or sites

    @cached_property
    def primary_likelihood(self) -> ObservedSite:
        """The observed site that defines N: the most numerous, one in a plate if any is."""
        data = [site for site in self.data if site.in_plate or not site.is_factor]
        if not data:
            raise ValueError(
                "the only likelihood is a factor outside of any plate, so that the number of data "
                "is unknown: put it in their plate, or use FullGuide with curvature='hessian'"
            )
        return max(data, key=lambda site: (site.in_plate, site.num_data))

    @property
    def num_data(self) -> int:
        """N."""
        return self.primary_likelihood.num_data

    @property
    def num_data_if_known(self) -> int | None:
        """N, or None if the only likelihood is a factor outside of any plate."""
        is_known = any(site.in_plate or not site.is_factor for site in self.data)
        return self.num_data if is_known else None

    @property
    def batch(self) -> int:
        """B."""
        return self.primary_likelihood.batch

    @property
    def has_finite_support(self) -> bool:
        """Whether all likelihoods are over finitely many values."""
        data = [site for site in self.data if site.in_plate or not site.is_factor]
        return all(unwrap(site.fn, masks=True).has_enumerate_support for site in data)

    def check_per_example_density(self, kind: str) -> None:
        """Raise ValueError for a joint density of several examples, if `kind` needs each one's."""
        if kind == "hessian":
            return
        primary = self.primary_likelihood
        for site in self.data:
            is_outside = primary.in_plate and not site.in_plate and site.rows != primary.rows
            batch_shape = unwrap(site.fn, masks=True).batch_shape
            is_joint = not batch_shape and max(site.rows, primary.rows) > 1
            if is_outside or is_joint:
                raise ValueError(
                    f"site {site.name!r} has one density for all examples, but "
                    f"curvature={kind!r} needs one for each: use 'hessian', or give the "
                    "likelihood an axis of examples"
                )

    @property
    def likelihood_terms(self) -> list[LikelihoodTerm]:
        """The data as terms of the curvature per datum."""
        rows = self.primary_likelihood.rows
        return [likelihood_term(site, self.num_data, rows) for site in self.data]

    # ---- priors and other parameters ------------------------------------------------------------

    @cached_property
    def prior_sites(self) -> dict[str, PriorSite]:
        """The priors of the weights that the run used."""
        latents = self.replay.latents.items()
        return {n: PriorSite(site.fn, site.power) for n, site in latents if n in self.weights}

    @property
    def params(self) -> list[Tensor]:
        """All parameters to be trained in addition to the weights, in the order of `auxiliary`."""
        return [*self.model_params.values(), *self.guide_params.values()]

    def auxiliary(self, gradients: Sequence[Tensor | None]) -> list[AuxiliaryParameter]:
        """The `params` with their gradients."""
        sides = [("model", self.model_params, MODEL_OPTIONS),
                 ("guide", self.guide_params, GUIDE_OPTIONS)]
        named = [(side, n, p, options) for side, params, options in sides
                 for n, p in params.items()]
        return [
            AuxiliaryParameter(
                name, param, gradient, side, options, joins_without_gradient=name in self.own_params
            )
            for (side, name, param, options), gradient in zip(named, gradients, strict=True)
        ]

    # ---- the loss -------------------------------------------------------------------------------

    @cached_property
    def nll(self) -> Tensor:
        """N nll, of the data alone."""
        return -functools.reduce(torch.add, [site.log_prob for site in self.replay.observed])

    def tempered_nll(self, temperature: float) -> Tensor:
        """N nll, plus T (log q - log p) of the latents that the fallback guide has.

        Priors of the weights that depend on those latents, or on parameters, enter with their
        gradient but without a value: the weights' own KL is computed elsewhere, in closed form.
        """
        nll = self.nll
        for name, (fn, power) in self.prior_sites.items():
            normal = as_normal(fn)
            if normal is not None and (normal.loc.requires_grad or normal.scale.requires_grad):
                log_prior = power * normal.log_prob(self.weights[name].detach()).sum()
                nll = nll - temperature * (log_prior - log_prior.detach())
        if self.fallback is None:
            return nll
        latents = self.replay.latents.items()
        prior = sum(site.log_prob for name, site in latents if name not in self.weights)
        self.fallback.compute_log_prob()
        sites = [site for site in self.fallback.nodes.values() if site["type"] == "sample"]
        return nll + temperature * (sum(site["log_prob_sum"] for site in sites) - prior)

    def negative_log_joint(self, temperature: float) -> Tensor:
        """-log p(y | z) - T (log p(z) + the log volume), of all latents z."""
        likelihood = torch.stack([site.log_prob for site in self.replay.observed]).sum()
        prior = sum((site.log_prob for site in self.replay.latents.values()), self.log_volume)
        return -likelihood - temperature * prior


@dataclass(frozen=True, eq=False)
class BatchModel:
    """A model and its guide on one batch; `network()` is the autocast context to run it in."""

    model: Callable[..., Any]
    guide: StructuredGuide
    network: Autocast
    args: Any
    kwargs: Any

    def __call__(self, weights: Mapping[str, Tensor], capture: bool = False) -> ModelRun:
        """Run the model, see `run_model`.

        Raises ValueError also for a plate that is smaller than the batch in it.
        """
        run = run_model(self.model, self.guide, weights, self.args, self.kwargs, capture)
        for site in run.replay.observed:
            if site.batch > site.num_data:
                raise ValueError(
                    f"site {site.name!r} has {site.batch} rows in a plate of size {site.num_data}: "
                    "the plate's size is the number of data in total"
                )
        return run


def run_model(
    model: Callable[..., Any], guide: StructuredGuide, weights: Mapping[str, Tensor], args: Any,
    kwargs: Any, capture: bool = False, auxiliary: Mapping[str, Tensor] | None = None,
) -> ModelRun:
    """Run the model at values of the guide's sites; with `capture` its layers are recorded.

    The latents of the fallback guide are a sample from it, or the values in `auxiliary`.

    Raises ValueError if nothing is observed.
    """
    values, log_volume = guide.constrain(weights)
    values, fallback = {**values, **(auxiliary or {})}, None
    if guide.fallback_sites and auxiliary is None:
        fallback = sample_fallback(guide, args, kwargs)
        values.update(sampled_values(fallback))
    recorder = Capture(dict(weights)) if capture else None
    modules = named_modules(model)
    with still_frozen(modules.values()), ReplayMessenger(values) as replay:
        with recorder or nullcontext():
            model(*args, **kwargs)
    _check_observed(replay)
    own = _own_params(model, modules)  # after the run: the store may have replaced some
    params = {n: p for n, p in replay.params.items() if p.requires_grad}
    calls = () if recorder is None else recorder.trace().calls
    return ModelRun(
        weights, replay, fallback, calls, own, _unique({**own, **params}),
        _fallback_params(guide, fallback), log_volume,
    )


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An item of a loader as the arguments of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def require_grad(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights themselves, which nothing else uses, as leaves of a graph."""
    for weight in weights.values():
        weight.requires_grad_()
    return weights


def setup_guide(guide: StructuredGuide, args: Any, kwargs: Any) -> None:
    """Set up a guide that has not been called, without using random numbers."""
    if guide.prototype_trace is None:
        with isolated_rng(torch.device("cpu")):
            guide.setup(args, kwargs)


def mean_weights(guide: StructuredGuide) -> dict[str, Tensor]:
    """The mean of the guide as leaves of a graph."""
    guide.sync_with_store()
    means: dict[str, Tensor] = {}
    for family in guide.blocks:
        means.update(family.block.unpack(family.raw_loc.detach().clone()))
    return require_grad(means)


def auxiliary_medians(guide: StructuredGuide, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The medians {site: value} of the fallback guide's latents."""
    return guide.fallback.median(*args, **kwargs) if guide.fallback_sites else {}


def layer_calls(
    guide: StructuredGuide, calls: Sequence[LayerCall], weights: Mapping[str, Tensor], rows: int
) -> list[LayerCall]:
    """The calls of the guide's layers, including weights that no supported op consumes."""
    blocks = [family.block for family in guide.blocks]
    untraced = [layer for block in blocks if block.is_untraced for layer in block.layers]
    return [*calls, *(UntracedWeight(x, weights[x.weight], rows) for x in untraced)]


def likelihood_term(site: ObservedSite, num_data: int, rows: int) -> LikelihoodTerm:
    """An observed site as a term of the curvature per datum: a mean over the run's `rows`."""
    fn, mask = site.fn, site.mask
    while isinstance(fn, MaskedDistribution):
        inner = torch.as_tensor(fn._mask)
        mask = inner if mask is None else inner & torch.as_tensor(mask)
        fn = fn.base_dist
    return LikelihoodTerm(fn, site.value, site.scale * (rows / num_data), mask)


def sample_fallback(guide: StructuredGuide, args: Any, kwargs: Any) -> Any:
    """A trace of the fallback latents, and of the subsample of data that the plates draw."""
    def sample(*args: Any, **kwargs: Any) -> None:
        guide._create_plates(*args, **kwargs)
        guide.fallback(*args, **kwargs)

    return poutine.trace(sample).get_trace(*args, **kwargs)


def sampled_values(trace: Any) -> dict[str, Tensor]:
    """{site: value} of what a trace has sampled."""
    return {name: s["value"] for name, s in trace.nodes.items() if s["type"] == "sample"}


def _own_params(model: Callable[..., Any], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The trainable parameters of a model that is a module; a function's are in the store."""
    if not isinstance(unwrap_model(model)[0], nn.Module):
        return {}
    return {
        f"{path}.{name}": p for path, module in modules.items()
        for name, p in module._parameters.items() if p is not None and p.requires_grad
    }


def _unique(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each parameter under its first name."""
    names: dict[int, str] = {}
    return {n: p for n, p in params.items() if names.setdefault(id(p), n) == n}


def _fallback_params(guide: StructuredGuide, trace: Any) -> dict[str, Tensor]:
    """The fallback's parameters, by names without the counter of the guide's own name."""
    nodes = {} if trace is None else trace.nodes
    return {
        f"guide {name.removeprefix(guide._pyro_name)}": site["value"].unconstrained()
        for name, site in nodes.items() if site["type"] == "param"
    }


def _depends_on(leaves: Container[int], value: Tensor) -> bool:
    """Whether the graph of a value has one of the leaves (ids) in it.

    The graph is searched because the parameters of a distribution may be anywhere: in the
    components of a mixture, in a transform.
    """
    return any(id(getattr(node, "variable", None)) in leaves for node in ancestors(value))


def _check_observed(replay: ReplayMessenger) -> None:
    if not any(site.batch or site.is_factor for site in replay.observed):
        raise ValueError("the model has no observed site in this call: were the data left out?")
