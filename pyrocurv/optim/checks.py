"""Checks of hyperparameters, also of those that a scheduler or the user has changed since."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyrocurv.runtime.validation import check_integer, is_number


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raise ValueError for one of a group that is not finite or out of its range."""
    for name in ("lr", "initial_lr", "damping", "weight_decay"):
        if name in values:
            check_number(name, values[name], "a number from 0", lambda x: x >= 0)
    check_number("momentum", values["momentum"], "a number in [0, 1)", lambda x: 0 <= x < 1)
    if values["kl_clip"] is not None:
        check_number("kl_clip", values["kl_clip"], "a positive number or None", lambda x: x > 0)
    for name, word in (("prior_precision", "fan_in"), ("temperature", "auto")):
        if values.get(name, word) != word:
            what = f"a positive number or {word!r}"
            check_number(name, values[name], what, lambda x: x > 0)


def check_number(name: str, value: Any, what: str, is_valid: Any) -> None:
    """Raise ValueError unless `value` is a finite number, or a tensor of one, and valid."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not (is_number(number) and math.isfinite(number) and is_valid(number)):
        raise ValueError(f"{name}={value!r}: {what} is needed")


def check_run_settings(
    num_data: Any, num_samples: Any, kl_warmup: Any, augmentation: Any
) -> None:
    """Raise ValueError for one that is out of its range."""
    check_integer("num_data", num_data, 1)
    check_integer("num_samples", num_samples, 1)
    check_integer("kl_warmup", kl_warmup, 0)
    check_number("augmentation", augmentation, "a positive number", lambda x: x > 0)


def check_batch_size(batch_size: int, num_data: int, augmentation: float) -> None:
    """Raise ValueError for a batch of more examples than there are."""
    if batch_size > num_data * augmentation:
        raise ValueError(f"num_data={num_data}, but there are {batch_size} in one batch")
