"""States that do not fit are refused with a ValueError that says why, and change nothing."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pytest
import torch
import torch.nn.functional as F
from snapshots import contents, differences, modules_state, store_state
from torch import nn

from pyrocurv.curvature import KFAC
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

X, Y = torch.linspace(-1, 2, 12).reshape(6, 2).sin(), torch.arange(6) % 2


class Case(NamedTuple):
    """Something with `load_state_dict`, and everything that this may change."""

    target: Any
    state: Callable[[], Any]


def small(hidden: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 2)
    )


def trainer(
    guide: type[Any] = KFACGuide, hidden: int = 3, steps: int = 2, structure: Any = None,
    **options: Any,
) -> NGVI:
    model = Classifier(bayesianize(small(hidden)), 12)
    ngvi = NGVI(model, guide(model, structure=structure), **options)
    for _ in range(steps):
        ngvi.step(X, Y)
    return ngvi


def regression() -> NGVI:
    """With a latent of the fallback guide."""
    model = Regressor(bayesianize(nn.Linear(2, 2)), 12, noise=None)
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(X, X)
    return ngvi


def optimizer(kind: Any = SecondOrderOptimizer, hidden: int = 3, **options: Any) -> Any:
    net = small(hidden)
    sizes = () if kind is SecondOrderOptimizer else (12,)
    result = kind(net, *sizes, **options)
    for _ in range(2):
        if kind is SecondOrderOptimizer:
            F.cross_entropy(net(X), Y).backward()
        else:
            with result.sampled_params():
                F.cross_entropy(net(X), Y).backward()
        result.step()
    return result


def ngvi_case(ngvi: NGVI, target: Any) -> Case:
    guide, model = ngvi.guide, ngvi.model

    def state() -> Any:
        return contents({
            **modules_state(guide, model), "store": store_state(guide), "ngvi": ngvi.state_dict(),
            "sites": [guide.sites, guide.fallback_sites, guide.is_joint, guide.is_laplace],
            "to be loaded": [guide._fallback_state, guide._loaded_fallback],
        })

    return Case(target, state)


def guide_case(steps: int = 2) -> Case:
    ngvi = trainer(steps=steps)
    return ngvi_case(ngvi, ngvi.guide)


def trainer_case(**options: Any) -> Case:
    ngvi = trainer(**options)
    return ngvi_case(ngvi, ngvi)


def optimizer_case(kind: Any = SecondOrderOptimizer) -> Case:
    target = optimizer(kind)
    return Case(target, lambda: contents({
        **modules_state(target.net), "optimizer": target.state_dict(),
        "counts": target.update_counts(), "summary": target.summary(),
    }))


def mixture(count: int = 2, hidden: int = 3) -> MixtureGuide:
    model = Classifier(bayesianize(small(hidden)), 12)
    guides = [KFACGuide(model) for _ in range(count)]
    for guide in guides:
        NGVI(model, guide).step(X, Y)
    return MixtureGuide(guides)


def mixture_case() -> Case:
    target = mixture()
    return Case(target, lambda: contents([
        modules_state(target), *(store_state(guide) for guide in target)
    ]))


def newer(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with the version of every part increased."""
    return {
        key: 999 if key == "version" else newer(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
    }


def truncated(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a guide without some of its tensors."""
    return {key: value for key, value in state.items() if not key.endswith("scale_unconstrained")}


FOREIGN: dict[str, Callable[[], Any]] = {
    "empty": dict,
    "another dict": lambda: {"epoch": 3, "loss": 0.1},
    "network": lambda: small().state_dict(),
    "Adam": lambda: torch.optim.Adam(small().parameters()).state_dict(),
}

# name: what is loaded, the state, and a part of the message
REFUSED: dict[str, tuple[Callable[[], Case], Callable[[], Any], str]] = {
    **{f"guide, {name}": (guide_case, make, "is not of a KFACGuide: it has")
       for name, make in FOREIGN.items()},
    **{f"guide before its first call, {name}": (
        lambda: guide_case(0), make, "is not of a KFACGuide: it has"
    ) for name, make in FOREIGN.items()},
    "guide, NGVI": (guide_case, lambda: trainer().state_dict(), "is not of a KFACGuide: it has"),
    "guide, mixture": (
        guide_case, lambda: mixture().state_dict(), "is not of a KFACGuide: it has components"
    ),
    "guide, class": (
        guide_case, lambda: trainer(DiagonalGuide).guide.state_dict(),
        "structure 'diag', this one has 'kfac'",
    ),
    "guide before its first call, class": (
        lambda: guide_case(0), lambda: trainer(FullGuide).guide.state_dict(),
        "structure 'full', this one has 'kfac'",
    ),
    "guide, shapes": (
        guide_case, lambda: trainer(hidden=4).guide.state_dict(),
        r"the state has weights .*'net.0.weight': \(\(4, 2\).*, this guide .*\(\(3, 2\)",
    ),
    "guide, structure": (
        guide_case, lambda: trainer(structure={"net.0": "diag"}).guide.state_dict(),
        "the state has weights .*Diagonal",
    ),
    "guide, structure of its own": (
        guide_case, lambda: trainer(structure={"net.0": KFAC(rank=1)}).guide.state_dict(),
        "the state has weights .*rank=1",
    ),
    "guide, before its first call": (
        guide_case, lambda: trainer(steps=0).guide.state_dict(), "the state has weights {}, this",
    ),
    "guide, fallback": (
        lambda: ngvi_case(ngvi := regression(), ngvi.guide),
        lambda: {
            **(state := regression().guide.state_dict()),
            "_extra_state": {**state["_extra_state"], "fallback": ["tau"]},
        },
        r"the state has the fallback latents \['tau'\], this guide \['sigma'\]",
    ),
    "guide, version": (
        guide_case, lambda: newer(trainer().guide.state_dict()), "KFACGuide has format version 999"
    ),
    "mixture, guide": (
        mixture_case, lambda: trainer().guide.state_dict(), "is not of a MixtureGuide: it has"
    ),
    "mixture, number": (
        mixture_case, lambda: mixture(3).state_dict(), "is of a mixture of 3 guides, this one has 2"
    ),
    "mixture, shapes of the second": (
        mixture_case, lambda: {
            key: value if ".1." in key else mixture().state_dict()[key]
            for key, value in mixture(hidden=4).state_dict().items()
        }, "the state has weights",
    ),
    **{f"NGVI, {name}": (trainer_case, make, "is not of an NGVI: it lacks")
       for name, make in FOREIGN.items()},
    "NGVI, guide": (trainer_case, lambda: trainer().guide.state_dict(), "is not of an NGVI"),
    "NGVI, optimizer": (
        trainer_case, lambda: optimizer().state_dict(), "is not of an NGVI: it lacks average"
    ),
    "NGVI, shapes": (
        trainer_case, lambda: trainer(hidden=4).state_dict(), "it has net.0 .* this one has net.0"
    ),
    "NGVI, structure": (
        trainer_case, lambda: trainer(structure={"net.0": "diag"}).state_dict(),
        "it has net.0 .* this one has net.0",
    ),
    "NGVI, class of the guide": (
        trainer_case, lambda: trainer(DiagonalGuide).state_dict(), "it has .* this one has net.0",
    ),
    "NGVI, average": (
        trainer_case, lambda: trainer(average=True).state_dict(), "average=True, this NGVI has"
    ),
    "NGVI, PyroOptim": (
        trainer_case, lambda: trainer(optim=pyro.optim.Adam({})).state_dict(), "is of a PyroOptim",
    ),
    "NGVI with a PyroOptim": (
        lambda: trainer_case(optim=pyro.optim.Adam({})), lambda: trainer().state_dict(),
        "is of a torch.optim.Optimizer, this NGVI has a PyroOptim",
    ),
    "NGVI, version": (
        trainer_case, lambda: newer(trainer().state_dict()), "state of NGVI has format version 999"
    ),
    **{f"second order, {name}": (optimizer_case, make, "is not of a SecondOrderOptimizer: it lacks")
       for name, make in FOREIGN.items()},
    "second order, NGVI": (
        optimizer_case, lambda: trainer().state_dict(), "not of a SecondOrderOptimizer: it lacks"
    ),
    "second order, class": (
        optimizer_case, lambda: optimizer(VIOptimizer).state_dict(),
        "is of a VIOptimizer, this is a SecondOrderOptimizer",
    ),
    "second order, shapes": (
        optimizer_case, lambda: optimizer(hidden=4).state_dict(), r"\(4, 2\).*the network has"
    ),
    "second order, structure": (
        optimizer_case, lambda: optimizer(structure={"0": "diag"}).state_dict(),
        "for 0.weight, this SecondOrderOptimizer has",
    ),
    "second order, shapes without blocks": (
        optimizer_case, lambda: optimizer(hidden=4, structure=lambda *_: "point").state_dict(),
        r"0\.weight.*\(4, 2\).*the network has",
    ),
    "second order, version": (
        optimizer_case, lambda: newer(optimizer().state_dict()), "has format version 999"
    ),
    **{f"variational, {name}": (
        lambda: optimizer_case(VIOptimizer), make, "is not of a VIOptimizer: it lacks"
    ) for name, make in FOREIGN.items()},
    "variational, class": (
        lambda: optimizer_case(VIOptimizer), lambda: optimizer().state_dict(),
        "is of a SecondOrderOptimizer, this is a VIOptimizer",
    ),
    "variational, shapes": (
        lambda: optimizer_case(VIOptimizer), lambda: optimizer(VIOptimizer, 4).state_dict(),
        r"\(4, 2\).*the network has",
    ),
    "variational, structure": (
        lambda: optimizer_case(VIOptimizer),
        lambda: optimizer(VIOptimizer, structure="ekfac").state_dict(), "this VIOptimizer has",
    ),
    "variational, version": (
        lambda: optimizer_case(VIOptimizer),
        lambda: newer(optimizer(VIOptimizer).state_dict()), "has format version 999",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_does_not_fit_changes_nothing(name: str) -> None:
    make, other, message = REFUSED[name]
    case, state = make(), other()
    before, saved = case.state(), contents(copy.deepcopy(state))
    with pytest.raises(ValueError, match=message):
        case.target.load_state_dict(state)
    assert not differences(before, case.state())
    assert contents(state) == saved


@pytest.mark.parametrize("steps", [0, 2])
def test_nor_does_a_state_that_lacks_tensors(steps: int) -> None:
    """Torch's own error comes after everything else has been loaded."""
    case, state = guide_case(steps), truncated(trainer().guide.state_dict())
    before = case.state()
    with pytest.raises(RuntimeError, match="Missing key"):
        case.target.load_state_dict(state)
    assert not differences(before, case.state())


@pytest.mark.parametrize("target", ["guide", "ngvi", SecondOrderOptimizer, VIOptimizer])
def test_a_state_that_fits_is_loaded(target: Any) -> None:
    """What the others are compared with: the same calls, with a state that is accepted."""
    if target == "guide":
        ngvi, other = trainer(steps=1), trainer()
        ngvi.guide.load_state_dict(other.guide.state_dict())
        assert contents(ngvi.guide.state_dict()) == contents(other.guide.state_dict())
        return
    made: Callable[[], Any] = trainer if target == "ngvi" else lambda: optimizer(target)
    one, other = made(), made()
    one.load_state_dict(other.state_dict())
    assert contents(one.state_dict()) == contents(other.state_dict())


@pytest.mark.parametrize("other", [lambda: trainer(hidden=4), lambda: trainer(DiagonalGuide)])
def test_a_trainer_that_has_no_blocks_yet_refuses_at_its_first_step(
    other: Callable[[], NGVI]
) -> None:
    ngvi = trainer(steps=0)
    ngvi.load_state_dict(other().state_dict())
    case = ngvi_case(ngvi, ngvi)
    before = case.state()
    with pytest.raises(ValueError, match="it has .* this one has net.0"):
        ngvi.step(X, Y)
    assert not differences(before, case.state())


def test_a_guide_that_has_no_blocks_yet_refuses_another_network() -> None:
    state = trainer(hidden=4).guide.state_dict()
    ngvi = trainer(steps=0)
    case = ngvi_case(ngvi, ngvi.guide)
    before = case.state()
    with pytest.raises(ValueError, match="the state is of another network"):
        ngvi.guide.load_state_dict(state)
    assert not differences(before, case.state())


TARGETS: dict[str, Callable[[], Case]] = {
    "guide": guide_case, "guide before its first call": lambda: guide_case(0),
    "mixture": mixture_case, "NGVI": trainer_case, "second order": optimizer_case,
    "variational": lambda: optimizer_case(VIOptimizer),
}
SOMETHING: tuple[Any, ...] = (None, [], "checkpoint.pt", 3, torch.zeros(2), small(), {1: 2})


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_state_changes_nothing(target: str) -> None:
    case = TARGETS[target]()
    before = case.state()
    for value in SOMETHING:
        with pytest.raises((TypeError, ValueError), match="state"):
            case.target.load_state_dict(value)
    assert not differences(before, case.state())


@pytest.mark.parametrize(("target", "key"), [
    ("NGVI", "stream"), ("NGVI", "posterior"), ("NGVI", "optimizer"), ("NGVI", "auxiliary"),
    ("second order", "param_groups"), ("second order", "posterior"), ("variational", "stream"),
    ("variational", "left_out"), ("guide", "_extra_state"), ("mixture", "_extra_state"),
])
def test_a_state_with_a_wrong_value_in_it_changes_nothing(target: str, key: str) -> None:
    case = TARGETS[target]()
    before = case.state()
    for value in ("x", 3, {"kind": "Posterior"}, [1], {"version": "new"}):
        with pytest.raises(ValueError, match="the state "):
            case.target.load_state_dict({**case.target.state_dict(), key: value})
    assert not differences(before, case.state())
