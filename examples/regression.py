"""A regression with its uncertainty: noise learnt, bands that widen where there are no data.

    python examples/regression.py                  # under a minute; draws regression.png

A small network on 200 points of a curve with a gap, targets with noise of a size that it is not
told. First the default path: the mode of the log joint by natural gradients, then the prediction of
the network linearised there. Then sampled variational inference, whose predictions come from
samples of the posterior. Prints a table and draws both with their bands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import pyrocurv
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Laplace

NOISE, NUM_DATA, BATCH = 0.2, 200, 32


def curve(x: Tensor) -> Tensor:
    return torch.sin(2 * x)


def make_data(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Targets at places on both sides of a gap: x [N, 1] in [-2, -0.6] or [0.6, 2], y [N]."""
    generator = torch.Generator().manual_seed(seed)
    side = torch.randint(2, (count, 1), generator=generator) * 2 - 1
    x = side * (0.6 + 1.4 * torch.rand(count, 1, generator=generator))
    return x, curve(x.squeeze(-1)) + NOISE * torch.randn(count, generator=generator)


def make_model(seed: int) -> pyrocurv.nn.Regressor:
    """The noise scale is a latent, the weights have priors of variance 1 / (fan_in + 1)."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    return pyrocurv.nn.Regressor(pyrocurv.nn.bayesianize(net), num_data=NUM_DATA)


def train(name: str, ngvi: NGVI, x: Tensor, y: Tensor, steps: int) -> None:
    schedule = CosineAnnealingLR(ngvi.optimizer, T_max=steps)
    for _ in tqdm(range(steps), desc=name, disable=None):
        rows = torch.randint(len(y), (BATCH,))
        ngvi.step(x[rows], y[rows])
        schedule.step()


Bands = tuple[Tensor, Tensor, Tensor]  # mean, deviation without and with noise, each [N]


def default_path(x: Tensor, y: Tensor, new: Tensor, args: argparse.Namespace) -> Bands:
    """The mode by natural gradients, then the linearised network."""
    model = make_model(args.seed)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=args.lr, curvature="ggn", num_particles=0)
    train("default", ngvi, x, y, args.steps)
    laplace = Laplace(model, guide).fit([(x, y)])  # one pass over all data, in any batches
    predictive = laplace.predict(new)  # a Normal [N], noise included
    sigma = guide.median()["sigma"]
    return predictive.mean, (predictive.variance - sigma**2).sqrt(), predictive.stddev


def sampled(x: Tensor, y: Tensor, new: Tensor, args: argparse.Namespace) -> Bands:
    """Samples of the posterior, at a temperature below 1: T = 1 under-fits few data."""
    model = make_model(args.seed)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=args.lr, curvature="ggn", temperature=args.temperature)
    train("sampled", ngvi, x, y, args.steps)
    predict = pyro.infer.Predictive(
        model, guide=guide, num_samples=args.samples, return_sites=("_RETURN", "sigma")
    )
    draws = predict(new)
    means, sigma = draws["_RETURN"], draws["sigma"].reshape(-1, 1)  # [S, N] and [S, 1]
    spread = means.var(0)
    return means.mean(0), spread.sqrt(), (spread + sigma.square().mean()).sqrt()


PATHS = {"default": default_path, "sampled": sampled}


def table(bands: dict[str, Bands], x: Tensor) -> str:
    """Errors and mean deviations beside the data, in their gap and beyond them."""
    far, x = x.abs(), x.squeeze(-1)
    places = {"at data": (far >= 0.6) & (far <= 2), "in the gap": far < 0.6, "beyond": far > 2}
    lines = [f"{'path':<10}{'noise':>8}" + "".join(
        f"{f'error {place}':>18}{'sd':>7}" for place in places
    )]
    for name, (mean, inner, outer) in bands.items():
        noise = (outer.square() - inner.square()).mean().sqrt()
        line = f"{name:<10}{noise:>8.3f}"
        for inside in places.values():
            rows = inside.squeeze(-1)
            error = (mean - curve(x))[rows].square().mean().sqrt()
            line += f"{error:>18.3f}{inner[rows].mean():>7.3f}"
        lines.append(line)
    return "\n".join(lines)


def draw(ax: Axes, title: str, data: tuple[Tensor, Tensor], x: Tensor, bands: Bands) -> None:
    """The mean, two deviations of it and, lighter, of the targets."""
    mean, inner, outer = bands
    line = x.squeeze(-1)
    for spread, alpha in ((outer, 0.15), (inner, 0.3)):
        ax.fill_between(line, mean - 2 * spread, mean + 2 * spread, alpha=alpha, color="C0", lw=0)
    ax.plot(line, mean, color="C0", label="mean, ± 2 sd without and with noise")
    ax.plot(line, curve(line), color="black", lw=0.8, ls="--", label="truth")
    ax.scatter(*data, s=8, color="C1", label="data")
    ax.set(title=title, ylim=(-2.5, 2.5))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000)
    add("--lr", type=float, default=0.03)
    add("--temperature", type=float, default=0.3, help="of sampled inference")
    add("--samples", type=int, default=100)
    add("--seed", type=int, default=0)
    add("--plot", type=Path, default=Path("regression.png"))
    add("--smoke", action="store_true", help="a few seconds, to see that everything runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.samples = 100, 8
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    x, y = make_data(args.seed, NUM_DATA)
    new = torch.linspace(-3, 3, 241).unsqueeze(-1)
    with torch.no_grad():
        bands = {name: path(x, y, new, args) for name, path in PATHS.items()}
    print(table(bands, new))
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for ax, (name, found) in zip(figure.subplots(1, 2, sharey=True), bands.items(), strict=True):
        draw(ax, name, (x.squeeze(-1), y), new, found)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
