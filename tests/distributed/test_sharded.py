"""Networks that fully_shard has sharded: the optimizers, and refusals elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from pyrocurv.curvature import estimate
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer


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
