"""Training the components of a mixture: the same run from several seeds, under one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyrocurv.guides import MixtureGuide
from pyrocurv.handlers.modules import named_modules
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.runtime.validation import check_integer

Made = NGVI | tuple[NGVI, Any]


def train_mixture(
    make: Callable[[int], Made],
    loader: Iterable[Any],
    epochs: int,
    seeds: int | Iterable[int] = 5,
    *,
    finished: dict[int, NGVI] | None = None,
    progress: bool = True,
) -> MixtureGuide:
    """Train a guide from each of several seeds, and mix them.

    Args:
        make: seed -> (ngvi, schedule), or the `NGVI` alone: a new network, model and guide. The
            schedule, or None, is stepped after each batch.
        loader: batches, to be gone through once an epoch: tuples of the model's arguments, mappings
            of its keyword arguments, or a tensor.
        epochs: of each component.
        seeds: M for 0 ... M-1, or the seeds themselves. Torch's generators are seeded for each run,
            `make` and the order of the data included, and put back afterwards.
        finished: {seed: ngvi} of the components that are done, filled as they come. What is in it
            at the start is not trained again, so after an error or an interruption a second call
            with the same dict goes on with the component that was not finished.
        progress: one bar for all, if tqdm is installed.

    Returns:
        The guides of `seeds`, in their order, as a `MixtureGuide`; the model of any of them goes
        with it in `Predictive`.

    Raises:
        TypeError: `make` gives no NGVI.
        ValueError: no seed, or one twice; an epoch without a batch; before any training, models
            that have parameters or statistics which are no latents (see `MixtureGuide`).

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
    chosen = [*range(seeds)] if isinstance(seeds, int) else [*seeds]
    if not chosen or len({*chosen}) < len(chosen):
        raise ValueError(f"seeds={seeds!r}: one or more are needed, each once")
    check_integer("epochs", epochs, 1)
    done = {} if finished is None else finished
    left = [seed for seed in chosen if seed not in done]
    with _bar(len(left) * epochs, loader, progress) as bar:
        for seed in left:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                done[seed] = _train(make(seed), loader, epochs, bar, seed, len(chosen) > 1)
    return MixtureGuide([done[seed].guide for seed in chosen])


def _train(
    made: Made, loader: Iterable[Any], epochs: int, bar: Any, seed: int, to_be_mixed: bool
) -> NGVI:
    ngvi, schedule = made if isinstance(made, tuple) else (made, None)
    if not isinstance(ngvi, NGVI):
        raise TypeError(f"make: an NGVI, or (NGVI, schedule), is needed, got {type(ngvi).__name__}")
    if to_be_mixed:
        _check_model(ngvi.model)
    for epoch in range(epochs):
        losses = []
        for batch in loader:
            losses.append(_step(ngvi, batch))
            if schedule is not None:
                schedule.step()
            bar.update()
        if not losses:
            raise ValueError(
                f"the loader has no batch in epoch {epoch + 1}: a DataLoader or a list is needed, "
                "which can be gone through again"
            )
        bar.set_postfix(seed=seed, epoch=epoch + 1, loss=sum(losses) / len(losses))
    return ngvi


def _step(ngvi: NGVI, batch: Any) -> float:
    if isinstance(batch, Mapping):
        return ngvi.step(**batch)
    return ngvi.step(*batch) if isinstance(batch, (tuple, list)) else ngvi.step(batch)


def _check_model(model: Any) -> None:
    """Raises ValueError for what training moves beside the latents: no mixture has it."""
    moving = []
    for path, module in named_modules(model).items():
        moving += [f"{path}.{n}" for n, p in module._parameters.items()
                   if p is not None and p.requires_grad]
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            moving.append(f"{path}.running_mean")
    if moving:
        raise ValueError(
            f"training moves {', '.join(moving[:3])}{' ...' if len(moving) > 3 else ''} beside the "
            "latents, and each component would need its own: make latents of the parameters, with "
            '`bayesianize(net, layers=[...])` and `structure={...: "point"}`, do without running '
            "statistics, or train one by one and average the predictions"
        )


class _NoBar:
    """In place of a progress bar."""

    def update(self) -> None:
        """One batch."""

    def set_postfix(self, **values: Any) -> None:
        """What stands beside the bar."""


@contextmanager
def _bar(rounds: int, loader: Any, progress: bool) -> Iterator[Any]:
    """A bar over `rounds` of the loader."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]  # optional, and without stubs
    except ImportError:
        progress = False
    if not progress:
        yield _NoBar()
        return
    total = rounds * len(loader) if hasattr(loader, "__len__") else None
    with tqdm(total=total, unit="batch") as bar:
        yield bar
