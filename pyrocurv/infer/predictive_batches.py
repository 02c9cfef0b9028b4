"""Predictions for the batches of a loader, at the same samples, joined along the axis of the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrocurv.handlers.vectorized import RETURN, RunResults
from pyrocurv.runtime.rng import RandomStream, derived_seed, next_seed

TARGETS = ("y", "label", "labels", "target", "targets")  # keywords that are no inputs


def inputs_of(batch: Any) -> Any:
    """The inputs in a batch: its first element, or of a mapping all but the targets."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in TARGETS}
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("the loader has a batch without an element")
        return (batch[0],)
    return batch


def rows_of(args: Any, kwargs: Any) -> int:
    """The number of data in a batch: the rows of the first tensor that has axes."""
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, Tensor) and x.dim():
            return len(x)
    raise ValueError("the loader has a batch without a tensor among its inputs")


class RepeatedDraws:
    """Draws the same numbers in each pass.

    The first draw is what torch's global generators gave in the first pass. Further ones do not
    depend on what else was drawn in between, the noise of as many data as the batch has.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()  # of the latents that are drawn
        self._first: RandomStream | None = None
        self._seed = 0  # of the further ones
        self._position = 0

    def restart(self) -> None:
        """Begin another pass."""
        self._position = 0

    @contextmanager
    def next(self, device: torch.device) -> Iterator[None]:
        """Draw the next numbers inside."""
        if self._position:
            with RandomStream(derived_seed(self._seed, self._position))(device):
                yield
        elif self._first is None:
            self._first = RandomStream.ahead(device)
            yield
            self._seed = next_seed()
        else:
            with copy.copy(self._first)(device):
                yield
        self._position += 1


Run = Callable[[Any, Any, RepeatedDraws], tuple[dict[str, Tensor], RunResults]]


def join_batches(
    batches: Iterable[tuple[Any, Any]], run: Run, device: torch.device | None,
    after: Callable[[], Any],
) -> dict[str, Tensor]:
    """What `run` returns for the arguments of all batches, on a device; `after` each is called.

    Raises ValueError if there is none, or one whose results cannot be joined with the others.
    """
    joined, draws = JoinedBatches(device), RepeatedDraws()
    for args, kwargs in batches:
        rows = rows_of(args, kwargs)
        draws.restart()
        joined.add(*run(args, kwargs, draws), draws.names, rows)
        after()
    return joined.result()


class JoinedBatches:
    """Results of batches, {site: [S, ...]}, and along which axes they can be joined."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._parts: dict[str, list[Tensor]] = {}
        self._axes: dict[str, list[int]] = {}  # those that have had the batch's size each time

    def add(
        self, values: Mapping[str, Tensor], runs: RunResults, drawn: Container[str], rows: int
    ) -> None:
        """Add the results of a batch of as many rows; `drawn` are the latents of the guide."""
        for name, site in runs.sites.items():
            is_given = name in drawn or site.is_observed or name == RETURN
            if not is_given and rows not in site.shape:
                raise ValueError(
                    f"site {name!r} of shape {tuple(site.shape)} is drawn by the model itself, "
                    "anew for each batch: give samples of it in posterior_samples, or a guide"
                )
        for name, value in values.items():
            site = runs.sites[name]
            first = 1 if name == RETURN else 1 + runs.max_plate_nesting - site.batch_dim
            last = 1 + runs.max_plate_nesting if name in drawn else value.dim()
            axes = [axis for axis in range(first, last) if value.shape[axis] == rows]
            value = value if self._device is None else value.to(self._device)
            if name not in self._parts:
                self._parts[name], self._axes[name] = [value], axes
                continue
            known = self._axes[name]
            self._axes[name] = [axis for axis in known if axis in axes]
            if self._axes[name]:
                self._parts[name].append(value)
            elif known or not torch.equal(value, self._parts[name][0]):
                raise ValueError(
                    f"site {name!r} has shape {tuple(value.shape)} for a batch of {rows} rows: "
                    "which axis is that of the data? Choose other return_sites, or call the "
                    "Predictive on each batch"
                )

    def result(self) -> dict[str, Tensor]:
        """Those of all batches. Raises ValueError if there was none."""
        if not self._parts:
            raise ValueError("the loader gave no data")
        return {
            name: torch.cat(parts, self._axes[name][0]) if self._axes[name] else parts[0]
            for name, parts in self._parts.items()
        }
