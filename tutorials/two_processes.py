"""What the tutorial on several processes trains, alone or started twice by torchrun.

    torchrun --standalone --nproc_per_node 2 two_processes.py FOLDER STEPS
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyrocurv
from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI

BATCH, NUM_DATA = 100, 1_000  # of all processes together
UPDATES = ("natural", "auto")  # steps of the mean


def train(rank: int, size: int, steps: int, update: str) -> dict[str, Any]:
    """Losses, the posterior, and the bytes of each step, of this process."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data[:NUM_DATA], dtype=torch.float32)
    x = principal_components(pixels, 20)
    y = torch.tensor(digits.target[:NUM_DATA])
    net = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 10))
    model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(net), num_data=NUM_DATA)
    curvature = Curvature("ggn", batch=None)
    ngvi = NGVI(model, KFACGuide(model), curvature=curvature, update=update)  # finds the group
    shuffle = torch.Generator().manual_seed(1)
    losses, traffic = [], []
    for _ in range(steps):
        rows = torch.randint(NUM_DATA, (BATCH,), generator=shuffle)[rank::size]  # our share
        with counted() as sent:
            losses.append(ngvi.step(x[rows], y[rows]))
        traffic.append(dict(sent))
    posterior = ngvi.guide.posterior
    return {"losses": losses, "traffic": traffic, "mean": posterior.loc.detach(),
            "variance": posterior.precision.inverse_diag().detach()}


def principal_components(x: Tensor, count: int) -> Tensor:
    """[N, count], each of variance 1."""
    x = x - x.mean(0)
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:]
    return (x @ directions) / (x @ directions).std(0)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the bytes that this process passes to collective operations."""
    sent: dict[str, int] = {}

    def counting(name: str, position: int) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[position]
            sent[name] = sent.get(name, 0) + tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    with counting("all_reduce", 0), counting("all_gather", 1), counting("broadcast", 0):
        yield sent


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    runs = {update: train(rank, size, steps, update) for update in UPDATES}
    torch.save(runs, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
