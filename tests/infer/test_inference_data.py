"""`to_arviz`: its groups against densities written out, and `arviz.loo` on them."""

import math
import pickle
import sys
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.func import functional_call
from toys import Line, class_data, classifier, regression_data, regressor, sigma_model

from pyrocurv.guides import BlockGuide, KFACGuide, MixtureGuide
from pyrocurv.infer import Laplace, to_arviz
from pyrocurv.nn import Regressor, bayesianize, update_bn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    arviz = pytest.importorskip("arviz")
pytestmark = pytest.mark.filterwarnings("ignore:.*ArviZ:FutureWarning")


def of(model: Any, data: Any, kind: Any = KFACGuide) -> Any:
    guide = kind(model, init_scale=0.1)
    guide(*data)
    return guide


def draws(found: Any, name: str) -> Tensor:
    return torch.as_tensor(found.posterior[name].values[0])


@pytest.mark.parametrize("noise", [0.3, None])
def test_each_datum_has_its_density(noise: float | None) -> None:
    data = regression_data(8)
    guide = of(regressor(noise), data)
    found = to_arviz(guide, *data, num_samples=5)
    assert {*found.posterior} == {*guide.sites, *guide.fallback_sites}
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for number in range(5):
        weights = {n.removeprefix("net."): draws(found, n)[number] for n in guide.sites}
        scale = draws(found, "sigma")[number] if noise is None else noise
        wanted = dist.Normal(functional_call(plain, weights, data[0]), scale).log_prob(data[1])
        each = torch.as_tensor(found.log_likelihood["obs"].values[0, number])
        torch.testing.assert_close(each, wanted.sum(-1))
    assert torch.equal(torch.as_tensor(found.observed_data["obs"].values), data[1])
    assert "posterior_predictive" not in found.groups()


def test_loo_of_a_conjugate_model() -> None:
    """The density of a datum given the others has a closed form for a linear model."""
    from toys import NUM_DATA, exactly, linear

    torch.manual_seed(1)
    x = torch.randn(NUM_DATA, 3).double()
    y = x @ torch.randn(3, 2).double() + 0.3 * torch.randn(NUM_DATA, 2).double()
    data = x, y
    ngvi = exactly(linear("equal"), "full")
    ngvi.step(*data)
    site = "net.bias"
    with warnings.catch_warnings():  # of single data, whose weights vary much
        warnings.simplefilter("ignore")
        samples = to_arviz(ngvi.guide, *data, num_samples=1000, sites=[site])
        found = arviz.loo(samples, pointwise=True)
    assert found.n_data_points == NUM_DATA
    design = torch.cat([x, x.new_ones(NUM_DATA, 1)], 1)
    wanted = []
    for left_out in range(NUM_DATA):
        keep = torch.arange(NUM_DATA) != left_out
        precision = design[keep].mT @ design[keep] / 0.3**2 + torch.eye(4).double() / 0.7**2
        mean = torch.linalg.solve(precision, design[keep].mT @ y[keep] / 0.3**2)
        row = design[left_out]
        variance = row @ torch.linalg.solve(precision, row) + 0.3**2
        wanted.append(dist.Normal(row @ mean, variance.sqrt()).log_prob(y[left_out]).sum())
    error = torch.stack(wanted).sum() - float(found.elpd_loo)
    assert abs(float(error)) < 0.5, "nats, of 30 data"


def test_targets_are_drawn_if_asked_for() -> None:
    data = class_data(6)
    guide = of(classifier(), data)
    found = to_arviz(guide, *data, num_samples=400, posterior_predictive=True, sites=["net.0.bias"])
    assert [*found.posterior] == ["net.0.bias"]
    drawn = torch.as_tensor(found.posterior_predictive["obs"].values[0])
    assert drawn.shape == (400, 6) and {*drawn.unique().tolist()} <= {0, 1, 2}
    share = (drawn == data[1]).double().mean(0)
    wanted = torch.as_tensor(found.log_likelihood["obs"].values[0]).exp().mean(0)
    assert ((share - wanted).abs() < 5 * (wanted * (1 - wanted) / 400).sqrt() + 0.01).all()


def test_masks_and_several_observed_sites() -> None:
    x, y = regression_data(6)
    mask = torch.tensor([True, True, False, True, True, True])

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with pyro.poutine.mask(mask=mask):
            pyro.sample("first", dist.Normal(mean[:, 0], 0.3), obs=None if y is None else y[:, 0])
        pyro.sample("second", dist.Normal(mean[:, 1], 0.3), obs=None if y is None else y[:, 1])

    found = to_arviz(of(Line(observe), (x, y), BlockGuide), x, y, num_samples=3)
    assert {*found.log_likelihood} == {"first", "second"} == {*found.observed_data}
    assert (found.log_likelihood["first"].values[0, :, 2] == 0).all()


def test_a_mixture_and_batch_norm() -> None:
    data = regression_data(8)
    models = [sigma_model() for _ in range(2)]
    guides = [of(model, data) for model in models]
    for number, (model, guide) in enumerate(zip(models, guides, strict=True)):
        update_bn(model, guide, [data[0] * (1 + number)])
        model.train()
    before = [x.clone() for x in models[0].buffers()]
    found = to_arviz(MixtureGuide(guides), *data, num_samples=4)
    assert "net.1.running_mean" not in found.posterior
    assert found.log_likelihood["obs"].shape == (1, 4, 8)
    assert all(map(torch.equal, models[0].buffers(), before)) and models[0].training


def test_half_precision() -> None:
    model = Regressor(bayesianize(nn.Linear(3, 1).bfloat16()), 5, noise=0.3)
    x, y = torch.randn(5, 3).bfloat16(), torch.randn(5).bfloat16()
    found = to_arviz(of(model, (x, y)), x, y, num_samples=2)
    assert math.isfinite(float(found.log_likelihood["obs"].sum()))


class Unobserved(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 2).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = regression_data(8)
    guide = of(regressor(0.3), data)
    for arguments, message in [
        ({"num_samples": 0}, "num_samples=0"), ({"sites": ["net.9"]}, "no latent 'net.9'; net.0.w"),
        ({"sites": []}, "at least one is needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_arviz(guide, *data, **arguments)
    with pytest.raises(ValueError, match="'obs' is neither observed"):
        to_arviz(guide, data[0])
    with pytest.raises(ValueError, match="observes nothing in this call"):
        to_arviz(of(Unobserved(), data[:1]), data[0], num_samples=1)
    with pytest.raises(TypeError, match="one of pyrocurv.guides is needed, got Regressor"):
        to_arviz(regressor(0.3), *data)
    with pytest.raises(RuntimeError, match="not initialized"):
        to_arviz(KFACGuide(regressor(0.3)), *data)
    with pytest.raises(RuntimeError, match="without its model"):
        to_arviz(pickle.loads(pickle.dumps(guide)), *data)
    model = regressor(0.3)
    model.num_data = 8
    laplace = Laplace(model, KFACGuide(model)).fit([data])
    with pytest.raises(ValueError, match="is a Laplace approximation"):
        to_arviz(laplace.guide, *data)
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        to_arviz(guide, *data)
