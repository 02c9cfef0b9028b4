"""`NGVI`: exact on conjugate models, resumed bit for bit, and nothing lost when a step fails."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from toys import (
    EXACT,
    GUIDES,
    NUM_DATA,
    class_data,
    classifier,
    inputs,
    mlp,
    normal_prior,
    regression_data,
    regressor,
)

from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.guides import KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI, Laplace, log_predictive_density
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.posterior import step as engine

NOISE = 0.3
CORRELATED = ["kfac", "ekfac", "block", "full"]
PRIORS = {"equal": (0.7, 0.7), "unequal": (0.7, 1.9)}  # standard deviations of weight and bias

each = pytest.mark.parametrize("structure", GUIDES)
each_correlated = pytest.mark.parametrize("structure", CORRELATED)
each_prior = pytest.mark.parametrize("priors", PRIORS)


def exactly(model: Any, structure: str, **options: Any) -> NGVI:
    """An NGVI whose first step is Newton's."""
    options = {"curvature": EXACT, "lr": 1.0, "momentum": 0.0, "damping": 0.0, **options}
    return NGVI(model, GUIDES[structure](model), kl_clip=None, **options)


def linear(priors: str, num_data: int = NUM_DATA, columns: int = 3) -> Regressor:
    net = bayesianize(nn.Linear(columns, 2).double(), normal_prior(*PRIORS[priors]))
    return Regressor(net, num_data, noise=NOISE)


def truth(x: Tensor, y: Tensor, priors: str, noise: float = NOISE) -> tuple[Tensor, ...]:
    weight, bias = PRIORS[priors]
    return oracles.linear_layer_posterior(x, y, noise, weight**-2, bias**-2)


def assert_posterior(guide: StructuredGuide, mean: Tensor, covariance: Tensor) -> None:
    posterior = guide.posterior
    torch.testing.assert_close(posterior.loc, mean, rtol=1e-10, atol=1e-10)
    found = torch.linalg.inv(posterior.precision.dense())
    torch.testing.assert_close(found, covariance, rtol=1e-10, atol=1e-10)


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

    data, n, T = regression_data(), 200, 5.0
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


# ---- scales, masks, several sites ---------------------------------------------------------------


class Line(PyroModule):
    """y ~ N(W x + b, NOISE²), with what happens around the observed site left open."""

    def __init__(self, observe: Callable[[Tensor, Tensor], Any], num_data: int = NUM_DATA) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 2).double(), normal_prior(*PRIORS["unequal"]))
        self.observe, self.num_data = observe, num_data

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.net(x)
        with pyro.plate("data", self.num_data, subsample_size=len(x)):
            self.observe(mean, y)
        return mean


def plain(mean: Tensor, y: Tensor | None, name: str = "obs", noise: float = NOISE) -> None:
    pyro.sample(name, dist.Normal(mean, noise).to_event(1), obs=y)


@each_correlated
def test_scale_tempers_the_likelihood(structure: str) -> None:
    x, y = regression_data()

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=4.0):
            plain(mean, y)

    ngvi = exactly(Line(observe), structure)
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal", NOISE / 2)
    assert_posterior(ngvi.guide, mean, covariance)


@each_correlated
def test_scale_around_the_whole_model(structure: str) -> None:
    """Likelihood and prior to the power s: one step is exact, and the loss that of Trace_ELBO."""
    x, y = regression_data()
    s, (weight, bias) = 2.5, PRIORS["unequal"]
    model = poutine.scale(linear("unequal"), scale=s)
    ngvi = exactly(model, structure)
    ngvi.step(x, y)
    root = s**0.5
    mean, covariance, _ = oracles.linear_layer_posterior(
        x, y, NOISE / root, s / weight**2, s / bias**2
    )
    assert_posterior(ngvi.guide, mean, covariance)
    for _ in range(3):  # without noise, as q is the posterior
        loss = Trace_ELBO().loss(model, ngvi.guide, x, y)
        assert ngvi.evaluate_loss(x, y) == pytest.approx(loss, rel=1e-11, abs=1e-8)
    ours = ngvi.guide.kl()
    ngvi.guide(x, y)
    ngvi.evaluate_loss(x, y)
    torch.testing.assert_close(ngvi.guide.kl(), ours)
    prior = torch.tensor([weight**-2] * 6 + [bias**-2] * 2).double()
    torch.testing.assert_close(ours, ngvi.guide.posterior.kl(torch.zeros(8).double(), prior))


@each_correlated
def test_scales_around_priors(structure: str) -> None:
    """Of each site another."""
    x, y = regression_data()

    class Scaled(Line):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            with poutine.scale(scale=3.0):
                weight = self.net.weight
            with poutine.scale(scale=torch.tensor(0.2).double()):
                bias = self.net.bias
            with pyro.plate("data", self.num_data, subsample_size=len(x)):
                self.observe(nn.functional.linear(x, weight, bias), y)

    ngvi, (weight, bias) = exactly(Scaled(plain), structure), PRIORS["unequal"]
    ngvi.step(x, y)
    mean, covariance, _ = oracles.linear_layer_posterior(x, y, NOISE, 3 / weight**2, 0.2 / bias**2)
    assert_posterior(ngvi.guide, mean, covariance)
    loss = Trace_ELBO().loss(ngvi.model, ngvi.guide, x, y)
    assert ngvi.evaluate_loss(x, y) == pytest.approx(loss, rel=1e-11, abs=1e-8)


def test_a_scale_of_many_numbers_around_a_prior() -> None:
    model = poutine.scale(linear("equal"), scale=torch.ones(NUM_DATA).double())
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match=r"site 'net.weight' has a scale of shape \(30,\)"):
        ngvi.step(*regression_data())


def mask_by_handler(mean: Tensor, y: Tensor | None) -> None:
    with poutine.mask(mask=torch.arange(len(mean)) % 3 > 0):
        plain(mean, y)


def mask_in_distribution(mean: Tensor, y: Tensor | None) -> None:
    fn = dist.Normal(mean, NOISE).to_event(1).mask(torch.arange(len(mean)) % 3 > 0)
    pyro.sample("obs", fn, obs=y)


def mask_in_both(mean: Tensor, y: Tensor | None) -> None:
    rows = torch.arange(len(mean))
    fn = dist.Normal(mean, NOISE).to_event(1).mask((rows % 3 > 0) | (rows < 15))
    with poutine.mask(mask=(rows % 3 > 0) | (rows >= 15)):
        pyro.sample("obs", fn, obs=y)


MASKS = {"handler": mask_by_handler, "distribution": mask_in_distribution, "both": mask_in_both}


@pytest.mark.parametrize("mask", MASKS)
@each_correlated
def test_masked_examples_count_for_nothing(structure: str, mask: str) -> None:
    x, y = regression_data()
    kept = torch.arange(len(x)) % 3 > 0
    y = torch.where(kept[:, None], y, 1e3)
    ngvi = exactly(Line(MASKS[mask]), structure)
    ngvi.step(x, y)
    mean, covariance, evidence = truth(x[kept], y[kept], "unequal")
    assert_posterior(ngvi.guide, mean, covariance)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


@pytest.mark.parametrize("structure", ["block", "full"])
def test_a_mask_on_entries_of_an_event(structure: str) -> None:
    """Some outputs of some examples are missing."""
    x, y = regression_data()
    kept = torch.arange(y.numel()).reshape(y.shape) % 3 > 0

    def observe(mean: Tensor, y: Tensor | None) -> None:
        pyro.sample("obs", dist.Normal(mean, NOISE).mask(kept).to_event(1), obs=y)

    ngvi = exactly(Line(observe), structure)
    ngvi.step(x, torch.where(kept, y, 1e3))
    X, (weight, bias) = oracles.linear_layer_design(x, 2)[kept.flatten()], PRIORS["unequal"]
    mean, covariance, _ = oracles.linear_posterior(
        X / NOISE, y[kept] / NOISE, 1.0, torch.zeros(8).double(),
        X.new_tensor([weight**-2] * 6 + [bias**-2] * 2),
    )
    assert_posterior(ngvi.guide, mean, covariance)


@pytest.mark.parametrize("structure", ["block", "full"])
def test_a_mask_on_one_of_two_sites(structure: str) -> None:
    kept = torch.arange(NUM_DATA) % 3 > 0

    def observe(mean: Tensor, y: Tensor | None) -> None:
        plain(mean, y, "first")
        with poutine.mask(mask=kept):
            plain(mean, y, "second", 0.5)

    x, y = regression_data()
    ngvi = exactly(Line(observe), structure)
    ngvi.step(x, y)
    X, again = (oracles.linear_layer_design(part, 2) for part in (x, x[kept]))
    weight, bias = PRIORS["unequal"]
    mean, covariance, _ = oracles.linear_posterior(
        torch.cat([X / NOISE, again / 0.5]),
        torch.cat([y.flatten() / NOISE, y[kept].flatten() / 0.5]), 1.0,
        torch.zeros(8).double(), X.new_tensor([weight**-2] * 6 + [bias**-2] * 2),
    )
    assert_posterior(ngvi.guide, mean, covariance)


@pytest.mark.parametrize("kind", ["fisher", "empirical"])
def test_masked_examples_have_no_sampled_curvature(kind: str) -> None:
    x, y = regression_data()
    x[::3] = 1e3  # would drown all the rest
    curvature = Curvature(kind, every=1, batch=None, initial=0.0, num_samples=50)
    ngvi = exactly(Line(mask_by_handler), "full", curvature=curvature)
    ngvi.step(x, y)
    X = oracles.linear_layer_design(x[torch.arange(len(x)) % 3 > 0], 2)
    assert ngvi.guide.posterior.precision.trace() < 100 * (X.T @ X / NOISE**2).trace()


@each_correlated
@pytest.mark.parametrize("sizes", [(30, 30), (60, 30), (30, 90)])
def test_several_observed_sites(structure: str, sizes: tuple[int, int]) -> None:
    """Two instruments read the same line; each in its own plate, of its own size."""
    x, y = regression_data()
    second = y + torch.randn_like(y)

    class Two(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 2).double(), normal_prior(*PRIORS["unequal"]))

        def forward(self, x: Tensor, one: Tensor, two: Tensor) -> None:
            mean = self.net(x)
            with pyro.plate("one", sizes[0], subsample_size=len(x)):
                plain(mean, one, "first", NOISE)
            with pyro.plate("two", sizes[1], subsample_size=len(x)):
                plain(mean, two, "second", 0.5)

    ngvi = exactly(Two(), structure)
    ngvi.step(x, y, second)
    X, root = oracles.linear_layer_design(x, 2), [(size / NUM_DATA) ** 0.5 for size in sizes]
    weight, bias = PRIORS["unequal"]
    delta = torch.cat([torch.full((6,), weight**-2), torch.full((2,), bias**-2)]).double()
    delta = delta.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    mean, covariance, evidence = oracles.linear_posterior(
        torch.cat([X * root[0] / NOISE, X * root[1] / 0.5]),
        torch.cat([y.flatten() * root[0] / NOISE, second.flatten() * root[1] / 0.5]),
        1.0, torch.zeros(8).double(), delta,
    )
    assert_posterior(ngvi.guide, mean, covariance)
    if sizes == (30, 30):
        units = -y.numel() * (math.log(NOISE) + math.log(0.5))
        expected = float(evidence) + units
        assert -ngvi.evaluate_loss(x, y, second) == pytest.approx(expected, rel=1e-11, abs=1e-9)


def assert_exact(model: Any, x: Tensor, y: Tensor, *args: Tensor) -> None:
    """One step at `args`, or x and y, gives the posterior under PRIORS["unequal"]."""
    ngvi = exactly(model, "kfac")
    ngvi.step(*(args or (x, y)))
    assert_posterior(ngvi.guide, *truth(x, y, "unequal")[:2])


def test_a_conditioned_model() -> None:
    x, y = regression_data()
    assert_exact(pyro.condition(linear("unequal"), data={"obs": y}), x, y, x)


def test_a_conditioned_noise_scale() -> None:
    """An observed site that is no data, and of another length than they."""
    model = linear("unequal")
    model.noise = None
    sigma = torch.tensor(NOISE, dtype=torch.float64)
    assert_exact(pyro.condition(model, data={"sigma": sigma}), *regression_data())


class Beside(PyroModule):
    """A linear regression with another site before or after its own."""

    def __init__(self, other: Callable[[Tensor], Any], before: bool) -> None:
        super().__init__()
        self.line, self.other, self.before = Line(plain), other, before

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        if self.before:
            self.other(x)
        self.line(x, y)
        if not self.before:
            self.other(x)


@pytest.mark.parametrize("before", [True, False])
def test_a_factor_beside_the_data(before: bool) -> None:
    factor = partial(pyro.factor, "penalty", torch.tensor(-1.5).double())
    assert_exact(Beside(lambda x: factor(), before), *regression_data())


@pytest.mark.parametrize("before", [True, False])
def test_observed_sites_that_the_weights_have_no_part_in(before: bool) -> None:
    def inputs_are_normal(x: Tensor) -> None:
        with pyro.plate("inputs", 2 * NUM_DATA, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)

    assert_exact(Beside(inputs_are_normal, before), *regression_data())


def shifted(mean: Tensor, y: Tensor | None) -> None:
    standard = dist.Normal(torch.zeros_like(mean), NOISE)
    shift = dist.transforms.AffineTransform(mean, 1.0)
    pyro.sample("obs", dist.TransformedDistribution(standard, [shift]).to_event(1), obs=y)


def mixed(mean: Tensor, y: Tensor | None) -> None:
    parts = dist.Normal(mean.unsqueeze(1).expand(-1, 2, -1), NOISE).to_event(1)
    weights = dist.Categorical(torch.ones(len(mean), 2).double())
    pyro.sample("obs", dist.MixtureSameFamily(weights, parts), obs=y)


@pytest.mark.parametrize("observe", [shifted, mixed])
def test_a_composite_likelihood_beside_another_site(observe: Any) -> None:
    """As a normal twice: what is a shift or a mixture in name has the same density."""
    x, y = regression_data()
    spec = Curvature("empirical", every=1, batch=None, initial=0.0)
    found = []
    for second in (observe, plain):
        def both(mean: Tensor, y: Tensor | None, second: Any = second) -> None:
            plain(mean, y, "first")
            second(mean, y)

        torch.manual_seed(3)
        ngvi = exactly(Line(both), "full", curvature=spec)
        ngvi.step(x, y)
        found.append(ngvi.guide.posterior.precision.dense())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (40,)])
def test_an_observed_penalty_beside_the_data(shape: tuple[int, ...], before: bool) -> None:
    """In no plate, so it is no example, however many numbers it has; and so flat as to be none."""
    x, y = regression_data()

    class Penalised(Line):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            value = dist.Normal(mean.square().mean().expand(shape), 1e5).to_event(len(shape))
            penalty = partial(pyro.sample, "penalty", value, obs=torch.zeros(shape).double())
            if before:
                penalty()
            with pyro.plate("data", self.num_data, subsample_size=len(x)):
                self.observe(mean, y)
            if not before:
                penalty()

    with pytest.raises(ValueError, match="'penalty' has one density for all examples"):
        exactly(Penalised(plain), "block").step(x, y)
    ngvi = exactly(Penalised(plain), "block", curvature=replace(EXACT, kind="hessian"))
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal")
    posterior = ngvi.guide.posterior
    torch.testing.assert_close(posterior.loc, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.linalg.inv(posterior.precision.dense()), covariance)


def test_a_plate_for_the_outputs_too() -> None:
    def observe(mean: Tensor, y: Tensor | None) -> None:
        pyro.sample("obs", dist.Normal(mean, NOISE), obs=y)

    class Nested(Line):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            data = pyro.plate("data", NUM_DATA, subsample_size=len(x), dim=-2)
            with pyro.plate("outputs", 2, dim=-1), data:
                self.observe(mean, y)

    assert_exact(Nested(observe), *regression_data())


def test_a_model_that_draws_its_own_mini_batch() -> None:
    x, y = regression_data()

    class Inside(Line):
        def forward(self, x: Tensor, y: Tensor) -> None:
            plate = pyro.plate("data", NUM_DATA, subsample_size=10)
            mean = self.net(x[plate.indices])
            with plate:
                plain(mean, y[plate.indices])

    model = Inside(plain)
    ngvi = NGVI(model, KFACGuide(model), lr=0.2, kl_clip=None, curvature="ggn")
    losses = [ngvi.step(x, y) for _ in range(80)]
    mean, covariance, evidence = truth(x, y, "unequal")
    assert len(set(losses)) == 80
    far = (ngvi.guide.posterior.loc - mean).square() / covariance.diag()
    assert far.mean() < 9


LIKELIHOODS: dict[str, tuple[Callable[[Tensor], dist.Distribution], Callable[[Tensor], Tensor]]] = {
    "bernoulli": (lambda f: dist.Bernoulli(logits=f).to_event(1), lambda y: (y > 0).double()),
    "poisson": (lambda f: dist.Poisson(f.exp()).to_event(1), lambda y: y.exp().round()),
    "student": (lambda f: dist.StudentT(4.0, f, 0.3).to_event(1), lambda y: y),
    "lognormal": (lambda f: dist.LogNormal(f, 0.3).to_event(1), torch.exp),
    "mixture": (
        lambda f: dist.MixtureSameFamily(
            dist.Categorical(torch.ones_like(f)), dist.Normal(f, 0.5)
        ),
        lambda y: y[:, 0],
    ),
    "heteroscedastic": (lambda f: dist.Normal(f[:, 0], f[:, 1].exp()), lambda y: y[:, 0]),
    "negative binomial": (
        lambda f: dist.NegativeBinomial(3.0, logits=f).to_event(1), lambda y: y.exp().round()
    ),
    "ordered": (
        lambda f: dist.OrderedLogistic(f[:, 0], f.new_tensor([-1.0, 1.0])),
        lambda y: (y[:, 0].sign() + 1).long(),
    ),
}


@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_any_likelihood(likelihood: str, kind: str) -> None:
    make, targets = LIKELIHOODS[likelihood]

    def observe(mean: Tensor, y: Tensor | None) -> None:
        pyro.sample("obs", make(mean), obs=y)

    model, (x, y) = Line(observe), regression_data()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1, curvature=kind)
    if kind == "ggn" and likelihood == "mixture":
        with pytest.raises(ValueError, match="curvature='ggn' supports .* use 'fisher'"):
            ngvi.step(x, targets(y))
        return
    losses = [ngvi.step(x, targets(y)) for _ in range(40)]
    assert sum(losses[-10:]) / 10 < losses[0]


def test_a_model_without_a_plate_has_its_batch_for_data() -> None:
    x, y = regression_data()
    net = bayesianize(nn.Linear(3, 2).double(), normal_prior(*PRIORS["unequal"]))

    class Bare(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, y: Tensor) -> None:
            plain(self.net(x), y)

    ngvi = exactly(Bare(), "kfac")
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal")
    assert_posterior(ngvi.guide, mean, covariance)


class Dropping(PyroModule):
    """A residual network whose middle layer is left out of some runs."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)])
        self.net = bayesianize(layers.double())
        self.drops = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        hidden = self.net[0](x).tanh()
        if not self.drops:
            hidden = hidden + self.net[1](hidden).tanh()
        mean = self.net[2](hidden)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize("kind", ["fisher", "hessian"])
@pytest.mark.parametrize("every", [1, 3, "auto"])
@pytest.mark.parametrize("first", [True, False], ids=["dropped at first", "there at first"])
@each
def test_a_layer_left_out_of_some_runs(structure: str, first: bool, every: Any, kind: str) -> None:
    model, data = Dropping(), regression_data()
    guide = GUIDES[structure](model)
    guide(*data)
    ngvi = NGVI(model, guide, curvature=Curvature(kind, every=every), lr=0.1, momentum=0.0)
    prior = partial(guide.get_posterior, "net.1.weight")
    losses = []
    for step in range(12):
        model.drops = (step % 2 == 0) == first
        losses.append(ngvi.step(*data))
        if model.drops and step == 0:  # the prior and the initial curvature are all there is
            delta, faint = 5 / ngvi.temperature, 0.1 * NUM_DATA
            scale = torch.full((4, 4), (delta + faint) ** -0.5).double()
            torch.testing.assert_close(prior().base_dist.scale, scale)
        assert math.isfinite(losses[-1]) and math.isfinite(ngvi.evaluate_loss(*data))
    assert sum(losses[-4:]) < sum(losses[:4])
    state = ngvi.state_dict()["state"]["blocks"]
    assert all(block["running"]["count"] > 0 for block in state)


def test_a_wide_layer_left_out_at_first() -> None:
    model, data = Dropping(170), regression_data()
    guide = KFACGuide(model)
    guide(*data)
    ngvi = NGVI(model, guide, lr=0.1)
    for model.drops in (True, False, True):
        assert math.isfinite(ngvi.step(*data))
    assert [count.updates for count in ngvi.update_counts().values()] == [1, 1, 1]


def test_a_layer_left_out_moves_by_its_prior_alone() -> None:
    model, data = Dropping(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), momentum=0.0, damping=0.0, kl_clip=None, lr=0.5)
    ngvi.step(*data)
    model.drops = True
    before = ngvi.guide.median()["net.1.weight"]
    ngvi.step(*data)
    after = ngvi.guide.median()["net.1.weight"]
    assert after.norm() < before.norm()


def test_a_functional_model() -> None:
    x, y = regression_data()
    zero = torch.zeros(()).double()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(zero, 0.7).expand([2, 3]).to_event(2))
        b = pyro.sample("b", dist.Normal(zero, 1.9).expand([2]).to_event(1))
        assert w.shape == (2, 3)
        mean = nn.functional.linear(x, w, b)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)

    ngvi = exactly(model, "kfac")
    ngvi.step(x, y)
    mean, covariance, _ = truth(x, y, "unequal")
    assert ngvi.guide.sites == {"w": (2, 3), "b": (2,)}
    torch.testing.assert_close(ngvi.guide.posterior.loc, mean, rtol=1e-6, atol=1e-6)


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


# ---- the step's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, 0.4])
def test_momentum_is_of_the_likelihood_gradient(initial: float) -> None:
    """M ← M - lr d by hand, in a linear model without noise of the samples."""
    x, y = regression_data()
    curvature = Curvature("ggn", every=1, batch=None, initial=initial)
    ngvi = exactly(linear("unequal"), "full", lr=0.1, momentum=0.8, damping=0.05, num_particles=2,
                   curvature=curvature)
    ngvi.guide(x, y)
    loc = ngvi.guide.posterior.loc.clone()
    X, n = oracles.linear_layer_design(x, 2), NUM_DATA
    C = X.T @ X / NOISE**2 / n
    weight, bias = PRIORS["unequal"]
    delta = C.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    m, eye = torch.zeros(8).double(), torch.eye(8).double()
    for t in range(1, 6):
        P = C + torch.diag(delta) / n + (0.05 + initial * 0.95 ** (t - 1)) * eye
        m = 0.8 * m + 0.2 * X.T @ (X @ loc - y.flatten()) / NOISE**2 / n
        loc = loc - 0.1 * torch.linalg.solve(P, m / (1 - 0.8**t) + delta * loc / n)
        ngvi.step(x, y)
        torch.testing.assert_close(ngvi.guide.posterior.loc, loc, rtol=1e-9, atol=1e-9)


def test_the_clip_bounds_a_step() -> None:
    """lr₀² ν² <d, h> <= kl_clip, over all blocks; d and h by hand from the unclipped step."""
    data, model = regression_data(), Regressor(mlp(0.8, 0.8), NUM_DATA, noise=NOISE)
    plain = NGVI(model, KFACGuide(model), lr=0.5, curvature=EXACT, kl_clip=None, momentum=0.0)
    start = KFACGuide(model)
    start(*data)
    plain.step(*data)
    clipped = NGVI(model, KFACGuide(model), lr=0.5, curvature=EXACT, kl_clip=1e-3, momentum=0.0)
    clipped.step(*data)
    free, held = ((ngvi.guide.posterior.loc - start.posterior.loc).detach()
                  for ngvi in (plain, clipped))
    precision = clipped.guide.posterior.precision.dense().detach()  # N/T (P - damping)
    inner = held @ precision @ held / NUM_DATA + 3e-3 * held @ held  # lr² ν² <d, P d>
    assert float(inner) == pytest.approx(1e-3, rel=1e-6)
    torch.testing.assert_close(held / held.norm(), free / free.norm())
    assert held.norm() < free.norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_learned_log_scale_does_not_run_away(seed: int) -> None:
    """Under wide priors: losses of 1e15 at unlucky samples, whose gradients momentum would keep."""
    torch.manual_seed(seed)
    net = bayesianize(nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 2)), 1.0)

    def model(x: Tensor, y: Tensor) -> None:
        mean, log_scale = net(x).unbind(-1)
        with pyro.plate("data", 300, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(mean, log_scale.exp()), obs=y)

    x = torch.randn(300, 1)
    y = torch.sin(2 * x[:, 0]) + (0.1 + 0.3 * torch.sigmoid(2 * x[:, 0])) * torch.randn(300)
    ngvi, losses = NGVI(model, KFACGuide(model), temperature=0.3), []
    for _ in range(400):
        rows = torch.randint(300, (64,))
        losses.append(ngvi.step(x[rows], y[rows]))
    early, late = (torch.tensor(losses[n : n + 100]).median() for n in (100, 300))
    assert max(losses) > 1e6 and late < 0.8 * early


@pytest.mark.parametrize(("structure", "every", "eigen_every", "turned"), [
    ("full", 3, 200, [3, 6, 9, 12]), ("diag", 3, 200, [3, 6, 9, 12]),
    ("ekfac", 3, 200, [3, 6, 9, 12]),
    ("kfac", 3, 200, [3, 9]),  # with the eigendecompositions: at the 2nd and 4th estimate
    ("kfac", 2, 5, [2, 6, 10]),  # and at the first estimate from steps 5 and 10 on
    ("kfac", 1, 5, [1, 3, 5, 7, 10]),
])
def test_curvature_is_estimated_every_so_often(
    structure: str, every: int, eigen_every: int, turned: list[int]
) -> None:
    data, model = regression_data(), regressor()
    curvature = Curvature("fisher", every=every, eigen_every=eigen_every, initial=0.0)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature)
    precisions = []
    for _ in range(14):
        ngvi.step(*data)
        precisions.append(ngvi.guide.posterior.precision.dense())
    pairs = zip(precisions, precisions[1:], strict=False)
    assert [t + 1 for t, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == turned


@pytest.mark.parametrize("decay", [0.95, 0.5, 0.0])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_curvature_is_averaged_equally_at_first(structure: str, decay: float) -> None:
    """The n-th estimate comes in with weight max(1 - decay, 1/n)."""
    curvature = Curvature("ggn", every=1, batch=None, initial=0.0, decay=decay)
    ngvi = exactly(linear("unequal"), structure, curvature=curvature, lr=0.1)
    weight, bias = PRIORS["unequal"]
    delta = torch.tensor([weight**-2] * 6 + [bias**-2] * 2).double()
    C = torch.zeros(8, 8).double()
    for n in range(1, 6):
        x, y = regression_data()
        ngvi.step(x, y)
        X = oracles.linear_layer_design(x, 2)
        C = C.lerp(X.T @ X / NOISE**2, max(1 - decay, 1 / n))
        expected = C if structure == "full" else torch.diag(C.diag())
        found = ngvi.guide.posterior.precision.dense()
        torch.testing.assert_close(found, expected + torch.diag(delta))


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_empirical_fisher_is_that_of_the_tempered_likelihood(factor: float) -> None:
    """Λ = scale · sum_n g gᵀ + δ, with g of one example at the mean."""

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=factor):
            plain(mean, y)

    x, y = regression_data(10)
    curvature = Curvature("empirical", every=1, batch=None, initial=0.0)
    ngvi = exactly(Line(observe), "full", curvature=curvature)
    ngvi.guide(x, y)
    start = ngvi.guide.posterior.loc.detach().clone()
    ngvi.step(x, y)
    X = oracles.linear_layer_design(x, 2)
    residuals = (X @ start - y.flatten()) / NOISE**2
    g = (X * residuals[:, None]).view(10, 2, 8).sum(1)
    weight, bias = PRIORS["unequal"]
    delta = g.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    expected = factor * NUM_DATA / 10 * g.T @ g + torch.diag(delta)
    torch.testing.assert_close(ngvi.guide.posterior.precision.dense(), expected)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_sampled_fisher_is_that_of_the_tempered_likelihood(factor: float) -> None:
    """Its mean over K draws is scale · XᵀX/σ², with a standard error from Isserlis' theorem."""

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=factor):
            plain(mean, y)

    x, y = regression_data()
    curvature = Curvature("fisher", every=1, batch=None, initial=0.0, num_samples=400)
    ngvi = exactly(Line(observe), "full", curvature=curvature)
    ngvi.step(x, y)
    J = oracles.linear_layer_design(x, 2).view(NUM_DATA, 2, 8) / NOISE
    each = torch.einsum("noi,noj->nij", J, J)  # of an example
    diagonals = each.diagonal(dim1=1, dim2=2)
    variance = (diagonals[:, :, None] * diagonals[:, None] + each.square()).sum(0) / 400
    weight, bias = PRIORS["unequal"]
    delta = x.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    found = (ngvi.guide.posterior.precision.dense() - torch.diag(delta)) / factor
    assert ((found - each.sum(0)).abs() < 5 * variance.sqrt() + 1e-9).all()


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical"])
@each
def test_a_network_learns(structure: str, kind: str) -> None:
    model, data = classifier(), class_data()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1, temperature=0.1, curvature=kind)
    losses = [ngvi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


# ---- schedules and other optimizers -------------------------------------------------------------


def test_a_schedule_turns_the_learning_rates() -> None:
    """Of the mean, and in proportion that of a torch optimizer of the rest."""
    data, model = regression_data(), regressor(noise=None)
    made: list[torch.optim.Optimizer] = []

    def optim(params: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(params, lr=0.5))
        return made[-1]

    ngvi = NGVI(model, KFACGuide(model), lr=0.2, optim=optim)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, T_max=4)
    for t in range(4):
        ngvi.step(*data)
        factor = (1 + math.cos(math.pi * t / 4)) / 2
        assert ngvi.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * factor)
        assert all(g["lr"] == pytest.approx(0.5 * factor) for g in made[0].param_groups)
        schedule.step()
    assert len(made) == 1
    before = ngvi.guide.posterior.loc.clone()
    ngvi.step(*data)  # at a rate of 0
    torch.testing.assert_close(ngvi.guide.posterior.loc, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", [
    partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20,
            cycle_momentum=False),
    partial(torch.optim.lr_scheduler.StepLR, step_size=2),
    partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: 1 / (t + 1)),
    partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1),
], ids=["one cycle", "step", "lambda", "plateau"])
def test_other_schedules(schedule: Any) -> None:
    data, model = regression_data(), regressor()
    ngvi = NGVI(model, KFACGuide(model))
    scheduler = schedule(ngvi.optimizer)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for _ in range(5):
        loss = ngvi.step(*data)
        scheduler.step(loss) if plateau else scheduler.step()


def test_the_optimizer_alone_makes_no_step() -> None:
    model = regressor()
    with pytest.raises(RuntimeError, match=r"call ngvi.step\(...\)"):
        NGVI(model, KFACGuide(model)).optimizer.step()


OPTIMS: dict[str, Any] = {
    "default": None,
    "class": torch.optim.Adam,
    "factory": lambda params: torch.optim.AdamW(params, lr=0.05),
    "PyroOptim": pyro.optim.Adam({"lr": 0.05}),
    "PyroOptim, clipped": pyro.optim.ClippedAdam({"lr": 0.05}),
}


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_rest_is_trained_by_optim(optim: str) -> None:
    """Parameters of a module, a `pyro.param`, and the fallback guide of sigma."""

    class Mixed(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(
                nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
            )
            self.spread = PyroParam(torch.ones(2).double(), dist.constraints.positive)

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x) * self.spread
            factor = pyro.param("factor", lambda: torch.ones(2).double(),
                                constraint=dist.constraints.positive)
            sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 1.0))
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(factor * mean, sigma).to_event(1), obs=y)

    model, data = Mixed(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), optim=OPTIMS[optim])
    ngvi.guide(*data)
    params = {**dict(model.named_parameters()), **dict(ngvi.guide.fallback.named_parameters())}
    before = {name: value.detach().clone() for name, value in params.items()}
    assert {"net.1.weight", "net.1.bias", "spread_unconstrained"} <= set(before)
    assert len(before) == 5
    losses = [ngvi.step(*data) for _ in range(30)]
    assert all(not torch.equal(value, before[name]) for name, value in params.items())
    assert (pyro.param("factor") != 1).all()
    assert losses[-1] < losses[0]


def test_parameters_that_take_no_part_stay() -> None:
    model, data = regressor(), regression_data()
    model.spare = nn.Parameter(torch.ones(3))
    ngvi = NGVI(model, KFACGuide(model), optim=partial(torch.optim.AdamW, weight_decay=0.5))
    ngvi.step(*data), ngvi.step(*data)
    assert torch.equal(model.spare, torch.ones(3))


@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
@pytest.mark.parametrize("called", [False, True], ids=["guide new", "guide called"])
def test_frozen_parameters_stay_frozen(local: bool, called: bool) -> None:
    """A posterior over the last layer of a network whose other layers are kept as they are."""
    with pyro.settings.context(module_local_params=local):
        net = norm_net()
        net.requires_grad_(False)
        model, data = Regressor(bayesianize(net, layers=["3"]), NUM_DATA), regression_data()
        before = {name: value.clone() for name, value in model.named_parameters()}
        ngvi = NGVI(model, KFACGuide(model))
        if called:
            ngvi.guide(*data)
        for _ in range(3):
            ngvi.step(*data)
        assert list(ngvi.guide.sites) == ["net.3.weight", "net.3.bias"] and len(before) == 4
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert not any(value.requires_grad for value in model.parameters())


def test_a_step_under_no_grad() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with torch.no_grad():
        losses = [ngvi.step(*data) for _ in range(3)]
    assert all(map(math.isfinite, losses))


def test_nobodys_grad_is_touched() -> None:
    model, data = Regressor(bayesianize(norm_net()), NUM_DATA), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.guide(*data)
    params = [*model.parameters(), *ngvi.guide.parameters()]
    assert len(params) > 4
    for p in params[::2]:
        p.grad = torch.full_like(p, 7.0)
    held = [p.grad for p in params]
    for _ in range(3):
        ngvi.step(*data)
    assert all(p.grad is g for p, g in zip(params, held, strict=True))
    assert all((g == 7).all() for g in held if g is not None)


def norm_net() -> nn.Module:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


# ---- hierarchical priors ------------------------------------------------------------------------


class Hierarchical(PyroModule):
    """Weights of unknown standard deviation tau."""

    def __init__(self, prior: Callable[[Any], dist.Distribution]) -> None:
        super().__init__()
        self.tau = PyroSample(dist.LogNormal(torch.zeros(()).double(), 1.0))
        self.layer = PyroModule[nn.Linear](20, 4, bias=False)
        self.layer.weight = PyroSample(lambda _: prior(self.tau))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.layer(x)
        with pyro.plate("data", 200, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.1).to_event(1), obs=y)


@pytest.mark.parametrize(("structure", "scale"), [*((s, 0.3) for s in GUIDES), ("kfac", 3.0)])
def test_a_hierarchical_prior(structure: str, scale: float) -> None:
    """With 80 weights all but known, log tau is log rms(w) give or take 1/sqrt(160)."""
    model = Hierarchical(lambda tau: dist.Normal(0 * tau, tau).expand([4, 20]).to_event(2))
    x = torch.randn(200, 20).double()
    weight = scale * torch.randn(4, 20).double()
    y = x @ weight.T + 0.1 * torch.randn(200, 4).double()
    guide = GUIDES[structure](model, init_loc_fn=init_to_value(values={"layer.weight": 0 * weight}))
    ngvi = NGVI(model, guide, lr=0.3, kl_clip=None, curvature="ggn",
                optim=partial(torch.optim.Adam, lr=0.05, betas=(0.9, 0.99)))
    for _ in range(100):
        ngvi.step(x, y)
    assert ngvi.guide.fallback_sites == ("tau",)
    tau, rms = ngvi.guide.median()["tau"], weight.square().mean().sqrt()
    assert abs(tau.log() - rms.log()) < 3 / math.sqrt(160)


class Changing(PyroModule):
    """A linear regression whose priors are new distributions in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {"weight": 0.7, "bias": 0.7}
        self.net = PyroModule[nn.Linear](3, 2).double()
        for name, shape in (("weight", [2, 3]), ("bias", [2])):
            setattr(self.net, name, PyroSample(partial(self.prior, name, shape)))

    def prior(self, name: str, shape: list[int], _: Any) -> dist.Distribution:
        zero = torch.zeros(()).double()
        return dist.Normal(zero, zero + self.scales[name]).expand(shape).to_event(len(shape))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@each_correlated
def test_a_prior_is_read_anew_when_it_has_changed(structure: str) -> None:
    """Also its units: the eigenbasis is reckoned in them, whether or not one is due."""
    x, y = regression_data()
    model = Changing()
    curvature = Curvature("ggn", every=1, batch=None, initial=0.0, decay=0.0)
    ngvi = exactly(model, structure, curvature=curvature, num_particles=2)
    ngvi.step(x, y)
    changes = [(0.7, 0.7), (0.2, 0.2), (0.2, 5.0), (3.0, 0.5), (1.0, 1.0), (2.0, 0.3)]
    for weight, bias in changes:  # at the 2nd to 7th estimate
        model.scales.update(weight=weight, bias=bias)
        ngvi.step(x, y)
        expected = oracles.linear_layer_posterior(x, y, NOISE, weight**-2, bias**-2)
        assert_posterior(ngvi.guide, *expected[:2])
        loss = ngvi.evaluate_loss(x, y)
        assert -loss == pytest.approx(float(expected[2]), rel=1e-11, abs=1e-9)


@pytest.mark.parametrize("start", [0.3, 5.0])
def test_a_prior_with_a_trained_parameter(start: float) -> None:
    """Empirical Bayes: at the optimum tau² is the mean of w² under the posterior."""

    class Empirical(Hierarchical):
        def __init__(self) -> None:
            super().__init__(lambda _: dist.Normal(
                torch.zeros(()).double(),
                pyro.param("scale", lambda: torch.tensor(start).double(),
                           constraint=dist.constraints.positive),
            ).expand([4, 20]).to_event(2))
            del self.tau
            self.tau = None

    model = Empirical()
    x = torch.randn(200, 20).double()
    y = x @ torch.randn(4, 20).double().T + 0.1 * torch.randn(200, 4).double()
    ngvi = NGVI(model, KFACGuide(model), lr=0.3, kl_clip=None, curvature="ggn",
                optim=partial(torch.optim.Adam, lr=0.1, betas=(0.9, 0.99)))
    for _ in range(150):
        ngvi.step(x, y)
    posterior = ngvi.guide.posterior
    expected = (posterior.loc.square() + posterior.variance).mean().sqrt()
    torch.testing.assert_close(pyro.param("scale").log(), expected.log(), rtol=0, atol=0.05)


# ---- checkpoints --------------------------------------------------------------------------------


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(12, 3),
    )


def conv_model() -> Classifier:
    return Classifier(bayesianize(conv_net()), 40)


def sigma_model() -> Regressor:
    return Regressor(bayesianize(norm_net(), normal_prior(0.5, 1.0)), NUM_DATA)


def wide_model() -> Classifier:
    net = nn.Sequential(nn.Linear(170, 165), nn.ReLU(), nn.Linear(165, 3))
    return Classifier(bayesianize(net), 40)


def wide_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 170), torch.randint(3, (8,))) for _ in range(12)]


def conv_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(12)]


def sigma_batches() -> list[tuple[Tensor, Tensor]]:
    return [regression_data(10) for _ in range(12)]


RUNS: dict[str, tuple[Callable[[], Any], Callable[[], list[tuple[Tensor, Tensor]]]]] = {
    "conv": (conv_model, conv_batches), "sigma": (sigma_model, sigma_batches),
    "wide": (wide_model, wide_batches),
}


class Training:
    """Model, guide, inference and schedule, as a program would set them up."""

    def __init__(self, run: str, structure: str, **options: Any) -> None:
        curvature = Curvature("fisher", every=2, eigen_every=4, batch=6)
        self.model = RUNS[run][0]()
        self.guide = GUIDES[structure](self.model)
        self.ngvi = NGVI(self.model, self.guide, lr=0.1, curvature=curvature, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.ngvi.optimizer, T_max=12)

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        losses = []
        for x, y in batches:
            losses.append(self.ngvi.step(x, y))
            self.schedule.step()
        return losses

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in vars(self).items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in vars(self).items():
            part.load_state_dict(state[name])

    def everything(self) -> list[Any]:
        return everything(self.ngvi)


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    else:
        yield value.clone() if isinstance(value, Tensor) else value


def everything(ngvi: NGVI) -> list[Any]:
    """Copies of all that a step may change."""
    store = {name: value.detach() for name, value in pyro.get_param_store().items()}
    parts = [ngvi.guide.state_dict(), ngvi.state_dict(), store]
    if isinstance(ngvi.model, nn.Module):
        parts.append(ngvi.model.state_dict())
    return list(leaves(parts))


def identical(a: list[Any], b: list[Any]) -> bool:
    """Bit for bit."""
    pairs = zip(a, b, strict=False)
    same = (torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)
    return len(a) == len(b) and all(same)


def tensors(training: Training) -> list[Tensor]:
    parts = [training.guide.state_dict(), training.ngvi.state_dict(), training.model.state_dict()]
    return [leaf for leaf in leaves(parts) if isinstance(leaf, Tensor)]


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "averaged": {"average": True},
    "particles": {"num_particles": 3},
    "SGD": {"optim": partial(torch.optim.SGD, lr=0.01, momentum=0.9)},
}
CHECKPOINTS = [(run, structure, "defaults") for run in ("conv", "sigma") for structure in GUIDES]
CHECKPOINTS += [("wide", structure, "defaults") for structure in ("kfac", "ekfac")]
CHECKPOINTS += [("conv", "ekfac", o) for o in OPTIONS] + [("sigma", "kfac", o) for o in OPTIONS]


@pytest.mark.parametrize(("run", "structure", "options"), dict.fromkeys(CHECKPOINTS))
@pytest.mark.parametrize("steps", [4, 5])  # between the two of an antithetic pair, and after one
def test_a_run_is_resumed_bit_for_bit(run: str, structure: str, options: str, steps: int) -> None:
    batches = RUNS[run][1]()
    torch.manual_seed(1)
    straight = Training(run, structure, **OPTIONS[options])
    expected = straight.run(batches)
    torch.manual_seed(1)
    first = Training(run, structure, **OPTIONS[options])
    losses = first.run(batches[:steps])
    saved = first.save()
    first.run(batches[steps:7])  # a checkpoint must be a copy
    pyro.clear_param_store()  # another process
    torch.manual_seed(99)
    second = Training(run, structure, **OPTIONS[options])
    second.load(saved)
    losses += second.run(batches[steps:])
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(tensors(second), tensors(straight), strict=True))


class Alternating(PyroModule):
    """A parameter takes part in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(norm_net())
        self.shift = nn.Parameter(torch.zeros(2).double())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x) + (self.shift if self.calls % 2 == 0 else 0.0)
        self.calls += 1
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_parameter_of_some_steps_only_is_resumed(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "alternating", (Alternating, sigma_batches))
    batches = sigma_batches()
    torch.manual_seed(1)
    straight = Training("alternating", "kfac").run(batches)
    torch.manual_seed(1)
    first = Training("alternating", "kfac")
    losses = first.run(batches[:steps])
    second = Training("alternating", "kfac")
    second.load(first.save())
    assert losses + second.run(batches[steps:]) == straight


class Late(PyroModule):
    """Parameters that are met late, in some steps only, and not in the order of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(norm_net())
        self.shift = nn.Parameter(torch.zeros(2).double())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x)
        if self.calls >= 3:
            mean = mean + pyro.param("late", torch.zeros(2).double())
        if self.calls % 3 == 1:
            mean = mean * pyro.param("often", torch.ones(2).double())
        if self.calls >= 2:
            mean = mean + self.shift
        self.calls += 1
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize("options", ["defaults", "SGD"])
@pytest.mark.parametrize("steps", [2, 4, 6, 7])
def test_parameters_met_late_are_resumed(
    steps: int, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "late", (Late, sigma_batches))
    batches = sigma_batches()
    torch.manual_seed(1)
    straight = Training("late", "kfac", **OPTIONS[options]).run(batches)
    pyro.clear_param_store()
    torch.manual_seed(1)
    first = Training("late", "kfac", **OPTIONS[options])
    losses = first.run(batches[:steps])
    saved, store = first.save(), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(store)
    second = Training("late", "kfac", **OPTIONS[options])
    second.load(saved)
    second.load(second.save())  # before the parameters are met again
    assert losses + second.run(batches[steps:]) == straight


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_back_to_its_checkpoint(run: str) -> None:
    batches, training = RUNS[run][1](), Training(run, "kfac")
    training.run(batches[:5])
    saved = training.save()
    expected = training.run(batches[5:])
    training.load(saved)
    assert training.run(batches[5:]) == expected


def test_a_run_goes_back_to_its_start() -> None:
    batches, training = sigma_batches(), Training("sigma", "kfac")
    training.guide(*batches[0])
    saved = training.save()
    expected = training.run(batches)
    training.load(saved)
    assert training.run(batches) == expected


def test_a_run_goes_on_whatever_else_draws_random_numbers() -> None:
    batches = conv_batches()
    runs = []
    for other_draws in (0, 5):
        torch.manual_seed(1)
        training = Training("conv", "kfac")
        training.guide(*batches[0])
        losses = []
        for batch in batches:
            torch.randn(other_draws)
            losses += training.run([batch])
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_seed_reaches_the_stream() -> None:
    batches, runs = conv_batches(), []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        training = Training("conv", "kfac")
        torch.manual_seed(seed)
        training.ngvi = NGVI(training.model, training.guide)
        runs.append([training.ngvi.step(*batch) for batch in batches])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("called", [True, False], ids=["guide called", "guide new"])
def test_a_step_leaves_the_global_generator_alone(called: bool) -> None:
    batches, training = conv_batches(), Training("conv", "kfac")
    if called:
        training.guide(*batches[0])
    before = torch.get_rng_state()
    training.run(batches[:3])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_other_blocks() -> None:
    batches, training = conv_batches(), Training("conv", "kfac")
    training.run(batches[:2])
    other = Training("sigma", "kfac")
    other.run(sigma_batches()[:2])
    before = other.everything()
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        other.ngvi.load_state_dict(training.ngvi.state_dict())
    assert identical(other.everything(), before)


STRUCTURES: list[Any] = ["kfac", "block", "ekfac", "kfac-block", KFAC(rank=2), KFAC(rank=None)]


@pytest.mark.parametrize("there", STRUCTURES[1:], ids=str)
def test_a_state_of_another_structure(there: Any) -> None:
    """Of as many weights, in blocks of the same layers."""
    model, data = regressor(), regression_data()

    def make(structure: Any) -> NGVI:
        return NGVI(model, KFACGuide(model, structure={nn.Linear: structure}))

    ngvi, other = make(there), make("kfac")
    ngvi.step(*data)
    other.step(*data)
    before = everything(other)
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        other.load_state_dict(ngvi.state_dict())
    assert identical(everything(other), before)
    fresh = make("kfac")
    fresh.load_state_dict(ngvi.state_dict())
    fresh.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        fresh.step(*data)


@pytest.mark.parametrize("average", [True, False])
def test_a_state_with_another_average(average: bool) -> None:
    model, data = regressor(), regression_data()
    guide = KFACGuide(model)
    ngvi, other = NGVI(model, guide, average=average), NGVI(model, guide, average=not average)
    ngvi.step(*data)
    before = everything(other)
    with pytest.raises(ValueError, match=f"is of average={average}, this .* average={not average}"):
        other.load_state_dict(ngvi.state_dict())
    assert identical(everything(other), before)


def test_a_state_before_the_first_step() -> None:
    training, batches = Training("conv", "kfac"), conv_batches()
    state = training.ngvi.state_dict()
    training.ngvi.load_state_dict(state)
    training.run(batches[:2])


# ---- steps that fail ----------------------------------------------------------------------------


class Failing(PyroModule):
    """A regressor that can be told to fail in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.broken = sigma_model(), False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        result = self.inner(x, y)
        if self.broken:
            raise KeyError("out of order")
        return result


def failing(structure: str = "kfac", steps: int = 3, **options: Any) -> tuple[NGVI, Any, Any]:
    model, data = Failing(), regression_data()
    curvature = Curvature("fisher", every=2)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature, **options)
    for _ in range(steps):
        ngvi.step(*data)
    return ngvi, model, data


@pytest.mark.parametrize("steps", [1, 2, 3])
@each
def test_an_exception_in_the_model_changes_nothing(structure: str, steps: int) -> None:
    ngvi, model, data = failing(structure, steps)
    before, generator = everything(ngvi), torch.get_rng_state()
    model.broken = True
    with pytest.raises(KeyError, match="out of order"):
        ngvi.step(*data)
    assert identical(everything(ngvi), before)
    assert torch.equal(torch.get_rng_state(), generator)
    model.broken = False
    assert math.isfinite(ngvi.step(*data))


def test_a_failed_step_is_taken_as_if_it_had_not_failed() -> None:
    losses = []
    for fails in (False, True):
        torch.manual_seed(5)
        ngvi, model, data = failing()
        if fails:
            model.broken = True
            for _ in range(2):
                with pytest.raises(KeyError):
                    ngvi.step(*data)
            model.broken = False
        losses.append([ngvi.step(*data) for _ in range(4)])
    assert losses[0] == losses[1]


def with_nan(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x = data[0].clone()
    x[3, 1] = torch.nan
    return x, data[1]


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
@each
def test_nan_in_the_data_raises_and_changes_nothing(structure: str, steps: int) -> None:
    ngvi, _, data = failing(structure, steps)
    before, generator = everything(ngvi), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
        ngvi.step(*with_nan(data))
    assert identical(everything(ngvi), before)
    assert torch.equal(torch.get_rng_state(), generator) and ngvi.skipped == 0
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
def test_nan_in_the_data_is_skipped_and_counted(steps: int) -> None:
    ngvi, _, data = failing(steps=steps, on_nonfinite="skip")
    before = everything(ngvi)
    for skipped in (1, 2):
        assert math.isnan(ngvi.step(*with_nan(data)))
        assert ngvi.skipped == skipped
        ngvi.skipped = 0
        assert identical(everything(ngvi), before)
        ngvi.skipped = skipped
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical"])
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_nan_in_a_classifier(kind: str, steps: int, on_nonfinite: str) -> None:
    """Whose Fisher cannot even draw its targets."""
    model, data = classifier(), class_data()
    ngvi = NGVI(model, KFACGuide(model), curvature=Curvature(kind, every=2),
                on_nonfinite=on_nonfinite)
    for _ in range(steps):
        ngvi.step(*data)
    before = everything(ngvi)
    if on_nonfinite == "skip":
        assert math.isnan(ngvi.step(*with_nan(data))) and ngvi.skipped == 1
        ngvi.skipped = 0
    else:
        with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
            ngvi.step(*with_nan(data))
    assert identical(everything(ngvi), before)
    assert math.isfinite(ngvi.step(*data))


def test_a_gradient_that_is_not_finite_where_the_loss_is() -> None:
    """sqrt has an infinite slope at 0, and here a bias of exactly 0 in front of it."""

    class Root(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = linear("equal").net, 1.0
            self.offset = nn.Parameter(torch.zeros(()).double())

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x) + (self.offset.abs() + self.shift).sqrt()
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
                plain(mean, y)

    model, data = Root(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), optim=partial(torch.optim.SGD, lr=0.0))
    ngvi.step(*data)
    model.shift = 0.0
    before = everything(ngvi)
    with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
        ngvi.step(*data)
    assert identical(everything(ngvi), before)


def test_nan_at_the_first_step() -> None:
    """Validation sees it first, or else the curvature; the guide is then as good as new."""
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="loc"):
        ngvi.step(*with_nan(data))
    assert ngvi.guide.prototype_trace is None and ngvi.guide.sites == {}
    ngvi.step(*data)


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_nan_at_the_first_step_without_validation(on_nonfinite: str) -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), on_nonfinite=on_nonfinite)
    with pyro.validation_enabled(False):
        if on_nonfinite == "skip":
            assert math.isnan(ngvi.step(*with_nan(data))) and ngvi.skipped == 1
        else:
            with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
                ngvi.step(*with_nan(data))
        assert all(torch.isfinite(value).all() for value in ngvi.guide.median().values())
        assert math.isfinite(ngvi.step(*data))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("moment", ["made", "stepped"])
def test_an_optimizer_that_fails_leaves_all_as_it_was(moment: str, steps: int) -> None:
    """Batch norm's statistics, too; and goes on as if it had not failed."""
    broken = False

    def check() -> None:
        if broken:
            raise KeyError("out of order")

    class Unreliable(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            check()
            return super().step(closure)

    def optim(params: Any) -> torch.optim.Optimizer:
        if moment == "made":
            check()
        return Unreliable(params, lr=0.01)

    def state(ngvi: NGVI) -> list[Any]:
        own = {name: part for name, part in ngvi.state_dict().items() if name != "rest"}
        return list(leaves([ngvi.guide.state_dict(), ngvi.model.state_dict(), own]))

    data, losses = regression_data(), []
    for fails in (False, True):
        torch.manual_seed(4)
        model = sigma_model()
        ngvi = NGVI(model, KFACGuide(model), optim=optim)
        ngvi.guide(*data)
        for _ in range(steps):
            ngvi.step(*data)
        if fails and (moment == "stepped" or steps == 0):
            broken, before, generator = True, state(ngvi), torch.get_rng_state()
            with pytest.raises(KeyError, match="out of order"):
                ngvi.step(*data)
            broken = False
            assert identical(state(ngvi), before)
            assert torch.equal(torch.get_rng_state(), generator)
        losses.append([ngvi.step(*data) for _ in range(3)])
    assert losses[0] == losses[1]


def test_validation_is_put_back() -> None:
    ngvi, model, data = failing()
    model.broken = True
    with pytest.raises(KeyError):
        ngvi.step(*data)
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


# ---- bad input ----------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "curvature": ({"curvature": "gnn"}, ValueError, "curvature='gnn': choose one of hessian, ggn"),
    "curvature type": ({"curvature": 3}, TypeError, "a name or a Curvature is needed, got 3"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, ValueError, "'ignore': choose 'raise' or 'skip'"),
    "lr": ({"lr": 0.0}, ValueError, "lr=0.0"),
    "lr nan": ({"lr": math.nan}, ValueError, "lr=nan"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
    "kl_clip": ({"kl_clip": 0.0}, ValueError, "kl_clip=0.0"),
    "momentum": ({"momentum": 1.0}, ValueError, "momentum=1.0"),
    "damping": ({"damping": -1e-3}, ValueError, "damping=-0.001"),
    "num_particles": ({"num_particles": -1}, ValueError, "num_particles=-1"),
    "half a particle": ({"num_particles": 1.5}, ValueError, "num_particles=1.5"),
    "optim": ({"optim": "adam"}, TypeError, "optim: a callable .* got 'adam'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    options, error, message = BAD[name]
    model = regressor()
    with pytest.raises(error, match=message):
        NGVI(model, KFACGuide(model), **options)


def test_a_guide_of_another_kind() -> None:
    model = regressor()
    with pytest.raises(TypeError, match="one of pyrocurv.guides is needed.*got AutoNormal"):
        NGVI(model, AutoNormal(model))


def test_targets_left_out_of_the_first_step() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="left out"):
        ngvi.step(data[0])
    ngvi.step(*data)


@pytest.mark.parametrize("make", [regressor, sigma_model, classifier])
def test_targets_left_out_of_a_later_step(make: Callable[[], Any]) -> None:
    model = make()
    data = class_data() if isinstance(model, Classifier) else regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(*data)
    before = everything(ngvi)
    with pytest.raises(ValueError, match="'obs'.*left out"):
        ngvi.step(data[0])
    with pytest.raises(ValueError, match="'obs'.*left out"):
        ngvi.evaluate_loss(data[0])
    assert identical(everything(ngvi), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_plate_smaller_than_the_batch(steps: int) -> None:
    class Small(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear("equal").net
            self.size = NUM_DATA

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            with pyro.plate("data", self.size, subsample=torch.arange(len(x))):
                plain(mean, y)

    model, data = Small(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    for _ in range(steps):
        ngvi.step(*data)
    before = everything(ngvi)
    model.size = 7
    with pytest.raises(ValueError, match="30 rows in a plate of size 7"):
        ngvi.step(*data)
    if steps:
        assert identical(everything(ngvi), before)
    model.size = NUM_DATA
    assert math.isfinite(ngvi.step(*data))


def test_a_latent_that_the_guide_does_not_know() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(*data)
    model.noise = None  # now with a sigma
    with pytest.raises(ValueError, match="'sigma'.*the guide.*knows net.0.weight"):
        ngvi.step(*data)


def test_a_batch_that_is_not_the_first_axis() -> None:
    class Sideways(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 2).double())

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = self.net(x.mT.reshape(5, -1, 3)).reshape(-1, 2)
            with pyro.plate("data", NUM_DATA, subsample_size=len(y)):
                plain(mean, y)

    model, data = Sideways(), regression_data()
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide)
    with pytest.warns(UserWarning, match="net.weight .5 rows where there are 30 examples"):
        ngvi.step(*data)
    assert all(family.block.is_untraced for family in guide.blocks)
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.filterwarnings("ignore:a matrix of .* rows is indefinite by rounding")
@pytest.mark.parametrize("noise", [0.1, 0.01])
@each
def test_a_step_in_single_precision_is_taken_or_changes_nothing(
    structure: str, noise: float
) -> None:
    """N/T C is rounded by more than the prior's precision: a Cholesky factor may not exist."""
    x, y = (part.float() for part in regression_data(20))
    net = bayesianize(nn.Sequential(nn.Linear(3, 30), nn.ReLU(), nn.Linear(30, 2)), prior=1.0)
    model = Regressor(net, 100_000, noise=noise)
    curvature = Curvature("ggn", every=1, initial=0.0)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature)
    ngvi.guide(x, y)
    for _ in range(3):
        before = everything(ngvi)
        try:
            assert math.isfinite(ngvi.step(x, y))
        except torch.linalg.LinAlgError:
            assert identical(everything(ngvi), before)
            assert structure in ("block", "full")


def test_evaluate_loss_changes_nothing() -> None:
    ngvi, _, data = failing()
    before = everything(ngvi)
    assert math.isfinite(ngvi.evaluate_loss(*data))
    assert identical(everything(ngvi), before)


def test_evaluate_loss_has_less_noise_with_more_particles() -> None:
    model, data = regressor(), regression_data()
    spread = []
    for num_particles in (1, 8):
        ngvi = NGVI(model, KFACGuide(model), num_particles=num_particles, curvature="ggn")
        ngvi.step(*data)
        losses = torch.tensor([ngvi.evaluate_loss(*data) for _ in range(60)])
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


# ---- temperature="auto" -------------------------------------------------------------------------


def test_automatic_temperature_is_the_rule_for_the_likelihood() -> None:
    """min(0.1, N/P) for a finite support, 0.3 otherwise: the same steps as with that number."""
    x = torch.randn(8, 3).double()
    classes, targets = torch.randint(2, (8,)), torch.randn(8, 2).double()

    def classifier() -> Classifier:
        return Classifier(bayesianize(nn.Linear(3, 2).double(), normal_prior(0.5, 0.5)), 8)

    cases = [(classifier(), classes, 0.1), (Regressor(classifier().net, 8, 0.5), targets, 0.3)]
    for model, y, expected in cases:
        runs = []
        for temperature in ("auto", expected):
            torch.manual_seed(3)
            ngvi = NGVI(model, KFACGuide(model), temperature=temperature)
            runs.append([ngvi.step(x, y) for _ in range(3)])
        assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="temperature='warm'"):
        NGVI(cases[0][0], KFACGuide(cases[0][0]), temperature="warm")


def test_automatic_temperature_is_the_same_in_evaluate_loss() -> None:
    """Only the labels are data, and evaluation must see that as a step does."""

    class Labelled(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier()

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            pyro.sample("inputs", dist.Normal(x.new_zeros(3), 1.0).to_event(1), obs=x)
            self.inner(x, y)

    model, data, losses = Labelled(), class_data(), []
    guide = KFACGuide(model)
    guide(*data)
    for temperature in ("auto", min(0.1, NUM_DATA / 31)):
        torch.manual_seed(2)
        ngvi = NGVI(model, guide, temperature=temperature)
        losses.append(ngvi.evaluate_loss(*data))
    assert losses[0] == losses[1]


# ---- when the curvature is estimated ------------------------------------------------------------


def test_schedule_of_estimates() -> None:
    spec = Curvature("fisher", every="schedule", eigen_every=200)
    due = [step for step in range(1_001) if spec.is_due(step)]
    assert due[:21] == list(range(0, 105, 5)) and due[20:40] == list(range(100, 300, 10))
    assert due[40:] == [*range(300, 600, 20), 600, 700, 800, 900, 1_000]
    assert [step for step in due if spec.turns(step)] == [0, 200, 400, 600, 800, 1_000]
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    model = Classifier(bayesianize(nn.Linear(3, 2).double()), 8)
    ngvi = NGVI(model, KFACGuide(model), curvature=spec)
    for _ in range(12):  # estimates at 0, 5 and 10
        ngvi.step(x, y)
    assert ngvi.state_dict()["state"]["blocks"][0]["running"]["count"] == 3
    for wrong in ("often", 0, 2.5):
        with pytest.raises(ValueError, match="every=.* or 'schedule' is needed"):
            Curvature("fisher", every=wrong)


# ---- several samples in a step ------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("structure", ["full", "block", "diag", "kfac"])
def test_curvature_is_the_mean_over_the_samples(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a softmax, whose Gauss-Newton matrix depends on the weights."""
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    model = Classifier(bayesianize(nn.Linear(3, 3)), 12)
    guide = KFACGuide(model, structure={"*": structure})
    spec = Curvature("ggn", every=1, eigen_every=1, batch=None, decay=0.7)
    ngvi = NGVI(model, guide, num_particles=4, curvature=spec)
    seen, around = [], engine.around

    def spy(*args: Any) -> Any:
        seen.append(around(*args))
        return seen[-1]

    monkeypatch.setattr(engine, "around", spy)
    mean = torch.zeros(12, 12) if structure != "kfac" else torch.zeros(3, 3)
    a = torch.cat([x, torch.ones(12, 1)], 1)
    for step in range(1, 6):
        seen.clear()
        ngvi.step(x, y)
        found = []
        for (weights,) in seen:
            p = (x @ weights["net.weight"].T + weights["net.bias"]).softmax(-1)
            output = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
            matrix = torch.einsum("noq,ni,nj->oiqj", output, a, a).reshape(12, 12) / 12
            found.append(output.mean(0) if structure == "kfac" else matrix)
        assert len(found) == 4 and (step == 1 or not torch.equal(found[0], found[1]))
        mean = mean.lerp(torch.stack(found).mean(0), max(0.3, 1 / step))
        (held,) = [one.running for one in ngvi._state.blocks]
        got = held.factors.output if structure == "kfac" else held.curvature.dense()
        expected = mean.diagonal().diag() if structure == "diag" else mean
        torch.testing.assert_close(got, expected)
        assert held.count == step


def test_an_interrupt_in_a_step_changes_nothing() -> None:
    """The run goes on as one that was not interrupted, curvature and clocks too."""
    data, stop = regression_data(), [False]

    def observe(mean: Tensor, y: Tensor | None) -> None:
        plain(mean, y)
        if stop[0]:
            raise KeyboardInterrupt

    def run(interrupted: bool) -> list[float]:
        torch.manual_seed(0)
        model = Line(observe)
        ngvi = NGVI(model, KFACGuide(model), curvature=Curvature("fisher", every=2))
        losses = [ngvi.step(*data) for _ in range(4)]
        if interrupted:
            stop[0] = True
            with pytest.raises(KeyboardInterrupt):
                ngvi.step(*data)
            stop[0] = False
        return losses + [ngvi.step(*data) for _ in range(4)]

    assert run(True) == run(False)


@pytest.mark.parametrize("mask", [False, torch.tensor([[True, False, True]])], ids=["all", "one"])
def test_a_masked_prior_is_refused(mask: Any) -> None:
    """A flat prior has no KL; one that nothing masks is what it was."""
    x, y = regression_data()

    def model(x: Tensor, y: Tensor, mask: Any) -> None:
        with poutine.mask(mask=mask):
            w = pyro.sample("w", dist.Normal(torch.zeros(1, 3).double(), 0.1).to_event(2))
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(nn.functional.linear(x, w)[:, 0], 0.3), obs=y[:, 0])

    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="prior of 'w' is masked"):
        ngvi.step(x, y, mask)
    assert math.isfinite(ngvi.step(x, y, True))


@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical", "hessian"])
def test_a_factor_is_no_likelihood_with_targets(kind: str) -> None:
    """Its Hessian is what that of the density is; it cannot be sampled."""
    def posterior(observe: Callable[[Tensor, Tensor], None]) -> Tensor:
        model = Line(observe)
        guide = KFACGuide(model)
        spec = Curvature(kind, batch=None, initial=0.0)
        NGVI(model, guide, curvature=spec, lr=1e-6).step(*regression_data())
        return guide.posterior.precision.dense()

    def factor(mean: Tensor, y: Tensor) -> None:
        pyro.factor("obs", dist.Normal(mean, NOISE).to_event(1).log_prob(y))

    if kind in ("fisher", "ggn"):
        with pytest.raises(ValueError, match=f"'{kind}' is of a likelihood, and a factor is none"):
            posterior(factor)
        return
    torch.manual_seed(0)
    found = posterior(factor)
    torch.manual_seed(0)
    torch.testing.assert_close(found, posterior(plain))


def test_a_factor_outside_of_the_plate_has_no_number_of_data() -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        pyro.factor("obs", dist.Normal(net(x), NOISE).log_prob(y).sum())

    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="a factor outside of any plate"):
        ngvi.step(*regression_data())


@pytest.mark.parametrize("structure", GUIDES)
def test_data_that_were_left_out_are_missed_beside_a_deterministic(structure: str) -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.deterministic("mean", net(x), event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, NOISE).to_event(1), obs=y)

    x, y = regression_data()
    guide = GUIDES[structure](model)
    with pytest.raises(ValueError, match="were the data left out"):
        guide(x)
    ngvi = NGVI(model, guide)
    assert math.isfinite(ngvi.step(x, y))
    with pytest.raises(ValueError, match="'obs' is neither observed"):
        ngvi.step(x)


def test_a_state_has_its_temperature() -> None:
    data, model = regression_data(), regressor()
    ngvi = NGVI(model, KFACGuide(model), temperature=0.3, lr=0.05)
    ngvi.step(*data)
    other = NGVI(model, ngvi.guide)
    other.load_state_dict(ngvi.state_dict())
    assert other.temperature == 0.3 and other.optimizer.param_groups[0]["lr"] == 0.05
    assert other.evaluate_loss(*data).temperature == 0.3


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_data_that_spread_their_distribution_are_named(structure: str) -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)[:, 0]
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    x, y = regression_data()
    ngvi = NGVI(model, GUIDES[structure](model))
    with pytest.raises(ValueError, match=r"'obs': data of shape \(30, 1\) against .* \(30,\)"):
        ngvi.step(x, y[:, :1])
    ngvi.step(x, y[:, 0])
    with pytest.raises(ValueError, match="'obs': data of shape"):
        ngvi.step(x, y[:, :1])


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_an_output_that_was_not_squeezed_is_named(structure: str) -> None:
    """[B, 1] in a plate of B is a density of B x B, which Pyro's ELBOs refuse too."""
    net = mlp(outputs=1)

    def model(x: Tensor, y: Tensor, is_squeezed: bool) -> None:
        mean = net(x).squeeze(-1) if is_squeezed else net(x)
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    x, y = regression_data()
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    told = r"'obs': a batch of shape \(30, 30\) in plates of sizes \(30,\)"
    with pytest.raises(ValueError, match=told):
        ngvi.step(x, y[:, 0], False)
    ngvi.step(x, y[:, 0], True)
    for call in (
        lambda: ngvi.step(x, y[:, 0], False), lambda: ngvi.evaluate_loss(x, y[:, 0], False),
        lambda: Laplace(model, guide).fit([(x, y[:, 0], False)]),
        lambda: log_predictive_density(model, guide, [(x, y[:, 0], False)]),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_a_plate_as_large_as_the_batch_is_noticed_once() -> None:
    """As soon as a batch of another size shows it."""
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x, y = regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(x, y)
    ngvi.evaluate_loss(x[:5], y[:5])  # held-out data may be as many as they are
    with pytest.warns(UserWarning, match="had 30 data in all, and has 7 now") as caught:
        for size in (30, 7, 30, 7, 5):
            ngvi.step(x[:size], y[:size])
    assert len(caught) == 1


class LearnedNoise(PyroModule):
    """Its scale is a parameter, no latent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sigma = net, PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, self.sigma), obs=y)


@pytest.mark.parametrize(("make", "steps"), [
    (lambda net: Regressor(net, 100), 1500), (LearnedNoise, 3000),
])
def test_a_bad_start_of_the_weights_does_not_spoil_the_noise_scale(
    make: Callable[[nn.Module], Any], steps: int
) -> None:
    """Its first gradients are a hundred times those that count."""
    x, net = torch.randn(100, 3), nn.Linear(3, 1)
    y = x.sum(-1) + 0.5 * torch.randn(100)
    nn.init.constant_(net.weight, 5.0)
    model = make(bayesianize(net, 100.0))
    ngvi = NGVI(model, KFACGuide(model), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, steps)
    for _ in range(steps):
        ngvi.step(x, y)
        schedule.step()
    residuals = y - (x @ torch.linalg.lstsq(x, y[:, None]).solution).squeeze(-1)
    error = 1 / math.sqrt(2 * 96)  # of a log standard deviation, as 96 degrees of freedom tell it
    latent = "sigma" in ngvi.guide.fallback_sites
    found = ngvi.guide.median()["sigma"] if latent else model.sigma.detach()
    assert abs(found.log() - residuals.std().log()) < 2 * error


# ---- what is forgotten --------------------------------------------------------------------------


def test_a_state_without_that_of_its_guide_is_noticed() -> None:
    def parts() -> tuple[NGVI, Any]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = regressor()
        return NGVI(model, KFACGuide(model), lr=0.1), regression_data()

    ngvi, data = parts()
    for _ in range(20):
        ngvi.step(*data)
    state, weights = ngvi.state_dict(), ngvi.guide.state_dict()
    ngvi, data = parts()
    ngvi.load_state_dict(state)
    with pytest.warns(UserWarning, match="load the guide's own state too"):
        ngvi.step(*data)
    ngvi, data = parts()
    ngvi.guide.load_state_dict(weights)
    ngvi.load_state_dict(state)
    ngvi.step(*data)


def test_a_store_that_is_loaded_on_the_way(tmp_path: Path) -> None:
    """The model's parameter is another tensor then; its optimizer goes on with it."""
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 1))
            self.noise = PyroParam(torch.tensor(1.0), dist.constraints.positive)

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", 30):
                pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)

    model, x = Model(), torch.randn(30, 3)
    ngvi = NGVI(model, KFACGuide(model))
    for _ in range(3):
        ngvi.step(x, x[:, 0])
    pyro.get_param_store().save(tmp_path / "store")
    ngvi.step(x, x[:, 0])
    pyro.get_param_store().load(tmp_path / "store")
    before = model.noise.item()
    for _ in range(3):
        ngvi.step(x, x[:, 0])
    assert model.noise.item() != before
    copied = copy.deepcopy((model, ngvi))
    copied[1].step(x, x[:, 0])
    assert len(ngvi.state_dict()["rest"]["torch"]) == 1
