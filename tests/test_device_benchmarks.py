"""What a step dispatches and where it waits, and the checks of `benchmarks/gpu.py` on a CPU."""

from collections.abc import Callable

import pytest
import torch

import gpu
import step_cost
from pyrocurv.nn.networks import LeNet5

CPU = gpu.Place(torch.device("cpu"), torch.float64, rounding=True)


@pytest.mark.parametrize(("method", "most"), [
    ("kfac", 142), ("ekfac", 142), ("natural", 122), ("diagonal", 57), ("second-order", 108),
    ("vi", 163),
])
def test_operations_of_a_quiet_step_on_lenet(method: str, most: int) -> None:
    """Above those of the forward and backward pass, which are 73 or more with the version of torch;
    Adam has 29 above them, with `foreach=True`.
    """
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    passes, _ = step_cost.count_dispatches(step_cost.plain_step(LeNet5()), x, y)
    count, views = step_cost.count_dispatches(step_cost.make_step(method, LeNet5()), x, y)
    assert 0 < views < count <= passes + most


def test_rows_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--smoke", "--only", "resume, ivon"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 and all(row.endswith("pass") for row in rows)
    assert last == "all checks passed"


def test_a_difference_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here between runs whose data differ by their last bits."""
    monkeypatch.setitem(gpu.TOLERANCE, torch.float64, 0.0)
    assert gpu.main(["--device", "cpu", "--smoke", "--only", "estimate, ggn"]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("make", [gpu.ngvi_step, gpu.second_order_step, gpu.vi_step])
def test_a_quiet_step_in_float64_waits_for_nothing_else(
    make: Callable[[torch.nn.Module], gpu.Step]
) -> None:
    row = gpu.quiet_step("step", make, CPU)
    assert row.passed, row
