"""Adam against its Bayesian twin, on 400 of scikit-learn's digits.

    python examples/classification.py            # under a minute; draws classification.png

Both networks have the same layers, first weights and batches. Adam finds one value for each weight.
`bayesianize` turns the weights of the twin into random variables with a prior, and `NGVI` trains
their posterior, a Gaussian with one Kronecker-factored precision for each layer; predictions are
averages over its samples. Prints the accuracy, negative log likelihood (NLL) and expected
calibration error (ECE) on 1,000 test images, and draws how reliable the predicted probabilities
are. `benchmarks/classification.py` has more guides, data sets and settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)
from tqdm import tqdm

import pyrocurv
from digits import CLASSES, Labeled, load, make_net
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.plots import reliability, uncertain_images

BATCH, SEED = 50, 0


def make_batches(data: Labeled, epochs: int) -> list[Labeled]:
    """All batches of a training run, in a new order each epoch."""
    x, y = data
    order = torch.Generator().manual_seed(SEED)
    epoch_rows = (torch.randperm(len(y), generator=order).split(BATCH) for _ in range(epochs))
    return [(x[rows], y[rows]) for epoch in epoch_rows for rows in epoch]


def adam_probs(batches: list[Labeled], x_test: Tensor) -> Tensor:
    """Probabilities [N, classes] that a point estimate predicts."""
    torch.manual_seed(SEED)
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = CosineAnnealingLR(optimizer, T_max=len(batches))
    for x, y in tqdm(batches, "Adam", disable=None):  # a bar on terminals only
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return net(x_test).softmax(-1)


def ngvi_probs(batches: list[Labeled], x_test: Tensor, num_data: int, num_samples: int) -> Tensor:
    """Probabilities [N, classes] that a posterior predicts, averaged over its samples."""
    torch.manual_seed(SEED)
    net = pyrocurv.nn.bayesianize(make_net())
    model = pyrocurv.nn.Classifier(net, num_data=num_data)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide)
    schedule = CosineAnnealingLR(ngvi.optimizer, T_max=len(batches))
    for x, y in tqdm(batches, "NGVI", disable=None):
        ngvi.step(x, y)
        schedule.step()
    predictive = Predictive(model, guide=guide, num_samples=num_samples, return_sites=["_RETURN"])
    logits = predictive(x_test)["_RETURN"]  # [samples, N, classes]
    return logits.softmax(-1).mean(0)


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
    train_size, epochs, num_samples = (200, 2, 8) if args.smoke else (400, 100, 32)
    train, (images, classes), _ = load(train_size)
    batches = make_batches(train, epochs)
    methods = {
        "Adam": adam_probs(batches, images),
        "NGVI": ngvi_probs(batches, images, len(train[1]), num_samples),
    }
    print(f"{'method':<8}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
    for name, probs in methods.items():
        accuracy = multiclass_accuracy(probs, classes, CLASSES, average="micro")
        nll = F.nll_loss(probs.clamp(min=1e-12).log(), classes)
        ece = multiclass_calibration_error(probs, classes, CLASSES, n_bins=15)
        print(f"{name:<8}{accuracy:>10.4f}{nll:>10.4f}{ece:>10.4f}")
    draw(args.plot, methods, images, classes)


if __name__ == "__main__":
    main()
