# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Hierarchical priors and other latents
#
# Weights of a network are one kind of unknown. A model may have others: a mean for each school,
# the spread of those means, the noise of the targets, the importance of each input. In Pyro all
# of them are written in the same way, as named samples from a prior, and a guide finds a
# posterior for all of them together. This notebook goes from a model without any network to a
# network whose prior is learned.
#
# Three words of Pyro are enough: `pyro.sample(name, distribution)` draws an unknown (a
# **latent**); with `obs=` it is data instead; `pyro.plate` says that what is inside is repeated
# independently.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI

SHORT = "PYROCURV_SHORT" in os.environ  # a few steps only, to check that everything runs
STEPS, NET_STEPS, SEEDS = (5, 3, 2) if SHORT else (150, 1000, 3)
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Twenty schools
#
# Twenty schools, with 2 to 12 pupils each; we want the mean score of each school, in points.
# The mean of two pupils is a poor estimate. But schools resemble each other, and how much they
# do can be learned from all of them: the model has a latent `mu` (the mean of all schools), a
# latent `tau` (how much schools differ, in points) and a latent `theta` for each school.

# %%
SCHOOLS, NOISE = 20, 10.0  # the standard deviation of a pupil, in points


def make_schools(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """True means [20], pupils of each school [20], and the observed means [20]."""
    generator = torch.Generator().manual_seed(seed)
    theta = 50 + 5 * torch.randn(SCHOOLS, generator=generator)
    pupils = torch.randint(2, 13, (SCHOOLS,), generator=generator)
    observed = theta + NOISE / pupils.sqrt() * torch.randn(SCHOOLS, generator=generator)
    return theta, pupils, observed


def schools(pupils: Tensor, observed: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(50.0, 20.0))
    tau = pyro.sample("tau", dist.HalfNormal(20.0))
    with pyro.plate("schools", SCHOOLS):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, NOISE / pupils.sqrt()), obs=observed)


def fit_schools(
    pupils: Tensor, observed: Tensor, seed: int = 0, kind: type[StructuredGuide] = FullGuide
) -> StructuredGuide:
    pyro.set_rng_seed(seed)
    guide = kind(schools)
    ngvi = NGVI(schools, guide, curvature="hessian")
    for _ in range(STEPS):
        ngvi.step(pupils, observed)
    return guide


theta, pupils, observed = make_schools(seed=0)
guide = fit_schools(pupils, observed)
print(guide.summary())

# %% [markdown]
# `FullGuide` is one Gaussian over all 22 latents, and `curvature="hessian"` trains it by the
# second derivatives of the log density. `tau` must be positive, so the Gaussian is over log
# tau; `median` and `quantiles` translate back.
#
# The picture shows what a hierarchical model does. Each school's observed mean is pulled
# towards the mean of all, small schools more than large ones.

# %%
low, median, high = guide.quantiles([0.05, 0.5, 0.95])["theta"]
order = pupils.argsort()
figure, ax = plt.subplots(figsize=(8, 3.8))
position = np.arange(SCHOOLS)
ax.errorbar(position, median[order], [(median - low)[order], (high - median)[order]], fmt="o",
            capsize=2, label="posterior: median and 90 %")
ax.plot(position, observed[order], "x", color="tab:red", label="observed mean")
ax.plot(position, theta[order], "_", color="black", markersize=12, label="true mean")
ax.axhline(guide.median()["mu"].item(), color="0.6", linestyle="--", label="mean of all schools")
ax.set_xticks(position, [str(n) for n in pupils[order].tolist()])
ax.set(xlabel="pupils of the school", ylabel="score (points)")
ax.legend(fontsize="small", ncols=2)
plt.show()

# %% [markdown]
# Is it more accurate? Over several made worlds, the root mean square error of three estimates:
# each school's own mean, the mean of all pupils for every school, and the posterior median.

# %%
errors: dict[str, list[float]] = {"own mean": [], "mean of all": [], "hierarchical": []}
covered = []
for seed in range(2 * SEEDS):
    truth, n, y = make_schools(seed)
    quantiles = fit_schools(n, y, seed).quantiles([0.05, 0.5, 0.95])["theta"]
    estimates = {"own mean": y, "mean of all": ((n * y).sum() / n.sum()).expand(SCHOOLS),
                 "hierarchical": quantiles[1]}
    for name, estimate in estimates.items():
        errors[name].append((estimate - truth).square().mean().sqrt().item())
    covered.append(((quantiles[0] < truth) & (truth < quantiles[2])).float().mean().item())
for name, values in errors.items():
    print(f"{name:<13} error {np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} points")
print(f"share of true means in the 90 % interval: {np.mean(covered):.0%}")

# %% [markdown]
# The hierarchical estimate has an error of 3.2 points, a school's own mean 4.3, although the
# model was told nothing that the others do not know. The 90 % intervals hold 82 % of the true
# means: somewhat too narrow; the next section shows one reason.
#
# ## Where a Gaussian is not enough
#
# For this model the exact posterior of tau can be computed on a grid, as everything else is
# Gaussian given tau. So the approximations can be checked: the Gaussian over all latents, and
# independent ones (`DiagonalGuide`, the same family as Pyro's `AutoNormal`), trained in the
# same way.

# %%
taus = torch.linspace(0.02, 16, 400)
errors2 = NOISE**2 / pupils  # variances of the observed means
marginal = torch.stack([
    dist.MultivariateNormal(torch.full((SCHOOLS,), 50.0), torch.diag(errors2 + tau**2) + 20.0**2)
    .log_prob(observed) + dist.HalfNormal(20.0).log_prob(tau)
    for tau in taus
])
exact = (marginal - marginal.max()).exp()
exact = exact / torch.trapezoid(exact, taus)

independent = fit_schools(pupils, observed, kind=DiagonalGuide)
draws = {
    "one Gaussian": guide.sample_posterior(4000)["tau"],
    "independent": independent.sample_posterior(4000)["tau"],
}
figure, ax = plt.subplots(figsize=(6.5, 3.4))
ax.plot(taus, exact, color="black", label="exact")
for name, values in draws.items():
    ax.hist(values.flatten().tolist(), 50, range=(0, 16), density=True, histtype="step",
            linewidth=1.5, label=name)
ax.set(xlabel="tau: how much schools differ (points)", ylabel="density (1 / point)")
ax.legend()
plt.show()
cumulative = torch.cumulative_trapezoid(exact, taus)
interval = [taus[int((cumulative < level).sum())].item() for level in (0.05, 0.5, 0.95)]
print(f"{'exact':<13} 5 %, 50 %, 95 %: " + "  ".join(f"{q:5.2f}" for q in interval))
for name, values in draws.items():
    levels = values.flatten().quantile(torch.tensor([0.05, 0.5, 0.95]))
    print(f"{name:<13} 5 %, 50 %, 95 %: " + "  ".join(f"{q:5.2f}" for q in levels.tolist()))

# %% [markdown]
# The medians agree; the interval of the full Gaussian is 84 % as wide as the exact one, that of
# independent latents 67 %. Where schools cannot be told apart (tau near 0) the exact posterior
# is a funnel, which no Gaussian fits; there the error is larger still. If the tails of such a
# latent matter to you, run HMC for the small models, and use this for the large ones.
#
# ## A network that finds out which inputs matter
#
# Now a regression with 8 inputs, of which the first three matter. Each input has a latent scale
# `tau[i]`, the prior standard deviation of all weights that leave this input. If the data do
# not need an input, a small tau makes its weights vanish. The noise of the targets, `sigma`, is
# a latent too.
#
# Weights become latents by `PyroSample`, whose prior may depend on other latents of the module.
# `KFACGuide` has a posterior with Kronecker factors for the layers; the two latents that are no
# weights, `tau` and `sigma`, go to a fallback guide, by default Pyro's `AutoNormal`. All are
# trained together, from the same backward pass.

# %%
INPUTS, HIDDEN, NUM_DATA = 8, 16, 400


def make_regression(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(NUM_DATA, INPUTS, generator=generator)
    y = (1.5 * x[:, 0]).sin() + 0.7 * x[:, 1] - 0.3 * x[:, 2]
    return x, y + 0.2 * torch.randn(NUM_DATA, generator=generator)


class Relevance(PyroModule):
    """Regression with a prior scale for each input and a latent noise."""

    def __init__(self) -> None:
        super().__init__()
        self.tau = PyroSample(dist.HalfNormal(1.0).expand([INPUTS]).to_event(1))
        self.sigma = PyroSample(dist.LogNormal(-1.0, 1.0))
        self.first = PyroModule[nn.Linear](INPUTS, HIDDEN)
        self.first.weight = PyroSample(
            lambda _: dist.Normal(0.0, self.tau).expand([HIDDEN, INPUTS]).to_event(2)
        )
        self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([HIDDEN]).to_event(1))
        self.last = PyroModule[nn.Linear](HIDDEN, 1)
        self.last.weight = PyroSample(
            dist.Normal(0.0, HIDDEN**-0.5).expand([1, HIDDEN]).to_event(2)
        )
        self.last.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.last(self.first(x).tanh())[:, 0]
        sigma = self.sigma
        size = len(x) if y is None else NUM_DATA
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def fit_relevance(seed: int) -> tuple[NGVI, list[Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = Relevance()
    ngvi = NGVI(model, KFACGuide(model), curvature="ggn", temperature=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, NET_STEPS)
    x, y = make_regression(seed)
    path = []
    for _ in range(NET_STEPS):
        ngvi.step(x, y)
        schedule.step()
        path.append(ngvi.guide.median()["tau"].detach().clone())
    return ngvi, path


runs = [fit_relevance(seed) for seed in range(SEEDS)]
print(runs[0][0].guide.summary())

# %%
scales = torch.stack([path[-1] for _, path in runs])  # [seeds, inputs]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for index, values in enumerate(torch.stack(runs[0][1]).T):
    matters = index < 3
    left.plot(values, color="tab:red" if matters else "0.6",
              label={0: "inputs that matter", 3: "others"}.get(index))
left.set(xlabel="step", ylabel="median of tau", ylim=(0, 1.6), title="One run")
left.legend(loc="upper right")
right.errorbar(range(INPUTS), scales.mean(0), scales.std(0), fmt="o", capsize=3)
right.set(xlabel="input", ylabel="median of tau", ylim=(0, None),
          title=f"Mean ± standard deviation of {SEEDS} runs")
plt.show()
for name, part in (("matter", scales[:, :3]), ("do not", scales[:, 3:])):
    print(f"tau of inputs that {name:<7} {part.mean():.3f}, from {part.min():.3f} to "
          f"{part.max():.3f}")
sigmas = torch.stack([ngvi.guide.median()["sigma"] for ngvi, _ in runs])
print(f"sigma: {sigmas.mean():.3f} ± {sigmas.std():.3f}, true 0.2")

# %% [markdown]
# Inputs 0, 1 and 2 keep a scale that falls with what they contribute; those of the other five
# shrink from the prior median to 0.15 and would shrink on, slowly, over more steps. The noise
# is overestimated (0.27 against 0.2): at T = 1 the network underfits a little, and what it does
# not fit is noise to it.
#
# ## Where to read on
#
# - [Hierarchical priors](https://pyrocurv.github.io/pyrocurv/latest/hierarchical/): the
#   shortest such model.
# - [Your own model](https://pyrocurv.github.io/pyrocurv/latest/models/): other likelihoods,
#   several observed sites, models without a network.
# - [Guides](https://pyrocurv.github.io/pyrocurv/latest/guides/#other-latents-and-parameters):
#   what a fallback guide is.
# - [Benchmarks](https://pyrocurv.github.io/pyrocurv/latest/benchmarks/): posteriors compared
#   with HMC.
# - The next tutorial, [a second-order optimizer in your own
#   loop](https://pyrocurv.github.io/pyrocurv/latest/tutorials/05_second_order/).
