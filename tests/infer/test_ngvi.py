"""`NGVI` on conjugate models, whose posterior and evidence are known."""

import math
from collections.abc import Callable
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import (
    EXACT,
    GUIDES,
    NOISE,
    NUM_DATA,
    PRIORS,
    assert_posterior,
    everything,
    exactly,
    identical,
    inputs,
    linear,
    plain,
    regression_data,
    regressor,
    sigma_model,
    truth,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Regressor, bayesianize

CORRELATED = ["kfac", "ekfac", "block", "full"]
each = pytest.mark.parametrize("structure", GUIDES)
each_correlated = pytest.mark.parametrize("structure", CORRELATED)
each_prior = pytest.mark.parametrize("priors", PRIORS)


# ---- conjugate models ---------------------------------------------------------------------------


@each_prior
@each_correlated
def test_one_step_finds_the_exact_posterior(structure: str, priors: str) -> None:
    x, y = regression_data()
    mean, covariance, evidence = truth(x, y, priors)
    ngvi = exactly(linear(priors), structure)
    ngvi.step(x, y)
    assert_posterior(ngvi.guide, mean, covariance)
    for _ in range(3):  # no noise: log q and the log joint differ by the evidence everywhere
        assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


@each_prior
def test_a_diagonal_guide_is_exact_on_an_orthogonal_design(priors: str) -> None:
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x = torch.cartesian_prod(signs, signs, signs) * torch.tensor([1.0, 2.0, 0.5]).double()
    y = torch.randn(8, 2, dtype=torch.float64)
    mean, covariance, evidence = truth(x, y, priors)
    ngvi = exactly(linear(priors, num_data=8), "diag")
    ngvi.step(x, y)
    assert_posterior(ngvi.guide, mean, covariance)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


@each_prior
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_wide_layer_with_few_data_is_exact(structure: str, priors: str) -> None:
    """12 examples span no more than the 16 directions that a side of 171 inputs keeps."""
    x, y = torch.randn(12, 170).double() / 5, torch.randn(12, 2).double()
    ngvi = exactly(linear(priors, num_data=12, columns=170), structure)
    ngvi.step(x, y)
    assert ngvi.guide.blocks[0].input_basis.shape == (171, 16)
    mean, covariance, evidence = truth(x, y, priors)
    assert_posterior(ngvi.guide, mean, covariance)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


@each_correlated
def test_a_prior_with_a_mean(structure: str) -> None:
    x, y = regression_data()
    loc = {"weight": torch.randn(2, 3).double(), "bias": torch.randn(2).double()}
    net = bayesianize(
        nn.Linear(3, 2).double(), lambda module, name: dist.Normal(loc[name], 0.7)
    )
    ngvi = exactly(Regressor(net, NUM_DATA, noise=NOISE), structure)
    ngvi.step(x, y)
    start = torch.cat([loc["weight"].flatten(), loc["bias"]])
    mean, covariance, evidence = oracles.linear_layer_posterior(
        x, y, NOISE, 0.7**-2, 0.7**-2, start
    )
    torch.testing.assert_close(ngvi.guide.posterior.loc, mean, rtol=1e-6, atol=1e-6)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-6)


@pytest.mark.parametrize("structure", ["block", "full", "diag"])
def test_a_prior_for_every_weight(structure: str) -> None:
    """Of no product form: dense and diagonal blocks take it as it is."""
    x, y = regression_data()
    scales = {name: torch.rand(shape).double() + 0.5
              for name, shape in {"weight": (2, 3), "bias": (2,)}.items()}
    net = bayesianize(nn.Linear(3, 2).double(), lambda module, name: dist.Normal(
        torch.zeros_like(scales[name]), scales[name]))
    ngvi = exactly(Regressor(net, NUM_DATA, noise=NOISE), structure)
    ngvi.step(x, y)
    delta = torch.cat([scales["weight"].flatten(), scales["bias"]]) ** -2
    X = oracles.linear_layer_design(x, 2)
    mean, covariance, _ = oracles.linear_posterior(
        X, y.flatten(), NOISE, torch.zeros(8).double(), delta
    )
    if structure == "diag":
        precision = (X.T @ X / NOISE**2 + torch.diag(delta)).diag()
        found = ngvi.guide.posterior.precision.diag()
        torch.testing.assert_close(found, precision, rtol=1e-10, atol=1e-10)
    else:
        assert_posterior(ngvi.guide, mean, covariance)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_per_input_priors_are_exact_in_kronecker_blocks(structure: str) -> None:
    """Automatic relevance determination: one standard deviation for each input."""
    x, y = regression_data()
    ard = torch.tensor([0.3, 1.0, 4.0]).double()
    scales = {"weight": ard.expand(2, 3), "bias": torch.ones(2).double()}
    net = bayesianize(nn.Linear(3, 2).double(), lambda module, name: dist.Normal(
        torch.zeros_like(scales[name]), scales[name]))
    ngvi = exactly(Regressor(net, NUM_DATA, noise=NOISE), structure)
    ngvi.step(x, y)
    delta = torch.cat([scales["weight"].flatten(), scales["bias"]]) ** -2
    mean, covariance, evidence = oracles.linear_posterior(
        oracles.linear_layer_design(x, 2), y.flatten(), NOISE, torch.zeros(8).double(), delta
    )
    assert_posterior(ngvi.guide, mean, covariance)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


@each_prior
@each
def test_a_mini_batch_stands_for_all_data(structure: str, priors: str) -> None:
    """N/B comes in once: a third of data that repeat three times gives what all of them give."""
    x, y = regression_data(10)
    model = linear(priors, num_data=30)
    part, whole = exactly(model, structure), exactly(model, structure)
    part.step(x, y)
    whole.step(x.repeat(3, 1), y.repeat(3, 1))
    assert_posterior(part.guide, whole.guide.posterior.loc,
                     torch.linalg.inv(whole.guide.posterior.precision.dense()))
    if structure != "diag":
        mean, covariance, _ = truth(x.repeat(3, 1), y.repeat(3, 1), priors)
        assert_posterior(part.guide, mean, covariance)


@each_correlated
def test_the_first_examples_stand_for_the_batch(structure: str) -> None:
    x, y = regression_data(10)
    x, y = x.repeat(3, 1), y.repeat(3, 1)
    curvature = Curvature("ggn", every=1, batch=10, initial=0.0)
    ngvi = exactly(linear("unequal"), structure, curvature=curvature)
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal")
    assert_posterior(ngvi.guide, mean, covariance)


@each_prior
@each_correlated
@pytest.mark.parametrize("temperature", [0.1, 3.0])
def test_temperature(structure: str, priors: str, temperature: float) -> None:
    """Λ = (N/T) C + δ: the posterior under noise of variance T σ², the loss T times as cold."""
    x, y = regression_data()
    ngvi = exactly(linear(priors), structure, temperature=temperature)
    ngvi.step(x, y)
    mean, covariance, evidence = truth(x, y, priors, NOISE * temperature**0.5)
    assert_posterior(ngvi.guide, mean, covariance)
    log_variance = math.log(2 * math.pi * NOISE**2)
    powers = y.numel() * (math.log(temperature) + log_variance - log_variance / temperature) / 2
    expected = -temperature * (float(evidence) + powers)  # T times of the integral of p l^(1/T)
    assert ngvi.evaluate_loss(x, y) == pytest.approx(expected, rel=1e-11, abs=1e-9)


def test_temperature_multiplies_the_whole_kl() -> None:
    """That of the fallback guide too: T times the loss of a likelihood to the power of 1/T."""

    class Tempered(PyroModule):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.net = linear("equal").net
            self.scale = scale

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()) - 1, 0.1))
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)), poutine.scale(
                scale=self.scale
            ):
                plain(mean, y, noise=sigma)

    data, n, T = regression_data(), 40, 5.0
    model = Tempered(1.0)
    ngvi = NGVI(model, KFACGuide(model), temperature=T, curvature=EXACT, lr=0.3)
    for _ in range(5):
        ngvi.step(*data)
    ours = torch.tensor([ngvi.evaluate_loss(*data) for _ in range(n)])
    model.scale = 1 / T
    theirs = [T * Trace_ELBO().loss(model, ngvi.guide, *data) for _ in range(n)]
    difference = ours.mean() - torch.tensor(theirs).mean()
    assert abs(difference) < 4 * math.sqrt((ours.var() + torch.tensor(theirs).var()) / n)


def test_initial_curvature_fades() -> None:
    """Λ = (N/T)(C + e) + δ, e = initial (1 - ρ)^t, ρ = B/N, at most 0.05."""
    x, y = regression_data()
    ngvi = exactly(linear("unequal"), "full",
                   curvature=Curvature("ggn", every=1, batch=None, initial=0.4), temperature=0.5)
    _, covariance, _ = truth(x, y, "unequal", NOISE * 0.5**0.5)
    for step in range(3):
        ngvi.step(x, y)
        faint = 0.4 * 0.95**step * NUM_DATA / 0.5
        precision = torch.linalg.inv(covariance) + faint * torch.eye(8).double()
        torch.testing.assert_close(ngvi.guide.posterior.precision.dense(), precision)


@pytest.mark.parametrize("num_data, rho", [(30, 0.05), (1_000, 0.03), (1_000_000, 0.01)])
def test_how_fast_the_initial_curvature_fades(num_data: int, rho: float) -> None:
    """By epochs, yet not slower than 0.01 a step where an epoch is thousands of steps."""
    x, y = regression_data()
    found = []
    for initial in (0.0, 0.4):
        spec = Curvature("ggn", every=1, batch=None, initial=initial)
        ngvi = exactly(linear("unequal", num_data), "full", curvature=spec)
        for _ in range(3):
            ngvi.step(x, y)
        found.append(ngvi.guide.posterior.precision.diag())
    faint = torch.full((8,), 0.4 * (1 - rho) ** 2 * num_data).double()
    torch.testing.assert_close(found[1] - found[0], faint)


def test_damping_never_shrinks_the_posterior() -> None:
    x, y = regression_data()
    ngvi = exactly(linear("unequal"), "kfac", damping=5.0)
    before = ngvi.guide
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal")
    found = torch.linalg.inv(before.posterior.precision.dense())
    torch.testing.assert_close(found, covariance, rtol=1e-10, atol=1e-10)
    assert (ngvi.guide.posterior.loc - mean).norm() > 0.1


# ---- particles, averages, the first step --------------------------------------------------------


class Recorder:
    """A linear model that keeps the means it gave, and with them the weights it was run at."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model, self.seen = model, list[Tensor]()

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        self.seen.append(self.model(x, y).detach().clone())


class Recorded:
    """A run of `steps` steps: the means seen at each, and those at the guide's location."""

    def __init__(self, steps: int, **options: Any) -> None:
        recorder, (x, y) = Recorder(linear("equal")), regression_data()
        guide = KFACGuide(recorder)
        guide(x, y)
        recorder.seen.clear()
        self.start = self.at(guide, x)
        ngvi = NGVI(recorder, guide, curvature=EXACT, **options)
        self.losses = [ngvi.step(x, y) for _ in range(steps)]
        self.seen, self.end = recorder.seen, self.at(guide, x)
        self.noise = [seen - self.end for seen in self.seen]

    def at(self, guide: StructuredGuide, x: Tensor) -> Tensor:
        location = guide.median()
        return nn.functional.linear(x, location["net.weight"], location["net.bias"])


@pytest.mark.parametrize("num_particles", [1, 2, 3])
def test_the_first_step_is_taken_at_the_mean(num_particles: int) -> None:
    run = Recorded(1, num_particles=num_particles)
    assert len(run.seen) == num_particles
    assert all(torch.equal(seen, run.start) for seen in run.seen)
    assert math.isfinite(run.losses[0]) and not torch.equal(run.start, run.end)


def test_noise_comes_in_antithetic_pairs_over_the_steps() -> None:
    noise = Recorded(5, lr=1e-14).noise
    torch.testing.assert_close(noise[1], -noise[2])
    torch.testing.assert_close(noise[3], -noise[4])
    assert (noise[1] - noise[3]).norm() > 0.1 * noise[1].norm()


def test_noise_comes_in_antithetic_pairs_over_the_particles() -> None:
    noise = Recorded(2, lr=1e-14, num_particles=4).noise[4:]
    torch.testing.assert_close(noise[0], -noise[1])
    torch.testing.assert_close(noise[2], -noise[3])
    assert (noise[0] - noise[2]).norm() > 0.1 * noise[0].norm()


def test_independent_noise_on_request() -> None:
    noise = Recorded(3, lr=1e-14, antithetic=False).noise
    assert (noise[1] + noise[2]).norm() > 0.1 * noise[1].norm()


@each_correlated
def test_antithetic_particles_have_the_gradient_of_the_mean_in_a_linear_model(
    structure: str,
) -> None:
    x, y = regression_data()
    mean, covariance, evidence = truth(x, y, "unequal")
    ngvi = exactly(linear("unequal"), structure, num_particles=4)
    losses = [ngvi.step(x, y) for _ in range(4)]
    assert_posterior(ngvi.guide, mean, covariance)
    assert -losses[-1] == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)
    single = exactly(linear("unequal"), structure)
    single.step(x, y), single.step(x, y)
    assert (single.guide.posterior.loc - mean).norm() > 1e-3


@each
def test_average(structure: str) -> None:
    """Of weight 4/(t+4), beside a twin that keeps none and takes the same steps."""
    data, steps = regression_data(), 8
    model = regressor()
    torch.manual_seed(3)
    averaged = NGVI(model, GUIDES[structure](model), lr=0.3, curvature=EXACT, average=True)
    torch.manual_seed(3)
    twin = NGVI(model, GUIDES[structure](model), lr=0.3, curvature=EXACT)
    loc = precision = None
    for t in range(steps):
        assert averaged.step(*data) == pytest.approx(twin.step(*data), rel=1e-9)
        posterior = twin.guide.posterior
        weight = 4 / (t + 4)
        parts = [family.precision().map(torch.clone) for family in twin.guide.blocks]
        loc = posterior.loc.clone() if loc is None else loc.lerp(posterior.loc, weight)
        precision = parts if precision is None else [
            a.lerp(b, weight) for a, b in zip(precision, parts, strict=True)
        ]
        torch.testing.assert_close(averaged.guide.posterior.loc, loc)
        for family, expected in zip(averaged.guide.blocks, precision, strict=True):
            torch.testing.assert_close(family.precision().dense(), expected.dense())
    assert not torch.allclose(loc, twin.guide.posterior.loc)


# ---- the loss -----------------------------------------------------------------------------------


def test_evaluate_loss_changes_nothing() -> None:
    model, data = sigma_model(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), curvature=Curvature("fisher", every=2))
    for _ in range(3):
        ngvi.step(*data)
    before = everything(ngvi)
    assert math.isfinite(ngvi.evaluate_loss(*data))
    assert identical(everything(ngvi), before)


def test_evaluate_loss_has_less_noise_with_more_particles() -> None:
    model, data = regressor(), regression_data()
    spread = []
    for num_particles in (1, 8):
        ngvi = NGVI(model, KFACGuide(model), num_particles=num_particles, curvature="ggn")
        ngvi.step(*data)
        losses = torch.tensor([ngvi.evaluate_loss(*data) for _ in range(30)])
        spread.append(losses.std())
    assert spread[1] < 0.7 * spread[0]  # 8 or fewer in effect: pairs are not independent


def test_step_reports_the_loss_of_its_weights() -> None:
    """What `step` returns is on average what `evaluate_loss` estimates, at an exact posterior."""
    x, y = regression_data()
    ngvi = exactly(linear("unequal"), "kfac")
    first = ngvi.step(x, y)
    assert first > ngvi.evaluate_loss(x, y)
    assert ngvi.step(x, y) == pytest.approx(ngvi.evaluate_loss(x, y), rel=0.5)


def test_inputs_alone_reach_the_model() -> None:
    """Keyword arguments go through to guide and model."""
    x, y = regression_data()
    model = regressor()
    ngvi = NGVI(model, KFACGuide(model))
    assert math.isfinite(ngvi.step(x, y=y)) and math.isfinite(ngvi.evaluate_loss(x=x, y=y))
    assert model(inputs(4)).shape == (4, 2)
