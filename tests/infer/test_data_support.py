"""Data outside of the support of their likelihood are refused, at every step, by name."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from toys import everything, identical

from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.nn import bayesianize

ROWS = 6
Likelihood = Callable[[Tensor], Any]
# {name: (likelihood of outputs [B, 3], good data, bad data)}
CASES: dict[str, tuple[Likelihood, Any, Any]] = {
    "bernoulli": (lambda f: dist.Bernoulli(logits=f[:, 0]), 1.0, 2.0),
    "probabilities": (lambda f: dist.Bernoulli(f[:, 0].sigmoid()), 0.0, 0.5),
    "fraction": (lambda f: dist.Categorical(logits=f), 1.0, 0.7),
    "class": (lambda f: dist.Categorical(logits=f), 2, 3),
    "negative class": (lambda f: dist.Categorical(logits=f), 0, -1),
    "poisson": (lambda f: dist.Poisson(f[:, 0].exp()), 3.0, -1.0),
    "poisson fraction": (lambda f: dist.Poisson(f[:, 0].exp()), 3.0, 2.5),
    "binomial": (lambda f: dist.Binomial(4, logits=f[:, 0]), 4.0, 5.0),
    "geometric": (lambda f: dist.Geometric(logits=f[:, 0]), 3.0, -2.0),
    "gamma": (lambda f: dist.Gamma(2.0, f[:, 0].exp()), 1.5, -0.5),
    "lognormal": (lambda f: dist.LogNormal(f[:, 0], 1.0), 1.5, -0.5),
    "beta": (lambda f: dist.Beta(f[:, 0].exp(), 2.0), 0.3, 1.5),
    "events": (lambda f: dist.Bernoulli(logits=f).to_event(1), [1.0, 0.0, 1.0], [1.0, 3.0, 0.0]),
    "one-hot": (lambda f: dist.OneHotCategorical(logits=f), [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]),
    "simplex": (lambda f: dist.Dirichlet(f.exp()), [0.5, 0.25, 0.25], [0.5, 0.6, 0.25]),
}


def make(likelihood: Likelihood, mask: Any = True) -> Any:
    net = bayesianize(nn.Linear(2, 3))

    def model(x: Tensor, y: Tensor) -> None:
        f = net(x)
        with pyro.plate("data", ROWS), poutine.mask(mask=mask):
            pyro.sample("y", likelihood(f), obs=y)

    return model


def data(value: Any, bad: Any = None) -> tuple[Tensor, Tensor]:
    values = [value] * ROWS
    if bad is not None:
        values[2] = bad
    return torch.randn(ROWS, 2), torch.tensor(values)


@pytest.mark.parametrize("case", CASES)
def test_every_step_refuses_them(case: str) -> None:
    likelihood, good, bad = CASES[case]
    model = make(likelihood)
    ngvi = NGVI(model, KFACGuide(model), curvature="empirical")
    with pytest.raises(ValueError, match=r"'y' is \w+, with data in .*1 of its data"):
        ngvi.step(*data(good, bad))
    assert not ngvi.guide.is_initialized
    for _ in range(2):
        assert math.isfinite(ngvi.step(*data(good)))
    before = everything(ngvi)
    for function in (ngvi.step, ngvi.evaluate_loss):
        with pytest.raises(ValueError, match=r"'y' is \w+, with data in .*1 of its data"):
            function(*data(good, bad))
    assert identical(everything(ngvi), before)


def test_laplace_refuses_them() -> None:
    model = make(CASES["bernoulli"][0])
    laplace = Laplace(model, KFACGuide(model))
    laplace.fit([data(1.0)])
    with pytest.raises(ValueError, match="'y' is Bernoulli"):
        laplace.fit([data(1.0, 2.0)])


@pytest.mark.parametrize("make_guide", [FullGuide, DiagonalGuide])
def test_models_without_a_network(make_guide: Any) -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    ngvi = NGVI(model, make_guide(model), curvature="hessian", num_particles=4)
    good = torch.tensor([1.0, 4.0])
    for _ in range(3):
        ngvi.step(good)
    for bad in (torch.tensor([1.0, -4.0]), torch.tensor([math.nan, 1.0])):
        with pytest.raises(ValueError, match="'y' is Poisson.*1 of its data are not: (-4|nan)"):
            ngvi.step(bad)
    ngvi.step(good)


def test_validation_can_be_turned_off() -> None:
    model = make(CASES["bernoulli"][0])
    ngvi = NGVI(model, KFACGuide(model), curvature="empirical")
    with pyro.validation_enabled(False):
        assert all(math.isfinite(ngvi.step(*data(1.0, 2.0))) for _ in range(2))
    with pytest.raises(ValueError, match="'y' is Bernoulli"):
        ngvi.step(*data(1.0, 2.0))


@pytest.mark.parametrize("how", ["site", "distribution", "inside events", "around events"])
def test_masked_data_may_be_anything(how: str) -> None:
    keep = torch.arange(ROWS) != 2

    def likelihood(f: Tensor) -> Any:
        if how == "distribution":
            return dist.Bernoulli(logits=f[:, 0]).mask(keep)
        if how == "inside events":
            return dist.Bernoulli(logits=f).mask(keep[:, None]).to_event(1)
        if how == "around events":
            return dist.Bernoulli(logits=f).to_event(1).mask(keep)
        return dist.Bernoulli(logits=f[:, 0])

    model = make(likelihood, keep if how == "site" else True)
    events = "events" in how
    x, y = data([1.0, 0.0, 1.0], [-1.0, 0.0, -1.0]) if events else data(1.0, -1.0)
    with pyro.distributions.util.validation_enabled(False):
        ngvi = NGVI(model, KFACGuide(model), curvature="empirical")
        assert math.isfinite(ngvi.step(x, y)) and math.isfinite(ngvi.step(x, y))
        y[3] = 7.0
        with pytest.raises(ValueError, match="of its data are not: 7"):
            ngvi.step(x, y)


def test_nan_targets_are_not_finite_losses() -> None:
    """Not data outside of the real numbers: `on_nonfinite` decides."""
    model = make(lambda f: dist.Normal(f[:, 0], 1.0))
    ngvi = NGVI(model, KFACGuide(model), on_nonfinite="skip")
    ngvi.step(*data(1.0))
    assert math.isnan(ngvi.step(*data(1.0, math.nan))) and ngvi.skipped == 1


def test_a_support_that_depends_on_a_latent_is_not_checked() -> None:
    def model(y: Tensor) -> None:
        width = pyro.sample("width", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Uniform(-2.0 * width, 2.0 * width), obs=y)

    with pyro.distributions.util.validation_enabled(False):
        ngvi = NGVI(model, FullGuide(model), curvature="hessian", on_nonfinite="skip")
        ngvi.step(torch.tensor([0.1, 1e6]))
    assert ngvi.skipped == 1
