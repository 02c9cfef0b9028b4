"""Checks of values that users pass, and of errors; a bool is not a number."""

from __future__ import annotations

from typing import Any

import torch


def is_integer(value: Any, minimum: int) -> bool:
    """Whether a value is an integer of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def is_number(value: Any) -> bool:
    """Whether a value is a number other than NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def check_integer(name: str, value: Any, minimum: int, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`, or one of `allowed`."""
    if not (is_integer(value, minimum) or _is_among(value, allowed)):
        raise ValueError(_message(name, value, f"an integer of at least {minimum}", allowed))


def check_positive(name: str, value: Any, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is a positive number, or one of `allowed`."""
    if not (is_number(value) and value > 0 or _is_among(value, allowed)):
        raise ValueError(_message(name, value, "a positive number", allowed))


def _is_among(value: Any, allowed: tuple[str | None, ...]) -> bool:
    return (value is None or isinstance(value, str)) and value in allowed


def _message(name: str, value: Any, kind: str, allowed: tuple[str | None, ...]) -> str:
    *first, last = [kind, *map(repr, allowed)]
    options = f"{', '.join(first)} or {last}" if first else last
    return f"{name}={value!r}: {options} is needed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted, on any device; the CPU allocator raises a RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)
