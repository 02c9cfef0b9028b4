"""A guide is one of its own through copies, pickles, moves and states, in both parameter modes."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoLaplaceApproximation, AutoNormal
from torch import Tensor, nn
from toys import GUIDES, class_data, classifier, inputs, regression_data, regressor, trained

from pyrocurv.guides import KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)
Data = tuple[Tensor, Tensor]


@pytest.fixture(params=[False, True], ids=["store", "local"], autouse=True)
def mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    with pyro.settings.context(module_local_params=request.param):
        yield request.param


def with_sigma(structure: str) -> tuple[NGVI, Data]:
    """Some way into training, with a fallback guide."""
    model, data = regressor(noise=None), regression_data()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1)
    ngvi.step(*data), ngvi.step(*data)
    return ngvi, data


def medians(guide: StructuredGuide) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in guide.median().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: Any, guide: StructuredGuide, data: Data) -> None:
    """By natural gradients and by Pyro's."""
    NGVI(model, guide, lr=0.3).step(*data)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(*data)
    guide(*data)


def assert_apart(model: Any, one: StructuredGuide, two: StructuredGuide, data: Data) -> None:
    """Both can be trained, and neither moves with the other."""
    one(*data), two(*data)
    assert same(medians(one), medians(two))
    for moving, still in ((one, two), (two, one)):
        before, start = medians(still), medians(moving)
        train(model, moving, data)
        still(*data)
        assert same(medians(still), before)
        assert not any(torch.equal(start[name], moving.median()[name]) for name in start)


# ---- deepcopy -----------------------------------------------------------------------------------


@each
def test_a_copy_is_independent(structure: str) -> None:
    ngvi, data = with_sigma(structure)
    expected = medians(ngvi.guide)
    twin = copy.deepcopy(ngvi.guide)
    assert same(medians(twin), expected) and type(twin) is type(ngvi.guide)
    assert twin.sites == ngvi.guide.sites and twin.fallback_sites == ("sigma",)
    assert torch.equal(twin.posterior.precision.dense(), ngvi.guide.posterior.precision.dense())
    torch.testing.assert_close(twin.kl(), ngvi.guide.kl())
    assert twin.summary() == ngvi.guide.summary()
    assert twin._base_model[0] is ngvi.model, "a guide alone is copied on its model"
    assert_apart(ngvi.model, ngvi.guide, twin, data)
    ngvi.step(*data)


@each
def test_a_copy_of_a_copy(structure: str, mode: bool) -> None:
    ngvi, data = with_sigma(structure)
    twin = copy.deepcopy(copy.deepcopy(ngvi.guide))
    assert mode or ngvi.guide._pyro_name != twin._pyro_name  # in a store of their own no matter
    assert_apart(ngvi.model, ngvi.guide, twin, data)


def test_a_copy_before_the_first_call() -> None:
    model, data = regressor(noise=None), regression_data()
    guide = KFACGuide(model, structure={"net.0": "diag"}, init_loc_fn=lambda site: site["fn"].mean)
    twin = copy.deepcopy(guide)
    assert_apart(model, guide, twin, data)
    assert "diag" in twin.summary()


def test_a_copy_of_a_guide_that_was_loaded() -> None:
    ngvi, data = with_sigma("kfac")
    loaded = KFACGuide(ngvi.model)
    loaded.load_state_dict(ngvi.guide.state_dict())
    twin = copy.deepcopy(loaded)
    twin(*data)
    assert same(medians(twin), medians(ngvi.guide))


@each
def test_model_and_guide_copied_together_stay_a_pair(structure: str) -> None:
    ngvi, data = with_sigma(structure)
    model, guide = copy.deepcopy((ngvi.model, ngvi.guide))
    assert guide._base_model[0] is model is not ngvi.model
    assert guide.model.args[-1] is model
    model.float(), guide.float()  # the pair alone is of another kind now
    NGVI(model, guide).step(*(part.float() for part in data))
    ngvi.step(*data)
    assert {value.dtype for value in guide.median().values()} == {torch.float32}
    assert {value.dtype for value in ngvi.guide.median().values()} == {torch.float64}


def test_a_pair_with_handlers_around_the_model() -> None:
    model, data = regressor(noise=None), regression_data()
    guide = KFACGuide(poutine.block(poutine.scale(model, 0.5), hide=["sigma"]))
    guide(*data)
    other, twin = copy.deepcopy((model, guide))
    found = twin._base_model[0]
    while not isinstance(found, nn.Module):
        found = found.args[-1]
    assert found is other
    assert not hasattr(twin, "fallback") and twin(*data).keys() == guide(*data).keys()
    never_called = copy.deepcopy((model, KFACGuide(poutine.block(model, hide=["sigma"]))))[1]
    assert never_called(*data).keys() == guide(*data).keys()


@each
def test_a_run_copied_whole_goes_on_as_the_run_does(structure: str) -> None:
    ngvi, data = with_sigma(structure)
    twin = copy.deepcopy(ngvi)
    assert twin.guide._base_model[0] is twin.model
    expected = [ngvi.step(*data) for _ in range(3)]
    assert [twin.step(*data) for _ in range(3)] == expected
    assert same(medians(twin.guide), medians(ngvi.guide))


def test_a_prior_that_hangs_on_a_latent_is_copied() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), tau).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(nn.functional.linear(x, w)[:, 0], 1.0), obs=y)

    ngvi, data = NGVI(model, KFACGuide(model)), (torch.randn(6, 3), torch.randn(6))
    ngvi.step(*data), ngvi.step(*data)
    for twin in (copy.deepcopy(ngvi.guide), pickle.loads(pickle.dumps(ngvi.guide))):
        assert torch.equal(twin.kl(), ngvi.guide.kl())


def test_a_copy_of_a_list_of_guides() -> None:
    model, data = regressor(noise=None), regression_data()
    guide = AutoGuideList(model)
    guide.append(KFACGuide(poutine.block(model, hide=["sigma"])))
    guide.append(AutoNormal(poutine.block(model, expose=["sigma"])))
    guide(*data)
    twin = copy.deepcopy(guide)
    assert all(part.master() is twin for part in twin) and twin[0]._pyro_name == "AutoGuideList.0"
    assert same(twin.median(*data), guide.median(*data))
    assert twin(*data).keys() == guide(*data).keys()


# ---- pickle -------------------------------------------------------------------------------------


@each
def test_a_pickle_is_independent(structure: str) -> None:
    ngvi, data = with_sigma(structure)
    again = pickle.loads(pickle.dumps(ngvi.guide))
    assert_apart(ngvi.model, ngvi.guide, again, data)


def test_pickling_leaves_the_fallback_its_model() -> None:
    model, data = regressor(noise=None), regression_data()
    guide = KFACGuide(model, fallback=AutoLaplaceApproximation)
    guide(*data)
    pickle.dumps(guide)
    assert guide.fallback.model is not None and guide.fallback.master() is guide
    guide(*data)


def test_what_the_first_call_needed_is_not_pickled() -> None:
    model, data = regressor(), regression_data()
    guide = KFACGuide(
        model, structure=lambda name, module: "diag", init_loc_fn=lambda site: site["fn"].mean
    )
    guide(*data)
    again = pickle.loads(pickle.dumps(guide))
    assert again(*data).keys() == guide(*data).keys()


def test_a_whole_guide_in_a_file() -> None:
    ngvi, data = with_sigma("ekfac")
    file = io.BytesIO()
    torch.save(ngvi.guide, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert same(medians(again), medians(ngvi.guide))
    assert_apart(ngvi.model, ngvi.guide, again, data)


# ---- states -------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each
@pytest.mark.parametrize("noise", [0.3, None])
def test_a_loaded_guide_predicts_without_data(structure: str, noise: float | None) -> None:
    """A Normal `obs` is no latent of it: the state says which the latents are."""
    model, data = regressor(noise), regression_data()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1)
    ngvi.step(*data)
    fresh = GUIDES[structure](model)
    fresh.load_state_dict(through_a_file(ngvi.guide.state_dict()))
    samples = Predictive(model, guide=fresh, num_samples=3)(inputs(7))
    assert samples["obs"].shape == (3, 7, 2)
    assert fresh(inputs(7)).keys() == {*fresh.sites, *fresh.fallback_sites}
    assert fresh.fallback_sites == (() if noise else ("sigma",))
    assert same(medians(fresh), medians(ngvi.guide))
    NGVI(model, fresh).step(*data)


def test_a_loaded_guide_of_classes_predicts_without_data() -> None:
    model, data = classifier(), class_data()
    guide = KFACGuide(model)
    guide(*data)
    fresh = KFACGuide(model)
    fresh.load_state_dict(through_a_file(guide.state_dict()))
    assert Predictive(model, guide=fresh, num_samples=3)(inputs(7))["obs"].shape == (3, 7)


@pytest.mark.parametrize("kind", ["point", "frozen"])
def test_a_loaded_guide_of_classes_beside_points_predicts_without_data(kind: str) -> None:
    """A discrete `obs` is none of the latents that the guide for points starts."""
    model, data = classifier(), class_data()
    guide = KFACGuide(model, structure={"net.0": kind})
    guide(*data)
    fresh = KFACGuide(model, structure={"net.0": kind})
    fresh.load_state_dict(through_a_file(guide.state_dict()))
    assert Predictive(model, guide=fresh, num_samples=3)(inputs(7))["obs"].shape == (3, 7)
    assert same(medians(fresh), medians(guide))


def test_a_loaded_guide_of_counts_predicts_without_data() -> None:
    """Beside a latent that is no weight."""
    net = bayesianize(nn.Linear(3, 1).double())

    def model(x: Tensor, y: Tensor | None = None) -> None:
        spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
        logits = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.NegativeBinomial(spread, logits=logits), obs=y)

    x, guide, fresh = inputs(), KFACGuide(model), KFACGuide(model)
    guide(x, torch.poisson(x[:, 0].exp()))
    fresh.load_state_dict(through_a_file(guide.state_dict()))
    assert Predictive(model, guide=fresh, num_samples=3)(inputs(7))["obs"].shape == (3, 7)
    assert same(medians(fresh), medians(guide))


def test_a_loaded_guide_of_points_and_frozen_weights_predicts_without_data() -> None:
    choice = {"net.0": "frozen", "net.2": "point"}
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model, data = Regressor(bayesianize(net.double()), 30), regression_data()
    ngvi = NGVI(model, KFACGuide(model, structure=choice), lr=0.1)
    ngvi.step(*data), ngvi.step(*data)
    fresh = KFACGuide(model, structure=choice)
    fresh.load_state_dict(through_a_file(ngvi.guide.state_dict()))
    assert Predictive(model, guide=fresh, num_samples=3)(inputs(7))["obs"].shape == (3, 7, 2)
    assert same(medians(fresh), medians(ngvi.guide))
    assert same(medians(pickle.loads(pickle.dumps(ngvi.guide))), medians(ngvi.guide))


def test_a_list_of_loaded_guides_predicts_without_data() -> None:
    model, data = regressor(noise=None), regression_data()

    def make() -> AutoGuideList:
        guide = AutoGuideList(model)
        guide.append(KFACGuide(poutine.block(model, hide=["sigma"])))
        guide.append(KFACGuide(poutine.block(model, expose=["sigma"])))
        return guide

    guide, fresh = make(), make()
    guide(*data)
    fresh.load_state_dict(through_a_file(guide.state_dict()))
    assert Predictive(model, guide=fresh, num_samples=3)(inputs(7))["obs"].shape == (3, 7, 2)
    assert same(fresh.median(), guide.median())


def test_a_loaded_guide_saved_again_before_its_first_call() -> None:
    ngvi, _ = with_sigma("kfac")
    one, two = KFACGuide(ngvi.model), KFACGuide(ngvi.model)
    one.load_state_dict(ngvi.guide.state_dict())
    two.load_state_dict(through_a_file(one.state_dict()))
    two(inputs(7))
    assert same(medians(two), medians(ngvi.guide))


@each
@pytest.mark.parametrize("assign", [False, True])
def test_a_used_guide_takes_on_a_state(structure: str, assign: bool) -> None:
    """Also where the state's tensors are put in place of its parameters."""
    ngvi, data = with_sigma(structure)
    other = GUIDES[structure](ngvi.model)
    other(*data)
    other.load_state_dict(through_a_file(ngvi.guide.state_dict()), assign=assign)
    other(*data)
    assert same(medians(other), medians(ngvi.guide))
    assert_apart(ngvi.model, ngvi.guide, other, data)


# ---- moves --------------------------------------------------------------------------------------


@each
def test_a_move_is_not_undone_by_the_store(structure: str) -> None:
    """To a device where parameters are other objects than before; and back, from a state."""
    ngvi, data = with_sigma(structure)
    guide = ngvi.guide
    state, expected = through_a_file(guide.state_dict()), medians(guide)
    guide(*data)
    guide.to("meta")
    if structure in ("diag", "full", "block"):  # the others ask their tensors for values
        with pyro.validation_enabled(False):
            assert {value.device.type for value in guide(*data).values()} == {"meta"}
    assert {value.device.type for value in guide.parameters()} == {"meta"}
    assert {value.device.type for value in guide.buffers()} <= {"meta"}
    guide.load_state_dict(state, assign=True)
    guide(*data)
    assert same(medians(guide), expected)
    train(ngvi.model, guide, data)


@each
def test_there_and_back_in_precision(structure: str) -> None:
    ngvi, data = with_sigma(structure)
    expected = medians(ngvi.guide)
    ngvi.guide.float()
    assert {value.dtype for value in ngvi.guide.median().values()} == {torch.float32}
    ngvi.guide.double()
    ngvi.guide(*data)
    for name, value in ngvi.guide.median().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    ngvi.step(*data)


def test_what_the_store_was_given_is_not_lost_by_a_move() -> None:
    """Parameters loaded into Pyro's store count before those of a guide that has not met them."""
    ngvi, data = trained("kfac", steps=2)
    ngvi.guide(*data)
    kept = copy.deepcopy(pyro.get_param_store().get_state())
    expected = medians(ngvi.guide)
    train(ngvi.model, ngvi.guide, data)
    if not kept["params"]:
        pytest.skip("parameters are the modules' own")
    pyro.get_param_store().set_state(kept)
    ngvi.guide.double()
    ngvi.guide(*data)
    assert same(medians(ngvi.guide), expected)
