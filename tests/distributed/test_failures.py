"""Ranks that die or drift apart: a clear error, nothing lost, and no process left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import Ranks
from test_checkpoints import ROWS, STEPS, Run, equal
from test_ngvi_ranks import target
from torch.distributed.run import main as torchrun

from pyrocurv import checkpoint
from pyrocurv.runtime import sharded_folder

DIES_IN = 2  # the step


def states(run: Run) -> dict[str, torch.Tensor]:
    owners = {name: getattr(owner, "module", owner) for name, owner in run.objects.items()}
    content = {name: owner.state_dict() for name, owner in owners.items()}
    return {name: x.clone() for name, x in sharded_folder.flatten(content)[1].items()}


def train(
    rank: int, size: int, make: str, path: Path, death: int | None
) -> dict[str, torch.Tensor]:
    """Go on from the checkpoint, if there is one, to the end, or until rank 1 is killed."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, ROWS, 2, 4), torch.randint(3, (STEPS, ROWS))
    run, start = Run(make, rank, size), 0
    if path.exists():
        start = checkpoint.load(path, run.objects)["step"]
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        for step in range(start, STEPS):
            before = states(run)
            if step == death and rank == 1:  # in the middle of the step, when it reduces
                with mock.patch("torch.distributed.all_reduce", kill):
                    run.step(x[step], y[step])
            try:
                run.step(x[step], y[step])
            except RuntimeError:
                assert equal(states(run), before) and step == death
                raise
            checkpoint.save(path, {**run.objects, "step": step + 1})
    torch.set_default_dtype(torch.float32)
    return states(run)


def kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("make", ["ngvi", "vi"])
def test_a_rank_dies_and_the_run_goes_on(ranks: Any, make: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "run.pt"
    torch.set_default_dtype(torch.float64)
    checkpoint.save(whole, {**Run(make, 0, 1).objects, "step": 0})  # one start for both
    torch.set_default_dtype(torch.float32)
    path.write_bytes(whole.read_bytes())
    expected = ranks(2).run(train, 2, make, whole, None)
    with pytest.raises(pytest.fail.Exception, match=r"rank has died") as caught:
        ranks(2).run(train, 2, make, path, DIES_IN)
    message = f"LostProcessError: step {DIES_IN}: rank 0 cannot reach all of the 2 processes: "
    assert message + "a process of the group has died, has left" in str(caught.value)
    at_death = path.read_bytes()
    for found in ranks(2).run(train, 2, make, path, None):
        assert equal(found, expected[0])
    path.write_bytes(at_death)
    found = train(0, 1, make, path, None)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-8)


def drift(rank: int, make: str, name: str, options: dict[str, Any]) -> str:
    """The error after a parameter of rank 1 has changed."""
    torch.manual_seed(0)
    run = Run(make, rank, 2, **options)
    x, y = torch.randn(ROWS, 2, 4), torch.randint(3, (ROWS,))
    with mock.patch("pyrocurv.infer.ngvi.CHECK_EVERY", 2), \
            mock.patch("pyrocurv.optim.curvature_optimizer.CHECK_EVERY", 2):
        run.step(x, y)
        if rank == 1:
            if make == "ngvi":
                families = run.objects["guide"].blocks
                weights = {family.block.name: family.raw_loc for family in families}[name]
            else:
                weights = dict(run.net.module.named_parameters())[name]  # type: ignore[arg-type]
            with torch.no_grad():
                weights.view(-1)[0] += 0.1
        run.step(x, y)
        try:
            run.step(x, y)
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("make, name, reported, options", [
    ("ngvi", "net.4", "net.4", {}),
    ("second-order", "4.weight", "4", {}), ("vi", "4.weight", "4", {}),
    ("second-order", "3.weight", "3.weight", {"structure": {"3": "point"}}),
    ("vi", "3.weight", "3.weight", {"structure": {"3": "point"}}),
])
def test_a_state_that_differs_is_found(
    ranks: Any, make: str, name: str, reported: str, options: dict[str, Any]
) -> None:
    for error in ranks(2).run(drift, make, name, options):
        assert error.startswith("step 2: ") and "of rank 1 differs from rank 0" in error
        assert reported in error.partition(" of rank")[0].removeprefix("step 2: ").split(", ")


# ---- the ranks of these tests -------------------------------------------------------------------


def sleep_or_die(rank: int, how: str) -> None:
    if how == "die" and rank == 1:
        os._exit(1)
    time.sleep(60)


@pytest.mark.parametrize("how", ["sleep", "die"])
def test_no_process_is_left_behind(ranks: Any, how: str) -> None:
    pool: Ranks = ranks(2)
    with pytest.raises(pytest.fail.Exception, match="did not finish"):
        pool.run(sleep_or_die, how, timeout=2)
    assert not any(process.is_alive() for process in pool.processes)


@pytest.fixture
def same_signals() -> Iterator[None]:
    """torchrun has handlers of its own, which a program of its own need not give back."""
    names = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    before = {name: signal.getsignal(name) for name in names}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.usefixtures("same_signals")
def test_torchrun_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    """torchrun in this process, whose ranks come from the server of those of the other tests."""
    script, path = Path(__file__).with_name("killed_once.py"), tmp_path / "run.pt"
    torchrun([
        "--standalone", "--nproc_per_node", "2", "--max-restarts", "1", "--run-path",
        "--start-method", "forkserver", "--redirects", "3", "--log-dir", str(tmp_path / "logs"),
        str(script), "--smoke", "--data-root", str(tmp_path), "--checkpoint", str(path),
    ])
    attempts = sorted((tmp_path / "logs").glob("*/attempt_*"))
    assert [attempt.name for attempt in attempts] == ["attempt_0", "attempt_1"]

    def printed(rank: int) -> list[list[str]]:
        """The words of its lines, without those of gloo, which some versions print."""
        logs = [(attempt / str(rank) / "stdout.log").read_text() for attempt in attempts]
        lines = "".join(logs).splitlines()
        return [line.split() for line in lines if not line.startswith("[Gloo]")]

    lines = printed(0)
    assert [line[-1] for line in lines if line[0] == "ngvi,"] == ["1", "2"]
    assert [line[0] for line in lines] == ["ngvi,", "epoch", "1", "ngvi,", "epoch", "2"]
    assert printed(1) == []
