"""Collectives, assignments and errors."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_run import N, data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer
from pyrocurv.runtime.workers import ALONE, Workers, assign


def collectives(rank: int) -> Any:
    workers = Workers.of("auto")
    a, b = torch.full((2, 3), float(rank)), torch.tensor([rank], dtype=torch.int64)
    summed = workers.sums([a, b, a.double()])
    rows = workers.rows(torch.full((rank, 2), float(rank)))
    results = [torch.zeros(3), torch.zeros(2), torch.zeros(1)]

    def compute(items: Any) -> None:
        for item in items:
            results[item].fill_(10 * item + rank)

    workers.share_out([3.0, 2.0, 1.5], [(x,) for x in results], compute)
    changed = torch.full((2,), float(rank))
    workers.broadcast_([changed], 1)
    torch.manual_seed(5)
    with workers.local_noise(torch.device("cpu")):
        torch.rand(rank)
    return summed, rows, results, changed, workers.broadcast({"rank": rank}), torch.rand(2)


def test_collectives(ranks: Any) -> None:
    for summed, rows, results, changed, value, _ in ranks(3).run(collectives):
        assert [x.dtype for x in summed] == [torch.float32, torch.int64, torch.float64]
        assert all(bool((x == 3).all()) for x in summed)
        assert rows.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert [x[0].item() for x in results] == [0, 11, 22]
        assert changed.tolist() == [1.0, 1.0] and value == {"rank": 0}


def test_one_process_alone() -> None:
    x = torch.ones(2)
    assert ALONE.sums([x])[0] is x and ALONE.rows(x) is x and ALONE.size == 1
    assert Workers.of("auto") is ALONE and Workers.of(None) is ALONE
    with pytest.raises(TypeError, match="process_group=3"):
        Workers.of(3)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_assignments_are_even(size: int) -> None:
    costs = [float(n**3) for n in (400, 256, 256, 120, 84, 10, 10)]
    owners = assign(costs, size)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank)
             for rank in range(size)]
    assert max(loads) <= max(max(costs), 4 / 3 * sum(costs) / size)


def shared(rank: int, kind: str, update: str) -> Any:
    """What share_out was asked for, and the assignment that is printed."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    curvature = Curvature("ggn", every=1, eigen_every=1)
    if kind == "ngvi":
        model = Classifier(bayesianize(plain), num_data=N)
        engine: Any = NGVI(model, KFACGuide(model), curvature=curvature, update=update)
    else:
        wrapped = DistributedDataParallel(plain)
        engine = SecondOrderOptimizer(wrapped, curvature=curvature, update=update)
    share_out, calls = Workers.share_out, []

    def recording(self: Workers, costs: Any, outputs: Any, compute: Any) -> None:
        def own(items: Any) -> None:
            calls.append((len(costs), list(items)))
            compute(items)

        share_out(self, costs, outputs, own)

    with mock.patch.object(Workers, "share_out", recording):
        for step in range(2):
            calls.clear()
            x, y = data(step, 16)
            if kind == "ngvi":
                engine.step(x, y)
            else:
                engine.zero_grad()
                F.cross_entropy(wrapped(x), y).backward()
                engine.step()
    return calls, engine.work_assignment()


@pytest.mark.parametrize("kind", ["ngvi", "second-order"])
@pytest.mark.parametrize("update", ["whitened-muon", "muon", "natural"])
def test_work_is_done_as_it_is_assigned(ranks: Any, kind: str, update: str) -> None:
    results = ranks(2).run(shared, kind, update)
    for rank, (calls, assignment) in enumerate(results):
        wanted = [assignment[name] for name in ("eigendecompositions", "update")]
        for (count, items), owners in zip(calls, filter(None, wanted), strict=True):
            assert count == len(owners)
            assert items == [n for n, owner in enumerate(owners.values()) if owner == rank]
    assert len(results[0][1]["eigendecompositions"]) == 6
    assert len(results[0][1]["update"]) == (0 if update == "natural" else 3)


def test_a_network_in_ddp_is_no_pyro_model(ranks: Any) -> None:
    for message in ranks(2).run(bayesian_ddp):
        assert "net.module" in message


def outsider(rank: int) -> str:
    group = dist.new_group([0, 1])
    dist.barrier()  # none leaves while others still connect
    if rank < 2:
        assert Workers.of(group).size == 2
        return ""
    with pytest.raises(ValueError) as error:
        Workers.of(group)
    return str(error.value)


def test_a_group_without_this_process(ranks: Any) -> None:
    *_, message = ranks(3).run(outsider)
    assert "not in the group" in message


def bayesian_ddp(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        bayesianize(DistributedDataParallel(nn.Linear(2, 2)))
    return str(error.value)


def wrong_sizes(rank: int, case: str) -> str:
    pyro.clear_param_store()
    num_data = {"differ": 32 + rank, "shard": 8}[case]
    model = Classifier(bayesianize(nn.Linear(6, 3)), num_data=num_data)
    engine = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError) as error:
        engine.step(*data(rank, 8))
    return str(error.value)


def test_the_plate_has_the_size_of_all_data(ranks: Any) -> None:
    for message in ranks(2).run(wrong_sizes, "differ"):
        assert "other ranks another number" in message
    for message in ranks(2).run(wrong_sizes, "shard"):
        assert "16 data together, and the plate has 8" in message


def a_loss_that_is_not_finite(rank: int, on_nonfinite: str) -> Any:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = Classifier(bayesianize(nn.Linear(6, 3)), num_data=N)
    engine = NGVI(model, KFACGuide(model), on_nonfinite=on_nonfinite)
    x, y = data(0, 8)
    losses = [engine.step(x, y)]
    for step in range(2):
        bad = x * math.inf if rank == 1 and step == 0 else x
        try:
            losses.append(engine.step(bad, y))
        except FloatingPointError:
            losses.append(None)
    return losses, engine.skipped, dist.get_rank()


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_all_ranks_skip_a_step_that_one_cannot_take(ranks: Any, on_nonfinite: str) -> None:
    first, second = ranks(2).run(a_loss_that_is_not_finite, on_nonfinite)
    assert str(first[:2]) == str(second[:2])
    middle = first[0][1]
    assert middle is None if on_nonfinite == "raise" else math.isnan(middle)
    assert math.isfinite(first[0][2])
