"""A posterior for a network that has been trained already: Laplace, after the fact.

    python examples/laplace.py                              # digits, under a minute
    python examples/laplace.py --dataset fashion-mnist --download

A network is trained by Adam, with the weight decay of a normal prior, so that it ends at a mode of
the log joint. Then a K-FAC guide starts at its weights, one pass over the data gives the precision
of the posterior, and the evidence chooses the widths of the priors. The predictions are those of
the linearised network, never of samples. Beside it a Laplace approximation of the last layer alone,
with a dense matrix. Prints a table of scores on the test images and on images of a kind that nobody
has seen.

Read it as what it is: the posterior knows much better than the network which images it has not
seen, and with as few data as the digits it doubts those it knows more than it should.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)
from tqdm import tqdm

import pyrocurv
from data import NAMES, Labelled, Refusal, load
from nets import CLASSES, make_net
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import Laplace

LARGE = dict(epochs=10, batch_size=128, lr=2e-3)
PRESETS = dict.fromkeys(NAMES, LARGE) | {"digits": dict(epochs=100, batch_size=50, lr=1e-2)}
SMOKE = dict(epochs=2, train_size=200)
PRIOR = 0.5  # standard deviation of each weight
Predict = Callable[[Tensor], Tensor]  # images -> probabilities [B, classes]


def train(data: Labelled, args: argparse.Namespace) -> nn.Module:
    """Nothing Bayesian here; `penalty` is -log p(w) / N but for a constant."""
    torch.manual_seed(args.seed)
    net = make_net(args.dataset, small=args.dataset == "digits").to(args.device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr)
    x, y = data
    schedule = CosineAnnealingLR(optimizer, args.epochs * ceil(len(y) / args.batch_size))
    for _ in tqdm(range(args.epochs), desc="Adam", disable=None):
        for rows in torch.randperm(len(y)).split(args.batch_size):
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in net.parameters()) / (2 * PRIOR**2 * len(y))
            (F.cross_entropy(net(x[rows]), y[rows]) + penalty).backward()
            optimizer.step()
            schedule.step()
    return net


def fitted(net: nn.Module, data: Labelled, last_layer: bool) -> Laplace:
    """One pass over the data; the guide starts at the network's weights."""
    x, y = data
    bayesian = pyrocurv.nn.bayesianize(copy.deepcopy(net), prior=PRIOR)
    model = pyrocurv.nn.Classifier(bayesian, num_data=len(y))
    if last_layer:
        *_, last = (name for name, part in net.named_modules() if isinstance(part, nn.Linear))
        guide = FullGuide(model, structure={f"net.{last}": "full", "*": "frozen"})
    else:
        guide = KFACGuide(model)
    return Laplace(model, guide).fit(zip(x.split(256), y.split(256), strict=True))


def in_parts(predict: Predict, x: Tensor) -> Tensor:
    return torch.cat([predict(rows) for rows in x.split(250)])


def scores(predict: Predict, known: Labelled, unseen: Tensor) -> dict[str, float]:
    """On the test images; AUROC of the entropy against images of another kind."""
    x, y = known
    start = time.perf_counter()
    with torch.no_grad():
        probs, other = in_parts(predict, x), in_parts(predict, unseen)
    seconds = time.perf_counter() - start
    entropies = torch.special.entr(torch.cat([probs, other])).sum(-1)
    is_unseen = (torch.arange(len(entropies), device=entropies.device) >= len(probs)).long()
    tiny = torch.finfo(probs.dtype).tiny
    return {
        "accuracy": multiclass_accuracy(probs, y, CLASSES, average="micro").item(),
        "NLL": F.nll_loss(probs.clamp(min=tiny).log(), y).item(),
        "ECE": multiclass_calibration_error(probs, y, CLASSES, n_bins=15).item(),
        "OOD AUROC": binary_auroc(entropies, is_unseen).item(),
        "predict s": seconds,
    }


def line(name: str, found: dict[str, float], evidence: str = "") -> str:
    values = "".join(f"{value:>11.4f}" for value in found.values())
    return f"{name:<28}{values}{evidence:>14}"


def probabilities(laplace: Laplace, x: Tensor) -> Tensor:
    """Of the linearised prediction, [B, classes]."""
    return laplace.predict(x).probs


def run(args: argparse.Namespace) -> None:
    data = load(args.dataset, args.data_root, args.download, args.train_size).to(args.device)
    net = train(data.train, args).eval()
    columns = ("accuracy", "NLL", "ECE", "OOD AUROC", "predict s")
    print(f"{'method':<28}" + "".join(f"{name:>11}" for name in columns) + f"{'log evidence':>14}")
    print(line("Adam", scores(lambda x: net(x).softmax(-1), data.test, data.unseen)))
    for name, last_layer in (("Laplace kfac", False), ("Laplace last layer", True)):
        laplace = fitted(net, data.train, last_layer)
        for what in ("", ", tuned"):
            if what:
                laplace.tune_prior()
            found = scores(partial(probabilities, laplace), data.test, data.unseen)
            print(line(name + what, found, f"{laplace.log_marginal_likelihood():.0f}"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="digits")
    add("--data-root", default="data", help="folder of the torchvision data sets")
    add("--download", action="store_true", help="fetch the data set into --data-root first")
    add("--train-size", type=int, help="train on the first so many images")
    add("--epochs", type=int, help="the default depends on the data set, as do the next two")
    add("--batch-size", type=int)
    add("--lr", type=float, help="of Adam")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a few seconds, to see that everything runs")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name, value in (PRESETS[args.dataset] | (SMOKE if args.smoke else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except Refusal as refusal:
        print(f"laplace.py: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
