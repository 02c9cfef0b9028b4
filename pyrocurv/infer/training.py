"""`fit`: the training loop that everyone writes by hand."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from pyrocurv.curvature.data_checks import check_num_data
from pyrocurv.handlers.modules import modules, unwrap_model
from pyrocurv.infer.history import Epoch, History
from pyrocurv.infer.loaders import (
    OnDevice,
    arguments,
    check_progress,
    device_of_model,
    length,
    progress_bar,
    set_epoch,
)
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.infer.schedules import Schedule, check_schedule, make_schedule
from pyrocurv.infer.temperature_selection import density_at_seed
from pyrocurv.infer.training_state import Run, TrainingState
from pyrocurv.nn.models import Classifier, Regressor
from pyrocurv.runtime.agreement import check_same, gather
from pyrocurv.runtime.module_state import train_mode
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.validation import (
    check_integer,
    check_is,
    check_iterable,
    check_loader,
    is_function_of,
    shown,
)

Log = Callable[[dict[str, Any]], Any]


def fit(
    ngvi: NGVI,
    loader: Iterable[Any],
    epochs: int,
    *,
    schedule: Schedule = "cosine",
    warmup: int = 0,
    held_out: Iterable[Any] | None = None,
    num_samples: int = 32,
    patience: int | None = None,
    callbacks: Sequence[Callable[[Epoch], Any]] = (),
    logger: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> History:
    """Train `ngvi.guide` for some epochs.

    What it does can be written in a few lines around `ngvi.step`, as the quick start of the
    documentation does; such loops are as good.

    Args:
        ngvi: the model and its guide. The model's modules are in train mode during the steps, each
            in its own mode again after every epoch.
        loader: batches, iterated over once per epoch: tuples of the model's arguments, mappings of
            its keyword arguments, or tensors. They are moved to the model's device. A
            `DistributedSampler` is told the epoch.
        epochs: number of passes over the loader.
        schedule: of the learning rates, on `ngvi.optimizer`: "cosine" lowers them to 0 over all
            steps, None leaves them; or a callable from an optimizer to a
            `torch.optim.lr_scheduler.LRScheduler`, stepped after each step. Those of `optim=`
            follow. Afterwards the learning rate is as it was before.
        warmup: steps over which the learning rates rise linearly before.
        held_out: batches of other data, whose `log_predictive_density` is evaluated after each
            epoch, always at the same random numbers. The state after the best epoch (model, guide
            and NGVI) is restored at the end. Do not use test data. Not for a guide of which each
            rank has a part.
        num_samples: of the posterior, for the held-out data.
        patience: number of epochs without a higher held-out density after which training ends;
            None for no end.
        callbacks: each is called with the `Epoch` after it, on all processes; one that returns True
            (not only something true) ends training.
        logger: an object with `log(dict)`, as a run of Weights & Biases, or with `add_scalar(name,
            value, step)`, as TensorBoard's `SummaryWriter`, or a callable of a dict; told the
            values of each epoch, on rank 0.
        checkpoint: a file, written after each epoch, when logger and callbacks have been called. If
            it exists, training continues from it, bit for bit, and a run that was finished is not
            repeated. `epochs` and `patience` may be others then; the temperature, the learning rate
            and the other settings have to be the same. The order of the data continues too if it is
            drawn from the loader's own generator, `DataLoader(..., generator=...)`.
        progress: whether to show a progress bar, on rank 0; None for on a terminal only.

    Processes that train together (`process_group` of the NGVI) all call this, each with its own
    loader of as many batches, and its own part of the held-out data, as for
    `log_predictive_density`.

    If a step, a callback or an interrupt raises, model, guide and NGVI are as after the last step
    that was complete: nothing is restored, and the checkpoint is that of the last epoch.

    Returns:
        The `History`, a sequence of `Epoch`s.

    Raises:
        TypeError: an argument of another kind; a schedule that returns no scheduler.
        ValueError: an epoch without a batch, a cosine for a loader without a length, patience
            without held-out data, held-out data for `num_particles=0`, whose samples are not meant
            for prediction, or a checkpoint of other objects or settings.
        Exception: what `NGVI.step` raises.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.infer import NGVI, fit
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=48)
        >>> ngvi = NGVI(model, pyrocurv.guides.KFACGuide(model))
        >>> train, held_out = torch.utils.data.random_split(data, [48, 16])
        >>> loaders = [torch.utils.data.DataLoader(part, 16) for part in (train, held_out)]
        >>> history = fit(ngvi, loaders[0], epochs=3, held_out=loaders[1])
        >>> [epoch.step for epoch in history]
        [3, 6, 9]
    """
    check_is("ngvi", ngvi, NGVI, "an NGVI")
    check_loader("loader", loader)
    check_integer("epochs", epochs, 1)
    check_integer("warmup", warmup, 0)
    batches = length(loader)
    check_schedule(schedule, warmup, batches)
    _check_held_out(ngvi, held_out, num_samples, patience)
    callbacks, log = _callables(callbacks), _log_function(logger)
    path = _checked_path(checkpoint)
    check_progress(progress)
    workers = ngvi._workers
    (group,) = ngvi.optimizer.param_groups
    before: dict[str, Any] = {key: group[key] for key in ("lr", "initial_lr") if key in group}
    plan = {"schedule": schedule if isinstance(schedule, str | None) else "callable",
            "warmup": warmup, "held_out": held_out is not None, "num_samples": num_samples,
            "temperature": ngvi.temperature, "kl_warmup": ngvi.kl_warmup,
            **{key: group[key] for key in ngvi.optimizer.defaults}}
    check_same(workers, {**plan, "epochs": epochs, "batches": batches, "patience": patience,
                         "checkpoint": path is None},
               "all of them have to train for as many epochs of as many batches")
    total = None if batches is None else epochs * batches
    try:
        scheduler = make_schedule(schedule, warmup, total, ngvi.optimizer)
        state = TrainingState(ngvi, scheduler, plan)
        run = Run(state, 0 if held_out is None else RandomStream().seed)
        if path is not None and workers.broadcast(path.exists()):
            run.load(path, loader, workers)
        shows = progress if workers.rank == 0 else False
        with progress_bar(shows, total=total, unit="batch") as bar:
            bar.update(len(run.history) * (batches or 0))
            while len(run.history) < epochs and not run.history.stopped_early:
                epoch = _train(run, loader, bar)
                if held_out is not None:
                    epoch = _score(epoch, run, held_out, num_samples)
                run.add(epoch)
                if log is not None and workers.rank == 0:
                    log(epoch.as_dict())
                wants_end = [callback(epoch) is True for callback in callbacks]
                has_lost = patience is not None and run.epochs_since_best() >= patience
                is_end = any(gather(workers, any(wants_end) or has_lost))
                is_early = is_end and len(run.history) < epochs
                run.history = replace(run.history, stopped_early=is_early)
                if path is not None:
                    run.save(path, loader, workers)
        run.restore_best()
    finally:
        (group,) = ngvi.optimizer.param_groups
        group.pop("initial_lr", None)
        group.update(before)
    return run.history


# ---- an epoch -----------------------------------------------------------------------------------


def _train(run: Run, loader: Iterable[Any], bar: Any) -> Epoch:
    """A pass over the loader."""
    ngvi, scheduler, number = run.state.ngvi, run.state.scheduler, len(run.history) + 1
    start, device = time.perf_counter(), device_of_model(ngvi.model, ngvi.guide)
    past = run.history[-1] if run.history else None
    sums, steps, batches, lr = [0.0, 0.0, 0.0], 0, 0, math.nan
    set_epoch(loader, number - 1)
    with train_mode(modules(ngvi.model)):
        for batch in loader:
            args, kwargs = arguments(batch, device)
            (group,) = ngvi.optimizer.param_groups
            lr, batches = group["lr"], batches + 1
            loss = ngvi.step(*args, **kwargs)
            if number == batches == 1:
                counts_examples = isinstance(unwrap_model(ngvi.model)[0], Classifier | Regressor)
                check_num_data(ngvi.num_data, loader, counts_examples and ngvi._workers.is_alone)
            bar.update()
            terms = ngvi.loss_terms
            if math.isnan(loss) or terms is None:  # skipped
                continue
            if scheduler is not None:
                scheduler.step()
            data = terms.num_data or 1
            values = loss / data, terms.nll / data, terms.kl / data
            sums, steps = [a + b for a, b in zip(sums, values, strict=True)], steps + 1
            bar.set_postfix(_postfix(number, [x / steps for x in sums], lr, past), refresh=False)
    if not batches:
        raise ValueError(
            f"the loader has no batch in epoch {number}: a DataLoader or a list is needed, which "
            "can be iterated over several times"
        )
    terms = ngvi.loss_terms
    temperature = math.nan if terms is None else terms.temperature
    loss, nll, kl = (x / steps if steps else math.nan for x in sums)
    step, seconds = steps + (past.step if past else 0), time.perf_counter() - start
    return Epoch(number, step, loss, nll, kl, lr, temperature, seconds=seconds)


def _postfix(
    number: int, means: Sequence[float], lr: float, past: Epoch | None
) -> dict[str, str]:
    """What a bar says: the means so far, and the density after the last epoch."""
    values = {**dict(zip(("loss", "nll", "kl"), means, strict=True)), "lr": lr}
    if past is not None and past.held_out is not None:
        values["held_out"] = past.held_out
    return {"epoch": f"{number}", **{name: f"{x:.4g}" for name, x in values.items()}}


def _score(epoch: Epoch, run: Run, held_out: Iterable[Any], num_samples: int) -> Epoch:
    """The epoch with the density of the held-out data."""
    ngvi, start = run.state.ngvi, time.perf_counter()
    data = OnDevice(held_out, device_of_model(ngvi.model, ngvi.guide))
    density = density_at_seed(
        ngvi.model, ngvi.guide, data, num_samples, run.seed, ngvi.process_group
    )
    return replace(epoch, held_out=density, seconds=epoch.seconds + time.perf_counter() - start)


# ---- arguments ----------------------------------------------------------------------------------


def _check_held_out(ngvi: NGVI, held_out: Any, num_samples: Any, patience: Any) -> None:
    check_integer("num_samples", num_samples, 1)
    if patience is not None:
        check_integer("patience", patience, 1)
        if held_out is None:
            raise ValueError(f"patience={patience} needs held_out, the data whose density it is of")
    if held_out is None:
        return
    check_loader("held_out", held_out)
    if ngvi.guide.is_shared_out:
        raise ValueError(
            "held_out: the ranks of a network sharded by fully_shard have a part of the "
            "posterior each; leave it out, and score ngvi.guide.gathered()"
        )
    if isinstance(held_out, Iterator):
        raise ValueError("held_out: an iterator is exhausted after one epoch; use a list")
    if ngvi.num_particles == 0:
        raise ValueError(
            "held_out: with num_particles=0 samples of the posterior are not meant for prediction; "
            "leave it out, and score pyrocurv.infer.Laplace(model, guide).predict(x)"
        )


def _callables(callbacks: Any) -> tuple[Callable[[Epoch], Any], ...]:
    check_iterable("callbacks", callbacks, "a list of callables of an Epoch")
    callbacks = tuple(callbacks)
    for callback in callbacks:
        if not is_function_of(callback, None):
            raise TypeError(
                f"callbacks: a list of callables of an Epoch is needed, got {shown(callback)} in it"
            )
    return callbacks


def _log_function(logger: Any) -> Log | None:
    """A function of a dict. Raises TypeError for something else than a logger."""
    if logger is None:
        return None
    if callable(getattr(logger, "add_scalar", None)):
        return lambda values: [
            logger.add_scalar(name, value, values["epoch"]) for name, value in values.items()
            if name != "epoch"
        ]
    for log in (getattr(logger, "log", None), logger):
        if is_function_of(log, {}) and not isinstance(logger, type | ModuleType | Tensor):
            return log
    raise TypeError(
        "logger: an object with log(dict) or add_scalar(name, value, step), or a callable of a "
        f"dict, is needed, got {shown(logger)}"
    )


def _checked_path(checkpoint: Any) -> Path | None:
    if checkpoint is None:
        return None
    check_is("checkpoint", checkpoint, (str, os.PathLike), "a path, or None,")
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"checkpoint={str(path)!r}: a file in a folder that exists is needed"
        )
    return path
