"""The log density of each datum of a batch, at samples of a posterior.

The first sample is a plain run of the model, with Pyro's validation: it raises the errors of the
data, and shows which of them are masked. At the other samples the model runs at once under
`torch.func.vmap`, in groups that are small in memory. They are run one by one where vmap cannot run
the model or gains nothing; where the model draws random numbers itself, between those of the
samples; under autocast, which vmap ignores; and where a density is not finite, since Pyro's
validation may have an error for it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.replay import ObservedSite, ReplayMessenger
from pyrocurv.handlers.vectorized import MIN_CHUNK, RETURN, VectorizedRunner
from pyrocurv.infer.model_run import (
    ModelRun,
    require_grad,
    run_model,
    sample_fallback,
    sampled_values,
)
from pyrocurv.infer.predictive import MAX_ELEMENTS
from pyrocurv.runtime.rng import RandomStream, isolated_rng
from pyrocurv.runtime.validation import is_out_of_memory
from pyrocurv.structures import Structure

MAX_CPU_ELEMENTS = 1 << 20  # weights of all samples in a group that stay in a CPU's cache

# how the model of a guide is run, which is decided once for all epochs of `fit`
_runners: weakref.WeakKeyDictionary[StructuredGuide, VectorizedRunner] = (
    weakref.WeakKeyDictionary()
)


# ---- samples ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Component:
    """A guide, and the tensors {name: value} of the model that belong to its samples."""

    guide: StructuredGuide
    tensors: Mapping[str, Tensor]

    @cached_property
    def precisions(self) -> list[Structure]:
        """The precision of each block."""
        return [family.precision() for family in self.guide.blocks]

    def new_noise(self, n: int) -> list[Tensor]:
        """Memory for n draws of the noise of each block [n, P]."""
        return [family.raw_loc.new_empty(n, family.block.size) for family in self.guide.blocks]

    def weights(self, noise: Sequence[Tensor]) -> dict[str, Tensor]:
        """Unconstrained values {site: [n, *shape]} from the noise, which may be overwritten."""
        values: dict[str, Tensor] = {}
        for family, precision, z in zip(self.guide.blocks, self.precisions, noise, strict=True):
            perturbation = precision.rsqrt(z) if len(z) > 1 else precision.rsqrt_(z[0])[None]
            values.update(family.block.unpack(family.raw_loc.detach() + perturbation))
        return values


@dataclass(frozen=True, eq=False)
class Samples:
    """n samples of a component."""

    component: Component
    weights: Mapping[str, Tensor]  # {site of the blocks: [n, *shape]}, unconstrained
    auxiliary: Sequence[Mapping[str, Tensor]]  # {other site: [*shape]} of each sample

    def __len__(self) -> int:
        return len(self.auxiliary)

    def unbind(self) -> list[dict[str, Tensor]]:
        """The weights of each sample, {site: [*shape]}."""
        return [{name: x[i] for name, x in self.weights.items()} for i in range(len(self))]

    def latents(self) -> dict[str, Tensor]:
        """{site: [n, *shape]} of all sites, constrained."""
        auxiliary, weights = _stack(self.auxiliary), self.weights
        if self.component.guide.has_constrained:
            weights = _stack([self.component.guide.constrain(each)[0] for each in self.unbind()])
        return {**weights, **auxiliary}


def _stack(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in samples]) for name in samples[0]}


def draw(turns: Sequence[Component], args: Any, kwargs: Any) -> Iterator[Samples]:
    """A sample of each component in turn, those of one component together.

    The random numbers of a sample do not depend on how many samples are drawn together.
    """
    noise = {component: component.new_noise(n) for component, n in Counter(turns).items()}
    auxiliary: dict[Component, list[dict[str, Tensor]]] = {component: [] for component in noise}
    for component in turns:
        for z in noise[component]:
            z[len(auxiliary[component])].normal_()
        guide = component.guide
        has_others = bool(guide.fallback_sites)
        others = sampled_values(sample_fallback(guide, args, kwargs)) if has_others else {}
        auxiliary[component].append(others)
    for component, values in auxiliary.items():
        yield Samples(component, component.weights(noise.pop(component)), values)


# ---- densities ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BatchDensity:
    """The log densities of the data of one batch."""

    model: Callable[..., Any]
    args: Any
    kwargs: Any
    device: torch.device  # of the weights

    def __call__(self, turns: Sequence[Component]) -> tuple[Tensor, Tensor]:
        """At a sample of each component in turn [S, B], and which data are not masked [B].

        In a group of samples those of one component are next to each other.
        """
        first, vectorizes = self._first(turns[0])
        sites = _data_sites(first)
        program = _DensityModel(self.model, [site.name for site in sites])
        runner = _runners.setdefault(turns[0].guide, VectorizedRunner())
        densities, others = [_log_density(sites)[None]], turns[1:]
        size = self._group_size(turns) if vectorizes else 1
        for start in range(0, len(others), size):
            for samples in draw(others[start : start + size], self.args, self.kwargs):
                densities.append(self._densities(runner, program, samples))
        return torch.cat(densities), _is_counted(first)

    def _first(self, component: Component) -> tuple[ModelRun, bool]:
        """The run at the first sample, and whether others may be run at once."""
        (samples,) = draw([component], self.args, self.kwargs)
        before = RandomStream.ahead(self.device).states
        with _AutocastMessenger(self.device) as autocast:
            (run,) = self._runs(samples)
        after = RandomStream.ahead(self.device).states
        draws_itself = any(not torch.equal(state, after[kind]) for kind, state in before.items())
        return run, not (draws_itself or autocast.is_enabled or am_i_wrapped())

    def _group_size(self, turns: Sequence[Component]) -> int:
        """The number of samples that are drawn together."""
        elements = sum(family.block.size for family in turns[0].guide.blocks)
        limit = MAX_CPU_ELEMENTS if self.device.type == "cpu" else MAX_ELEMENTS
        return max(1, limit // max(1, elements))

    def _densities(
        self, runner: VectorizedRunner, program: _DensityModel, samples: Samples
    ) -> Tensor:
        """[n, B]."""
        if len(samples) >= MIN_CHUNK:
            densities = self._at_once(runner, program, samples)
            if densities is not None and bool(densities.isfinite().all()):
                return densities
        return torch.stack([_log_density(_data_sites(run)) for run in self._runs(samples)])

    def _at_once(
        self, runner: VectorizedRunner, program: _DensityModel, samples: Samples
    ) -> Tensor | None:
        """[n, B], or None where vmap cannot run the model, or gains nothing."""
        try:
            with (pyro.validation_enabled(False), ConditionMessenger(samples.component.tensors),
                  isolated_rng(self.device)):  # new tensors draw numbers under vmap
                results = runner.at_once(
                    program, samples.latents(), len(samples), self.args, self.kwargs,
                    RETURN.__eq__,
                )
        except Exception as error:  # if it is the model's own, a plain run raises it again
            if is_out_of_memory(error):
                raise
            return None
        return None if results is None else results.values[RETURN]

    def _runs(self, samples: Samples) -> Iterator[ModelRun]:
        """A plain run at each sample, with the tensors that belong to it."""
        component = samples.component
        for weights, auxiliary in zip(samples.unbind(), samples.auxiliary, strict=True):
            with ConditionMessenger(component.tensors):
                run = run_model(
                    self.model, component.guide, require_grad(weights), self.args, self.kwargs,
                    auxiliary=auxiliary,
                )
            yield run


@dataclass(frozen=True, eq=False)
class _DensityModel:
    """A model that returns the log density of each datum [B], the sum over observed sites."""

    model: Callable[..., Any]
    sites: Sequence[str]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        with ReplayMessenger({}, partial=True) as replay:  # a handler outside gives the latents
            self.model(*args, **kwargs)
        observed = {site.name: site for site in replay.observed}
        return _log_density([observed[name] for name in self.sites])


class _AutocastMessenger(Messenger):
    """Notices whether autocast is enabled where a model samples, by the model itself or around it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.is_enabled = device, False

    def _pyro_sample(self, msg: Any) -> None:
        self.is_enabled |= torch.is_autocast_enabled(self.device.type)


def _data_sites(run: ModelRun) -> list[ObservedSite]:
    """The observed sites over the data."""
    primary = run.primary_likelihood
    return [
        site for site in run.replay.observed
        if site.in_plate == primary.in_plate and site.rows == primary.rows
    ]


def _log_density(sites: Sequence[ObservedSite]) -> Tensor:
    """The log likelihood of each datum [B]."""
    return torch.stack([site.each.reshape(site.rows, -1).sum(-1) for site in sites]).sum(0)


def _is_counted(run: ModelRun) -> Tensor:
    """Which data are not masked [B]."""
    primary = run.primary_likelihood
    rows, device = primary.rows, primary.value.device
    if primary.mask is None:
        return torch.ones(rows, dtype=torch.bool, device=device)
    mask = torch.as_tensor(primary.mask, device=device)
    return mask.expand(primary.fn.batch_shape).reshape(rows, -1).any(-1)
