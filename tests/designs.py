"""Combinations of parameters for tests: every pair of values, not every product of all."""

from collections.abc import Collection
from typing import Any

Axis = Collection[Any]


def pairs(first: Axis, second: Axis, third: Axis, start: int = 0) -> list[tuple[Any, Any, Any]]:
    """Rows in which each value occurs with every value of the other two axes (a Latin square).

    The third axis may not be longer than the others. Tests with different `start` have different
    rows.
    """
    values = list(third)
    assert len(values) <= min(len(first), len(second))
    return [
        (one, other, values[(i + j + start) % len(values)])
        for i, one in enumerate(first) for j, other in enumerate(second)
    ]


def alternating(first: Axis, second: Axis, start: int = 0) -> list[tuple[Any, Any]]:
    """Each value of the first axis with one of the second, in turn."""
    values = list(second)
    return [(one, values[(i + start) % len(values)]) for i, one in enumerate(first)]
