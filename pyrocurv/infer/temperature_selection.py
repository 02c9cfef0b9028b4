"""Selection of a temperature by held-out data.

The score is the log predictive density, log 1/S Σ_s p(y_n | w_s) with w_s from the posterior, in
nats and averaged over the held-out data. T = 1 is the ELBO; networks with more weights than data
usually predict better below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from typing import Any

import torch

from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.handlers.modules import module_tensors, modules
from pyrocurv.infer.loaders import progress_bar
from pyrocurv.infer.model_run import setup_guide, split_batch
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.predictive_density import BatchDensity, Component
from pyrocurv.runtime.agreement import check_same, gather, raise_together
from pyrocurv.runtime.module_state import eval_mode, preserve_module_state
from pyrocurv.runtime.rng import RandomStream, device_of, rewind_rng_on_error
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import (
    check_callable,
    check_flag,
    check_integer,
    check_is,
    check_iterable,
    check_loader,
    check_positive,
)
from pyrocurv.runtime.workers import AUTO, Workers

Guide = StructuredGuide | MixtureGuide
Trained = NGVI | tuple[Callable[..., Any], Guide]  # or a model and its guide
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


class SelectedTemperature(float):
    """The selected temperature; `.densities` {temperature: log predictive density} are the scores.
    """

    densities: Mapping[float, float]


def choose_temperature(
    fit: Callable[[float], Trained], held_out: Iterable[Any],
    temperatures: Sequence[float] = TEMPERATURES, num_samples: int = 32, progress: bool = True,
    process_group: Any = AUTO,
) -> SelectedTemperature:
    """The temperature whose posterior predicts held-out data best.

    Args:
        fit: trains from scratch on the other data at a temperature, and returns the `NGVI` or
            (model, guide).
        held_out: batches of the model's arguments, data included, in a list or a DataLoader, which
            is iterated once for each temperature. Do not use test data.
        temperatures: the candidates.
        num_samples: of each posterior.
        progress: show a progress bar, on a terminal.
        process_group: as for `log_predictive_density`. All processes call `fit`, and select the
            same temperature by the held-out data of all of them.

    All posteriors are sampled with the same random numbers; treat differences below the standard
    error over the held-out data as ties. Warns if the best candidate is the lowest or highest and
    below 1.

    Raises:
        ValueError: no temperature, one that is not positive, held-out data that can be iterated
            only once, or what `log_predictive_density` raises.
        FloatingPointError: no score is finite (a score that is not finite is never selected).

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
    check_callable("fit", fit, "a callable temperature -> NGVI or (model, guide)")
    check_iterable("temperatures", temperatures, "a list of numbers")
    temperatures = [*temperatures]
    if not temperatures:
        raise ValueError("temperatures: at least one is needed")
    for temperature in temperatures:
        check_positive("temperatures", temperature)
    check_loader("held_out", held_out)
    if isinstance(held_out, Iterator):
        raise ValueError("held_out: an iterator is exhausted after one temperature; use a list")
    check_integer("num_samples", num_samples, 1)
    check_flag("progress", progress)
    workers = Workers.of(process_group)
    with rewind_rng_on_error(torch.device("cpu")):
        seed = RandomStream().seed  # the same draws from each posterior
        densities: dict[float, float] = {}
        bar = progress_bar(progress and None, iterable=temperatures, desc="temperatures")
        for temperature in bar:
            with raise_together(workers, f"fit({temperature})"):
                trained = fit(temperature)
            density = _density(trained, held_out, num_samples, seed, process_group)
            densities[temperature] = density
            bar.set_postfix(temperature=temperature, density=f"{density:.4f}")
    known = {t: density for t, density in densities.items() if math.isfinite(density)}
    if not known:
        raise FloatingPointError(f"no temperature has a finite density: {densities}")
    choice = SelectedTemperature(max(known, key=known.__getitem__))
    choice.densities = densities
    edges = {min(densities): "lowest", max(densities): "highest"}
    if len(densities) > 1 and choice in edges and choice < 1:
        warn_user(
            f"temperature {choice} is the {edges[choice]} of the candidates: one beyond it may be "
            "better"
        )
    return choice


def _density(
    trained: Trained, held_out: Iterable[Any], num_samples: int, seed: int, process_group: Any
) -> float:
    pair = (trained.model, trained.guide) if isinstance(trained, NGVI) else trained
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"fit: an NGVI or (model, guide) is needed, got {type(pair).__name__}")
    return density_at_seed(*pair, held_out, num_samples, seed, process_group)


def density_at_seed(
    model: Callable[..., Any], guide: Guide, held_out: Iterable[Any], num_samples: int, seed: int,
    process_group: Any,
) -> float:
    """`log_predictive_density` at samples that a seed determines."""
    like = next(iter(guide.parameters()), torch.zeros(()))
    with RandomStream(seed)(like.device):
        return log_predictive_density(model, guide, held_out, num_samples, process_group)


@torch.no_grad()
def log_predictive_density(
    model: Callable[..., Any], guide: Guide, loader: Iterable[Any], num_samples: int = 32,
    process_group: Any = AUTO,
) -> float:
    """log 1/S Σ_s p(y_n | w_s) on average over the data of a loader, in nats.

    The data are the first axis of the likelihoods in plates, or of all if there is no plate;
    masked data are excluded, and a `poutine.scale` does not count. The components of a mixture take
    turns. The samples w_s are the same for all data, from a seed that torch's global generator
    gives, and do not depend on the batches; the model is in eval mode. As in `Predictive`, it runs
    once for many samples where that is possible and faster, and so do its side effects.

    Args:
        process_group: the processes that have the data together, each a part of them in its loader:
            a group of `torch.distributed`, by default that of `init_process_group`, if it was
            called; None for this process alone. All of them have to call this, with the same
            posterior, and get the average over all data, at the samples of rank 0's seed. Data that
            a `DistributedSampler` repeats, up to world_size - 1 of them, count twice: take
            `Subset(data, range(rank, len(data), world_size))` to count each once.

    Raises ValueError for a Laplace approximation, whose samples are not meant for the network
    itself, for a loader without data (of all processes together), for less than one sample, and for
    processes with different posteriors; RuntimeError if another process has raised an exception.
    """
    check_callable("model", model, "a Pyro model, a callable,")
    check_is("guide", guide, (StructuredGuide, MixtureGuide), "one of pyrocurv.guides")
    check_loader("loader", loader)
    check_integer("num_samples", num_samples, 1)
    workers = Workers.of(process_group)
    if isinstance(guide, MixtureGuide):
        guide.prepare(model)
    turns = _turns_of_components(guide, num_samples)
    if any(component.guide.is_laplace for component in turns):
        raise ValueError(
            "the guide is a Laplace approximation: score "
            "pyrocurv.infer.Laplace(model, guide).predict(x), not samples"
        )
    total, count = 0.0, 0.0
    with rewind_rng_on_error(torch.device("cpu")):
        seed = workers.broadcast(RandomStream().seed)
        with raise_together(workers, "log_predictive_density"):
            for batch in loader:
                density, size = _sum_of_batch(model, turns, *split_batch(batch), seed)
                total, count = total + density, count + size
        check_same(workers, {**module_tensors(guide), **module_tensors(model)},
                   "all of them need the same posterior")
        parts = gather(workers, (total, count))
        total, count = (math.fsum(column) for column in zip(*parts, strict=True))
        if not count:
            raise ValueError("the loader gave no data")
    return total / count


def _sum_of_batch(
    model: Callable[..., Any], turns: Sequence[Component], args: Any, kwargs: Any, seed: int
) -> tuple[float, float]:
    """The sum over the data of a batch, and their number."""
    for component in turns:
        setup_guide(component.guide, args, kwargs)
    blocks = turns[0].guide.blocks
    device = blocks[0].raw_loc.device if blocks else device_of(args)
    with (eval_mode(modules(model)), preserve_module_state(modules(model)),
          RandomStream(seed)(device)):
        densities, is_counted = BatchDensity(model, args, kwargs, device)(turns)
    mean = torch.logsumexp(densities, 0) - math.log(len(turns))
    return float(mean[is_counted].double().sum()), float(is_counted.sum())


def _turns_of_components(guide: Guide, num_samples: int) -> list[Component]:
    """The component that each sample is from, with its tensors of the model."""
    turns = [*islice(_turns(guide), num_samples)]
    components = {
        each: Component(each, guide.tensors_of(each) if isinstance(guide, MixtureGuide) else {})
        for each in dict.fromkeys(turns)
    }
    return [components[each] for each in turns]


def _turns(guide: Guide) -> Iterator[StructuredGuide]:
    """The guide, or the components of a mixture in turn, endlessly."""
    if not isinstance(guide, MixtureGuide):
        return repeat(guide)
    return chain.from_iterable(zip(*map(_turns, guide), strict=True))
