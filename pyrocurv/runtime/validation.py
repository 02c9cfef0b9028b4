"""Checks of values that users pass, and of errors; a bool is not a number."""

from __future__ import annotations

from typing import Any

import torch

# of allocators that raise a plain RuntimeError: torch's on the CPU, the drivers of accelerators
MEMORY_MESSAGES = ("DefaultCPUAllocator", "out of memory")


def is_integer(value: Any, minimum: int) -> bool:
    """Whether a value is an integer of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Whether a value is a number other than NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_integer(name: str, value: Any, minimum: int, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`, or one of `allowed`."""
    if not is_integer(value, minimum):
        _check_allowed(name, value, f"an integer of at least {minimum}", allowed)


def check_positive(name: str, value: Any, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is a positive number, or one of `allowed`."""
    if not (is_number(value) and value > 0):
        _check_allowed(name, value, "a positive number", allowed)


def _check_allowed(name: str, value: Any, kind: str, allowed: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        *first, last = [kind, *map(repr, allowed)]
        options = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"{name}={value!r}: {options} is needed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the host is exhausted.

    Falling back to a slower computation is no remedy then: it fails too, or takes far too long.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)
