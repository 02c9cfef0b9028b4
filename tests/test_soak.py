"""What the benchmark of long runs calls flat."""

from dataclasses import replace

import pytest
import soak

START = soak.Measurement(1e-3, 300.0, 500, 12, 0.5)


@pytest.mark.parametrize(("change", "what"), [
    ({}, []), ({"seconds": 1.04e-3, "memory": 303.0, "eigenvalue": 0.3, "tensors": 499}, []),
    ({"seconds": 1.06e-3}, ["time"]), ({"memory": 310.0}, ["memory"]),
    ({"tensors": 501}, ["tensors"]),
    ({"entries": 16}, ["store"]), ({"eigenvalue": 0.2}, ["eigenvalue"]),
    ({"eigenvalue": float("nan")}, []),
])
def test_what_has_not_stayed_as_it_was(change: dict[str, float], what: list[str]) -> None:
    assert soak.failures(START, replace(START, **change)) == what


def test_a_run_is_compared_by_its_first_and_last_tenth() -> None:
    measured = [replace(START, tensors=number) for number in range(soak.MEASUREMENTS)]
    first, last = soak.tenths(measured)
    assert (first.tensors, last.tensors) == (2, soak.MEASUREMENTS - 3)
    assert "tensors" in soak.row("ngvi", 50, first, last)
