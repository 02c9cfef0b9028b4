"""Training the components of a mixture: the same run from several seeds, with one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from pyrocurv.curvature.data_checks import check_num_data
from pyrocurv.guides import MixtureGuide
from pyrocurv.infer.loaders import arguments, length, progress_bar, set_epoch
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.runtime.agreement import check_same
from pyrocurv.runtime.validation import (
    MAX_INTEGER,
    check_callable,
    check_flag,
    check_integer,
    check_is,
    check_iterable,
    check_loader,
    is_integer,
    shown,
)
from pyrocurv.runtime.workers import Workers

SAME_PLAN = "all of them have to train the same components, with as many batches on each"
Training = NGVI | tuple[NGVI, Any]  # with its learning rate schedule, or None


def train_mixture(
    make: Callable[[int], Training],
    loader: Iterable[Any],
    epochs: int,
    seeds: int | Iterable[int] = 5,
    *,
    finished: dict[int, NGVI] | None = None,
    progress: bool = True,
) -> MixtureGuide:
    """Train a guide from each of several seeds, and combine them.

    Args:
        make: seed -> (ngvi, schedule), or only the `NGVI`: a new network, model and guide. The
            schedule, if it is not None, is stepped after each batch.
        loader: batches, iterated over once per epoch: tuples of the model's arguments, mappings of
            its keyword arguments, or tensors.
        epochs: number of epochs for each component.
        seeds: M for 0 ... M-1, or the seeds themselves. Torch's generators are seeded for each run,
            including `make` and the order of the data, and restored afterwards.
        finished: {seed: ngvi} of the components that are trained, filled as they are. Components in
            it at the start are not trained again, so after an error or an interruption a second
            call with the same dict continues with the component that was not finished.
        progress: whether to show a progress bar, one for all components.

    Where the `NGVI`s train with other processes (their `process_group`), each of these calls this
    with the same seeds and its own loader, of as many batches, and has all components. To give each
    process other seeds instead, make them with `process_group=None`. A `DistributedSampler` of the
    loader is told the epoch, counted over all components.

    Returns:
        The guides of `seeds`, in their order, as a `MixtureGuide`; use it in `Predictive` with the
        model of any of them. What training has changed in the models beside their latents, as the
        statistics of batch norm, each component has its own of.

    Raises:
        TypeError: `make` does not return an NGVI.
        ValueError: no seed, or a seed twice; an epoch without a batch; processes with other seeds,
            epochs or numbers of batches; models of different architectures.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> from pyrocurv.infer import NGVI, train_mixture
        >>> data = [(torch.randn(20, 4), torch.randint(3, (20,))) for _ in range(2)]
        >>> def make(seed):
        ...     net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        ...     model = pyrocurv.nn.Classifier(net, num_data=40)
        ...     return NGVI(model, KFACGuide(model))
        >>> len(train_mixture(make, data, epochs=2, seeds=3, progress=False))
        3
    """
    check_callable("make", make, "a callable seed -> NGVI or (NGVI, schedule)")
    check_loader("loader", loader)
    check_integer("epochs", epochs, 1)
    all_seeds = _seeds(seeds)
    if finished is not None:
        check_is("finished", finished, dict, "a dict {seed: NGVI}")
    check_flag("progress", progress)
    finished = {} if finished is None else finished
    remaining = [seed for seed in all_seeds if seed not in finished]
    batches = length(loader) if progress else None
    total = None if batches is None else len(remaining) * epochs * batches
    with progress_bar(progress, total=total, unit="batch") as bar:
        for seed in remaining:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                training = _pair(make(seed))
                plan = {"seeds": remaining, "epochs": epochs, "batches": length(loader)}
                check_same(Workers.of(training[0].process_group), plan, SAME_PLAN)
                first = all_seeds.index(seed) * epochs
                finished[seed] = _train(training, loader, range(first, first + epochs), bar, seed)
    return MixtureGuide([finished[seed].guide for seed in all_seeds])


def _seeds(seeds: Any) -> list[int]:
    """The seeds themselves; ValueError if there is none, or one twice."""
    if is_integer(seeds, 1):
        return [*range(seeds)]
    if not isinstance(seeds, int):
        check_iterable("seeds", seeds, "a positive integer, or a list of integers,")
    every = [] if isinstance(seeds, int) else [*seeds]
    is_valid = all(is_integer(seed, -MAX_INTEGER) for seed in every)
    if not (every and is_valid and len({*every}) == len(every)):
        raise ValueError(f"seeds={shown(seeds)}: one or more different seeds are needed")
    return every


def _pair(training: Training) -> tuple[NGVI, Any]:
    ngvi, schedule = training if isinstance(training, tuple) else (training, None)
    if not isinstance(ngvi, NGVI):
        raise TypeError(f"make: an NGVI, or (NGVI, schedule), is needed, got {type(ngvi).__name__}")
    return ngvi, schedule


def _train(
    training: tuple[NGVI, Any], loader: Iterable[Any], epochs: range, bar: tqdm, seed: int
) -> NGVI:
    ngvi, schedule = training
    for epoch in epochs:
        number = epoch - epochs.start + 1
        set_epoch(loader, epoch)  # another order
        losses = []
        for batch in loader:
            args, kwargs = arguments(batch)
            losses.append(ngvi.step(*args, **kwargs))
            if schedule is not None:
                schedule.step()
            bar.update()
            if len(losses) == 1 and epoch == epochs.start:
                check_num_data(ngvi.num_data, loader)
        if not losses:
            raise ValueError(
                f"the loader has no batch in epoch {number}: a DataLoader or a list is needed, "
                "which can be iterated over several times"
            )
        bar.set_postfix(seed=seed, epoch=number, loss=sum(losses) / len(losses))
    return ngvi
