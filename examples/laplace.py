"""A posterior for a network that is already trained: the Laplace approximation.

    python examples/laplace.py                   # under a minute

Adam trains a network with the weight decay of a normal prior, so that it ends at a mode of the log
joint. A K-FAC guide then starts at the network's weights, one pass over the data gives the
precision of the posterior, and the evidence chooses the widths of the priors. Predictions are those
of the linearized network, never of samples. For comparison, a second Laplace approximation covers
only the last layer, with a dense matrix. Prints scores on the test images, and the AUROC of the
predictive entropy against images of a kind that was not trained on.

With as few data as these 400 digits, the posterior tells such images apart much better than the
network does, but it is less certain of the test images than it should be.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import (
    binary_auroc,
    multiclass_accuracy,
    multiclass_calibration_error,
)
from tqdm import trange

import pyrocurv
from digits import CLASSES, Digits, Labeled, load, make_net
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import Laplace

BATCH, LR = 50, 1e-2
PRIOR = 0.5  # standard deviation of each weight
Predict = Callable[[Tensor], Tensor]  # images -> probabilities [B, classes]


def train(data: Labeled, epochs: int, seed: int) -> nn.Module:
    """A point estimate; `penalty` is -log p(w) / N up to a constant."""
    torch.manual_seed(seed)
    net = make_net(small=True)
    optimizer = torch.optim.Adam(net.parameters(), LR)
    x, y = data
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * len(y) // BATCH)
    for _ in trange(epochs, desc="Adam", disable=None):
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in net.parameters()) / (2 * PRIOR**2 * len(y))
            (F.cross_entropy(net(x[rows]), y[rows]) + penalty).backward()
            optimizer.step()
            schedule.step()
    return net


def fit_laplace(net: nn.Module, data: Labeled, last_layer: bool) -> Laplace:
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


@torch.no_grad()
def print_scores(name: str, predict: Predict, data: Digits, evidence: str = "") -> None:
    """On the test images; the AUROC is that of the entropy against images of another kind."""
    x, y = data.test
    probs, unseen_probs = (
        torch.cat([predict(part) for part in images.split(250)]) for images in (x, data.unseen)
    )
    entropy = torch.special.entr(torch.cat([probs, unseen_probs])).sum(-1)
    is_unseen = (torch.arange(len(entropy)) >= len(probs)).long()
    scores = (
        multiclass_accuracy(probs, y, CLASSES, average="micro"),
        F.nll_loss(probs.clamp(min=1e-12).log(), y),
        multiclass_calibration_error(probs, y, CLASSES, n_bins=15),
        binary_auroc(entropy, is_unseen),
    )
    print(f"{name:<28}" + "".join(f"{score:>11.4f}" for score in scores) + f"{evidence:>14}")


def print_laplace(name: str, laplace: Laplace, data: Digits) -> None:
    evidence = f"{laplace.log_marginal_likelihood():.0f}"
    print_scores(name, lambda x: laplace.predict(x).probs, data, evidence)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    data = load(200 if args.smoke else 400)
    net = train(data.train, 2 if args.smoke else args.epochs, args.seed).eval()
    print(f"{'method':<28}{'accuracy':>11}{'NLL':>11}{'ECE':>11}{'OOD AUROC':>11}"
          f"{'log evidence':>14}")
    print_scores("Adam", lambda x: net(x).softmax(-1), data)
    for name, last_layer in (("Laplace kfac", False), ("Laplace last layer", True)):
        laplace = fit_laplace(net, data.train, last_layer)
        print_laplace(name, laplace, data)
        laplace.tune_prior()
        print_laplace(f"{name}, tuned", laplace, data)


if __name__ == "__main__":
    main()
