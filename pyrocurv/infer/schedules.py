"""The learning rate schedules of `fit`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pyrocurv.runtime.validation import check_choice, shown

Schedule = str | Callable[[Optimizer], LRScheduler] | None


def check_schedule(schedule: Any, warmup: int, batches: int | None) -> None:
    """Raise TypeError or ValueError for a schedule that is none, or lacks the number of steps."""
    if schedule is None:
        return
    if callable(schedule):
        if isinstance(schedule, type) and not issubclass(schedule, LRScheduler):
            raise TypeError(
                f"schedule={schedule.__name__}: 'cosine', None, or a callable (optimizer) -> "
                "scheduler is needed"
            )
        if warmup:
            raise ValueError(
                f"warmup={warmup}: it belongs to 'cosine' and None; a callable schedule has its own"
            )
        return
    others = ", None, or a callable (optimizer) -> scheduler"
    check_choice("schedule", schedule, ("cosine",), others)
    if batches is None:
        raise ValueError(
            "schedule='cosine' needs the number of steps, and the loader has no length: use "
            "schedule=None, or a callable (optimizer) -> scheduler"
        )


def make_schedule(
    schedule: Schedule, warmup: int, total: int | None, optimizer: Optimizer
) -> LRScheduler | None:
    """A scheduler to be stepped after each step; None for a constant learning rate.

    `total` is the number of steps, of a cosine. Raises TypeError for a callable that does not
    return a scheduler.
    """
    if callable(schedule):
        made = schedule(optimizer)
        if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
            raise TypeError(
                "schedule: a callable (optimizer) -> LRScheduler that is stepped after each step "
                f"is needed, it returned {shown(made)}"
            )
        return made
    if schedule is None and not warmup:
        return None
    steps = 1 if schedule is None or total is None else total

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if schedule is None:
            return rising
        done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
        return rising * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)
