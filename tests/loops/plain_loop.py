"""The loop that those of other libraries are compared with: same batches, same first weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

N, BATCH, EPOCHS = 32, 8, 2
STEPS = EPOCHS * N // BATCH
MAX_NORM = 0.5  # of gradients; the first ones are longer
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "second-order": lambda net: SecondOrderOptimizer(net, curvature="ggn"),
    "vi": lambda net: VIOptimizer(net, N),
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)
    )


def batches() -> DataLoader:
    return DataLoader(data(), BATCH)


def seeded(make: MakeOptimizer, net: nn.Module) -> torch.optim.Optimizer:
    """Whose random numbers are the same each time."""
    torch.manual_seed(3)
    return make(net)


def schedule(optimizer: torch.optim.Optimizer, steps: int = STEPS) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, steps)


def plain_loop(
    make: MakeOptimizer, accumulate: int = 1, clip: bool = True, is_scheduled: bool = True,
) -> nn.Module:
    """The network after EPOCHS; of several batches in a step each has a sample of its own."""
    net = network()
    optimizer = seeded(make, net)
    falling = schedule(optimizer, STEPS // accumulate)
    is_sampled = isinstance(optimizer, VIOptimizer)  # which takes the mean over the samples
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(batches(), start=1):
            with optimizer.sampled_params() if is_sampled else nullcontext():
                loss = F.cross_entropy(net(x), y)
                (loss if is_sampled else loss / accumulate).backward()
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                if is_scheduled:
                    falling.step()
    return net


def assert_same_weights(net: nn.Module, other: nn.Module) -> None:
    """Bit for bit; and they have moved."""
    start = network()
    for p, q, first in zip(
        net.parameters(), other.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(p, q) and not torch.equal(p, first)
