"""What the objects of this package are, in one line, for their `repr`."""

from __future__ import annotations

from typing import Any


def described(owner: Any, *parts: str) -> str:
    """Name(part, part, ...), without parts that are empty."""
    return f"{type(owner).__name__}({', '.join(filter(None, parts))})"


def counted(number: int, unit: str) -> str:
    """1,200 steps; 1 step."""
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def name_of(value: Any) -> str:
    """The name of a model or another callable: its class, or its own if it is a function."""
    own = getattr(value, "__name__", None)
    return own if isinstance(own, str) else type(value).__name__


def word_or(value: Any, other: str) -> str:
    """A word in quotes, and `other` in place of anything longer."""
    return repr(value) if isinstance(value, (str, int, float)) else other
