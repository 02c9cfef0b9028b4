"""The optimizers under DistributedDataParallel against one process that has all batches.

"wrapped later" and "as a part" are how other libraries' loops do it: the optimizer is made for the
plain network, which `DistributedDataParallel` gets afterwards, alone or in a larger module.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_ngvi_ranks import net, target
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.curvature import Curvature
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

STEPS, ROWS = 3, 16  # of a rank


def train(rank: int | None, size: int, make: str, options: dict[str, Any], loop: str) -> Any:
    """The parameters after some steps of a plain loop, on rows of this rank (None: of all)."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x, y = torch.randn(STEPS, ROWS * size, 2, 4), torch.randint(3, (STEPS, ROWS * size))
    plain = net()
    whole = nn.Sequential(plain) if loop == "as a part" else plain
    wrapped: nn.Module = whole if rank is None else DistributedDataParallel(whole)
    passed = plain if loop in ("wrapped later", "as a part") else wrapped
    if make == "vi":
        optimizer: Any = VIOptimizer(passed, num_data=96, **options)
    else:
        optimizer = SecondOrderOptimizer(passed, **options)
    rows = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    if rank is not None:
        torch.manual_seed(rank + 1)
    before = torch.get_rng_state()
    sampled = optimizer.sampled_params if make == "vi" else nullcontext
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        for a, b in zip(x, y, strict=True):
            step(optimizer, wrapped, sampled, a[rows], b[rows], loop)
    untouched = torch.equal(torch.get_rng_state(), before)
    torch.set_default_dtype(torch.float32)
    states = {
        s.block.name: (s.mean.clone(), s.precision.dense()) for s in optimizer._posterior.blocks
    }
    return {n: p.detach().clone() for n, p in plain.named_parameters()}, states, untouched


def step(optimizer: Any, wrapped: Any, sampled: Any, x: Any, y: Any, loop: str) -> None:
    if loop == "closure":
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(wrapped(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        return
    optimizer.zero_grad()
    parts = [(x, y)]
    if loop == "accumulate":  # the same number of parts, in another order of rows
        half = len(x) // 2
        parts = [(x[:half], y[:half]), (x[half:], y[half:])]
    with sampled():
        for number, (a, b) in enumerate(parts):
            is_last = number == len(parts) - 1
            no_sync = getattr(wrapped, "no_sync", nullcontext)
            with nullcontext() if is_last else no_sync():
                (F.cross_entropy(wrapped(a), b) / len(parts)).backward()
    if loop == "clip":
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 0.01)
    optimizer.step()


def check(ranks: Any, make: str, loop: str = "plain", size: int = 2, **options: Any) -> None:
    options.setdefault("curvature", Curvature("fisher", every=1, batch=None, eigen_every=1))
    expected, states, _ = train(None, size, make, options, loop)
    results = ranks(size).run(train, size, make, options, loop)
    for found, of_found, untouched in results:
        assert untouched
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(found[name], results[0][0][name])
        for name, (mean, precision) in states.items():
            torch.testing.assert_close(of_found[name][0], mean, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(of_found[name][1], precision, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", ["second-order", "vi"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diag", "full", "block"])
def test_structures(ranks: Any, make: str, structure: str) -> None:
    check(ranks, make, structure=structure)


@pytest.mark.parametrize("make", ["second-order", "vi"])
@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_kinds(ranks: Any, make: str, kind: str) -> None:
    check(ranks, make, curvature=Curvature(kind, every=1, batch=None))


def test_noise(ranks: Any) -> None:
    check(ranks, "vi", curvature="noise", structure="diag")


@pytest.mark.parametrize("make", ["second-order", "vi"])
@pytest.mark.parametrize("update", ["natural", "whitened-muon", "muon", "soap"])
def test_updates(ranks: Any, make: str, update: str) -> None:
    # without a prior, Adam divides the rounding errors of a direction without a gradient by theirs
    options = {"weight_decay": 0.01} if make == "second-order" else {}
    check(ranks, make, update=update, **options)


@pytest.mark.parametrize("make", ["second-order", "vi"])
@pytest.mark.parametrize("loop", [
    "closure", "accumulate", "clip", "wrapped later", "as a part",
])
def test_loops(ranks: Any, make: str, loop: str) -> None:
    if loop == "accumulate":
        check(ranks, make, loop, curvature=Curvature("ggn", every=1, batch=None))
    else:
        check(ranks, make, loop)


def alone(rank: int) -> list[str]:
    plain = nn.Linear(3, 2)
    optimizer = SecondOrderOptimizer(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            F.cross_entropy(plain(torch.randn(4, 3)), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
    return [str(warning.message) for warning in caught]


def test_processes_without_the_others_are_told(ranks: Any) -> None:
    for messages in ranks(2).run(alone):
        (message,) = [m for m in messages if "torch.distributed" in m]
        assert "2 processes" in message and "trains alone" in message
