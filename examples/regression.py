"""Regression with uncertainty: learned noise, and bands that widen where there are no data.

    python examples/regression.py                # under a minute; draws regression.png

A small network on 200 noisy points of a curve with a gap; the noise scale is a latent of the model.
"linearized" finds the mode of the log joint by natural gradients and predicts with the network
linearized there. "sampled" trains a posterior by variational inference and predicts with samples of
it. Prints a table and draws both with their bands.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

import pyrocurv
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Laplace, Predictive

NOISE, NUM_DATA, BATCH, LR = 0.2, 200, 32, 0.03
Data = tuple[Tensor, Tensor]  # x [N, 1], y [N]
Bands = tuple[Tensor, Tensor, Tensor]  # mean, standard deviation without and with noise, each [N]


def curve(x: Tensor) -> Tensor:
    return torch.sin(2 * x)


def make_data(seed: int) -> Data:
    """Points on both sides of a gap, in [-2, -0.6] and [0.6, 2]."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(2, (NUM_DATA, 1), generator=generator) * 2 - 1
    x = side * (0.6 + 1.4 * torch.rand(NUM_DATA, 1, generator=generator))
    return x, curve(x.squeeze(-1)) + NOISE * torch.randn(NUM_DATA, generator=generator)


def make_model(seed: int) -> pyrocurv.nn.Regressor:
    """The noise scale is the latent "sigma"; the weights have prior variance 1 / (fan_in + 1)."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    return pyrocurv.nn.Regressor(pyrocurv.nn.bayesianize(net), num_data=NUM_DATA)


def train(name: str, ngvi: NGVI, data: Data, steps: int) -> None:
    x, y = data
    schedule = CosineAnnealingLR(ngvi.optimizer, T_max=steps)
    for _ in trange(steps, desc=name, disable=None):
        rows = torch.randint(len(y), (BATCH,))
        ngvi.step(x[rows], y[rows])
        schedule.step()


def linearized(data: Data, x_new: Tensor, args: argparse.Namespace) -> Bands:
    """The mode of the log joint, then one pass over the data for the curvature there."""
    model = make_model(args.seed)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=LR, curvature="ggn", num_particles=0)  # steps at the mean
    train("linearized", ngvi, data, args.steps)
    laplace = Laplace(model, guide).fit([data])  # takes any loader of batches
    predictive = laplace.predict(x_new)  # a Normal [N], noise included
    sigma = guide.median()["sigma"]
    return predictive.mean, (predictive.variance - sigma**2).sqrt(), predictive.stddev


def sampled(data: Data, x_new: Tensor, args: argparse.Namespace) -> Bands:
    """Samples of the posterior, at a temperature below 1: T = 1 under-fits few data."""
    model = make_model(args.seed)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=LR, curvature="ggn", temperature=args.temperature)
    train("sampled", ngvi, data, args.steps)
    predictive = Predictive(
        model, guide=guide, num_samples=args.samples, return_sites=["_RETURN", "sigma"]
    )
    draws = predictive(x_new)
    means, sigma = draws["_RETURN"], draws["sigma"]  # [samples, N] and one for each sample
    variance = means.var(0)
    return means.mean(0), variance.sqrt(), (variance + sigma.square().mean()).sqrt()


METHODS = {"linearized": linearized, "sampled": sampled}


def print_table(bands: dict[str, Bands], x: Tensor) -> None:
    """Root mean square error, and mean sd without noise: at the data, in the gap and beyond."""
    x = x.squeeze(-1)
    distance = x.abs()
    regions = {"at data": (distance >= 0.6) & (distance <= 2), "in the gap": distance < 0.6,
               "beyond": distance > 2}
    header = "".join(f"{f'error {region}':>18}{'sd':>7}" for region in regions)
    print(f"{'method':<12}{'noise':>8}{header}")
    for name, (mean, sd, sd_with_noise) in bands.items():
        noise = (sd_with_noise.square() - sd.square()).mean().sqrt()
        line = f"{name:<12}{noise:>8.3f}"
        for inside in regions.values():
            error = (mean - curve(x))[inside].square().mean().sqrt()
            line += f"{error:>18.3f}{sd[inside].mean():>7.3f}"
        print(line)


def draw(ax: Axes, title: str, data: Data, x: Tensor, bands: Bands) -> None:
    """The mean, two standard deviations of it and, lighter, of the targets."""
    mean, sd, sd_with_noise = bands
    x = x.squeeze(-1)
    for width, alpha in ((sd_with_noise, 0.15), (sd, 0.3)):
        ax.fill_between(x, mean - 2 * width, mean + 2 * width, alpha=alpha, color="C0", lw=0)
    ax.plot(x, mean, color="C0", label="mean, ± 2 sd without and with noise")
    ax.plot(x, curve(x), color="black", lw=0.8, ls="--", label="truth")
    ax.scatter(*data, s=8, color="C1", label="data")
    ax.set(title=title, ylim=(-2.5, 2.5))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--temperature", type=float, default=0.3, help="of sampled inference")
    add("--samples", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--plot", type=Path, default=Path("regression.png"))
    add("--smoke", action="store_true", help="a few seconds, to check the set-up")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.samples = 100, 8
    data = make_data(args.seed)
    x_new = torch.linspace(-3, 3, 241).unsqueeze(-1)
    with torch.no_grad():
        bands = {name: method(data, x_new, args) for name, method in METHODS.items()}
    print_table(bands, x_new)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for ax, name in zip(figure.subplots(1, 2, sharey=True), bands, strict=True):
        draw(ax, name, data, x_new, bands[name])
    figure.axes[0].legend(fontsize="small")
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
