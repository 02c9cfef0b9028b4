"""Pyro's parameter store alone has a posterior, and all who read a guide see what the store has."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList
from torch import Tensor, nn
from toys import GUIDES, flat, regression_data, regressor, trained

from pyrocurv.curvature import KFAC
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, MixtureGuide, StructuredGuide
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.nn import Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)
Data = tuple[Tensor, Tensor]


def moments(guide: StructuredGuide) -> list[Tensor]:
    """Mean, covariance, and the medians and spread of all latents."""
    posterior, quantiles = guide.posterior, guide.quantiles([0.1, 0.9])
    return [
        posterior.loc, torch.linalg.inv(posterior.precision.dense()), *guide.median().values(),
        *quantiles.values(),
    ]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def with_sigma(structure: str, steps: int = 3) -> tuple[NGVI, Data]:
    """Weight and bias have unequal priors, so that Kronecker guides have roots."""
    model, data = regressor(noise=None), regression_data()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1)
    for _ in range(steps):
        ngvi.step(*data)
    return ngvi, data


def in_another_process(path: Path) -> None:
    """The store as it is after a program has ended and another has loaded the file."""
    pyro.get_param_store().save(path / "store")
    gc.collect()
    pyro.clear_param_store()
    pyro.get_param_store().load(path / "store")


def snapshot() -> Any:
    return copy.deepcopy(pyro.get_param_store().get_state())


# ---- another process ----------------------------------------------------------------------------


@each
def test_the_store_alone_restores_a_posterior(structure: str, tmp_path: Path) -> None:
    ngvi, data = with_sigma(structure)
    model, expected = ngvi.model, moments(ngvi.guide)
    del ngvi
    in_another_process(tmp_path)
    other = GUIDES[structure](regressor())  # made first, called last
    fresh = GUIDES[structure](model)
    fresh(*data)
    assert same(moments(fresh), expected)
    other(*data)
    assert not same(moments(other), expected) and other._pyro_name != fresh._pyro_name


def test_names_do_not_depend_on_how_many_guides_there_were(tmp_path: Path) -> None:
    for _ in range(3):
        ngvi, data = with_sigma("kfac", steps=1)
        model, expected = ngvi.model, moments(ngvi.guide)
    kept = KFACGuide(regressor())  # another guide of the class that lives
    kept(*data)
    del ngvi
    in_another_process(tmp_path)
    fresh = KFACGuide(model)
    NGVI(model, fresh).evaluate_loss(*data)
    assert same(moments(fresh), expected)


def test_truncated_bases_and_dense_layers_are_restored(tmp_path: Path) -> None:
    net = bayesianize(nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2)).double())
    model, x = Regressor(net, 30, noise=0.3), torch.randn(30, 12).double()
    choice = {"net.0": KFAC(rank=3), "net.2": "block"}
    ngvi = NGVI(model, KFACGuide(model, structure=choice))
    ngvi.step(x, x[:, :2]), ngvi.step(x, x[:, :2])
    expected = moments(ngvi.guide)
    del ngvi
    in_another_process(tmp_path)
    fresh = KFACGuide(model, structure=choice)
    fresh(x, x[:, :2])
    assert same(moments(fresh), expected)


@pytest.mark.parametrize("make", [FullGuide, DiagonalGuide])
def test_a_guide_without_a_network_is_restored(
    make: type[StructuredGuide], tmp_path: Path
) -> None:
    def model(y: Tensor) -> None:
        sd = pyro.sample("sd", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(pyro.sample("m", dist.Normal(0.0, 5.0)), sd), obs=y)

    data = torch.tensor([1.0, 2.0, 4.0])
    ngvi = NGVI(model, make(model), curvature="hessian")
    ngvi.step(data), ngvi.step(data)
    expected = moments(ngvi.guide)
    del ngvi
    in_another_process(tmp_path)
    fresh = make(model)
    fresh(data)
    assert same(moments(fresh), expected)


def test_a_mixture_is_restored(tmp_path: Path) -> None:
    model, data = regressor(), regression_data()
    guides = [KFACGuide(model), KFACGuide(model)]
    for guide in guides:
        NGVI(model, guide, lr=0.3).step(*data)
    expected = [moments(guide) for guide in guides]
    assert not same(*expected)
    del guides, guide
    in_another_process(tmp_path)
    mixture = MixtureGuide([KFACGuide(model), KFACGuide(model)])
    Predictive(model, guide=mixture, num_samples=2)(*data)
    assert [same(moments(g), e) for g, e in zip(mixture, expected, strict=True)] == [True, True]


def test_a_fallback_guide_with_plain_parameters_is_restored(tmp_path: Path) -> None:
    model, data = regressor(noise=None), regression_data()
    guide = KFACGuide(model, fallback=AutoDiagonalNormal)
    NGVI(model, guide).step(*data)
    expected = guide.median()["sigma"]
    state = snapshot()
    NGVI(model, guide).step(*data)
    pyro.get_param_store().set_state(state)
    assert torch.equal(guide.median()["sigma"], expected)


# ---- early stopping -----------------------------------------------------------------------------

READERS: dict[str, Callable[[NGVI, Data], Any]] = {
    "posterior": lambda ngvi, data: moments(ngvi.guide)[:2],
    "median": lambda ngvi, data: [*ngvi.guide.median().values()],
    "quantiles": lambda ngvi, data: [*ngvi.guide.quantiles(0.3).values()],
    "marginals": lambda ngvi, data: [ngvi.guide.get_posterior("net.0.weight").mean],
    "samples": lambda ngvi, data: [*ngvi.guide.sample_posterior(2).values()],
    "call": lambda ngvi, data: [*ngvi.guide(*data).values()],
    "kl": lambda ngvi, data: [ngvi.guide.kl().detach()],
    "loss": lambda ngvi, data: [torch.tensor(ngvi.evaluate_loss(*data))],
    "state": lambda ngvi, data: [
        value for value in ngvi.guide.state_dict().values() if isinstance(value, Tensor)
    ],
    "predictive": lambda ngvi, data: [
        Predictive(ngvi.model, guide=ngvi.guide, num_samples=2)(data[0])["obs"]
    ],
    "laplace": lambda ngvi, data: [Laplace(ngvi.model, ngvi.guide).predict(data[0]).variance],
    "step": lambda ngvi, data: [torch.tensor(NGVI(ngvi.model, ngvi.guide).step(*data))],
    "copy": lambda ngvi, data: moments(copy.deepcopy(ngvi.guide)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_every_reader_sees_the_restored_posterior(structure: str, reader: str) -> None:
    ngvi, data = with_sigma(structure)
    state = snapshot()

    def read() -> list[Tensor]:
        torch.manual_seed(1)
        return [value.detach().clone() for value in READERS[reader](ngvi, data)]

    expected = read()
    pyro.get_param_store().set_state(copy.deepcopy(state))  # what was read may have trained
    ngvi.step(*data), ngvi.step(*data)
    assert not same(read(), expected)
    pyro.get_param_store().set_state(copy.deepcopy(state))
    assert same(read(), expected)


@pytest.mark.parametrize("options", [{}, {"average": True}, {"curvature": "hessian"}], ids=str)
@pytest.mark.parametrize("structure", ["ekfac", "full"])
def test_the_next_step_starts_from_the_restored_posterior(
    structure: str, options: dict[str, Any]
) -> None:
    """As that of a new NGVI: the same loss and the same posterior after it, at the mean."""
    model, data = regressor(), regression_data()
    options = {"curvature": "ggn", "num_particles": 0, **options}
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1, **options)
    ngvi.step(*data), ngvi.step(*data)
    state = snapshot()
    ngvi.step(*data), ngvi.step(*data)
    results = []
    for stepping in (ngvi, NGVI(model, ngvi.guide, lr=0.1, **options)):
        pyro.get_param_store().set_state(copy.deepcopy(state))
        results.append([torch.tensor(stepping.step(*data)), *moments(ngvi.guide)])
    assert same(*results)


@each
def test_what_was_handed_out_does_not_move(structure: str) -> None:
    ngvi, data = trained(structure, steps=1)
    posterior = ngvi.guide.posterior
    before = posterior.loc.clone(), posterior.precision.dense()
    ngvi.step(*data), ngvi.step(*data)
    assert same([posterior.loc, posterior.precision.dense()], [*before])


def test_a_state_that_was_not_copied_is_one_posterior() -> None:
    """Parameters are trained in place, in Pyro too: such a state is the last posterior, whole."""
    ngvi, data = with_sigma("kfac")
    state = pyro.get_param_store().get_state()
    for _ in range(3):
        ngvi.step(*data)
    expected = moments(ngvi.guide)
    pyro.get_param_store().set_state(state)
    assert same(moments(ngvi.guide), expected)


# ---- names --------------------------------------------------------------------------------------


def test_names_as_those_of_pyro() -> None:
    model, data = regressor(), regression_data()
    guides = [FullGuide(model), KFACGuide(model), KFACGuide(model), DiagonalGuide(model)]
    for guide in guides:
        guide(*data)
    names = {*pyro.get_param_store().keys()}
    parts = "loc", "scale", "output_basis", "output_root", "input_basis", "input_root"
    layers = [f"{name}.net.{n}" for name in ("KFACGuide", "KFACGuide_1") for n in (0, 2)]
    assert names == {
        "FullGuide.loc", "FullGuide.scale_tril", "DiagonalGuide.loc", "DiagonalGuide.scale",
        *(f"{layer}.{part}" for layer in layers for part in parts),
    }
    samples = torch.stack([guides[1]()["net.0.bias"], guides[2]()["net.0.bias"]])
    with torch.no_grad():
        guides[1].blocks[0].raw_loc.add_(1)
    assert not torch.equal(guides[1].median()["net.0.bias"], guides[2].median()["net.0.bias"])
    assert samples.shape == (2, 4)


def test_names_in_a_list() -> None:
    model, data = regressor(noise=None), regression_data()
    guide = AutoGuideList(model)
    guide.append(FullGuide(poutine.block(model, hide=["sigma"])))
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["sigma"])))
    guide(*data)
    assert {*pyro.get_param_store().keys()} == {
        "AutoGuideList.0.loc", "AutoGuideList.0.scale_tril", "AutoGuideList.1.loc",
        "AutoGuideList.1.scale",
    }


@each
def test_guides_that_are_gone_leave_nothing(structure: str) -> None:
    model, data, sizes = regressor(noise=None), regression_data(), []
    for _ in range(6):
        guide = GUIDES[structure](model)
        guide(*data)
        names = {*pyro.get_param_store().keys()}
        sizes.append(len(names))
    assert max(sizes[1:]) <= 2 * sizes[0]  # a guide and the one that it takes the place of
    del guide
    gc.collect()
    GUIDES[structure](model)
    assert not pyro.get_param_store().keys()


def test_a_guide_that_is_gone_can_still_be_saved(tmp_path: Path) -> None:
    def train() -> list[Tensor]:
        ngvi, _ = with_sigma("kfac")
        return moments(ngvi.guide)

    expected = train()
    in_another_process(tmp_path)
    fresh = KFACGuide(regressor(noise=None))
    fresh(*regression_data())
    assert same(moments(fresh), expected)


def test_a_new_guide_does_not_inherit_from_one_that_is_gone() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), lr=0.3)
    ngvi.step(*data)
    moved = ngvi.guide.median()["net.0.bias"]
    fresh = KFACGuide(model)
    del ngvi
    gc.collect()
    fresh(*data)
    assert not torch.equal(fresh.median()["net.0.bias"], moved)
    assert torch.equal(fresh.median()["net.0.bias"], model.net[0]._buffers["_bias_initial"])


# ---- what does not fit --------------------------------------------------------------------------


def test_the_store_of_another_model_is_refused(tmp_path: Path) -> None:
    ngvi, data = trained("kfac", steps=1)
    del ngvi
    in_another_process(tmp_path)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model = Regressor(bayesianize(net), 30, noise=0.3)
    guide = KFACGuide(model)
    with pytest.raises(ValueError, match=r"KFACGuide.*another model: net\.0\.loc \(16,\) in place"):
        guide(*data)
    assert not guide.is_initialized
    pyro.clear_param_store()
    guide(*data)


def test_other_latents_in_the_store_are_pointed_out(tmp_path: Path) -> None:
    ngvi, data = trained("kfac", steps=1)
    del ngvi
    in_another_process(tmp_path)
    model = Regressor(bayesianize(nn.Sequential(nn.Tanh(), nn.Linear(3, 2)).double()), 30, 0.3)
    with pytest.warns(UserWarning, match="the param store has KFACGuide, not put there by"):
        KFACGuide(model)(*data)


def test_half_a_posterior_is_refused() -> None:
    ngvi, data = trained("kfac", steps=1)
    state = snapshot()
    for name in [name for name in state["params"] if name.endswith("input_basis")]:
        del state["params"][name], state["constraints"][name]
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    with pytest.raises(ValueError, match=r"but not KFACGuide\.net\.0\.input_basis"):
        ngvi.guide.median()


def test_shapes_that_do_not_fit_are_refused() -> None:
    ngvi, data = trained("diag", steps=1)
    name = next(name for name in pyro.get_param_store().keys() if name.endswith("loc"))
    del pyro.get_param_store()[name]
    pyro.get_param_store()[name] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"loc \(3,\) in place of"):
        ngvi.step(*data)


def test_local_parameters_stay_the_modules_own() -> None:
    with pyro.settings.context(module_local_params=True):
        ngvi, data = with_sigma("kfac")
        assert not pyro.get_param_store().keys()
        samples = flat(ngvi.guide.sample_posterior(2), ngvi.guide.sites)
    assert samples.shape == (2, sum(value.numel() for value in ngvi.guide.median().values()) - 1)
