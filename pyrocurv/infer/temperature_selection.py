"""Choosing a temperature by what it predicts of data that training has not seen.

The score is the log predictive density, log 1/S Σ_s p(y_n | w_s) with w_s from the posterior, in
nats and on average over the held-out data. T = 1 is the ELBO and needs no choosing; networks with
more weights than data predict better below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.infer.model_run import ModelRun, require_grad, run_model, split_batch
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.posterior.sampling import perturbed_weights, sample_perturbations
from pyrocurv.runtime.module_state import eval_mode, preserve_module_state
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_integer, check_positive

Guide = StructuredGuide | MixtureGuide
Trained = NGVI | tuple[Callable[..., Any], Guide]  # or a model and its guide
TEMPERATURES = (1.0, 0.3, 0.1, 0.03)


class SelectedTemperature(float):
    """The temperature chosen; `.densities` {temperature: log predictive density} are the scores."""

    densities: Mapping[float, float]


def choose_temperature(
    fit: Callable[[float], Trained], held_out: Iterable[Any],
    temperatures: Sequence[float] = TEMPERATURES, num_samples: int = 32,
) -> SelectedTemperature:
    """The temperature whose posterior predicts held-out data best.

    Args:
        fit: trains anew on the rest of the data at a temperature, and returns the `NGVI` or
            (model, guide).
        held_out: batches of the model's arguments, data included, in a list or a DataLoader: they
            are gone through once for each temperature. Data that a test will be made on have no
            place here.
        temperatures: among which to choose.
        num_samples: of each posterior.

    The draws from each posterior come from the same random numbers, and scores nearer than the
    standard error over the held-out data are a tie. Warns where the best is at an end of those
    tried, below 1. Raises ValueError for no temperature or one that is not positive, for held-out
    data that can be gone through only once, and where `log_predictive_density` does;
    FloatingPointError where no score is finite (one that is not is never chosen).

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.infer import NGVI, choose_temperature
        >>> x = torch.randn(60, 2)
        >>> y = x.sum(-1) + 0.1 * torch.randn(60)
        >>> def fit(temperature):
        ...     net = pyrocurv.nn.bayesianize(torch.nn.Linear(2, 1))
        ...     model = pyrocurv.nn.Regressor(net, num_data=40, noise=0.1)
        ...     guide = pyrocurv.guides.KFACGuide(model)
        ...     ngvi = NGVI(model, guide, lr=0.2, temperature=temperature)
        ...     for _ in range(5):
        ...         ngvi.step(x[:40], y[:40])
        ...     return ngvi
        >>> choice = choose_temperature(fit, [(x[40:], y[40:])])
        >>> choice in choice.densities
        True
    """
    if not temperatures:
        raise ValueError("temperatures: at least one is needed")
    for temperature in temperatures:
        check_positive("temperature", temperature)
    if isinstance(held_out, Iterator):
        raise ValueError("held_out: an iterator is gone after one temperature; a list is needed")
    check_integer("num_samples", num_samples, 1)
    seed = RandomStream().seed  # the same draws from each posterior
    densities = {t: _density(fit(t), held_out, num_samples, seed) for t in temperatures}
    known = {t: density for t, density in densities.items() if math.isfinite(density)}
    if not known:
        raise FloatingPointError(f"no temperature has a finite density: {densities}")
    choice = SelectedTemperature(max(known, key=known.__getitem__))
    choice.densities = densities
    edges = {min(densities): "lowest", max(densities): "highest"}
    if len(densities) > 1 and choice in edges and choice < 1:
        warn_user(
            f"temperature {choice} is the {edges[choice]} of those tried: one beyond it may be "
            "better"
        )
    return choice


def _density(trained: Trained, held_out: Iterable[Any], num_samples: int, seed: int) -> float:
    pair = (trained.model, trained.guide) if isinstance(trained, NGVI) else trained
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"fit: an NGVI or (model, guide) is needed, got {type(pair).__name__}")
    model, guide = pair
    like = next(iter(guide.parameters()), torch.zeros(()))
    with RandomStream(seed)(like.device):
        return log_predictive_density(model, guide, held_out, num_samples)


@torch.no_grad()
def log_predictive_density(
    model: Callable[..., Any], guide: Guide, loader: Iterable[Any], num_samples: int = 32
) -> float:
    """log 1/S Σ_s p(y_n | w_s) on average over the data of a loader, in nats.

    The data are the first axis of the likelihoods in plates, or of all where there is no plate,
    masked ones left out; a `poutine.scale` does not count. Of a mixture the components take turns.
    Draws from torch's global generator; the model is in eval mode.

    Raises ValueError for a Laplace approximation, whose samples mean nothing to the network, for a
    loader without data and for less than one sample.
    """
    check_integer("num_samples", num_samples, 1)
    turns = [*islice(_turns(guide), num_samples)]
    if any(one.is_laplace for one in turns):
        raise ValueError(
            "the guide is at a mode: score pyrocurv.infer.Laplace(model, guide).predict(x), not "
            "samples"
        )
    total, count = 0.0, 0.0
    for batch in loader:
        args, kwargs = split_batch(batch)
        with eval_mode(modules(model)), preserve_module_state(modules(model)):
            runs = [_run(model, one, args, kwargs) for one in turns]
        densities = torch.stack([_log_prob(run) for run in runs])  # [S, B]
        counted = _counted(runs[0])
        mean = torch.logsumexp(densities, 0) - math.log(num_samples)
        total += float(mean[counted].double().sum())
        count += float(counted.sum())
    if not count:
        raise ValueError("the loader gave no data")
    return total / count


def _turns(guide: Guide) -> Iterator[StructuredGuide]:
    """The guide, or a mixture's components one after the other, without end."""
    if not isinstance(guide, MixtureGuide):
        return repeat(guide)
    return chain.from_iterable(zip(*map(_turns, guide), strict=True))


def _run(model: Callable[..., Any], guide: StructuredGuide, args: Any, kwargs: Any) -> ModelRun:
    """At one sample of the posterior."""
    if guide.prototype_trace is None:
        guide(*args, **kwargs)
    families = guide.blocks
    precisions = [family.precision() for family in families]
    locs = [family.raw_loc.detach() for family in families]
    noise, _ = sample_perturbations(precisions, [None] * len(locs), locs[0], False)
    sample = perturbed_weights([family.block for family in families], locs, noise)
    return run_model(model, guide, require_grad(sample), args, kwargs)


def _log_prob(run: ModelRun) -> Tensor:
    """Of each datum [B]."""
    primary = run.primary_likelihood
    return torch.stack([
        site.each.reshape(site.rows, -1).sum(-1) for site in run.replay.observed
        if site.in_plate == primary.in_plate and site.rows == primary.rows
    ]).sum(0)


def _counted(run: ModelRun) -> Tensor:
    """Which rows are no masked ones [B]."""
    mask = run.primary_likelihood.mask
    if mask is None:
        return torch.ones(
            run.primary_likelihood.rows, dtype=torch.bool,
            device=run.primary_likelihood.value.device
        )
    mask = torch.as_tensor(mask, device=run.primary_likelihood.value.device)
    return mask.expand(
        run.primary_likelihood.fn.batch_shape
    ).reshape(run.primary_likelihood.rows, -1).any(-1)
