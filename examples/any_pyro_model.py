"""A Pyro model without a network: logistic regression whose prior scale is a latent too.

    python examples/any_pyro_model.py            # under a minute; draws any_pyro_model.png

One Gaussian over all latents (`FullGuide`) and independent ones (`DiagonalGuide`), both trained by
natural gradients with the Hessian of the log joint, on scikit-learn's breast cancer data. Its 30
standardized features are strongly correlated, and so are their weights under the posterior. Prints
the -ELBO and the widths of the intervals, and draws the weights with their 90 % intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from tqdm import trange

from pyrocurv.guides import DiagonalGuide, FullGuide
from pyrocurv.infer import NGVI, Predictive

GUIDES = {"full": FullGuide, "diagonal": DiagonalGuide}


def model(x: Tensor, y: Tensor | None = None) -> None:
    """Constraints, plates and hierarchical priors are written as for any guide of Pyro's."""
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    weight = pyro.sample("weight", dist.Normal(0.0, scale).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=bias + x @ weight), obs=y)


def load() -> tuple[Tensor, Tensor, list[str]]:
    """Standardized features [N, 30], labels [N] and the names of the features."""
    cancer = load_breast_cancer()
    x = torch.tensor(cancer.data, dtype=torch.float32)
    names = [str(name) for name in cancer.feature_names]
    return (x - x.mean(0)) / x.std(0), torch.tensor(cancer.target, dtype=torch.float32), names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("any_pyro_model.png"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    x, y, names = load()
    figure = Figure(figsize=(8, 6), layout="constrained")
    ax = figure.subplots()
    print(f"{'guide':<10}{'-ELBO':>8}{'scale':>8}{'mean width of 90 %':>20}{'accuracy':>10}")
    for row, (name, make_guide) in enumerate(GUIDES.items()):
        pyro.set_rng_seed(args.seed)
        guide = make_guide(model)
        ngvi = NGVI(model, guide, curvature="hessian")
        for _ in trange(5 if args.smoke else args.steps, desc=name, disable=None):
            ngvi.step(x, y)
        low, median, high = guide.quantiles([0.05, 0.5, 0.95])["weight"]  # [30] each
        draws = Predictive(model, guide=guide, num_samples=100)(x)["obs"]  # [100, N]
        accuracy = (draws.mean(0).round() == y).double().mean()
        print(f"{name:<10}{ngvi.evaluate_loss(x, y):>8.1f}{guide.median()['scale']:>8.3f}"
              f"{(high - low).mean():>20.3f}{accuracy:>10.4f}")
        heights = torch.arange(len(names)) + 0.3 * row
        errors = torch.stack([median - low, high - median])
        ax.errorbar(median, heights, xerr=errors, fmt="o", markersize=3, label=name)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.axvline(0, color="gray", linewidth=0.5)
    ax.set(xlabel="weight, median and 90 %")
    ax.legend()
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
