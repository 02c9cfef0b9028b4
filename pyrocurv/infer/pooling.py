"""Losses and gradients over the data of all workers: means, weighted by the examples of each.

A worker's values are for its batch of B of the N data, scaled to all data; Σ_r B_r x_r / Σ_r B_r is
what one process has for the batches of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrocurv.handlers.modules import modules
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.runtime.module_state import float_buffers
from pyrocurv.runtime.workers import Workers


class Pooled(NamedTuple):
    """Values and gradients of all workers, and which part of the data they are from, ΣB/N."""

    values: Sequence[Tensor]
    auxiliary: list[AuxiliaryParameter]
    batch_fraction: float


def pool(
    values: Sequence[Tensor], auxiliary: Sequence[AuxiliaryParameter], batch_fraction: float,
    num_data: float, workers: Workers, model: Callable[..., Any],
) -> Pooled:
    """Communicates one bucket; the buffers of the model's modules are replaced by their means.

    Raises ValueError if the workers do not have the same N, or more examples than that in a step.
    """
    if workers.is_alone:
        return Pooled(values, [*auxiliary], batch_fraction)
    gradients = [
        torch.zeros_like(p.tensor) if p.gradient is None else p.gradient for p in auxiliary
    ]
    has_gradient = [float(p.gradient is not None) for p in auxiliary]
    numbers = values[0].new_tensor([
        batch_fraction, num_data, num_data * num_data, *has_gradient
    ])
    weighted = torch._foreach_mul([*values, *gradients], batch_fraction)
    buffers = float_buffers(modules(model))
    *sums, numbers = workers.sums([*weighted, *buffers, numbers])
    for buffer, total in zip(buffers, sums[len(weighted):], strict=True):
        buffer.copy_(total / workers.size)
    fraction, data, squares, *counts = numbers.tolist()
    _check(fraction, num_data, data, squares, workers)
    means = torch._foreach_div(sums[: len(weighted)], fraction)
    pooled = [
        parameter._replace(gradient=mean if count else None)
        for parameter, mean, count in zip(auxiliary, means[len(values):], counts, strict=True)
    ]
    return Pooled(means[: len(values)], pooled, min(1.0, fraction))


def _check(
    fraction: float, num_data: float, total: float, squares: float, workers: Workers
) -> None:
    if workers.size * squares > total * total * (1 + 1e-5):
        raise ValueError(
            f"rank {workers.rank} has {num_data:g} data in total, and other ranks another number: "
            "give the plate the size of the whole data set on all of them"
        )
    count = round(fraction * num_data)
    if count >= num_data + workers.size:  # a `DistributedSampler` repeats data to have as many
        raise ValueError(
            f"the batches of {workers.size} ranks have {count} data together, and the plate has "
            f"{num_data:g}: give it the size of the whole data set, not of a rank's part of it"
        )
