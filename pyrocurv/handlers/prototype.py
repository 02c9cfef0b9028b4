"""One run of a model, from which a guide learns the latents and the layers that consume them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine, validation_enabled
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from pyrocurv.handlers.modules import modules, unwrap_model
from pyrocurv.handlers.replay import ObservedSite, ReplayMessenger
from pyrocurv.handlers.sites import (
    ENUMERATION,
    TraceSite,
    check_latent,
    is_real,
    is_single_event,
)
from pyrocurv.layers import Layer
from pyrocurv.layers.autograd_graph import ancestors
from pyrocurv.layers.batch_axis import mark_wrong_batch_axis
from pyrocurv.layers.capture import Capture
from pyrocurv.layers.module_types import has_synchronized_norm
from pyrocurv.layers.trace import Trace
from pyrocurv.runtime.distributions import as_normal, unwrap
from pyrocurv.runtime.module_state import preserve_module_state
from pyrocurv.runtime.rng import device_of, isolated_rng
from pyrocurv.runtime.validation import is_out_of_memory

CHECKPOINT = (
    "torch.utils.checkpoint recomputes layers outside of Pyro's handlers, where their weights are "
    "different samples: do not use it in a Bayesian network, or keep its layers out of the latents"
)


class EmptyModelError(ValueError, RuntimeError):
    """A model without latents, for which Pyro's guides raise a RuntimeError."""


@dataclass(frozen=True, eq=False)
class Prototype:
    """A trace of the model, its latent sites in order, and the layers that can have a Gaussian."""

    trace: Any
    latents: Mapping[str, TraceSite]
    layers: list[Layer]  # "untraced": no supported op consumes the weight, or not by examples
    unsupported: Mapping[str, str]  # {site: reason}: untraced, or a prior that rules out a Gaussian


def trace_prototype(
    model: Callable[..., Any], hide: Callable[[Any], bool], partial: bool, args: Any, kwargs: Any,
    known: Collection[str] = (), requires_data: bool = True,
) -> Prototype:
    """Run the model once to find its latents, and once more to find the layers they belong to.

    Args:
        model: with initial values set (`InitMessenger`).
        hide: which messages belong to no guide.
        partial: whether the guide covers only some of the sites, next to other guides.
        known: the latents of a guide that was loaded from a state. Where nothing is observed, all
            other latents are taken for data.
        requires_data: whether a model without an observed site is an error, unless handlers may
            hide one.
    """
    trace, observed = _trace(model, hide, args, kwargs)
    if known and not observed:
        for name in trace.nodes.keys() - known - {"_INPUT", "_RETURN"}:
            trace.remove_node(name)
    latents = dict(trace.iter_stochastic_nodes())
    needs_data = requires_data and not known and not partial and not unwrap_model(model)[1]
    if needs_data and not observed:
        raise ValueError(
            "the model has no observed site in this call, its latents are "
            f"{', '.join(latents) or 'none'}: were the data left out?"
        )
    _check_latents(latents)
    refused = {name: why for name, site in latents.items() if (why := _refusal(site))}
    values = {name: site["value"] for name, site in latents.items() if name not in refused}
    found = _trace_layers(model, values, args, kwargs)
    reasons = {**found.unsupported, **refused}
    unsupported = {name: why for name, why in reasons.items() if is_real(latents[name])}
    untraced = [
        Layer(name, None, tuple(latents[name]["value"].shape), "untraced")
        for name in unsupported if name not in refused and is_single_event(latents[name])
    ]
    return Prototype(trace, latents, [*found.layers, *untraced], unsupported)


def _trace(
    model: Callable[..., Any], hide: Callable[[Any], bool], args: Any, kwargs: Any
) -> tuple[Any, list[ObservedSite]]:
    """A trace of the model without the messages to hide, and all of its observed sites."""

    def run() -> tuple[Any, list[ObservedSite]]:
        replay = ReplayMessenger({}, partial=True)
        visible = poutine.block(replay(model), hide)
        trace = poutine.block(poutine.trace(visible).get_trace)(*args, **kwargs)
        return trace, replay.observed

    with preserve_module_state(modules(model)):
        try:
            with torch.no_grad():
                return run()
        except RuntimeError as error:  # the model may take derivatives; other errors come again
            if is_out_of_memory(error):
                raise
            return run()


def given(args: Any, kwargs: Mapping[str, Any]) -> frozenset[Any]:
    """Which arguments of a call are not None: positions and keywords."""
    arguments = [*enumerate(args), *kwargs.items()]
    return frozenset(key for key, value in arguments if value is not None)


def check_not_observed(
    model: Callable[..., Any], latents: Collection[str], args: Any, kwargs: Any
) -> None:
    """Run the model, and raise ValueError for a latent of a guide that is observed."""
    with preserve_module_state(modules(model)), isolated_rng(device_of(args)), torch.no_grad():
        trace = poutine.block(poutine.trace(model).get_trace)(*args, **kwargs)
    for name in trace.nodes.keys() & latents:
        check_latent(trace.nodes[name])


def _check_latents(latents: Mapping[str, TraceSite]) -> None:
    if not latents:
        raise EmptyModelError("the model has no latent: has the network been bayesianized?")
    for name, site in latents.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"latent {name!r} is discrete ({type(unwrap(site['fn'])).__name__}). If its data "
                "were left out of this call, give them; otherwise hide it from the guide, "
                f"poutine.block(model, hide=[{name!r}]). {ENUMERATION}"
            )
        if not all(frame.vectorized for frame in site["cond_indep_stack"]):
            raise ValueError(f"latent {name!r} is in a sequential plate: use a vectorized plate")


def _refusal(site: TraceSite) -> str:
    """The reason why the prior of a latent rules out a Gaussian of ours, or ""."""
    if as_normal(site["fn"]) is None:
        return f"a {type(unwrap(site['fn'])).__name__} prior"
    return "a weight inside a plate" if site["cond_indep_stack"] else ""


# ---- layers -------------------------------------------------------------------------------------


def _trace_layers(
    model: Callable[..., Any], values: Mapping[str, Tensor], args: Any, kwargs: Any
) -> Trace:
    """The layers of the weights at these values."""
    weights = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    capture = Capture(weights, has_synchronized_norm(modules(model)))
    replay = ReplayMessenger(weights, partial=True)
    with (
        torch.enable_grad(), isolated_rng(device_of(values.values())),
        preserve_module_state(modules(model)),
    ):
        with poutine.block(), validation_enabled(False):
            with capture:
                replay(model)(*args, **kwargs)
            trace = capture.trace()
            in_plates = [site for site in replay.observed if site.in_plate]  # only these: examples
            sites = in_plates or replay.observed
            terms = [(site.rows, site.fn.log_prob(site.value)) for site in sites]
        terms = [(rows, log_prob) for rows, log_prob in terms if rows and log_prob.requires_grad]
        if terms:  # examined before the buffers, which the graph may need, are restored
            count = max(rows for rows, _ in terms)
            densities = [log_prob.reshape(rows, -1).sum(1) for rows, log_prob in terms
                         if rows == count and log_prob.dim()]
            is_coupled = trace.has_batch_coupling or not densities
            density = None if is_coupled else torch.stack(densities).sum(0)  # [B]
            total = torch.stack([log_prob.sum() for _, log_prob in terms]).sum()
            try:
                trace = mark_wrong_batch_axis(trace.mark_untracked(total), count, density)
            except CheckpointError as error:  # of a backward pass that recomputes other weights
                raise ValueError(CHECKPOINT) from error
            untracked = weights.keys() - trace.tracked_names  # maybe in a reentrant checkpoint
            names = (node.name() for node in ancestors(total)) if untracked else ()
            if any(name.startswith("CheckpointFunction") for name in names):
                raise ValueError(f"{', '.join(sorted(untracked))}: {CHECKPOINT}")
    return trace
