"""Seconds to an accuracy: SGD with momentum, AdamW, Muon, SOAP and SecondOrderOptimizer.

    python benchmarks/second_order.py --data-root data           # on the test images
    python benchmarks/second_order.py --data-root data --tune    # the grids, on validation images

LeNet-5 on the first 12,000 images of Fashion-MNIST, batches of 128, one thread, 8 epochs over which
the learning rate falls to 0 as a cosine. Every method has a grid of 4 learning rates times 2 weight
decays. `--tune` trains each with seed 2 and prints the accuracy and NLL after the last epoch on the
training images 12,000-15,999, and the time until 88 % of them are right (in half epochs); of those
that need the fewest epochs to there, the one of the highest accuracy at the end runs on the test
images, with seeds 0 and 1. Seconds are CPU time of training alone, evaluation not counted. The
target is 0.6 times the seconds of AdamW, SGD and Muon. A missed target fails nothing. SOAP is that
of pytorch-optimizer, in the extra "peers".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, nan
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

from fashion_mnist import BATCH, VALIDATION, Labelled, batches, images
from nets import CLASSES
from pyrocurv.nn.networks import LeNet5
from pyrocurv.optim import SecondOrderOptimizer
from step_cost import keep_memory

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from matrix_muon import MatrixMuon

EPOCHS, PER_EPOCH = 8, 2  # evaluations
GOAL, TARGET = 0.88, 0.6
Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """How to make its optimizers, the grids, and what `--tune` has chosen."""

    make: Callable[[nn.Module, float, float], Optimizers]
    rates: tuple[float, ...]
    decays: tuple[float, float]
    chosen: tuple[float, float]


def muon(net: nn.Module, lr: float, decay: float) -> Optimizers:
    """Muon for the weights of layers, AdamW for the biases."""
    weights = [p for p in net.parameters() if p.dim() > 1]
    biases = [p for p in net.parameters() if p.dim() == 1]
    return [MatrixMuon(weights, lr=lr, weight_decay=decay), torch.optim.AdamW(biases, lr=3e-3)]


def soap(net: nn.Module, lr: float, decay: float) -> Optimizers:
    from pytorch_optimizer import SOAP

    return [SOAP(net.parameters(), lr=lr, weight_decay=decay, precondition_frequency=10)]


METHODS = {
    "sgd": Method(
        lambda net, lr, decay: [
            torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
        ], (0.02, 0.05, 0.1, 0.2), (0.0, 1e-4), (0.1, 1e-4),
    ),
    "adamw": Method(
        lambda net, lr, decay: [torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)],
        (2e-3, 4e-3, 8e-3, 1.6e-2), (0.01, 0.1), (1.6e-2, 0.1),
    ),
    "muon": Method(muon, (5e-3, 0.01, 0.02, 0.04), (0.0, 0.1), (0.02, 0.0)),
    "soap": Method(soap, (1e-3, 3e-3, 8e-3, 0.02), (0.0, 0.01), (3e-3, 0.01)),
    "second-order": Method(
        lambda net, lr, decay: [SecondOrderOptimizer(net, lr, decoupled_weight_decay=decay)],
        (0.01, 0.02, 0.03, 0.04), (0.1, 0.3), (0.02, 0.1),
    ),
}


@torch.no_grad()
def scores(net: nn.Module, data: Labelled) -> tuple[float, float]:
    """Accuracy and NLL."""
    x, y = data
    logits = torch.cat([net(part) for part in x.split(2000)])
    accuracy = multiclass_accuracy(logits, y, num_classes=CLASSES, average="micro")
    return accuracy.item(), F.cross_entropy(logits, y).item()


@dataclass(frozen=True)
class Score:
    """On held-out images, after some of the training."""

    epoch: float
    accuracy: float
    nll: float
    seconds: float


def run(
    method: Method, lr: float, decay: float, seed: int, train: Labelled, held: Labelled
) -> list[Score]:
    """The scores after each half of an epoch."""
    torch.manual_seed(seed)
    net = LeNet5()
    optimizers = method.make(net, lr, decay)
    each = ceil(len(train[1]) / BATCH)
    parts = [*optimizers, *(CosineAnnealingLR(one, EPOCHS * each) for one in optimizers)]
    due = {round(each * n / PER_EPOCH): n / PER_EPOCH for n in range(1, PER_EPOCH * EPOCHS + 1)}
    seconds, found = 0.0, []

    def step(x: Tensor, y: Tensor) -> None:
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for part in parts:
            part.step()

    steps = tqdm(batches(train, EPOCHS, seed), f"{lr:g} {decay:g}", EPOCHS * each,
                 disable=None, leave=False)
    for number, (x, y) in enumerate(steps, 1):
        start = time.process_time()
        step(x, y)
        seconds += time.process_time() - start
        if number in due:
            found.append(Score(due[number], *scores(net, held), seconds))
    return found


def reached(found: list[Score]) -> Score | None:
    """The first score with the accuracy that is the goal."""
    return next((score for score in found if score.accuracy >= GOAL), None)


def described(found: list[Score]) -> str:
    last, first = found[-1], reached(found)
    text = f"{last.accuracy:8.2%}{last.nll:8.4f}"
    return f"{text}  {'never':>16}" if first is None else (
        f"{text}  epoch {first.epoch:3.1f}{first.seconds:6.1f} s"
    )


def tune(names: Sequence[str], train: Labelled, held: Labelled) -> None:
    """Print the grids."""
    for name in names:
        method = METHODS[name]
        for lr, decay in product(method.rates, method.decays):
            found = run(method, lr, decay, 2, train, held)
            chosen = "  chosen" if method.chosen == (lr, decay) else ""
            print(f"{name:<14}lr {lr:<7g}decay {decay:<7g}{described(found)}{chosen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--tune", action="store_true", help="the grids, on validation images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    x, y = images(args.data_root, train=True)
    train = (x[:12_000], y[:12_000])
    if args.tune:
        tune(args.methods, train, (x[VALIDATION], y[VALIDATION]))
        return
    test = images(args.data_root, train=False)
    print(f"test images: accuracy and NLL after {EPOCHS} epochs, and the way to {GOAL:.0%}")
    for seed in (0, 1):
        times: dict[str, float] = {}
        for name in args.methods:
            method = METHODS[name]
            found = run(method, *method.chosen, seed, train, test)
            first = reached(found)
            times[name] = nan if first is None else first.seconds
            print(f"{name:<14}{seed}  {described(found)}", flush=True)
        if "second-order" in times:
            ratios = {name: times["second-order"] / seconds for name, seconds in times.items()}
            row = "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            print(f"seconds of second-order by those of: {row}  (target {TARGET})", flush=True)


if __name__ == "__main__":
    main()
