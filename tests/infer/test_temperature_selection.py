"""Choosing a temperature: the score against its closed form, and what is chosen."""

import importlib
import math

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from toys import EXACT, NUM_DATA, inputs, mlp, regression_data, regressor

from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, choose_temperature, log_predictive_density
from pyrocurv.nn import Regressor, bayesianize

NOISE = 0.3


def linear_fit(x: Tensor, y: Tensor, temperature: float) -> tuple[Regressor, FullGuide]:
    """One exact step."""
    net = bayesianize(nn.Linear(3, 2).double(), 0.7)
    model = Regressor(net, NUM_DATA, noise=NOISE)
    guide = FullGuide(model)
    ngvi = NGVI(model, guide, lr=1.0, momentum=0.0, damping=0.0, kl_clip=None, curvature=EXACT,
                update="natural", temperature=temperature)
    ngvi.step(x, y)
    return model, guide


def test_the_density_of_a_linear_model() -> None:
    """Its samples have a closed form: the predictive normal of each datum."""
    x, y = regression_data()
    new = inputs(8), torch.randn(8, 2).double()
    mean, covariance, _ = oracles.linear_layer_posterior(x, y, NOISE, 0.7**-2, 0.7**-2)
    wanted = []
    for row, target in zip(*new, strict=True):
        design = oracles.linear_layer_design(row.unsqueeze(0), 2)
        spread = design @ covariance @ design.mT + NOISE**2 * torch.eye(2).double()
        wanted.append(dist.MultivariateNormal(design @ mean, spread).log_prob(target))
    model, guide = linear_fit(x, y, 1.0)
    found = torch.tensor([
        log_predictive_density(model, guide, [(new[0][:5], new[1][:5]), (new[0][5:], new[1][5:])],
                               100) for _ in range(12)
    ])
    error = found.std() / math.sqrt(12)
    # log of a mean of S terms is low by var / (2 S mean²), which the spread of the twelve tells
    bias = 100 * found.var() * 8 / (2 * 100)
    assert abs(found.mean() - torch.stack(wanted).mean()) < 4 * error + bias


def test_the_best_of_what_was_tried() -> None:
    """Targets without noise in a model that thinks there is much: colder is better."""
    x = inputs()
    y = x @ torch.randn(3, 2).double()
    seen = []

    def fit(temperature: float) -> tuple[Regressor, FullGuide]:
        seen.append(temperature)
        return linear_fit(x, y, temperature)

    new = inputs(25)
    truth = torch.linalg.lstsq(x, y).solution
    with pytest.warns(UserWarning, match="0.01 is the lowest"):
        choice = choose_temperature(fit, [(new, new @ truth)], (10.0, 1.0, 0.01), 64)
    assert seen == [10.0, 1.0, 0.01] == [*choice.densities]
    assert choice == 0.01 == max(choice.densities, key=lambda t: choice.densities[t])


def test_held_out_data_are_needed_as_often_as_there_are_temperatures() -> None:
    x, y = regression_data()
    with pytest.raises(ValueError, match="an iterator is exhausted after one temperature"):
        choose_temperature(lambda t: pytest.fail("trained"), iter([(x, y)]))


def test_what_is_trained_may_come_with_its_ngvi() -> None:
    x, y = regression_data()
    ngvi = NGVI(*linear_fit(x, y, 1.0))
    seen = []
    for trained in (ngvi, (ngvi.model, ngvi.guide)):
        torch.manual_seed(0)
        seen.append(choose_temperature(lambda t, it=trained: it, [(x, y)], [1.0], 8).densities)
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("error")
def test_the_best_in_the_middle_is_no_news() -> None:
    """Held-out data that are a little off: neither a point nor all there is predicts them best."""
    x, y = regression_data()
    new = inputs(200)
    targets = new @ (torch.linalg.lstsq(x, y).solution + 0.3)
    tried = (1e4, 10.0, 1e-6)
    choice = choose_temperature(lambda t: linear_fit(x, y, t), [(new, targets)], tried)
    assert choice == 10.0


def test_more_held_out_data_than_training_has_seen() -> None:
    """Whatever the plates are, N there has no part in a mean over held-out data."""
    x, y = regression_data()
    model, guide = linear_fit(x, y, 1.0)
    new, found = (inputs(3 * NUM_DATA), torch.randn(3 * NUM_DATA, 2).double()), []
    for model.num_data in (NUM_DATA, 3 * NUM_DATA):
        torch.manual_seed(0)
        found.append(log_predictive_density(model, guide, [new]))
    assert found[0] == found[1] and model.training


def test_masked_data_do_not_count_and_scales_neither() -> None:
    x, y = regression_data()
    net, keep = mlp(), torch.arange(NUM_DATA) % 2 == 0

    def model(x: Tensor, y: Tensor, keep: Tensor, scale: float = 1.0) -> None:
        mean = net(x)
        with poutine.scale(scale=scale), pyro.plate("data", NUM_DATA, subsample=x[:, 0]):
            with poutine.mask(mask=keep):
                pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    guide = KFACGuide(model)
    guide(x, y, keep)
    every = torch.ones(len(y[keep]), dtype=torch.bool)
    found = []
    for batch in ((x, y, keep), (x[keep], y[keep], every), (x, y, keep, 0.1)):
        torch.manual_seed(1)
        found.append(log_predictive_density(model, guide, [batch], 3))
    assert found == pytest.approx([found[0]] * 3)


def test_what_has_no_score() -> None:
    x, y = regression_data()
    model = regressor()
    guide = KFACGuide(model)
    with pytest.raises(ValueError, match="no data"):
        log_predictive_density(model, guide, [])
    Laplace(model, guide).fit([(x, y)])
    with pytest.raises(ValueError, match="guide is a Laplace approximation"):
        log_predictive_density(model, guide, [(x, y)])
    for wrong, match in (((), "at least one"), ((0.3, -1.0), "temperatures=-1.0")):
        with pytest.raises(ValueError, match=match):
            choose_temperature(lambda t: (model, guide), [(x, y)], wrong)


@pytest.mark.parametrize(("temperature", "used"), [(0.5, 0.5), ("auto", 0.02)])
def test_a_loss_says_its_temperature(temperature: float | str, used: float) -> None:
    x, y = regression_data()
    model = regressor()
    ngvi = NGVI(model, KFACGuide(model), temperature=temperature)
    ngvi.step(x, y)
    loss = ngvi.evaluate_loss(x, y)
    assert loss.temperature == used and isinstance(loss, float)


def test_a_model_without_a_plate_has_a_score() -> None:
    x, y = regression_data()
    net = mlp()

    def bare(x: Tensor, y: Tensor) -> None:
        pyro.sample("obs", dist.Normal(net(x), 0.3).to_event(1), obs=y)

    def plated(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=y)

    found = []
    for model in (bare, plated):
        torch.manual_seed(1)
        guide = KFACGuide(model)
        guide(x, y)
        torch.manual_seed(1)
        found.append(log_predictive_density(model, guide, [(x, y)], 3))
    assert found[0] == pytest.approx(found[1])


def test_a_score_that_is_not_finite_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1.0: float("nan"), 0.3: -0.2, 0.1: -0.4, 0.03: -float("inf")}
    module = importlib.import_module("pyrocurv.infer.temperature_selection")
    monkeypatch.setattr(module, "_density", lambda temperature, *_: scores[temperature])
    assert choose_temperature(lambda t: t, [], [*scores]) == 0.3
    with pytest.raises(FloatingPointError, match="no temperature has a finite density"):
        choose_temperature(lambda t: t, [], [1.0, 0.03])
    with pytest.warns(UserWarning, match="0.3 is the highest of the candidates"):
        choose_temperature(lambda t: t, [], [0.3, 0.1])


def test_one_posterior_has_one_score() -> None:
    """Whatever temperature it is offered as: the draws are the same."""
    x = torch.randn(40, 2)
    model = Regressor(bayesianize(nn.Linear(2, 1)), 40, noise=NOISE)
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(x, x.sum(-1))
    choice = choose_temperature(lambda t: ngvi, [(x, x.sum(-1))], [1.0, 0.3, 0.1], 4)
    assert len({*choice.densities.values()}) == 1
    with pytest.raises(ValueError, match="num_samples=0: an integer of at least 1"):
        choose_temperature(lambda t: ngvi, [(x, x.sum(-1))], [1.0], 0)
