"""A run goes on from a checkpoint on as many ranks as before, and on another number of them."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
import torch.nn.functional as F
from test_ngvi_ranks import net, target
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ExponentialLR

from pyrocurv import checkpoint
from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, EKFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer
from pyrocurv.runtime import sharded_folder

ROWS, STEPS = 12, 4
CURVATURE = Curvature("fisher", every=2, batch=None, eigen_every=2)
MAKES = ["ngvi", "ngvi-diag", "second-order", "vi"]


class Run:
    """A model and what trains it, on this rank's part of each batch."""

    def __init__(self, make: str, rank: int, size: int, **options: Any) -> None:
        torch.manual_seed(rank + 7)  # a new program has other weights, until it has loaded
        network = net()
        if make.startswith("ngvi"):
            pyro.clear_param_store()
            model = Classifier(bayesianize(network), num_data=96)
            guide = (DiagonalGuide if make == "ngvi-diag" else EKFACGuide)(model)
            self.engine: Any = NGVI(model, guide, curvature=CURVATURE)
            self.objects: dict[str, Any] = {"model": model, "guide": guide, "ngvi": self.engine}
            schedule = ExponentialLR(self.engine.optimizer, 0.9)
        else:
            wrapped: nn.Module = DistributedDataParallel(network) if size > 1 else network
            self.net = wrapped
            self.engine = (
                VIOptimizer(wrapped, num_data=96, curvature=CURVATURE, **options)
                if make == "vi" else SecondOrderOptimizer(wrapped, curvature=CURVATURE, **options)
            )
            self.objects = {"net": wrapped, "optimizer": self.engine}
            schedule = ExponentialLR(self.engine, 0.9)
        self.objects["schedule"] = schedule
        self.rows = slice(ROWS * rank // size, ROWS * (rank + 1) // size)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x[self.rows], y[self.rows]
        if isinstance(self.engine, NGVI):
            self.engine.step(x, y)
        else:
            def closure() -> torch.Tensor:
                self.engine.zero_grad()
                loss = F.cross_entropy(self.net(x), y)
                loss.backward()
                return loss

            self.engine.step(closure)
        self.objects["schedule"].step()


def go(
    rank: int, size: int, make: str, start: int, end: int, source: Path | None,
    targets: list[Path],
) -> dict[str, torch.Tensor]:
    """The states after the steps from `start` to `end`."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, ROWS, 2, 4), torch.randint(3, (STEPS, ROWS))
    run = Run(make, rank, size)
    if source is not None:
        assert checkpoint.load(source, run.objects) == {"step": start, "name": "a run"}
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        for step in range(start, end):
            run.step(x[step], y[step])
    for path in targets:
        for _ in range(2):  # in place of the last one
            checkpoint.save(
                path, {**run.objects, "step": end, "name": "a run"}, sharded=not path.suffix
            )
    torch.set_default_dtype(torch.float32)
    states = {
        n: (o.module if isinstance(o, DistributedDataParallel) else o).state_dict()
        for n, o in run.objects.items()
    }
    return {name: x.clone() for name, x in sharded_folder.flatten(states)[1].items()}


def run_on(ranks: Any, size: int, *args: Any) -> list[dict[str, torch.Tensor]]:
    return [go(0, 1, *args)] if size == 1 else ranks(size).run(go, size, *args)


@pytest.mark.parametrize("make, before, after", [
    *((make, 2, 2) for make in MAKES), ("ngvi", 2, 1), ("ngvi", 1, 2), ("ngvi", 2, 3),
    ("second-order", 2, 1), ("second-order", 1, 2), ("vi", 2, 1), ("vi", 2, 3),
])
def test_a_run_goes_on(ranks: Any, make: str, before: int, after: int, tmp_path: Path) -> None:
    file, folder = tmp_path / "run.pt", tmp_path / "run"
    middle = STEPS // 2
    first = run_on(ranks, before, make, 0, middle, None, [file, folder])
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.pt"}
    assert {p.name for p in folder.iterdir()} == {"1", "latest"}
    through = run_on(ranks, before, make, middle, STEPS, file, [])
    if before == 1:  # what a new program loads is what the last one had
        assert equal(through[0], go(0, 1, make, middle, STEPS, folder, []))
    for source in (file, folder) if before == after else (folder,):
        resumed = run_on(ranks, after, make, middle, STEPS, source, [])
        for found in resumed:
            assert equal(found, resumed[0])
            if before == after:
                assert equal(found, through[0])
            for name, value in through[0].items():
                torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-8)
        assert not equal(resumed[0], first[0])


@pytest.mark.parametrize("make", ["ngvi", "vi"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    ranks: Any, make: str, tmp_path: Path
) -> None:
    (seed := tmp_path / "seed.pt", middle := tmp_path / "middle")
    run_on(ranks, 1, make, 0, 1, None, [seed])  # one start for both
    whole = run_on(ranks, 2, make, 1, STEPS, seed, [])
    run_on(ranks, 2, make, 1, 3, seed, [middle])
    for found in run_on(ranks, 2, make, 3, STEPS, middle, []):
        assert equal(found, whole[0])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- in one process -----------------------------------------------------------------------------


def linear(value: float) -> nn.Linear:
    layer = nn.Linear(2, 2)
    nn.init.constant_(layer.weight, value)
    return layer


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_until(event: Callable[..., None], call: str, path: Path, sharded: bool) -> None:
    """A process of its own that does not get beyond a call of the system."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, none of which the child has use for
        child = os.fork()
    if child == 0:
        try:
            with mock.patch.object(os, call, event):
                checkpoint.save(path, {"net": linear(2.0), "epoch": 2}, sharded=sharded)
        except BaseException as error:
            os._exit(3 if isinstance(error, KeyboardInterrupt) else 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    expected = 3 if event is interrupt else -signal.SIGKILL
    assert os.waitstatus_to_exitcode(status) == expected


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("event", [interrupt, kill])
def test_an_interrupted_write_leaves_the_last_one(
    sharded: bool, call: str, event: Callable[..., None], tmp_path: Path
) -> None:
    path, net = tmp_path / "run", linear(0.0)
    checkpoint.save(path, {"net": linear(1.0), "epoch": 1}, sharded=sharded)
    save_until(event, call, path, sharded)
    assert checkpoint.load(path, {"net": net}) == {"epoch": 1}
    assert bool((net.weight == 1).all())
    checkpoint.save(path, {"net": linear(3.0), "epoch": 3}, sharded=sharded)
    assert checkpoint.load(path, {"net": net}) == {"epoch": 3}
    assert len([*(path if sharded else tmp_path).iterdir()]) == 1 + sharded


def test_what_is_no_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    net, other = linear(1.0), nn.Linear(3, 1)
    file, folder = tmp_path / "run.pt", tmp_path / "run"
    checkpoint.save(file, {"net": net, "other": other})
    checkpoint.save(folder, {"net": net, "other": other}, sharded=True)
    for path in (file, folder):
        with pytest.raises(ValueError, match=r"objects are net, and the checkpoint .* net, other"):
            checkpoint.load(path, {"net": net})
        wrong, before = nn.Linear(4, 1), linear(5.0)
        with pytest.raises(RuntimeError, match="size mismatch"):
            checkpoint.load(path, {"net": before, "other": wrong})
        assert bool((before.weight == 5).all())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere", {"net": net})
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        checkpoint.load(tmp_path / "empty", {"net": net})
    file.write_bytes(file.read_bytes()[:200])
    next(folder.glob("*/*.distcp")).unlink()
    for path in (file, folder):
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(path, {"net": net, "other": other})
    with pytest.raises(TypeError, match="sharded=True"):
        checkpoint.save(folder, {"net": net})
    with pytest.raises(TypeError, match="sharded=False"):
        checkpoint.save(file, {"net": net}, sharded=True)
    with pytest.raises(TypeError, match="net has no load_state_dict"):
        checkpoint.load(file, {"net": 3})
