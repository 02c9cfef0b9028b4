"""Runs of many steps: the same bits on all ranks, samples of each rank, batch norm."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer
from pyrocurv.runtime.workers import Workers

N = 64


class SynchronizedNorm:
    """In place of the CUDA kernels of `nn.SyncBatchNorm`: the same on a CPU."""

    @staticmethod
    def apply(
        x: Tensor, weight: Any, bias: Any, running_mean: Tensor, running_var: Tensor, eps: float,
        momentum: float, group: Any, size: int,
    ) -> Tensor:
        mean = all_reduce(x.mean(0)) / size
        var = all_reduce(x.square().mean(0)) / size - mean.square()
        count = len(x) * size
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * count / (count - 1), momentum)
        return (x - mean) / (var + eps).sqrt()


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _AllReduce.apply(g)


all_reduce = _AllReduce.apply


def net(norm: Any = nn.BatchNorm1d) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 3))


def data(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator)
    return x, x[:, :3].argmax(-1)


def many_steps(rank: int, kind: str, steps: int, options: dict[str, Any]) -> Any:
    torch.manual_seed(rank)  # ranks that nobody has seeded alike
    pyro.clear_param_store()
    plain = nn.Sequential(net(), nn.Dropout(0.1))
    if kind == "ngvi":
        model = Classifier(bayesianize(plain), num_data=N)
        engine: Any = NGVI(model, KFACGuide(model), **options)
    else:
        wrapped = DistributedDataParallel(plain)
        make = VIOptimizer if kind == "vi" else SecondOrderOptimizer
        engine = make(wrapped, **({"num_data": N} if kind == "vi" else {}), **options)
    user = torch.get_rng_state()
    for step in range(steps):
        x, y = data(step * dist.get_world_size() + rank, 8 + 3 * rank)
        if kind == "ngvi":
            engine.step(x, y)
            continue
        engine.zero_grad()
        if kind == "vi":
            with engine.sampled_params():
                F.cross_entropy(wrapped(x), y).backward()
        else:
            F.cross_entropy(wrapped(x), y).backward()
        engine.step()
    if kind == "ngvi":  # dropout of a plain loop draws from it
        assert torch.equal(torch.get_rng_state(), user)
    state = engine.state_dict()
    if kind == "ngvi":
        state["guide"] = engine.guide.state_dict()
        state["buffers"] = {n: b.clone() for n, b in plain.named_buffers()}
    return state, [p.detach().clone() for p in plain.parameters()]


def assert_same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}/{index}")
    elif not (isinstance(a, float) and a != a and b != b):
        assert a == b, path


@pytest.mark.parametrize("kind, steps, options", [
    ("ngvi", 200, {}), ("vi", 200, {}),
    ("ngvi", 60, {"sample_parallel": True}), ("ngvi", 60, {"update": "natural"}),
    ("ngvi", 60, {"curvature": Curvature("fisher", every="auto")}),
    ("vi", 60, {"sample_parallel": True}),
    ("vi", 60, {"curvature": Curvature("ggn", every="auto")}), ("second-order", 60, {}),
])
def test_all_ranks_have_the_same_bits_after_many_steps(
    ranks: Any, kind: str, steps: int, options: dict[str, Any]
) -> None:
    first, second = ranks(2).run(many_steps, kind, steps, options)
    assert_same(first, second)


def normed(rank: int | None, size: int, kind: str) -> Any:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    plain = net(lambda size: nn.BatchNorm1d(size, affine=False))
    if rank is not None:
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    curvature = Curvature("ggn", every=1, batch=None)
    with (
        mock.patch.object(batchnorm, "sync_batch_norm", SynchronizedNorm),
        mock.patch.object(torch._C, "_get_privateuse1_backend_name", lambda: "cpu"),
        mock.patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"),
    ):
        if kind == "ngvi":
            model = Classifier(bayesianize(plain), num_data=N)
            engine: Any = NGVI(model, KFACGuide(model), curvature=curvature)
        else:
            wrapped: nn.Module = plain if rank is None else DistributedDataParallel(plain)
            engine = SecondOrderOptimizer(wrapped, curvature=curvature)
        for step in range(3):
            x, y = data(step, 16 * size)
            rows = slice(None) if rank is None else slice(16 * rank, 16 * (rank + 1))
            if kind == "ngvi":
                engine.step(x[rows].double(), y[rows])
            else:
                engine.zero_grad()
                F.cross_entropy(wrapped(x[rows].double()), y[rows]).backward()
                engine.step()
    torch.set_default_dtype(torch.float32)
    of = engine.guide if kind == "ngvi" else plain
    running = {n: b.clone() for n, b in plain.named_buffers() if "running" in n}
    return {n: p.detach().clone() for n, p in of.named_parameters()}, running


@pytest.mark.parametrize("kind", ["ngvi", "second-order"])
def test_synchronized_batch_norm(ranks: Any, kind: str) -> None:
    expected = normed(None, 2, kind)
    for found in ranks(2).run(normed, 2, kind):
        for one, other in zip(found, expected, strict=True):
            assert one.keys() == other.keys()
            for name, value in other.items():
                torch.testing.assert_close(one[name], value, rtol=1e-10, atol=1e-10)


def two_samples(rank: int | None, kind: str) -> Any:
    """Two antithetic samples on the same rows: of one process, or one of each rank."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    curvature = Curvature("ggn", every=2, batch=None)
    is_rank, count = rank is not None, 1 if rank is not None else 2
    with mock.patch.object(Workers, "noise", lambda *_: nullcontext()):  # that of one process
        if kind == "ngvi":
            model = Classifier(bayesianize(plain), num_data=N)
            engine: Any = NGVI(
                model, KFACGuide(model), curvature=curvature, num_particles=count,
                sample_parallel=is_rank,
            )
        else:
            wrapped = DistributedDataParallel(plain) if is_rank else plain
            engine = VIOptimizer(
                wrapped, N, curvature=curvature, num_samples=count, sample_parallel=is_rank
            )
        for step in range(5):
            x, y = data(step, 16)
            x = x.double()
            if not is_rank:
                x, y = torch.cat([x, x]), torch.cat([y, y])
            if kind == "ngvi":
                engine.step(x, y)
                continue

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                engine.zero_grad()
                loss = F.cross_entropy(wrapped(x), y)
                loss.backward()
                return loss

            engine.step(closure)
    torch.set_default_dtype(torch.float32)
    of = engine.guide if kind == "ngvi" else plain
    return {n: p.detach().clone() for n, p in of.named_parameters()}


@pytest.mark.parametrize("kind", ["ngvi", "vi"])
def test_a_sample_for_each_rank_is_a_mean_over_samples(ranks: Any, kind: str) -> None:
    expected = two_samples(None, kind)
    for found in ranks(2).run(two_samples, kind):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


def noise_of_each_rank(rank: int) -> Any:
    net = DistributedDataParallel(nn.GRU(3, 4))
    optimizer = VIOptimizer(net, N, sample_parallel=True, likelihood="normal")
    messages = []
    for _ in range(2):
        try:
            with optimizer.sampled_params():
                net(torch.randn(5, 2, 3))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_curvature_from_samples_refuses_a_sample_for_each_rank(ranks: Any) -> None:
    for messages in ranks(2).run(noise_of_each_rank):
        assert len(messages) == 1 and "sample_parallel" in messages[0]
