"""Joint or layer by layer: `NGVI` decides once, at its first step, and leaves the guide alone."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from toys import everything, identical, leaves

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Regressor, bayesianize

pytestmark = pytest.mark.usefixtures("double")
ROWS = 20
LAYERWISE = Curvature("hessian", every=5)


def network(noise: float | None = None) -> Regressor:
    """A network, by default with a latent noise scale."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return Regressor(bayesianize(net), ROWS, noise=noise)


def functional(x: Tensor, y: Tensor) -> None:
    """One weight that a supported op consumes."""
    w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
    with pyro.plate("data", ROWS):
        pyro.sample("obs", dist.Normal(nn.functional.linear(x, w)[:, 0], 0.5), obs=y)


MODELS: dict[str, Callable[[], Callable[..., Any]]] = {
    "network": network, "network of known noise": lambda: network(0.3),
    "functional": lambda: functional,
}
each_model = pytest.mark.parametrize("name", MODELS)
each_guide = pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide, KFACGuide])


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))
    return x, x[:, 0].sin()


def layout(guide: StructuredGuide) -> dict[str, Any]:
    return guide.get_extra_state()


def trained_after(
    discarded: Any, curvature: Any, name: str, structure: type[StructuredGuide]
) -> tuple[NGVI, list[float]]:
    """Three steps, after an `NGVI` of another curvature was made and never used."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = MODELS[name]()
    guide = structure(model)
    if discarded is not None:
        with torch.random.fork_rng():
            NGVI(model, guide, curvature=discarded)
    ngvi = NGVI(model, guide, curvature=curvature)
    return ngvi, [ngvi.step(*data()) for _ in range(3)]


@pytest.mark.parametrize(("discarded", "curvature"), [
    ("hessian", "ggn"), ("hessian", LAYERWISE), ("ggn", "hessian"),
])
@each_guide
@each_model
def test_a_discarded_ngvi_changes_nothing(
    name: str, structure: type[StructuredGuide], discarded: Any, curvature: Any
) -> None:
    expected, losses = trained_after(None, curvature, name, structure)
    ngvi, again = trained_after(discarded, curvature, name, structure)
    assert again == losses
    assert layout(ngvi.guide) == layout(expected.guide)
    states = [[*leaves([run.guide.state_dict(), run.state_dict()])] for run in (ngvi, expected)]
    assert identical(*states)


@each_guide
@each_model
@pytest.mark.parametrize("called", [False, True], ids=["guide new", "guide called"])
def test_a_guide_is_the_same_after_ngvi_is_made(
    name: str, structure: type[StructuredGuide], called: bool
) -> None:
    model = MODELS[name]()
    guide = structure(model)
    if called:
        guide(*data())
    state, attributes = layout(guide), dict(vars(guide))
    NGVI(model, guide, curvature="hessian")
    assert layout(guide) == state
    assert vars(guide) == attributes


@pytest.mark.parametrize(("curvature", "is_joint"), [("hessian", True), (LAYERWISE, False)])
def test_the_curvature_decides_for_a_guide_of_one_block(curvature: Any, is_joint: bool) -> None:
    """Called before `NGVI` is made, between that and the first step, or not at all."""
    for when in ("before", "between", "never"):
        model = network(0.3)
        guide = FullGuide(model)
        if when == "before":
            guide(*data())
        ngvi = NGVI(model, guide, curvature=curvature)
        if when == "between":
            guide(*data())
            before = guide.median()
        losses = [ngvi.step(*data()) for _ in range(3)]
        assert all(map(math.isfinite, losses)) and ngvi._rule.is_joint == is_joint
        assert guide.is_joint == (is_joint and when == "never")
        if when == "between":
            assert guide.median().keys() == before.keys()


def test_a_guide_called_before_ngvi_is_made_is_trained_as_it_is() -> None:
    """The scale stays with the fallback guide, and the defaults are those of layers."""
    model = network()
    guide = FullGuide(model)
    guide(*data())
    state = layout(guide)
    ngvi = NGVI(model, guide, curvature="hessian")
    assert math.isfinite(ngvi.step(*data())) and not ngvi._rule.is_joint
    assert layout(guide) == {**state, "temperature": guide.temperature}
    assert guide.fallback_sites == ("sigma",)
    assert ngvi.num_particles == 1 and ngvi.optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("how", ["called", "loaded"])
def test_a_guide_laid_out_by_layers_after_ngvi_was_made_is_named(how: str) -> None:
    """That `NGVI` has the defaults of joint steps, which cannot be taken any more."""
    model = network()
    guide = FullGuide(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    if how == "called":
        guide(*data())
    else:
        other = FullGuide(model)
        other(*data())
        guide.load_state_dict(other.state_dict())
    state = layout(guide)
    with pytest.raises(ValueError, match="jointly, but since then the guide was called or loaded"):
        ngvi.step(*data())
    assert layout(guide) == state
    assert math.isfinite(NGVI(model, guide, curvature="hessian").step(*data()))


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
def test_a_model_without_a_network_is_joint_whenever_the_guide_is_called(
    structure: type[StructuredGuide],
) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", ROWS):
            pyro.sample("obs", dist.Normal(x[:, 0], scale), obs=y)

    for when in ("before", "between", "never"):
        guide = structure(model)
        if when == "before":
            guide(*data())
        ngvi = NGVI(model, guide, curvature="hessian")
        if when == "between":
            guide(*data())
        ngvi.step(*data())
        assert guide.is_joint and ngvi._rule.is_joint
        with pytest.raises(ValueError, match="'fisher' is computed layer by layer"):
            NGVI(model, guide, curvature="fisher").step(*data())


# ---- states -------------------------------------------------------------------------------------


@each_guide
@each_model
@pytest.mark.parametrize("first", ["guide", "NGVI"])
def test_a_state_loaded_before_the_first_step(
    name: str, structure: type[StructuredGuide], first: str
) -> None:
    """Into a new guide and a new `NGVI`, in either order, also saved again before a step."""
    model = MODELS[name]()
    guide = structure(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    for _ in range(3):
        ngvi.step(*data())
    guide_state, state = guide.state_dict(), ngvi.state_dict()
    fresh = structure(model)
    if first == "guide":
        fresh.load_state_dict(guide_state)
        resumed = NGVI(model, fresh, curvature="hessian")
        resumed.load_state_dict(state)
    else:
        resumed = NGVI(model, fresh, curvature="hessian")
        resumed.load_state_dict(state)
        resumed.load_state_dict(resumed.state_dict())
        fresh.load_state_dict(guide_state)
    assert resumed.state_dict()["is_joint"] == ngvi._rule.is_joint
    assert [resumed.step(*data()) for _ in range(3)] == [ngvi.step(*data()) for _ in range(3)]
    assert resumed._rule.is_joint == ngvi._rule.is_joint
    assert layout(fresh) == layout(guide)


@pytest.mark.parametrize(("saved", "current"), [("hessian", LAYERWISE), (LAYERWISE, "hessian")])
def test_a_state_of_the_other_rule_is_refused(saved: Any, current: Any) -> None:
    """Over the same blocks, with the same update and average."""
    model = network(0.3)
    guide = FullGuide(model)
    guide(*data())
    options: dict[str, Any] = {"update": "natural", "average": False}
    ngvi = NGVI(model, guide, curvature=saved, **options)
    ngvi.step(*data())
    other = NGVI(model, guide, curvature=current, **options)
    other.load_state_dict(ngvi.state_dict())
    before = everything(other)
    with pytest.raises(ValueError, match="the state is of steps .* this NGVI steps .* curvature"):
        other.step(*data())
    assert identical(everything(other), before)
    assert math.isfinite(ngvi.step(*data()))
