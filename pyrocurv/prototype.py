"""What a guide learns from one run of its model: the latents, and which layers consume them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.distributions import Independent, constraints

from pyrocurv.buffers import snapshot
from pyrocurv.capture import Capture
from pyrocurv.layers import Layer
from pyrocurv.priors import as_normal

Site = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prototype:
    """A trace of the model, its latent sites in order, and the layers that can have a Gaussian.

    Those of form "opaque" are weights that no supported op consumes. `missed` {site: why} are these
    and the real latents that a prior of another kind keeps from a Gaussian.
    """

    trace: Any
    latents: Mapping[str, Site]
    layers: list[Layer]
    missed: Mapping[str, str]


class _Watch(Messenger):
    """Shows a capture the latents as they appear, and counts the observed sites."""

    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self.capture, self.observed = capture, 0

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"]:
            self.observed += 1
        else:
            self.capture.watch(msg["name"], msg["value"])


def _unwrapped(model: Any) -> tuple[Any, bool]:
    """What is under the `poutine` handlers around a model, and whether one hides sites."""
    blocked = False
    while not isinstance(model, nn.Module) and getattr(model, "args", None):
        blocked = blocked or any(isinstance(part, poutine.block_messenger.BlockMessenger)
                                 for part in (getattr(model.func, "__self__", None), *model.args))
        model = model.args[-1]
    return model, blocked


def modules(model: Any) -> list[nn.Module]:
    """The modules of a model, whatever `poutine` handlers are around it."""
    return list(named_modules(model).values())


def named_modules(model: Any) -> dict[str, nn.Module]:
    """The same by name; a model that is no module has none."""
    module, _ = _unwrapped(model)
    return dict(module.named_modules()) if isinstance(module, nn.Module) else {}


@contextmanager
def frozen_buffers(model: Any) -> Iterator[None]:
    """Leave the model's persistent buffers as they were, and frozen parameters frozen."""
    parts = modules(model)
    restore = snapshot(parts)
    try:
        with still_frozen(parts):
            yield
    finally:
        restore()


@contextmanager
def still_frozen(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Gives the modules' trainable parameters, and keeps the others from being made trainable.

    Pyro's parameter store does that to whatever it meets (`requires_grad_(True)` in place).
    """
    found = [p for part in modules for p in part._parameters.values() if p is not None]
    frozen = [p for p in found if not p.requires_grad]
    try:
        yield [p for p in found if p.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def inspect(
    model: Callable[..., Any], hide: Callable[[Any], bool], partial: bool, args: Any, kwargs: Any,
    known: Collection[str] = (),
) -> Prototype:
    """Run the model once, without gradients, and look.

    Args:
        model: with initial values set (`InitMessenger`).
        hide: which messages no guide is for.
        partial: a guide for some of the sites only, beside others.
        known: the latents, of a guide loaded from a state; where nothing is observed, whatever else
            there is are data.

    Raises:
        ValueError: no observed site, no latent, or a discrete one.
    """
    capture = Capture()
    watch = _Watch(capture)
    with torch.no_grad(), frozen_buffers(model), capture:
        trace = poutine.block(poutine.trace(poutine.block(watch(model), hide)).get_trace)(
            *args, **kwargs
        )
    if known and not watch.observed:
        for name in trace.nodes.keys() - known - {"_INPUT", "_RETURN"}:
            trace.remove_node(name)
    latents = dict(trace.iter_stochastic_nodes())
    if not watch.observed and not known and not partial and not _unwrapped(model)[1]:
        raise ValueError(
            "the model has no observed site in this call, its latents are "
            f"{', '.join(latents) or 'none'}: were the data left out?"
        )
    if not latents:
        raise ValueError("the model has no latent: has the network been bayesianized?")
    for name, site in latents.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"latent {name!r} is discrete ({type(site['fn']).__name__}): these guides need "
                "continuous latents; enumerate it, or hide it with poutine.block"
            )
        if not all(frame.vectorized for frame in site["cond_indep_stack"]):
            raise ValueError(f"latent {name!r} is in a sequential plate: use a vectorized one")
    for name in capture.watched:
        if reason := _refusal(latents.get(name)):
            capture.missed[name] = reason
    layers = capture.layers()
    missed = {n: why for n, why in capture.missed.items() if _is_real(latents.get(n))}
    opaque = [
        Layer(name, None, tuple(latents[name]["value"].shape), "opaque")
        for name in missed if not _refusal(latents[name]) and _is_whole(latents[name])
    ]
    return Prototype(trace, latents, [*layers, *opaque], missed)


def _refusal(site: Site | None) -> str:
    """Why a layer's weight cannot have a Gaussian of ours, or ""."""
    if site is None:
        return "a weight hidden from the guide"
    if as_normal(site["fn"]) is None:
        prior = site["fn"]
        while isinstance(prior, Independent):
            prior = prior.base_dist
        return f"a {type(prior).__name__} prior"
    return "a weight inside a plate" if site["cond_indep_stack"] else ""


def _is_whole(site: Site) -> bool:
    """Whether all axes belong to one event, as those of a weight do."""
    return 0 < site["fn"].event_dim == site["value"].dim()


def _is_real(site: Site | None) -> bool:
    """Whether a latent could be a weight at all: a scale, say, could not."""
    support = None if site is None else site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
