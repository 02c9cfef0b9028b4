"""The curvature as a plain optimizer: SecondOrderOptimizer against Adam and SGD with momentum.

    python examples/second_order.py                              # digits, under a minute
    python examples/second_order.py --dataset fashion-mnist --download

All three train the same network from the same first weights on the same batches, in the same loop.
Prints a table and draws the accuracy over epochs and over seconds, `second_order.png`. On 400
digits they end level; larger sets tell them apart (`benchmarks/second_order.py`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import multiclass_accuracy
from tqdm import tqdm

from data import NAMES, Labelled, Refusal, load
from nets import CLASSES, make_net
from pyrocurv.optim import SecondOrderOptimizer

OPTIMIZERS: dict[str, Callable[[nn.Module, argparse.Namespace], torch.optim.Optimizer]] = {
    "SGD": lambda net, args: torch.optim.SGD(net.parameters(), args.sgd_lr, momentum=0.9),
    "Adam": lambda net, args: torch.optim.Adam(net.parameters(), args.adam_lr),
    "second order": lambda net, args: SecondOrderOptimizer(net, args.lr),
}
# Learning rates: the best of three for each on validation images of the digits, and of four on
# those of Fashion-MNIST (`benchmarks/second_order.py --tune`), which serve the other sets too.
LARGE = dict(epochs=8, batch_size=128, sgd_lr=0.1, adam_lr=8e-3, lr=0.04)
PRESETS = dict.fromkeys(NAMES, LARGE) | {
    "digits": dict(epochs=40, batch_size=50, sgd_lr=0.05, adam_lr=1e-2, lr=0.1)
}
SMOKE = dict(epochs=2, train_size=200)
Curve = list[tuple[float, float]]  # seconds of training and accuracy after each epoch


@torch.no_grad()
def accuracy(net: nn.Module, data: Labelled) -> float:
    """On all images."""
    x, y = data
    net.eval()
    logits = torch.cat([net(rows) for rows in x.split(500)])
    net.train()
    return multiclass_accuracy(logits, y, CLASSES, average="micro").item()


def train(name: str, train: Labelled, held: Labelled, args: argparse.Namespace) -> Curve:
    """The loop is that of any optimizer."""
    torch.manual_seed(args.seed)
    net = make_net(args.dataset, small=False).to(args.device)
    optimizer = OPTIMIZERS[name](net, args)
    x, y = train
    total = args.epochs * ceil(len(y) / args.batch_size)
    schedule = CosineAnnealingLR(optimizer, total)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()

    shuffle = torch.Generator().manual_seed(args.seed)
    seconds, curve = 0.0, []
    with tqdm(desc=name, total=total, disable=None) as bar:
        for _ in range(args.epochs):
            start = time.perf_counter()
            for rows in torch.randperm(len(y), generator=shuffle).split(args.batch_size):
                step(x[rows], y[rows])
                bar.update()
            seconds += time.perf_counter() - start
            curve.append((seconds, accuracy(net, held)))
    return curve


def draw(path: Path, curves: dict[str, Curve]) -> None:
    """Accuracy over epochs and over seconds."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        seconds, scores = zip(*curve, strict=True)
        left.plot(range(1, len(curve) + 1), scores, label=name)
        right.plot(seconds, scores, label=name)
    left.set(xlabel="epochs", ylabel="accuracy")
    right.set_xlabel("seconds of training")
    right.legend()
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="digits")
    add("--data-root", default="data", help="folder of the torchvision data sets")
    add("--download", action="store_true", help="fetch the data set into --data-root first")
    add("--train-size", type=int, help="train on the first so many images")
    add("--epochs", type=int, help="the default depends on the data set, as do the next four")
    add("--batch-size", type=int)
    add("--sgd-lr", type=float)
    add("--adam-lr", type=float)
    add("--lr", type=float, help="of SecondOrderOptimizer")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, default=Path("second_order.png"))
    add("--smoke", action="store_true", help="a few seconds, to see that everything runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name, value in (PRESETS[args.dataset] | (SMOKE if args.smoke else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        data = load(args.dataset, args.data_root, args.download, args.train_size).to(args.device)
    except Refusal as refusal:
        print(f"second_order.py: {refusal}", file=sys.stderr)
        return 2
    curves = {name: train(name, data.train, data.test, args) for name in OPTIMIZERS}
    print(f"{'optimizer':<14}{'accuracy':>10}{'best':>10}{'train s':>10}")
    for name, curve in curves.items():
        best = max(score for _, score in curve)
        print(f"{name:<14}{curve[-1][1]:>10.4f}{best:>10.4f}{curve[-1][0]:>10.1f}")
    draw(args.plot, curves)
    return 0


if __name__ == "__main__":
    sys.exit(main())
