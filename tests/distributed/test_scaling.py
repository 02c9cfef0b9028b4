"""The bytes that `benchmarks/scaling.py` computes are those that the process group was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.curvature import Curvature
from pyrocurv.guides import BlockGuide, DiagonalGuide, EKFACGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer
from scaling import Shape, Traffic, direction_bytes, estimate_bytes, step_bytes, total

ROWS, BATCH = 20, 32  # of a rank, and of an estimate of all
GUIDES = {"kfac": KFACGuide, "ekfac": EKFACGuide, "diag": DiagonalGuide, "block": BlockGuide}


def net(is_small: bool) -> nn.Module:
    """With truncated factors, positions, groups, norms and batch norm."""
    if is_small:
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 170), nn.ReLU(),
        nn.Linear(170, 3),
    )


class Counter:
    """Bytes that are passed to the collective operations of Python code, DDP's not among them."""

    def __init__(self) -> None:
        self.reduced = self.gathered = self.broadcast = 0

    def wrap(self, name: str, kind: str, argument: int) -> Any:
        original: Callable[..., Any] = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            x = args[argument]
            setattr(self, kind, getattr(self, kind) + x.numel() * x.element_size())
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, counted)

    def of(self, step: Callable[[], Any]) -> Traffic:
        self.reduced = self.gathered = self.broadcast = 0
        with self.wrap("all_reduce", "reduced", 0), self.wrap("all_gather", "gathered", 1), \
                self.wrap("broadcast", "broadcast", 0):
            step()
        return Traffic(self.reduced, self.gathered, self.broadcast)


def measure(
    rank: int, method: str, structure: str, update: str, every: Any, steps: int, is_still: bool
) -> tuple[list[Traffic], list[Shape], int, int]:
    """Bytes of each step, the blocks, and the numbers of weights and tensors without one."""
    torch.manual_seed(0)
    is_small = structure in ("block", "diag") or is_still
    network = net(is_small)
    parameters, spec = [*network.parameters()], Curvature("fisher", every=every, batch=BATCH)
    x, y = torch.randn(ROWS, 1, 6, 6), torch.randint(3, (ROWS,))
    if method == "ngvi":
        pyro.clear_param_store()
        model = Classifier(bayesianize(network), num_data=96)
        guide = GUIDES[structure](model)
        options = {"lr": 1e-9} if is_still else {}
        engine: Any = NGVI(model, guide, curvature=spec, update=update, **options)

        def step() -> None:
            engine.step(x, y)
    else:
        wrapped = DistributedDataParallel(network)
        make: Any = SecondOrderOptimizer if method == "second-order" else VIOptimizer
        sizes = () if method == "second-order" else (96,)
        engine = make(wrapped, *sizes, curvature=spec, structure=structure, update=update)

        def step() -> None:
            engine.zero_grad()
            if method == "vi":
                with engine.sampled_params():
                    F.cross_entropy(wrapped(x), y).backward()
            else:
                F.cross_entropy(wrapped(x), y).backward()
            engine.step()

    counter = Counter()
    with mock.patch("pyrocurv.infer.ngvi.CHECK_EVERY", 10**9), \
            mock.patch("pyrocurv.optim.curvature_optimizer.CHECK_EVERY", 10**9):
        step()  # which also broadcasts the start and compares it
        traffic = [counter.of(step) for _ in range(steps)]
    shapes = [Shape.of(state) for state in engine._posterior.blocks]
    known = sum(shape.size for shape in shapes)
    others = sum(p.numel() for p in parameters) - known
    return traffic, shapes, others, len([*model.parameters()]) if method == "ngvi" else 0


@pytest.mark.parametrize("method, structure, update", [
    ("ngvi", "kfac", "whitened-muon"), ("ngvi", "ekfac", "natural"), ("ngvi", "diag", "natural"),
    ("ngvi", "block", "natural"), ("second-order", "kfac", "natural"),
    ("second-order", "ekfac", "whitened-muon"), ("vi", "kfac", "whitened-muon"),
    ("vi", "diag", "natural"),
])
def test_bytes_are_those_of_the_formula(
    ranks: Any, method: str, structure: str, update: str
) -> None:
    examples = math.ceil(BATCH / 2)
    for traffic, shapes, num_others, others in ranks(2).run(
        measure, method, structure, update, 2, 3, False
    ):
        weights = sum(shape.size for shape in shapes)
        quiet = total(direction_bytes(shape, update) for shape in shapes)
        quiet += step_bytes(method, weights, num_others, others)
        due = quiet + estimate_bytes(shapes, examples, 2, method)
        assert [quiet, due, quiet] == traffic
    assert any(shape.is_truncated for shape in shapes) == (structure in ("kfac", "ekfac"))


def test_automatic_intervals_lower_the_bytes_at_rest(ranks: Any) -> None:
    method, steps = "ngvi", 250
    traffic, shapes, *_ = ranks(2).run(measure, method, "kfac", "natural", "auto", steps, True)[0]
    gradients = step_bytes(method, sum(shape.size for shape in shapes))
    extra = [(found + gradients * -1).total for found in traffic]
    estimates = [index for index, value in enumerate(extra, 1) if value > 0]
    one = estimate_bytes(shapes, BATCH // 2, 2, method, is_auto=True)
    assert all(extra[index - 1] == one.total for index in estimates)  # blocks coincide
    gaps = [b - a for a, b in zip(estimates, estimates[1:], strict=False)]
    assert gaps == sorted(gaps) and gaps[-1] > gaps[0] == 20
    assert sum(extra[-100:]) < sum(extra[:100])
