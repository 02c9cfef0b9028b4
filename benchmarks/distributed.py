"""Throughput of two processes with one thread each against one, on the same global batch.

    python benchmarks/distributed.py                             # LeNet-5, ResNet and GPT
    python benchmarks/distributed.py --nets lenet --rounds 3

`NGVI` with its defaults trains each network for blocks of steps in turns: on two gloo processes
with half of the batch each, and on one, rank 0 alone, with the whole batch while rank 1 waits. The
ratio is the seconds of one process by those of two, the median over the rounds and its range, for
global batches of two sizes. It needs two idle cores; the target is 1.6. A missed target fails
nothing.

The bound is the same ratio for two processes that do not communicate, each alone with half of the
batch at the same time: what the machine and the work that does not shrink with a batch leave.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import pyro.distributions as distributions
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyrocurv
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn.networks import GPT, LeNet5, ResNet

CLASSES, CONTEXT, ALPHABET, TARGET = 10, 64, 96, 1.6
BATCHES = {"lenet": (256, 1024), "resnet": (256, 1024), "gpt": (32, 128)}
NETS: dict[str, Callable[[], nn.Module]] = {"lenet": LeNet5, "resnet": ResNet, "gpt": GPT}


class Tokens(PyroModule):
    """Every token is an example, as in `transformer.py`."""

    def __init__(self, net: nn.Module, sequences: int) -> None:
        super().__init__()
        self.net, self.sequences = net, sequences

    def forward(self, x: Tensor, y: Tensor) -> None:
        logits, rows = self.net(x), torch.arange(len(x))
        with pyro.plate("sequences", self.sequences, subsample=rows, dim=-2):
            with pyro.plate("positions", x.shape[1], dim=-1):
                pyro.sample("next", distributions.Categorical(logits=logits), obs=y)


def make(name: str, group: Any) -> Callable[[Tensor, Tensor], Any]:
    """A step of NGVI, by the processes of a group, or by this one alone."""
    torch.manual_seed(0)
    if name == "gpt":
        net = pyrocurv.nn.bayesianize(GPT(), layers=[nn.Linear])
        model: Any = Tokens(net, 16_000)
    else:
        net = pyrocurv.nn.bayesianize(NETS[name]())
        model = pyrocurv.nn.Classifier(net, num_data=12_800)
    return NGVI(model, KFACGuide(model), process_group=group).step


def batch(name: str, size: int) -> tuple[Tensor, Tensor]:
    if name == "gpt":
        return torch.randint(ALPHABET, (size, CONTEXT)), torch.randint(ALPHABET, (size, CONTEXT))
    return torch.randn(size, 1, 28, 28), torch.randint(CLASSES, (size,))


def seconds(step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step(x, y)
    return time.perf_counter() - start


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    if rank == 0:
        print(f"{'':<8}{'batch':>6}{'ratio':>8}{'range':>16}{'target':>8}{'bound':>8}"
              f"{'ms, one':>10}{'ms, two':>10}")
    for name, size in [(net, size) for net in args.nets for size in BATCHES[net]]:
        torch.manual_seed(1)
        x, y = batch(name, size)
        half = slice(rank * len(x) // 2, (rank + 1) * len(x) // 2)
        together, alone, apart = make(name, "auto"), make(name, None), make(name, None)
        two = partial(seconds, together, x[half], y[half])
        one = partial(seconds, alone, x, y)
        halves = partial(seconds, apart, x[half], y[half])
        rounds = []
        for number in range(args.rounds + 1):
            dist.barrier()
            of_two = two(args.steps)
            dist.barrier()
            of_halves = halves(args.steps)
            dist.barrier()
            of_one = one(args.steps) if rank == 0 else 0.0
            if number:  # the first is a warm-up
                rounds.append((of_one, of_two, of_halves))
        if rank == 0:
            ratios = sorted(a / b for a, b, _ in rounds)
            bound = median(a / c for a, _, c in rounds)
            spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
            ms = [1000 * median(column) / args.steps for column in zip(*rounds, strict=True)]
            print(f"{name:<8}{size:>6}{median(ratios):>8.2f}{spread:>16}{TARGET:>8}{bound:>8.2f}"
                  f"{ms[0]:>10.1f}{ms[1]:>10.1f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=[*NETS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        mp.spawn(measure, (args, folder), nprocs=2)


if __name__ == "__main__":
    main()
