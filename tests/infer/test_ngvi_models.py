"""`NGVI` on models with scales, masks, several sites, any likelihood and hierarchical priors."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from toys import (
    EXACT,
    GUIDES,
    NOISE,
    NUM_DATA,
    PRIORS,
    Line,
    assert_posterior,
    exactly,
    linear,
    mlp,
    normal_prior,
    plain,
    regression_data,
    truth,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import bayesianize

CORRELATED = ["kfac", "ekfac", "block", "full"]
each_correlated = pytest.mark.parametrize("structure", CORRELATED)


# ---- scales and masks ---------------------------------------------------------------------------


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


@pytest.mark.filterwarnings("ignore:inputs far from unit scale")
@pytest.mark.parametrize("kind", ["fisher", "empirical"])
def test_masked_examples_have_no_sampled_curvature(kind: str) -> None:
    x, y = regression_data()
    x[::3] = 1e3  # would drown all the rest
    curvature = Curvature(kind, every=1, batch=None, initial=0.0, num_samples=50)
    ngvi = exactly(Line(mask_by_handler), "full", curvature=curvature)
    ngvi.step(x, y)
    X = oracles.linear_layer_design(x[torch.arange(len(x)) % 3 > 0], 2)
    assert ngvi.guide.posterior.precision.trace() < 100 * (X.T @ X / NOISE**2).trace()


# ---- several sites ------------------------------------------------------------------------------


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


# ---- plates and likelihoods ---------------------------------------------------------------------


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
    ngvi = NGVI(
        model, KFACGuide(model), lr=0.2, kl_clip=None, curvature="ggn", update="natural"
    )
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


# ---- factors ------------------------------------------------------------------------------------


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
