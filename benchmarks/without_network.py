"""Models without a network: steps and CPU seconds to the posterior, against Adam and NUTS.

    python benchmarks/without_network.py                 # logistic regression, then eight schools
    python benchmarks/without_network.py --seeds 0 --draws 100   # a quick look

Logistic regression is on scikit-learn's breast cancer (569 rows, 30 standardised features, priors
N(0, 1)), against a reference of 64 chains of HMC (`hmc.py`), 1,000 draws each. A method has arrived
when every coordinate's mean is within 0.1 posterior standard deviations and its standard deviation
within 10 % of the reference, at that look and at all later ones; it is looked at after every step
(NGVI), every 20 (`AutoMultivariateNormal` with Adam: 8 particles, learning rate 0.03 that falls to
0 over 1,500 steps) or every 20 draws (Pyro's NUTS, 300 warm-up steps counted in the seconds). Eight
schools (non-centred) have no Gaussian that is their posterior: there the reference is the best
Gaussian, by a run of NGVI on ten times as many steps and samples, and the standard deviation of
log tau by HMC is printed beside its own. Defaults of the library; one thread. Seconds are CPU time,
looks not counted. A missed target fails nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.ops.stats import split_gelman_rubin
from pyro.optim import PyroLRScheduler
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from tqdm import tqdm

from hmc import Density, hmc
from pyrocurv.guides import FullGuide
from pyrocurv.infer import NGVI

STEPS, ADAM_STEPS, WARMUP, NUTS_DRAWS, CHAINS = 250, 1500, 300, 1000, 64
TARGETS = {"logistic regression": "60 steps, a tenth of both others", "eight schools": "250 steps"}
Moments = tuple[Tensor, Tensor]  # means and standard deviations, in unconstrained space
Model = Callable[..., None]


def logistic(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Bernoulli(logits=x @ w + b), obs=y)


def eight_schools(errors: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * theta, errors), obs=y)


def logistic_density(x: Tensor, y: Tensor) -> Density:
    """The log joint of `logistic` up to a constant, of w and b in a row."""
    def density(at: Tensor) -> Tensor:
        logits = at[:, :-1] @ x.T + at[:, -1:]
        misfit = F.binary_cross_entropy_with_logits(logits, y.expand_as(logits), reduction="none")
        return -misfit.sum(-1) - at.square().sum(-1) / 2
    return density


def schools_density(errors: Tensor, y: Tensor) -> Density:
    """And of `eight_schools`, of mu, log tau and the eight theta."""
    def density(at: Tensor) -> Tensor:
        mu, log_tau, theta = at[:, :1], at[:, 1:2], at[:, 2:]
        tau = log_tau.exp()
        residual = (y - mu - tau * theta) / errors
        prior = (mu / 5).square() / 2 + theta.square().sum(-1, keepdim=True) / 2
        heavy = (1 + (tau / 5).square()).log() - log_tau
        return -(residual.square().sum(-1) / 2 + (prior + heavy).squeeze(-1))
    return density


def breast_cancer() -> tuple[Tensor, Tensor]:
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), torch.tensor(data.target, dtype=torch.float32)


def schools() -> tuple[Tensor, Tensor]:
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    return torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]), y


@dataclass
class Look:
    """Where a method is, after so many steps or draws and seconds."""

    count: int
    seconds: float
    moments: Moments


def gaussian(guide: FullGuide) -> Moments:
    posterior = guide.posterior
    return posterior.loc.detach().clone(), posterior.precision.inverse_diag().sqrt().detach()


def ngvi(model: Model, data: tuple[Tensor, Tensor], steps: int, **numbers: Any) -> Iterator[Look]:
    guide = FullGuide(model)
    optimizer = NGVI(model, guide, curvature="hessian", **numbers)
    seconds = 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        optimizer.step(*data)
        seconds += time.process_time() - start
        yield Look(step, seconds, gaussian(guide))


def adam(model: Model, data: tuple[Tensor, Tensor]) -> Iterator[Look]:
    guide = AutoMultivariateNormal(model)
    schedule = PyroLRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, {
        "optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "T_max": ADAM_STEPS,
    })
    svi = SVI(model, guide, schedule, Trace_ELBO(num_particles=8))
    seconds = 0.0
    for step in range(1, ADAM_STEPS + 1):
        start = time.process_time()
        svi.step(*data)
        schedule.step()
        seconds += time.process_time() - start
        if step % 20 == 0:
            scale = guide.scale[..., None] * guide.scale_tril
            yield Look(step, seconds, (guide.loc.detach().clone(), scale.norm(dim=-1).detach()))


def nuts(model: Model, data: tuple[Tensor, Tensor], draws: int) -> Iterator[Look]:
    kernel, times = NUTS(model), []
    start = time.process_time()
    chain = MCMC(
        kernel, num_samples=draws, warmup_steps=WARMUP, disable_progbar=True,
        hook_fn=lambda kernel, samples, stage, i: times.append(time.process_time() - start),
    )
    chain.run(*data)
    samples = chain.get_samples()
    flat = torch.cat([samples[n].reshape(draws, -1) for n in ("w", "b")], 1)
    for count in range(20, draws + 1, 20):
        part = flat[:count]
        yield Look(count, times[WARMUP + count - 1], (part.mean(0), part.std(0)))


def truth(density: Density, size: int, draws: int) -> Moments:
    """By HMC; prints what the chains say about themselves."""
    found = hmc(density, 0.1 * torch.randn(CHAINS, size), draws, warmup=max(100, draws // 2),
                leapfrogs=(8, 24))
    spread = float(split_gelman_rubin(found, chain_dim=1, sample_dim=0).max())
    print(f"HMC: {CHAINS} chains of {draws:,} draws, R-hat at most {spread:.4f}")
    flat = found.flatten(0, 1)
    return flat.mean(0), flat.std(0)


def arrival(looks: list[Look], reference: Moments) -> tuple[str, float]:
    """Since when it is there for good: the count and the seconds."""
    there: Look | None = None
    for look in looks:
        (mean, sd), (wanted, scale) = look.moments, reference
        near = ((mean - wanted).abs() < 0.1 * scale).all() and ((sd / scale - 1).abs() < 0.1).all()
        there = (there or look) if near else None
    return (str(there.count), there.seconds) if there else ("never", float("nan"))


def show(name: str, seed: int, looks: list[Look], reference: Moments) -> None:
    count, seconds = arrival(looks, reference)
    print(f"{name:<22}{seed:>5}{count:>8}{seconds:>10.2f}{looks[-1].count:>8}"
          f"{looks[-1].seconds:>10.2f}", flush=True)


def watched(label: str, looks: Iterator[Look]) -> list[Look]:
    return list(tqdm(looks, label, disable=None, leave=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=1000, help="of each chain of the reference")
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = f"{'':<22}{'seed':>5}{'there':>8}{'s':>10}{'in all':>8}{'s':>10}"
    pyro.set_rng_seed(100)
    data = breast_cancer()
    print(f"logistic regression (aim: {TARGETS['logistic regression']})")
    reference = truth(logistic_density(*data), data[0].shape[1] + 1, args.draws)
    print(header)
    methods: dict[str, Callable[[], Iterator[Look]]] = {
        "NGVI": partial(ngvi, logistic, data, STEPS),
        "AutoMVN and Adam": partial(adam, logistic, data),
        "NUTS": partial(nuts, logistic, data, min(NUTS_DRAWS, 10 * args.draws)),
    }
    for name, method in methods.items():
        for seed in args.seeds:
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            show(name, seed, watched(name, method()), reference)
    pyro.set_rng_seed(101)
    data = schools()
    print(f"eight schools (aim: {TARGETS['eight schools']})")
    _, spread = truth(schools_density(*data), 10, args.draws)
    best = watched("reference", ngvi(eight_schools, data, 2500, num_particles=320))[-1].moments
    print(f"sd of log tau {spread[1]:.3f}, of the best Gaussian {best[1][1]:.3f}\n{header}")
    for seed in args.seeds:
        pyro.set_rng_seed(seed)
        looks = watched("eight schools", ngvi(eight_schools, data, 2 * STEPS))
        show("NGVI", seed, looks, best)


if __name__ == "__main__":
    main()
