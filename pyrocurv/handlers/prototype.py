"""What a guide learns from running its model: the latents, and which layers consume them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.utils.checkpoint import CheckpointError

from pyrocurv.handlers.modules import frozen_buffers, unwrap_model
from pyrocurv.layers import Layer
from pyrocurv.layers.autograd_graph import ancestors
from pyrocurv.layers.batch_axis import mark_wrong_batch_axis
from pyrocurv.layers.capture import Capture
from pyrocurv.runtime.distributions import as_normal

TraceSite = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prototype:
    """A trace of the model, its latent sites in order, and the layers that can have a Gaussian.

    Those with orientation "untraced" are weights that no supported op consumes, or of layers that
    do not see the examples. `unsupported` {site: why} are these and the real latents that a prior
    of another kind keeps from a Gaussian.
    """

    trace: Any
    latents: Mapping[str, TraceSite]
    layers: list[Layer]
    unsupported: Mapping[str, str]


def is_deterministic(site: TraceSite) -> bool:
    """Whether a site is a `pyro.deterministic`: observed to Pyro, but no data."""
    return bool(site["infer"] and site["infer"].get("_deterministic"))


def check_data(site: TraceSite) -> None:
    """Raise ValueError where an observed site has axes that its plates have not.

    Of the distribution, as Pyro's ELBOs do where validation is on, or of the data, which then
    spread it. Without a plate all axes are data.
    """
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    batch = tuple(site["fn"].batch_shape)
    strange = any(
        size != 1 and axis - len(batch) not in plates for axis, size in enumerate(batch)
    )
    if plates and strange:
        raise ValueError(
            f"site {site['name']!r}: a batch of shape {batch} in plates of sizes "
            f"{tuple(plates.values())}: is an output [B, 1] to be squeezed? What belongs to one "
            "datum wants .to_event(...), other data a plate of their own"
        )
    shape, value = tuple(site["fn"].shape()), tuple(site["value"].shape)
    if value == shape or not site["cond_indep_stack"]:
        return
    if torch.broadcast_shapes(value, shape) != shape:
        raise ValueError(
            f"site {site['name']!r}: data of shape {value} against a distribution of {shape}"
        )


class _Watch(Messenger):
    """Runs a model at `values`, as far as they go, and keeps what is observed."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.observed: list[tuple[Distribution, Tensor, bool]] = []  # and whether in a plate

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not site_is_subsample(msg) and not is_deterministic(msg):
            check_data(msg)
            self.observed.append((msg["fn"], msg["value"], bool(msg["cond_indep_stack"])))


def trace_prototype(
    model: Callable[..., Any], hide: Callable[[Any], bool], partial: bool, args: Any, kwargs: Any,
    known: Collection[str] = (),
) -> Prototype:
    """Run the model once, and once more with gradients at its weights, and look.

    Args:
        model: with initial values set (`InitMessenger`).
        hide: which messages no guide is for.
        partial: a guide for some of the sites only, beside others.
        known: the latents, of a guide loaded from a state; where nothing is observed, whatever else
            there is are data.

    Raises:
        ValueError: no observed site, no latent, or a discrete one.
    """
    watch = _Watch({})
    run = poutine.block(poutine.trace(poutine.block(watch(model), hide)).get_trace)
    with frozen_buffers(model):
        try:
            with torch.no_grad():
                trace = run(*args, **kwargs)
        except RuntimeError:  # of a model that takes derivatives; a true fault comes again
            watch.observed.clear()
            trace = run(*args, **kwargs)
    if known and not watch.observed:
        for name in trace.nodes.keys() - known - {"_INPUT", "_RETURN"}:
            trace.remove_node(name)
    latents = dict(trace.iter_stochastic_nodes())
    if not watch.observed and not known and not partial and not unwrap_model(model)[1]:
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
    refused = {name: why for name, site in latents.items() if (why := _refusal(site))}
    values = {name: site["value"] for name, site in latents.items() if name not in refused}
    layers, met = _layers(model, values, args, kwargs)
    unsupported = {name: why for name, why in {**met, **refused}.items() if is_real(latents[name])}
    opaque = [
        Layer(name, None, tuple(latents[name]["value"].shape), "untraced")
        for name in unsupported if name not in refused and _is_whole(latents[name])
    ]
    return Prototype(trace, latents, [*layers, *opaque], unsupported)


def _layers(
    model: Callable[..., Any], values: Mapping[str, Tensor], args: Any, kwargs: Any
) -> tuple[list[Layer], dict[str, str]]:
    """The layers of weights at these values, and {name: why} of those that are none.

    Of random numbers the run leaves as many as it found.
    """
    weights = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    capture, watch = Capture(dict(weights)), _Watch(weights)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), frozen_buffers(model):
        with poutine.block(), validation_enabled(False):
            with capture:
                watch(model)(*args, **kwargs)
            trace = capture.trace()
            plates = [site for site in watch.observed if site[2]]  # others are no examples
            terms = [(_rows(fn, y), fn.log_prob(y)) for fn, y, _ in plates or watch.observed]
        terms = [(rows, log_prob) for rows, log_prob in terms if rows and log_prob.requires_grad]
        if terms:  # looked at before the buffers are put back, which the graph may need
            count = max(rows for rows, _ in terms)
            densities = [log_prob.reshape(rows, -1).sum(1) for rows, log_prob in terms
                         if rows == count and log_prob.dim()]
            if trace.has_batch_coupling or not densities:
                said = None
            else:
                said = torch.stack(densities).sum(0)
            total = torch.stack([log_prob.sum() for _, log_prob in terms]).sum()
            with _recomputed():
                trace = mark_wrong_batch_axis(trace.mark_untracked(total), count, said)
            _refuse_checkpoints(total, weights.keys() - trace.tracked_names)
    return [*trace.layers], dict(trace.unsupported)


CHECKPOINT = (
    "torch.utils.checkpoint runs layers anew outside of Pyro's handlers, where their weights are "
    "other samples: leave it out of a Bayesian network, or its layers out of the latents"
)


@contextmanager
def _recomputed() -> Iterator[None]:
    """Around a backward pass: say what is wrong where a checkpoint finds other weights in it."""
    try:
        yield
    except CheckpointError as error:
        raise ValueError(CHECKPOINT) from error


def _refuse_checkpoints(total: Tensor, unseen: Collection[str]) -> None:
    """Raise ValueError where weights that nothing shows may be in a reentrant checkpoint."""
    names = (node.name() for node in ancestors(total)) if unseen else ()
    if any(name.startswith("CheckpointFunction") for name in names):
        raise ValueError(f"{', '.join(sorted(unseen))}: {CHECKPOINT}")


def _rows(likelihood: Distribution, value: Tensor) -> int:
    """Length of the first axis, the examples."""
    return (*likelihood.batch_shape, *value.shape, 1)[0]


def _refusal(site: TraceSite) -> str:
    """Why a layer's weight cannot have a Gaussian of ours, or ""."""
    if as_normal(site["fn"]) is None:
        prior = site["fn"]
        while isinstance(prior, Independent):
            prior = prior.base_dist
        return f"a {type(prior).__name__} prior"
    return "a weight inside a plate" if site["cond_indep_stack"] else ""


def _is_whole(site: TraceSite) -> bool:
    """Whether all axes belong to one event, as those of a weight do."""
    return 0 < site["fn"].event_dim == site["value"].dim()


def is_real(site: TraceSite) -> bool:
    """Whether a latent could be a weight at all: a scale, say, could not."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
