"""`update_bn`: statistics at the mean, against a loop by hand; what it restores and refuses."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from toys import inputs, regression_data

from pyrocurv.guides import DiagonalGuide, KFACGuide, MixtureGuide
from pyrocurv.infer import Predictive
from pyrocurv.nn import Classifier, Regressor, bayesianize, update_bn


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2),
        nn.BatchNorm1d(2, momentum=0.3),
    ).double()


def trained(kind: Any = KFACGuide, noise: float | None = 0.3) -> tuple[Regressor, Any, nn.Module]:
    """A model, a guide of it, and the network as it was, whose weights are the guide's mean."""
    net = network()
    plain = copy.deepcopy(net)
    model = Regressor(bayesianize(net), 30, noise=noise)
    guide = kind(model)
    guide(*regression_data())
    return model, guide, plain


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


def state(model: nn.Module) -> list[Any]:
    """Statistics, modes and momenta."""
    found = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    return [*found, *(x.tolist() for x in model.state_dict().values())]


@pytest.mark.parametrize("training", [True, False])
def test_the_statistics_are_averages_over_the_batches_at_the_mean(training: bool) -> None:
    model, guide, plain = trained()
    batches = [(inputs(rows), "targets of any kind") for rows in (8, 8, 5)]
    model.train(training)
    layers(model)[0].eval()  # as it was left
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()

    distances = update_bn(model, guide, batches)

    plain.eval()
    sums: list[Tensor] = []
    for x, _ in batches:  # the same by hand
        seen = []
        for layer in plain:
            if isinstance(layer, nn.BatchNorm1d):
                seen += [x.mean(0), x.var(0)]
                x = nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, True)
            else:
                x = layer(x)
        sums = [a + b for a, b in zip(sums, seen, strict=True)] if sums else seen
    found = [x for layer in layers(model) for x in (layer.running_mean, layer.running_var)]
    for value, total in zip(found, sums, strict=True):
        torch.testing.assert_close(value, total / 3)
    assert [module.training for module in model.modules()] == modes
    assert [layer.momentum for layer in layers(model)] == [0.1, 0.3]
    assert torch.equal(torch.get_rng_state(), random)
    assert list(distances) == ["net.1", "net.5"] and min(distances.values()) > 0
    again = update_bn(model, guide, batches)
    assert max(again.values()) < 1e-12


def test_the_distance_is_the_divergence_of_normals() -> None:
    model, guide, _ = trained()
    before = copy.deepcopy(layers(model)[1])
    distance = update_bn(model, guide, [inputs(20)])["net.5"]
    after = layers(model)[1]
    kl = torch.distributions.kl_divergence(
        dist.Normal(after.running_mean, after.running_var.sqrt()),
        dist.Normal(before.running_mean, before.running_var.sqrt()),
    )
    assert distance == pytest.approx(float(kl.mean()))


def test_batches_of_all_forms_and_their_number() -> None:
    x, y = regression_data()
    found = []
    forms: list[Any] = [[x], [(x, y)], [[x, y]], [{"x": x, "y": y}], iter([(x, y), (None, None)])]
    for batches in forms:
        model, guide, _ = trained()
        update_bn(model, guide, batches, num_batches=1, progress=False)
        found.append(layers(model)[0].num_batches_tracked.item())
    assert found == [1] * len(forms)


def test_other_latents_are_at_their_medians_and_guides_of_pyro_have_them_too() -> None:
    x, y = regression_data()
    for kind in (DiagonalGuide, AutoNormal):
        model, guide, _ = trained(kind, noise=None)
        assert update_bn(model, guide, [(x, y)]).keys() == {"net.1", "net.5"}


def test_a_function_of_a_network() -> None:
    net = bayesianize(network())
    model = Regressor(net, 30, noise=0.3)
    guide = KFACGuide(lambda x, y=None: model(x, y))
    guide(*regression_data())
    assert len(update_bn(guide._base_model[0], guide, [inputs()])) == 2


def test_without_batch_norm_there_is_no_pass() -> None:
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    net = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), norm)
    model = Regressor(bayesianize(net), 30, noise=0.3)

    class Untouched:
        def __iter__(self) -> Any:
            raise AssertionError("the data have been read")

    assert update_bn(model, KFACGuide(model), Untouched()) == {}


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [KeyError, Interrupted])
def test_an_error_leaves_all_as_it_was(error: type[BaseException]) -> None:
    def batches() -> Any:
        yield inputs(), None
        raise error

    model, guide, _ = trained()
    model.train()
    before = state(model)
    with pytest.raises(error):
        update_bn(model, guide, batches())
    assert state(model) == before
    for wrong, kind, message in [
        ([], ValueError, "loader: there is no batch"),
        ([()], ValueError, "loader: a batch is empty"),
        ([inputs() * torch.inf], Exception, "finite|nan"),
        ([inputs()[:, :2]], RuntimeError, "shapes"),
    ]:
        with pytest.raises(kind, match=message):
            update_bn(model, guide, wrong)
        assert state(model) == before


def test_what_is_refused() -> None:
    model, guide, _ = trained()
    with pytest.raises(NotImplementedError, match=r"use mixture\[i\]"):
        update_bn(model, MixtureGuide([guide]), [inputs()])
    with pytest.raises(TypeError, match=r"a guide with a median\(\) is needed, got Regressor"):
        update_bn(model, model, [inputs()])
    with pytest.raises(ValueError, match="num_batches=0"):
        update_bn(model, guide, [inputs()], num_batches=0)
    for fresh in (KFACGuide(model), AutoNormal(model)):
        with pytest.raises(RuntimeError, match="not initialized"):
            update_bn(model, fresh, [inputs()])


def test_a_classifier_in_half_precision() -> None:
    net = network().bfloat16()
    model = Classifier(bayesianize(net), 30)
    guide = DiagonalGuide(model)
    x = inputs().bfloat16()
    guide(x, torch.zeros(30, dtype=torch.long))
    assert len(update_bn(model, guide, [x])) == 2
    assert layers(model)[0].running_mean.dtype == torch.bfloat16


def test_statistics_of_a_new_network_are_noticed_once() -> None:
    model, guide, _ = trained()
    x = inputs()
    fresh = copy.deepcopy(model).eval()
    predict = Predictive(fresh, guide=guide, num_samples=2)
    with pytest.warns(UserWarning, match=r"of net.1, net.5 are .*nn.update_bn\(model, g"):
        predict(x)
    predict(x)
    update_bn(fresh, guide, [x])
    Predictive(fresh, guide=guide, num_samples=2)(x)
    with pytest.warns(UserWarning, match="in train"):  # which uses those of the batch
        Predictive(copy.deepcopy(model).train(), guide=guide, num_samples=2)(x)
    others = [trained() for _ in range(2)]
    for number, (one, own, _) in enumerate(others):
        update_bn(one, own, [x + number])
    mixture = MixtureGuide([own for _, own, _ in others])
    Predictive(copy.deepcopy(model).eval(), guide=mixture, num_samples=2)(x)
    samples = mixture.sample_posterior(2)
    Predictive(others[0][0].eval(), posterior_samples=samples)(x)
