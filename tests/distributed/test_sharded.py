"""Networks that fully_shard has sharded: the optimizers, and refusals elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_ngvi import target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pyrocurv.curvature import Curvature, estimate
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.layers.structure_spec import Diagonal
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

STEPS, ROWS, SIZE = 3, 16, 2  # rows of a rank, ranks


class Scale(nn.Module):
    """A weight that no supported op consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((5,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.rate.exp()


def net(is_traced: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 5), nn.Tanh(),
        *([] if is_traced else [Scale()]), nn.Linear(5, 3, bias=False),
    )


def make(network: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    if kind == "vi":
        return VIOptimizer(network, num_data=96, **options)
    return SecondOrderOptimizer(network, **options)


def whole(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for n, p in network.named_parameters()
    }


def train(rank: int | None, kind: str, options: dict[str, Any], is_traced: bool) -> Any:
    """The parameters after some steps, and sizes of what is kept of each block."""
    torch.set_default_dtype(torch.float64)
    try:
        return run(rank, kind, options, is_traced)
    finally:
        torch.set_default_dtype(torch.float32)


def run(rank: int | None, kind: str, options: dict[str, Any], is_traced: bool) -> Any:
    torch.manual_seed(0)
    x = torch.randn(STEPS, ROWS * SIZE, 2, 4)
    y = torch.randint(3, (STEPS, ROWS * SIZE))
    network = net(is_traced)
    if rank is not None:
        for index in (0, 4):
            fully_shard(network[index])
        fully_shard(network)
    optimizer = make(network, kind, options)
    rows = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    if rank is not None:
        torch.manual_seed(rank + 1)
    before = torch.get_rng_state()
    sampled = optimizer.sampled_params if kind == "vi" else nullcontext
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        for a, b in zip(x, y, strict=True):
            optimizer.zero_grad()
            with sampled():
                F.cross_entropy(network(a[rows]), b[rows]).backward()
            optimizer.step()
            with torch.no_grad():
                network(a[rows])  # which leaves the parameters of the root gathered
    assert torch.equal(torch.get_rng_state(), before)
    optimizer.summary()
    network.zero_grad()
    if rank is not None:
        network.reshard()
    states = {
        s.block.name: (s.precision.dense(), s.momentum.clone()) for s in optimizer._posterior.blocks
    }
    return whole(network), states


def check(ranks: Any, kind: str, is_traced: bool = True, **options: Any) -> None:
    options.setdefault("curvature", Curvature("fisher", every=1, batch=None, eigen_every=1))
    with mock.patch.object(Diagonal, "group", lambda self, layer: layer):  # a block for each
        expected, states = train(None, kind, options, is_traced)
    results = ranks(SIZE).run(train, kind, options, is_traced)
    found: dict[str, Any] = {}
    for parameters, own in results:
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-10, atol=1e-10)
        assert own and not own.keys() & found.keys()
        found |= own
    assert found.keys() == states.keys()
    for name, (precision, momentum) in states.items():
        torch.testing.assert_close(found[name][0], precision, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name][1], momentum, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["second-order", "vi"])
@pytest.mark.parametrize("structure", ["diag", "kfac", "ekfac"])
def test_structures(ranks: Any, kind: str, structure: str) -> None:
    check(ranks, kind, structure=structure)


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def refuse(rank: int) -> dict[str, str]:
    """What a sharded network is told where it is not supported."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fully_shard(net)
    x, y = torch.randn(5, 4), torch.randint(2, (5,))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return net(x)

    latent = Classifier(bayesianize(nn.Linear(4, 2)), num_data=5)
    guide = KFACGuide(latent)
    guide(x, y)
    latent.add_module("features", net)
    distributed = nn.Linear(4, 2)
    distributed.weight = nn.Parameter(
        distribute_tensor(torch.randn(2, 4), init_device_mesh("cpu", (2,)))
    )
    found = {
        "bayesianize": lambda: bayesianize(net),
        "estimate": lambda: estimate(net, x, y),
        "guide": lambda: KFACGuide(model)(x, y),
        "NGVI": lambda: NGVI(latent, guide),
        "Laplace": lambda: Laplace(latent, guide),
        "DTensor": lambda: SecondOrderOptimizer(distributed),
        "DTensor in VI": lambda: VIOptimizer(distributed, num_data=5),
        "DTensor in estimate": lambda: estimate(distributed, x, y),
    }
    return {name: message(run) for name, run in found.items()}


def test_refusals(ranks: Any) -> None:
    for messages in ranks(2).run(refuse):
        for name, text in messages.items():
            expected = "DTensor" if "DTensor" in name else "sharded by fully_shard"
            assert expected in text and "DistributedDataParallel" in text, (name, text)
