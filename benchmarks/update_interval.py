"""Automatic update intervals against fixed ones: LeNet-5 on all of Fashion-MNIST.

    python benchmarks/update_interval.py --data-root data        # two seeds, about five minutes

K-FAC NGVI by the natural gradient at temperature 0.1, 5 epochs of the first 55,000 training
images in batches of 128, a learning rate that falls to 0 as a cosine, one thread. The last 5,000
training images validate, with 32 samples of the posterior; test images are not read. Reported for
each seed and on average: estimates of a block's curvature summed over the blocks, steps on which
any was taken (each has one backward pass), the share of the training's CPU time that the estimates
took, accuracy and NLL; and how often each block was updated, with its interval at the end. A missed
target fails nothing. The settings of the clock were chosen with seeds 2 and 3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from statistics import mean
from unittest import mock

import pyro
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pyrocurv
from fashion_mnist import BATCH, SAMPLES, Labelled, batches, images, probabilities
from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, layerwise_step
from pyrocurv.nn.networks import LeNet5

TRAIN = 55_000
INTERVALS: tuple[int | str, ...] = (20, "schedule", "auto")
TARGET = "target: auto takes at most 2/3 of the updates of 20, at an NLL at most .01 above its"
DIGITS = {"updates": 0, "passes": 0, "share %": 1, "train s": 1, "accuracy": 2, "NLL": 4}

Result = dict[str, float]


class Spent:
    """How often the curvature was estimated, and the CPU seconds that took."""

    passes, seconds = 0, 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        estimate = layerwise_step.update_curvature

        def timed(*args: object) -> object:
            start = time.process_time()
            updated = estimate(*args)
            self.seconds += time.process_time() - start
            self.passes += 1
            return updated

        with mock.patch.object(layerwise_step, "update_curvature", timed):
            yield


def run(every: int | str, data: Labelled, held_out: Labelled, epochs: int, seed: int
        ) -> tuple[Result, NGVI]:
    """Train, and score the posterior on the held-out images."""
    total = epochs * ceil(len(data[1]) / BATCH)
    torch.manual_seed(seed)
    model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(LeNet5()), num_data=len(data[1]))
    guide = KFACGuide(model)
    ngvi = NGVI(
        model, guide, lr=0.02, temperature=0.1, update="natural",
        curvature=Curvature("fisher", every=every)
    )
    schedule = CosineAnnealingLR(ngvi.optimizer, total)
    predictive = pyro.infer.Predictive(
        model, guide=guide, num_samples=SAMPLES, return_sites=("_RETURN",)
    )
    spent, start = Spent(), time.process_time()
    with spent.watching():
        for x, y in tqdm(batches(data, epochs, seed), f"{every} {seed}", total, disable=None):
            ngvi.step(x, y)
            schedule.step()
    seconds = time.process_time() - start
    torch.manual_seed(seed)  # of the posterior samples
    probs = probabilities(
        lambda x: predictive(x)["_RETURN"].softmax(-1).mean(0), held_out[0], "predict"
    )
    return {
        "updates": float(sum(count for count, _ in ngvi.update_counts().values())),
        "passes": float(spent.passes),
        "share %": 100 * spent.seconds / seconds,
        "train s": seconds,
        "accuracy": 100 * (probs.argmax(-1) == held_out[1]).float().mean().item(),
        "NLL": F.nll_loss(probs.clamp(min=1e-12).log(), held_out[1]).item(),
    }, ngvi


def line(every: int | str, seed: object, values: Result) -> str:
    cells = (f"{value:>10.{DIGITS[key]}f}" for key, value in values.items())
    return f"{every!s:<9}{seed!s:>5}" + "".join(cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-root", default="data", help="folder of FashionMNIST/raw")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--epochs", type=int, default=5)
    add("--train-size", type=int, default=TRAIN, help="the first so many, at most 55,000")
    add("--intervals", nargs="+", default=INTERVALS, type=lambda s: int(s) if s.isdigit() else s)
    args = parser.parse_args(argv)
    if not 1 <= args.train_size <= TRAIN:
        parser.error(f"--train-size: 1 to {TRAIN}, the validation images follow")
    torch.set_num_threads(1)
    torch.empty(31 << 20, dtype=torch.uint8)  # once freed, malloc keeps the memory of each step
    x, y = images(args.data_root, train=True)
    data, held_out = (x[: args.train_size], y[: args.train_size]), (x[TRAIN:], y[TRAIN:])
    print("every     seed" + "".join(f"{column:>10}" for column in DIGITS))
    results: dict[int | str, list[Result]] = {every: [] for every in args.intervals}
    for seed in args.seeds:
        for every, runs in results.items():
            found, ngvi = run(every, data, held_out, args.epochs, seed)
            runs.append(found)
            print(line(every, seed, found))
            print("   ", ", ".join(f"{name} {count} ({interval})" for name, (count, interval)
                                   in ngvi.update_counts().items()), flush=True)
    for every, runs in results.items():
        print(line(every, "mean", {key: mean(one[key] for one in runs) for key in runs[0]}))
    print(TARGET)


if __name__ == "__main__":
    main()
