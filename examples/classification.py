"""Adam against its Bayesian twin, on 1,000 handwritten digits.

    python examples/classification.py            # about a minute; draws classification.png

Both networks are LeNet-5 with the same first weights and batches. Adam finds one value for each
weight. `bayesianize` turns the weights of the twin into random variables with a prior, and `NGVI`
trains their posterior, a Gaussian with one Kronecker-factored precision for each layer; predictions
are averages over its samples. Both learning rates were chosen from four on 1,000 validation images.
Prints the scores on 3,000 test images, mean and standard deviation of five seeds: accuracy,
negative log likelihood (NLL), expected calibration error (ECE), and how well the predictive entropy
tells photographs from digits (AUROC); and draws how reliable the predicted probabilities of the
first seed are.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)
from tqdm import tqdm

import pyrocurv
from mnist_subset import CLASSES, Digits, Labeled, load
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn.networks import LeNet5
from pyrocurv.plots import reliability, uncertain_images

BATCH, ADAM_LR, NGVI_LR = 50, 2e-3, 0.04
COLUMNS = ("accuracy %", "NLL", "ECE %", "AUROC %")


@dataclass(frozen=True)
class Probabilities:
    """What a method predicts, averaged over its samples if it has some."""

    test: Tensor  # [N, classes]
    unseen: Tensor  # [M, classes], images that are not digits


def batches(data: Labeled, epochs: int, seed: int) -> Iterator[Labeled]:
    """The batches of a training run, in a new order each epoch, the same for both methods."""
    x, y = data
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            yield x[rows], y[rows]


def train_adam(data: Digits, epochs: int, seed: int) -> Probabilities:
    torch.manual_seed(seed)
    net = LeNet5()
    optimizer = torch.optim.AdamW(net.parameters(), lr=ADAM_LR)
    steps = epochs * -(-len(data.train[1]) // BATCH)
    schedule = CosineAnnealingLR(optimizer, T_max=steps)
    for x, y in tqdm(batches(data.train, epochs, seed), "Adam", steps, disable=None):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Probabilities(net(data.test[0]).softmax(-1), net(data.unseen).softmax(-1))


def train_ngvi(data: Digits, epochs: int, seed: int, num_samples: int) -> Probabilities:
    torch.manual_seed(seed)
    net = pyrocurv.nn.bayesianize(LeNet5())
    model = pyrocurv.nn.Classifier(net, num_data=len(data.train[1]))
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=NGVI_LR)
    steps = epochs * -(-len(data.train[1]) // BATCH)
    schedule = CosineAnnealingLR(ngvi.optimizer, T_max=steps)
    for x, y in tqdm(batches(data.train, epochs, seed), "NGVI", steps, disable=None):
        ngvi.step(x, y)
        schedule.step()
    predictive = Predictive(model, guide=guide, num_samples=num_samples, return_sites=["_RETURN"])

    def probs(x: Tensor) -> Tensor:
        logits = predictive(x)["_RETURN"]  # [samples, N, classes]
        return logits.softmax(-1).mean(0)

    return Probabilities(probs(data.test[0]), probs(data.unseen))


def scores(probs: Probabilities, classes: Tensor) -> tuple[float, ...]:
    """In the order of `COLUMNS`."""
    entropy = torch.special.entr(torch.cat([probs.test, probs.unseen])).sum(-1)
    is_unseen = torch.arange(len(entropy)) >= len(classes)
    values = (
        100 * multiclass_accuracy(probs.test, classes, CLASSES, average="micro"),
        F.nll_loss(probs.test.clamp(min=1e-12).log(), classes),
        100 * multiclass_calibration_error(probs.test, classes, CLASSES, n_bins=15),
        100 * binary_auroc(entropy / entropy.max(), is_unseen.long()),
    )
    return tuple(value.item() for value in values)


def table(results: dict[str, list[tuple[float, ...]]]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = ["method" + "".join(f"{column:>18}" for column in COLUMNS)]
    for name, runs in results.items():
        spread = [stdev(values) if len(runs) > 1 else 0.0 for values in zip(*runs, strict=True)]
        pairs = zip(map(mean, zip(*runs, strict=True)), spread, strict=True)
        lines.append(f"{name:<6}" + "".join(f"{f'{m:.3f} ± {s:.3f}':>18}" for m, s in pairs))
    return "\n".join(lines)


def draw(path: Path, methods: dict[str, Tensor], images: Tensor, classes: Tensor) -> None:
    """Reliability diagrams, and the images of highest predictive entropy under NGVI."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    for ax, (name, probs) in zip(top.subplots(1, len(methods)), methods.items(), strict=True):
        reliability(probs, classes, ax)
        ax.set_title(f"{name}: {ax.get_title()}")
    bottom.suptitle("NGVI: the images of highest predictive entropy")
    uncertain_images(images, methods["NGVI"], classes, bottom)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, default=Path("classification.png"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    seeds, epochs, num_samples = (1, 1, 4) if args.smoke else (5, 20, 32)
    data = load()
    images, classes = data.test
    results: dict[str, list[tuple[float, ...]]] = {"Adam": [], "NGVI": []}
    for seed in range(seeds):
        found = {
            "Adam": train_adam(data, epochs, seed),
            "NGVI": train_ngvi(data, epochs, seed, num_samples),
        }
        for name, probs in found.items():
            results[name].append(scores(probs, classes))
        if seed == 0:
            draw(args.plot, {name: probs.test for name, probs in found.items()}, images, classes)
    print(table(results))


if __name__ == "__main__":
    main()
