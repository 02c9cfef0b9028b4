"""No network at all: a hierarchical logistic regression whose scale is a latent too.

    python examples/any_pyro_model.py        # some seconds

One Gaussian over all latents (`FullGuide`) and independent ones (`DiagonalGuide`), both by natural
gradients of the Hessian of the log joint, on scikit-learn's breast cancer: 30 standardised features
that say much the same, so that their weights are known together but not apart. Prints the -ELBO and
the widths, and draws the weights with their 90 % intervals, `any_pyro_model.png`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import Predictive
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from tqdm import trange

from pyrocurv.guides import DiagonalGuide, FullGuide
from pyrocurv.infer import NGVI

GUIDES = {"full": FullGuide, "diagonal": DiagonalGuide}


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Any Pyro model: bounds, plates and priors that depend on latents are as Pyro has them."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    weight = pyro.sample("weight", dist.Normal(0.0, scale).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=bias + x @ weight), obs=y)


def data() -> tuple[Tensor, Tensor, list[str]]:
    cancer = load_breast_cancer()
    x = torch.tensor(cancer.data, dtype=torch.float32)
    names = [str(name) for name in cancer.feature_names]
    return (x - x.mean(0)) / x.std(0), torch.tensor(cancer.target, dtype=torch.float32), names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("any_pyro_model.png"))
    parser.add_argument("--smoke", action="store_true", help="to see that everything runs")
    args = parser.parse_args(argv)
    x, y, names = data()
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    print(f"{'guide':<10}{'-ELBO':>8}{'scale':>8}{'mean width of 90 %':>20}{'accuracy':>10}")
    for number, (name, make) in enumerate(GUIDES.items()):
        pyro.set_rng_seed(args.seed)
        guide = make(model)
        ngvi = NGVI(model, guide, curvature="hessian")
        for _ in trange(5 if args.smoke else args.steps, desc=name, disable=None):
            ngvi.step(x, y)
        low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["weight"]
        draws = Predictive(model, guide=guide, num_samples=100)(x)["obs"]
        right = (draws.mean(0).round() == y).double().mean()
        print(f"{name:<10}{ngvi.evaluate_loss(x, y):>8.1f}{guide.median()['scale']:>8.3f}"
              f"{(high - low).mean():>20.3f}{right:>10.4f}")
        places = torch.arange(len(names)) + 0.3 * number
        width = torch.stack([middle - low, high - middle])
        axes.errorbar(middle, places, xerr=width, fmt="o", markersize=3, label=name)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.axvline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="weight, median and 90 %")
    axes.legend()
    figure.savefig(args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
