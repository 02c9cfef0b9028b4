"""What a pass over a loader needs: its length, its device, the order of its data, a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from pyrocurv.handlers.modules import module_tensors
from pyrocurv.infer.model_run import split_batch
from pyrocurv.runtime.validation import check_flag


def length(loader: Iterable[Any]) -> int | None:
    """The number of batches, if it is known."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # of a DataLoader over an `IterableDataset` without a length
        return None


def check_progress(progress: Any) -> None:
    """Raise TypeError unless it is True, False or None."""
    if progress is not None:
        check_flag("progress", progress)


def progress_bar(progress: bool | None, **options: Any) -> tqdm:
    """A bar of tqdm, on which Pyro depends; with None on a terminal only, with False never."""
    return tqdm(disable=None if progress is None else not progress, **options)


def set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell the samplers of a loader that want to know, as a `DistributedSampler`, the epoch."""
    for sampler in _samplers(loader):
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)


def generators(loader: Iterable[Any]) -> list[torch.Generator]:
    """The generators of its own that a loader draws the order of the data from."""
    owners = [loader, *_samplers(loader)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [*{id(x): x for x in found if isinstance(x, torch.Generator)}.values()]


def _samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler,
             getattr(batch_sampler, "sampler", None)]
    return [*{id(x): x for x in found if x is not None}.values()]


def device_of_model(model: Callable[..., Any], guide: Any = None) -> torch.device | None:
    """The device of the first tensor of a guide or a model; None if they have none."""
    owners = [x for x in (guide, model) if x is not None]
    tensors = (x for owner in owners for x in module_tensors(owner).values())
    return next((x.device for x in tensors), None)


@dataclass(frozen=True, eq=False)
class OnDevice:
    """A loader whose batches are moved to a device."""

    loader: Iterable[Any]
    device: torch.device | None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            args, kwargs = arguments(batch, self.device)
            yield kwargs or args


def arguments(
    batch: Any, device: torch.device | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An item of a loader as the arguments of a model, with their tensors on a device if given."""
    split = split_batch(batch)
    if device is None:
        return split
    return tree_map(
        lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, split
    )
