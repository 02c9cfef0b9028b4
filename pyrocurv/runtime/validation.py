"""Checks of values that users pass, and of errors."""

from __future__ import annotations

from typing import Any

import torch


def check_integer(name: str, value: Any, least: int) -> None:
    """Raises ValueError for what is no whole number from `least`."""
    if not is_integer(value, least):
        raise ValueError(f"{name}={value!r}: a whole number from {least} is needed")


def is_integer(value: Any, least: int) -> bool:
    """Whether a value is an integer, which a bool is not, from `least` on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_positive(name: str, value: Any, *others: Any) -> None:
    """Raises ValueError for what is neither a positive number nor one of the others."""
    if not (any(value is one or value == one for one in others) or is_number(value) and value > 0):
        raise ValueError(f"{name}={value!r}: a positive number is needed")


def is_number(value: Any) -> bool:
    """Whether a value is an int or float that is not NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted, on any device; the CPU allocator raises a RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
