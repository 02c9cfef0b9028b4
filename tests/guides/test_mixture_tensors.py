"""Mixtures whose models differ beside their latents: each component predicts with its own."""

import copy
import io
import math
import pickle
from typing import Any

import pyro.infer
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn
from toys import inputs, regression_data

from pyrocurv.guides import KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI, Predictive, log_predictive_density, train_mixture
from pyrocurv.nn import Classifier, Regressor, bayesianize, update_bn
from pyrocurv.nn.networks import ResNet

LIBRARIES = pytest.mark.parametrize("kind", [pyro.infer.Predictive, Predictive])


class Net(nn.Module):
    """Batch norm with a scale of its own, and a weight that is read without a call of its owner."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.last, self.shift = nn.Linear(4, 2), nn.Embedding(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh()) + self.shift.weight[0]


def model_of(seed: int) -> Regressor:
    torch.manual_seed(seed)
    return Regressor(bayesianize(Net().double()), 30, noise=0.3)


def points(number: int = 3) -> tuple[list[Regressor], MixtureGuide]:
    """Components so narrow that they are points, with statistics of their own."""
    models, guides = [model_of(seed) for seed in range(number)], []
    for number, model in enumerate(models):
        guide = KFACGuide(model, init_scale=1e-9)
        guide(*regression_data())
        update_bn(model, guide, [inputs(20) * 3 + 1])
        with torch.no_grad():
            model.net.norm.weight.mul_(1.0 + number)
        guides.append(guide)
        model.eval()
    return models, MixtureGuide(guides)


def by_hand(mixture: Any, models: Any, x: Tensor) -> Tensor:
    """What each component predicts with its own model, [K, B, D]."""
    with torch.no_grad():
        return torch.stack([
            poutine.condition(model, guide.median())(x)
            for model, guide in zip(models, mixture, strict=True)
        ])


def assert_predicts(found: Tensor, wanted: Tensor) -> None:
    """Each prediction [S, B, D] is of one of the components [K, B, D], and all of them are there.
    """
    distances = (found[:, None] - wanted[None]).flatten(2).norm(dim=-1)  # [S, K]
    assert distances.amin(1).max() < 1e-6
    assert {*distances.argmin(1).tolist()} == {*range(len(wanted))}
    assert torch.cdist(wanted.flatten(1), wanted.flatten(1)).fill_diagonal_(1).min() > 0.1


@LIBRARIES
@pytest.mark.parametrize("which", [0, 2])
def test_each_sample_is_predicted_with_what_is_its_components_own(kind: Any, which: int) -> None:
    models, mixture = points()
    x, model = inputs(6), models[which]
    own = [*model.state_dict(keep_vars=True).values()]
    values = [x.clone() for x in own]
    predict = kind(model, guide=mixture, num_samples=30, return_sites=["_RETURN"])
    assert_predicts(predict(x)["_RETURN"], by_hand(mixture, models, x))
    if kind is Predictive:
        assert max(predict._run_model.chunks.values()) > 1, "all samples at once"
    samples = mixture.sample_posterior(30)
    predict = kind(model, posterior_samples=samples, return_sites=["_RETURN"])
    assert_predicts(predict(x)["_RETURN"], by_hand(mixture, models, x))
    after = [*model.state_dict(keep_vars=True).values()]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(own, after, values, strict=True))


def test_the_tensors_are_what_differs() -> None:
    models, mixture = points()
    names = {f"net.norm.{name}" for name in ("weight", "running_mean", "running_var")}
    names.add("net.shift.weight")
    assert mixture.tensors_of(mixture[1]).keys() == names
    assert mixture.sample_posterior(2).keys() == {*mixture.sites, *names}
    same = MixtureGuide([mixture[0], mixture[0]])
    assert not same.component_tensors
    models[0].net.norm.running_mean.add_(1.0)  # copies have been made
    assert not torch.equal(mixture.tensors_of(mixture[0])["net.norm.running_mean"],
                           models[0].net.norm.running_mean)


def test_handlers_of_pyro_and_a_loop() -> None:
    models, mixture = points()
    x = inputs(6)
    wanted = by_hand(mixture, models, x)
    found, replayed = [], []
    for _ in range(20):
        trace = poutine.trace(mixture).get_trace(x)
        with torch.no_grad():
            found.append(poutine.condition(models[1], trace)(x))
            replayed.append(poutine.replay(models[1], trace)(x))
    assert_predicts(torch.stack(found), wanted)
    assert_predicts(torch.stack(replayed), wanted)

    def stubborn(x: Tensor) -> Tensor:  # which vmap cannot run
        out = models[1](x)
        return out if float(out.sum()) > -math.inf else x

    predict = Predictive(stubborn, guide=mixture, num_samples=20, return_sites=["_RETURN"])
    assert_predicts(predict(x)["_RETURN"], wanted)


def test_the_density_of_held_out_data() -> None:
    models, mixture = points()
    x, y = regression_data(10)
    each = dist.Normal(by_hand(mixture, models, x), 0.3).log_prob(y).sum(-1)  # [K, B]
    wanted = (each.logsumexp(0) - math.log(3)).mean()
    found = log_predictive_density(models[2], mixture, [(x, y)], 6)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    nested = MixtureGuide([MixtureGuide([*mixture]), mixture])
    assert log_predictive_density(models[2], nested, [(x, y)], 6) == pytest.approx(
        float(wanted), rel=1e-5
    )


@LIBRARIES
def test_a_file_and_guides_of_a_single_model(kind: Any) -> None:
    models, mixture = points()
    x = inputs(6)
    wanted = by_hand(mixture, models, x)
    torch.save(mixture.state_dict(), file := io.BytesIO())
    file.seek(0)
    fresh = model_of(7).eval()
    loaded = MixtureGuide([KFACGuide(fresh) for _ in range(3)])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    predict = kind(fresh, guide=loaded, num_samples=30, return_sites=["_RETURN"])
    assert_predicts(predict(x)["_RETURN"], wanted)
    again = MixtureGuide([KFACGuide(fresh) for _ in range(3)])
    again.load_state_dict(loaded.state_dict())
    assert [*again.state_dict()] == [*mixture.state_dict()]


def test_a_state_that_does_not_fit() -> None:
    _, mixture = points(2)
    state = mixture.state_dict()
    other = MixtureGuide([KFACGuide(model_of(7)) for _ in range(2)])
    for changed, message in [
        ({k: v for k, v in state.items() if k != "component_tensors.1.net.norm.weight"},
         "different tensors: .'net.norm.weight'"),
        ({**state, "component_tensors.0.net.norm.weight": torch.ones(3),
          "component_tensors.1.net.norm.weight": torch.ones(3)}, "shape .3,., the model has .4,."),
        ({**state, "component_tensors.0.a": torch.ones(3),
          "component_tensors.1.a": torch.ones(3)}, "have a of shape .3,., the model has none"),
        ({**state, "component_tensors.7.a": torch.ones(3)}, "the state "),
    ]:
        before = [*other.state_dict()]
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(changed)
        assert [*other.state_dict()] == before and not other.component_tensors


def test_copies_pickles_and_mixtures_of_mixtures() -> None:
    models, mixture = points()
    x = inputs(6)
    wanted = by_hand(mixture, models, x)
    nested = MixtureGuide([MixtureGuide([*mixture][:2]), mixture[2]])
    unpickled = pickle.loads(pickle.dumps(mixture))
    for twin in (copy.deepcopy(mixture), unpickled, nested):
        for model in (models[0], copy.deepcopy(models[1]), pickle.loads(pickle.dumps(models[2]))):
            predict = Predictive(model, guide=twin, num_samples=40, return_sites=["_RETURN"])
            assert_predicts(predict(x)["_RETURN"], wanted)
    weights = nested.sample_posterior(400)["net.shift.weight"][:, 0, 0]
    last = (weights == mixture.tensors_of(mixture[2])["net.shift.weight"][0, 0]).double().mean()
    assert abs(float(last) - 1 / 2) < 5 * (0.25 / 400) ** 0.5


def test_training_goes_on_with_the_models_own() -> None:
    """In training mode batch norm uses the batch, and its statistics are the model's."""
    models, mixture = points(2)
    model, x = models[1].train(), inputs(6)
    guide = KFACGuide(model)
    before = model.net.norm.running_mean.clone()
    NGVI(model, guide).step(*regression_data())
    assert not torch.equal(model.net.norm.running_mean, before)
    kept = [value.clone() for value in mixture.component_tensors.buffers()]
    with pytest.warns(UserWarning, match="in train"):
        Predictive(model, guide=mixture, num_samples=3)(x)
    assert all(map(torch.equal, mixture.component_tensors.buffers(), kept))


def test_a_model_that_raises_gets_its_own_back() -> None:
    models, mixture = points(2)
    own = models[0].net.norm.running_mean
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes"):
            Predictive(models[0], guide=mixture, num_samples=3)(inputs(5)[:, :2])
    assert models[0].net.norm.running_mean is own
    wanted = by_hand(mixture, models, x := inputs(5))
    predict = Predictive(models[0], guide=mixture, num_samples=20, return_sites=["_RETURN"])
    assert_predicts(predict(x)["_RETURN"], wanted)


def test_training_several_residual_networks() -> None:
    x, y = torch.randn(20, 1, 8, 8).double(), torch.arange(20) % 3
    kept = {}

    def make(seed: int) -> NGVI:
        net = bayesianize(ResNet(classes=3, widths=(4,)).double())
        kept[seed] = model = Classifier(net, 20)
        return NGVI(model, KFACGuide(model))

    mixture = train_mixture(make, [(x, y)], 3, seeds=2, progress=False)
    model = kept[0].eval()
    draws = Predictive(model, guide=mixture, num_samples=30, return_sites=["_RETURN"])(x)["_RETURN"]
    assert draws.shape == (30, 20, 3) and draws.isfinite().all()
    apart = []
    for seed, guide in enumerate(mixture):
        predict = Predictive(kept[seed].eval(), guide=guide, num_samples=30,
                             return_sites=["_RETURN"])
        apart.append(predict(x)["_RETURN"])
    mean, error = torch.cat(apart).mean(0), draws.std(0) / 30 ** 0.5
    error = error + torch.cat(apart).std(0) / 60 ** 0.5
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()


def test_a_parameter_with_a_constraint_is_refused() -> None:
    models = [model_of(0), model_of(0)]
    for number, model in enumerate(models):
        model.net.scale = pyro.nn.PyroParam(
            torch.tensor(1.0 + number).double(), dist.constraints.positive
        )
    with pytest.raises(ValueError, match="net.scale_unconstrained is a PyroParam"):
        MixtureGuide([KFACGuide(model) for model in models])
