"""Warnings about the data of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyrocurv.layers.calls import LayerCall, OpCall
from pyrocurv.runtime.user_warnings import warn_user

LARGEST = 50.0  # root mean square of a feature
SMALLEST = 0.1  # root of the mean squared length of an input
MANY_MORE = 1.5  # times the examples of a loader, that N cannot be
MAX_ROWS = 32  # examples that are looked at


@torch.no_grad()
def check_input_scale(calls: Iterable[LayerCall]) -> None:
    """Warn if the data that a network reads are far from unit scale.

    With features of size 1e6, a single one even or an offset, training goes nowhere without an
    error: the damping, the initial curvature and priors of variance 1/fan_in are made for inputs of
    size 1. Only layers that read data are looked at: other inputs have a gradient.
    """
    sizes: dict[str, float] = {}
    for call in calls:
        if isinstance(call, OpCall) and _reads_data(call):
            rows = call.input_rows(min(MAX_ROWS, call.batch_size)).float()
            features = rows.shape[-1] - (call.layer.bias is not None)
            squares = rows[..., :features].square().mean((-3, -2))  # [*lead, I]
            size = float(squares.amax().sqrt())
            if size > LARGEST or 0 < float(squares.sum(-1).amax().sqrt()) < SMALLEST:
                sizes[call.layer.name] = size
    if sizes:
        layers = ", ".join(f"{name} ({size:.0e})" for name, size in sizes.items())
        warn_user(
            f"inputs far from unit scale may not train: the root mean square of the largest "
            f"feature is given for {layers}; standardize the features, (x - mean) / std"
        )


def _reads_data(call: OpCall) -> bool:
    """Whether a layer multiplies floating-point data by its weight."""
    input: Tensor = call.record.input
    is_product = call.layer.orientation in ("out_in", "in_out")
    return is_product and input.is_floating_point() and not input.requires_grad


class DatasetSizeCheck:
    """Warns, once, if N changes from step to step, as without a plate of the full size."""

    def __init__(self) -> None:
        self._sizes: list[float] = []  # two at most

    @property
    def num_data(self) -> float | None:
        """N of the last steps, None before the first."""
        return self._sizes[-1] if self._sizes else None

    def note(self, num_data: float) -> None:
        """N of one step."""
        if num_data in self._sizes or len(self._sizes) > 1:
            return
        if self._sizes:
            warn_user(
                f"the model had {self._sizes[0]:g} data in total, and now has {num_data:g}, of "
                "which the posterior is. A plate gives the total, of which each call has a batch: "
                'pyro.plate("data", N, subsample=torch.arange(len(x)))'
            )
        self._sizes.append(num_data)


def check_num_data(num_data: float | None, loader: Any, has_all_examples: bool = False) -> None:
    """Warn if N is the size of a batch of a `DataLoader`, or the number of batches, `len(loader)`,
    and not the number of its data; or far more than there are, if N is of examples, and not of
    tokens, and this loader `has_all_examples`.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return
    sampler = loader.sampler
    if not isinstance(sampler, Sized):
        return
    try:
        batches, size = len(loader), len(sampler)
    except TypeError:  # a stream of unknown length
        return
    known = len(loader.dataset) if isinstance(loader.dataset, Sized) else size
    if batches > 1 and num_data == loader.batch_size < min(size, known):
        warn_user(
            f"the model has {num_data:g} data in total, which is the size of one batch, of {known} "
            f'data. A plate needs the total, pyro.plate("data", {known}, '
            "subsample=torch.arange(len(x)))"
        )
    elif batches > 1 and num_data == batches < size:
        warn_user(
            f"the model has {num_data:g} data in total, which is the number of batches of the "
            f"loader; the number of data is needed, len(loader.dataset): {size} are drawn an epoch"
        )
    elif has_all_examples and num_data and num_data > MANY_MORE * known:
        warn_user(
            f"num_data={num_data:g}, but the loader has {known} examples: the posterior would be "
            "far too narrow; the number of distinct examples is needed"
        )
