"""A small network against the truth: posteriors of functions, beside 16 chains of HMC.

    python benchmarks/small_bnn.py                                # three data seeds, all methods
    python benchmarks/small_bnn.py --seeds 0 --picture bands.png  # and what they look like

A 1-16-1 tanh network, priors N(0, 2²) in the first layer and N(0, 1) in the second, 60 points of
sin(3x) with a gap between -0.6 and 0.6, noise 0.1, which is known. The chains (1,500 draws of
warm-up, then 4,000, of 20 to 60 leapfrog steps) are compared with each other in function space.
Every method starts at each of four modes that Adam finds from four first weights, and its best ELBO
counts (Laplace: its best log joint). NGVI takes all 60 points a step: `FullGuide` with the Hessian,
the others with Gauss-Newton; their settings were chosen by the ELBO on data seeds 0 and 2.
`AutoMultivariateNormal` is trained by Pyro's SVI and Adam, at a falling learning rate and with a
hundred times the gradient evaluations of "full, briefly", which are 2,000.

Printed, over a grid inside the data, in the gap and outside (2 < |x| < 3): KL(N_HMC || N_method) of
the function's value, the root mean square of the error of its log standard deviation, and the ELBO;
then the aims, for each data seed. The mean of the prediction and the log predictive density
separate these methods little, so nothing is claimed from them. A missed target fails nothing. About
twenty minutes for each data seed.

What a structure is worth depends on the function. `--frequency 1` is a curve that a few units
describe, the prior decides about all others, and the order of the structures is another.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.distributions import Distribution, Normal
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.ops.stats import split_gelman_rubin
from torch import Tensor, nn
from tqdm import tqdm

import pyrocurv
from hmc import hmc
from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, EKFACGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI, Laplace, Predictive

HIDDEN, POINTS, NOISE, SPREADS = 16, 60, 0.1, (2.0, 1.0)
SAMPLES, CHAINS, PARTICLES, COLUMNS = 4000, 16, 8, 5
BLOCK_STEPS, MVN_STEPS = 3000, 25_000
BRIEF = "full, briefly"  # with a hundredth of the gradients of AutoMultivariateNormal
REGIONS = {
    "in": torch.cat([torch.linspace(-2, -0.6, 36), torch.linspace(0.6, 2, 36)]),
    "gap": torch.linspace(-0.6, 0.6, 32)[1:-1],
    "out": torch.cat([torch.linspace(-3, -2, 26)[:-1], torch.linspace(2, 3, 26)[1:]]),
}
SHAPES = {
    "net.0.weight": (HIDDEN, 1), "net.0.bias": (HIDDEN,),
    "net.2.weight": (1, HIDDEN), "net.2.bias": (1,),
}
Values = dict[str, Tensor]
Moments = tuple[Tensor, Tensor]  # mean and standard deviation of the function, [G]


def data(seed: int, frequency: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.empty(POINTS).uniform_(0.6, 2, generator=generator)
    x[: POINTS // 2].neg_()
    y = (frequency * x).sin() + NOISE * torch.randn(POINTS, generator=generator)
    return x.unsqueeze(-1), y


# ---- the truth ----------------------------------------------------------------------------------


def unpacked(at: Tensor) -> list[Tensor]:
    """Both layers' weights and biases for all chains, from [C, 49]."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    return [part.unflatten(-1, shape)
            for part, shape in zip(at.split(sizes, -1), SHAPES.values(), strict=True)]


def functions(at: Tensor, x: Tensor) -> Tensor:
    """[C, N] at the points [N, 1]."""
    w1, b1, w2, b2 = unpacked(at)
    return (w2 @ (w1 @ x.T + b1.unsqueeze(-1)).tanh()).squeeze(-2) + b2


def prior_scales() -> Tensor:
    """Standard deviations [49], in the order of `SHAPES`."""
    return torch.cat([
        torch.full((math.prod(shape),), scale_of(name)) for name, shape in SHAPES.items()
    ])


def scale_of(name: str) -> float:
    """The prior's standard deviation of a site."""
    return SPREADS[name.startswith("net.2")]


def log_joint(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    scale = prior_scales()

    def density(at: Tensor) -> Tensor:
        misfit = ((functions(at, x) - y) / NOISE).square().sum(-1)
        return -(misfit + (at / scale).square().sum(-1)) / 2

    return density


def truth(x: Tensor, y: Tensor, grid: Tensor, draws: int) -> Moments:
    start = 0.5 * torch.randn(CHAINS, sum(math.prod(shape) for shape in SHAPES.values()))
    found = hmc(log_joint(x, y), start, draws, warmup=max(200, 3 * draws // 8),
                leapfrogs=(20, 60), accept=0.83)
    values = functions(found[::4].flatten(0, 1), grid).unflatten(0, (-1, CHAINS))
    worst = float(split_gelman_rubin(values, chain_dim=1, sample_dim=0).max())
    print(f"HMC: {CHAINS} chains of {draws:,} draws, R-hat of the function at most {worst:.3f}")
    return values.flatten(0, 1).mean(0), values.flatten(0, 1).std(0)


# ---- methods ------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def mode(x: Tensor, y: Tensor, seed: int) -> Values:
    """Where Adam ends on the log joint."""
    torch.manual_seed(seed)
    at = torch.cat([p.detach().flatten() for p in network().parameters()]).unsqueeze(0)
    at.requires_grad_()
    optimizer = torch.optim.Adam([at], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3000)
    density = log_joint(x, y)
    for _ in range(3000):
        optimizer.zero_grad()
        (-density(at).sum()).backward()
        optimizer.step()
        schedule.step()
    parts = [part.squeeze(0) for part in unpacked(at.detach())]
    return dict(zip(SHAPES, parts, strict=True))


def model_of(values: Values) -> pyrocurv.nn.Regressor:
    """The network at these weights, as a model."""
    net = network()
    net.load_state_dict({name.removeprefix("net."): value for name, value in values.items()})

    def prior(module: nn.Module, name: str) -> Distribution:
        parameter = getattr(module, name)
        scale = SPREADS[module.out_features == 1]
        return Normal(0.0, scale).expand(parameter.shape).to_event(parameter.dim())

    return pyrocurv.nn.Regressor(pyrocurv.nn.bayesianize(net, prior), POINTS, noise=NOISE)


@dataclass(frozen=True)
class Fit:
    """Functions on the grid, and how good the method finds itself."""

    moments: Moments
    score: float


@torch.no_grad()
def sampled(
    model: Callable[..., Tensor], guide: AutoGuide, loc: Tensor, covariance: Tensor, x: Tensor,
    y: Tensor, grid: Tensor,
) -> Fit:
    """Moments and the ELBO of a Gaussian, from samples of the guide and a KL in closed form."""
    draw = Predictive(model, guide=guide, num_samples=SAMPLES, return_sites=("_RETURN",))
    values = draw(torch.cat([x, grid]))["_RETURN"].flatten(1)
    fitted = Normal(values[:, :POINTS], NOISE).log_prob(y).sum(-1).mean()
    on_grid = values[:, POINTS:]
    scales = prior_scales().double()
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(loc.double(), covariance),
        torch.distributions.MultivariateNormal(torch.zeros_like(scales), scales.square().diag()),
    )
    return Fit((on_grid.mean(0), on_grid.std(0)), float(fitted - kl))


def trained(model: Callable[..., Tensor], guide: StructuredGuide, *data: Tensor) -> Fit:
    posterior = guide.posterior
    root = torch.linalg.cholesky(posterior.precision.dense().detach().double())
    covariance = torch.cholesky_inverse(root)
    return sampled(model, guide, posterior.loc.detach(), covariance, *data)


def ngvi(
    make: type[StructuredGuide], x: Tensor, y: Tensor, grid: Tensor, values: Values
) -> Fit:
    """By Gauss-Newton matrices at 8 samples a step."""
    model = model_of(values)
    guide = make(model)
    engine = NGVI(
        model, guide, lr=0.1, temperature=1.0, update="natural", momentum=0.0, damping=0.0,
        kl_clip=1.0, num_particles=PARTICLES,
        curvature=Curvature("ggn", every=1, eigen_every=1, batch=POINTS, decay=0.95),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(engine.optimizer, T_max=BLOCK_STEPS)
    for _ in range(BLOCK_STEPS):
        engine.step(x, y)
        schedule.step()
    return trained(model, guide, x, y, grid)


def full(
    steps: int, samples: int, lr: float, x: Tensor, y: Tensor, grid: Tensor, values: Values
) -> Fit:
    """One Gaussian by the Hessian of the log joint."""
    model = model_of(values)
    guide = FullGuide(model)
    engine = NGVI(
        model, guide, lr=lr, num_particles=samples, curvature=Curvature("hessian", decay=0.9)
    )
    for _ in range(steps):
        engine.step(x, y)
    return trained(model, guide, x, y, grid)


def laplace(
    make: type[StructuredGuide], x: Tensor, y: Tensor, grid: Tensor, values: Values
) -> Fit:
    """Linearised."""
    model = model_of(values)
    found = Laplace(model, make(model)).fit([(x, y)]).predict(grid)
    at = torch.cat([value.flatten() for value in values.values()]).unsqueeze(0)
    spread = (found.variance - NOISE**2).clamp(min=1e-12).sqrt()
    return Fit((found.mean, spread), float(log_joint(x, y)(at)))


def batched(x: Tensor, y: Tensor | None = None) -> Tensor:
    """The same model for Pyro's SVI, all particles at once."""
    parts = [
        pyro.sample(name, Normal(0.0, scale_of(name)).expand(shape).to_event(len(shape)))
        for name, shape in SHAPES.items()
    ]
    w1, b1, w2, b2 = (
        part if part.dim() == len(shape) else part.squeeze(-1 - len(shape))  # the data's plate
        for part, shape in zip(parts, SHAPES.values(), strict=True)
    )
    f = (w2 @ (w1 @ x.T + b1.unsqueeze(-1)).tanh()).squeeze(-2) + b2
    with pyro.plate("data", len(x)):
        pyro.sample("obs", Normal(f, NOISE), obs=y)
    return f


def auto_mvn(x: Tensor, y: Tensor, grid: Tensor, values: Values) -> Fit:
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(
        batched, init_loc_fn=init_to_value(values=values), init_scale=0.02
    )
    schedule = pyro.optim.PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, {
        "optimizer": torch.optim.Adam, "optim_args": {"lr": 3e-3}, "T_max": MVN_STEPS,
    })
    elbo = Trace_ELBO(PARTICLES, max_plate_nesting=1, vectorize_particles=True)
    svi = SVI(batched, guide, schedule, elbo)
    for _ in tqdm(range(MVN_STEPS), "AutoMultivariateNormal", disable=None, leave=False):
        svi.step(x, y)
        schedule.step()
    q = guide.get_posterior()
    return sampled(
        batched, guide, q.loc.detach(), q.covariance_matrix.detach().double(), x, y, grid
    )


METHODS: dict[str, Callable[..., Fit]] = {
    "full": partial(full, 2000, 8, 0.1),
    BRIEF: partial(full, 500, 4, 0.2),
    "kfac": partial(ngvi, KFACGuide),
    "ekfac": partial(ngvi, EKFACGuide),
    "diagonal": partial(ngvi, DiagonalGuide),
    "laplace full": partial(laplace, FullGuide),
    "laplace kfac": partial(laplace, KFACGuide),
    "laplace diagonal": partial(laplace, DiagonalGuide),
    "AutoMVN, Adam": auto_mvn,
}


# ---- scores -------------------------------------------------------------------------------------

Scores = dict[str, tuple[float, float]]  # of each region: KL, and the error of the log sd


def scores(found: Moments, true: Moments) -> Scores:
    (mean, sd), (true_mean, true_sd) = found, true
    log_ratio = (sd / true_sd).log()
    kl = ((true_sd / sd).square() + ((mean - true_mean) / sd).square() - 1) / 2 + log_ratio
    sizes = [len(points) for points in REGIONS.values()]
    return {
        name: (float(a.mean()), float(b.square().mean().sqrt()))
        for name, a, b in zip(REGIONS, kl.split(sizes), log_ratio.split(sizes), strict=True)
    }


def aims(fits: dict[str, Fit], by: dict[str, Scores]) -> Iterator[str]:
    """Each with what was found."""
    out = {name: found["out"][0] for name, found in by.items()}
    if {"diagonal", "kfac", "full"} <= out.keys():
        yield f"KL outside, diagonal / kfac {out['diagonal'] / out['kfac']:.1f} (aim above 5)"
        yield f"KL outside, kfac / full {out['kfac'] / out['full']:.1f} (aim above 2)"
        yield f"error of log sd in the gap, kfac {by['kfac']['gap'][1]:.2f} (aim at most .45)"
    if "laplace full" in by:
        yield f"and inside, laplace full {by['laplace full']['in'][1]:.2f} (aim at most .1)"
    if {BRIEF, "AutoMVN, Adam"} <= fits.keys():
        yield (f"ELBO, {BRIEF} {fits[BRIEF].score:.1f}, AutoMVN with 100 times the gradients "
               f"{fits['AutoMVN, Adam'].score:.1f} (aim: below)")


def draw_bands(path: Path, x: Tensor, y: Tensor, grid: Tensor, moments: dict[str, Moments]) -> None:
    """Means and two standard deviations, side by side; dashed the truth's, which comes first."""
    rows = math.ceil(len(moments) / COLUMNS)
    columns = math.ceil(len(moments) / rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.4 * columns, 2 * rows), sharex=True, sharey=True, squeeze=False
    )
    points, order = grid.squeeze(-1), grid.squeeze(-1).argsort()
    (true_mean, true_sd), *_ = moments.values()
    for axis, (name, (mean, sd)) in zip(axes.flat, moments.items(), strict=False):
        low, high = ((mean + sign * 2 * sd)[order].detach() for sign in (-1, 1))
        axis.fill_between(points[order], low, high, alpha=0.3)
        axis.plot(points[order], mean[order].detach())
        for sign in (-1, 1):
            edge = (true_mean + sign * 2 * true_sd)[order].detach()
            axis.plot(points[order], edge, "--", color="gray", linewidth=0.8)
        axis.scatter(x.squeeze(-1), y, s=4, color="black")
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-3, 3)
    for axis in axes.flat[len(moments):]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the data")
    add("--frequency", type=float, default=3.0, help="f in y = sin(f x)")
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    add("--restarts", type=int, default=4)
    add("--draws", type=int, default=4000, help="of each chain")
    add("--picture", type=Path, help="where to draw the bands of the last seed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    grid = torch.cat([*REGIONS.values()]).unsqueeze(-1)
    for seed in args.seeds:
        x, y = data(seed, args.frequency)
        torch.manual_seed(seed)
        print(f"data seed {seed}")
        true = truth(x, y, grid, args.draws)
        modes = [mode(x, y, 100 * seed + number) for number in range(args.restarts)]
        fits: dict[str, Fit] = {}
        head = "".join(f"{f'KL {region}':>9}{'log sd':>8}" for region in REGIONS)
        print(f"{'':<18}{head}{'ELBO':>9}")
        for name in args.methods:
            torch.manual_seed(seed)
            fits[name] = max((METHODS[name](x, y, grid, at) for at in modes), key=lambda f: f.score)
            found = scores(fits[name].moments, true)
            row = "".join(f"{kl:>9.2f}{sd:>8.2f}" for kl, sd in found.values())
            print(f"{name:<18}{row}{fits[name].score:>9.1f}", flush=True)
        by = {name: scores(fit.moments, true) for name, fit in fits.items()}
        print(*(f"  {line}" for line in aims(fits, by)), sep="\n", flush=True)
        if args.picture:
            shown = {"HMC": true, **{name: fit.moments for name, fit in fits.items()}}
            draw_bands(args.picture, x, y, grid, shown)


if __name__ == "__main__":
    main()
