"""A posterior, or an optimizer, on several processes, each with its share of the data.

    torchrun --standalone --nproc_per_node 2 examples/distributed.py    # two on this machine
    torchrun --standalone --nproc_per_node 2 examples/distributed.py --method vi
    python examples/distributed.py                                      # one, by the same code

Trains LeNet-5 on Fashion-MNIST if `--data-root` has its files (FashionMNIST/raw, as torchvision
keeps them), else on made images. Each process reads its rows of a batch by a `DistributedSampler`;
`NGVI` finds the group that `init_process_group` has made, and the optimizers of `pyrocurv.optim`
find `DistributedDataParallel` around the network. With `--checkpoint run.pt` a run goes on where it
stopped, on any number of processes:

    torchrun --standalone --nproc_per_node 2 --max-restarts 1 examples/distributed.py \\
        --checkpoint run.pt

Prints the accuracy and the negative log likelihood (NLL) of the test images after each epoch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

import pyrocurv
from pyrocurv import checkpoint
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn.networks import LeNet5
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

CLASSES, SEED = 10, 0
Labeled = tuple[Tensor, Tensor]  # images [N, 1, 28, 28], classes [N]


class Training(NamedTuple):
    """What a method consists of."""

    step: Callable[[Tensor, Tensor], Any]  # on a batch
    probs: Callable[[Tensor], Tensor]  # [N, classes] of images
    optimizer: torch.optim.Optimizer  # that a schedule is for
    objects: dict[str, Any]  # whose states are a checkpoint


def ngvi(num_data: int, samples: int, device: torch.device) -> Training:
    """The same program as for one process."""
    net = pyrocurv.nn.bayesianize(LeNet5().to(device))
    model = pyrocurv.nn.Classifier(net, num_data=num_data)  # of all processes together
    guide = KFACGuide(model)
    engine = NGVI(model, guide)
    predictive = Predictive(model, guide=guide, num_samples=samples, return_sites=["_RETURN"])
    return Training(
        engine.step, lambda x: predictive(x)["_RETURN"].softmax(-1).mean(0), engine.optimizer,
        {"model": model, "guide": guide, "ngvi": engine},
    )


def second_order(num_data: int, samples: int, device: torch.device) -> Training:
    net = parallel(LeNet5().to(device))
    optimizer = SecondOrderOptimizer(net)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    return Training(
        step, lambda x: net(x).softmax(-1), optimizer, {"net": net, "optimizer": optimizer}
    )


def vi(num_data: int, samples: int, device: torch.device) -> Training:
    net = parallel(LeNet5().to(device))
    optimizer = VIOptimizer(net, num_data=num_data)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    def probs(x: Tensor) -> Tensor:
        return optimizer.predict(x, num_samples=samples).softmax(-1).mean(0)

    return Training(step, probs, optimizer, {"net": net, "optimizer": optimizer})


METHODS = {"ngvi": ngvi, "second-order": second_order, "vi": vi}


# ---- processes ----------------------------------------------------------------------------------


@contextmanager
def process_group() -> Iterator[tuple[int, int, torch.device]]:
    """The rank of this process, their number and its device; `torchrun` has set what it needs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield 0, 1, device
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield dist.get_rank(), dist.get_world_size(), device
    dist.destroy_process_group()


def parallel(net: torch.nn.Module) -> torch.nn.Module:
    return DistributedDataParallel(net) if dist.is_initialized() else net


# ---- data ---------------------------------------------------------------------------------------


def load(root: Path, train_size: int) -> tuple[Labeled, Labeled]:
    """Training and test images, scaled to mean 0 and variance 1."""
    try:
        parts = [FashionMNIST(root, train=train) for train in (True, False)]
        (x, y), test = ((p.data[:, None] / 255, p.targets) for p in parts)
    except RuntimeError:
        (x, y), test = made_images(12_000), made_images(2_000)
    x, y = x[:train_size], y[:train_size]
    mean, std = x.mean(), x.std()
    return ((x - mean) / std, y), ((test[0] - mean) / std, test[1])


def made_images(count: int) -> Labeled:
    """Ten clouds of images, which overlap."""
    generator = torch.Generator().manual_seed(SEED)
    centers = torch.randn(CLASSES, 1, 28, 28, generator=generator)
    generator.manual_seed(count)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return centers[y] / 8 + torch.randn(count, 1, 28, 28, generator=generator), y


# ---- training -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(probs: Callable[[Tensor], Tensor], test: Labeled, rank: int, size: int) -> list[float]:
    """Accuracy and NLL of all test images, of which each process has every `size`-th."""
    sums = torch.zeros(3, dtype=torch.float64, device=test[0].device)
    for x, y in zip(*(part[rank::size].split(500) for part in test), strict=True):
        p = probs(x)
        nll = F.nll_loss(p.clamp(min=1e-12).log(), y, reduction="sum")
        right = (p.argmax(-1) == y).sum()
        sums += torch.stack([right, nll, torch.tensor(len(y)).to(nll)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    right, nll, count = sums.tolist()
    return [right / count, nll / count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="ngvi")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=128, help="images in a step of all processes together")
    add("--samples", type=int, default=16, help="posterior samples for each prediction")
    add("--data-root", type=Path, default=Path("data"), help="folder of FashionMNIST/raw")
    add("--checkpoint", type=Path, help="written after each epoch; a run goes on from it")
    add("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    train_size, test_size = (512, 200) if args.smoke else (12_000, 10_000)
    if args.smoke:
        args.epochs, args.samples = 2, 2
    with process_group() as (rank, size, device):
        torch.manual_seed(SEED)
        (x, y), test = load(args.data_root, train_size)
        test = test[0][:test_size].to(device), test[1][:test_size].to(device)
        data = TensorDataset(x, y)
        sampler = DistributedSampler(data, size, rank, seed=SEED)
        loader = DataLoader(data, args.batch // size, sampler=sampler)
        training = METHODS[args.method](len(data), args.samples, device)
        schedule = CosineAnnealingLR(training.optimizer, T_max=args.epochs * len(loader))
        objects, start = {**training.objects, "schedule": schedule}, 0
        if args.checkpoint and args.checkpoint.exists():
            start = checkpoint.load(args.checkpoint, objects)["epoch"]
        if rank == 0:
            print(f"{args.method}, {size} process{'es' * (size > 1)}, from epoch {start + 1}")
            print(f"{'epoch':>5}{'accuracy':>10}{'NLL':>10}", flush=True)
        for epoch in range(start, args.epochs):
            sampler.set_epoch(epoch)
            for x, y in tqdm(loader, f"epoch {epoch + 1}", disable=None if rank == 0 else True):
                training.step(x.to(device), y.to(device))
                schedule.step()
            accuracy, nll = evaluate(training.probs, test, rank, size)
            if rank == 0:
                print(f"{epoch + 1:>5}{accuracy:>10.4f}{nll:>10.4f}", flush=True)
            if args.checkpoint:
                checkpoint.save(args.checkpoint, {**objects, "epoch": epoch + 1})


if __name__ == "__main__":
    main()
