"""A run of `NGVI` is resumed bit for bit."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import (
    GUIDES,
    NUM_DATA,
    everything,
    identical,
    leaves,
    norm_net,
    plain,
    regression_data,
    regressor,
    sigma_model,
)

from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(12, 3),
    )


def conv_model() -> Classifier:
    return Classifier(bayesianize(conv_net()), 40)


def wide_model() -> Classifier:
    net = nn.Sequential(nn.Linear(170, 165), nn.ReLU(), nn.Linear(165, 3))
    return Classifier(bayesianize(net), 40)


def wide_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 170), torch.randint(3, (8,))) for _ in range(12)]


def conv_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(12)]


def sigma_batches() -> list[tuple[Tensor, Tensor]]:
    return [regression_data(10) for _ in range(12)]


RUNS: dict[str, tuple[Callable[[], Any], Callable[[], list[tuple[Tensor, Tensor]]]]] = {
    "conv": (conv_model, conv_batches), "sigma": (sigma_model, sigma_batches),
    "wide": (wide_model, wide_batches),
}


class Training:
    """Model, guide, inference and schedule, as a program would set them up."""

    def __init__(self, run: str, structure: str, **options: Any) -> None:
        curvature = Curvature("fisher", every=2, eigen_every=4, batch=6)
        self.model = RUNS[run][0]()
        self.guide = GUIDES[structure](self.model)
        self.ngvi = NGVI(self.model, self.guide, lr=0.1, curvature=curvature, **options)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.ngvi.optimizer, T_max=12)

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        losses = []
        for x, y in batches:
            losses.append(self.ngvi.step(x, y))
            self.schedule.step()
        return losses

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in vars(self).items()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        for name, part in vars(self).items():
            part.load_state_dict(state[name])

    def everything(self) -> list[Any]:
        return everything(self.ngvi)


def tensors(training: Training) -> list[Tensor]:
    parts = [training.guide.state_dict(), training.ngvi.state_dict(), training.model.state_dict()]
    return [leaf for leaf in leaves(parts) if isinstance(leaf, Tensor)]


# ---- resumed runs -------------------------------------------------------------------------------


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "averaged": {"average": True},
    "particles": {"num_particles": 3},
    "SGD": {"optim": partial(torch.optim.SGD, lr=0.01, momentum=0.9)},
}
# after an even number of steps a checkpoint is between two antithetic pairs, after an odd one in a
# pair: (run, structure, options, steps)
CHECKPOINTS = [
    ("conv", "diag", "defaults", 4), ("sigma", "diag", "defaults", 5),
    ("conv", "kfac", "defaults", 5), ("sigma", "kfac", "defaults", 4),
    ("conv", "ekfac", "defaults", 4), ("sigma", "ekfac", "defaults", 5),
    ("conv", "block", "defaults", 5), ("sigma", "block", "defaults", 4),
    ("conv", "full", "defaults", 4), ("sigma", "full", "defaults", 5),
    ("wide", "kfac", "defaults", 4), ("wide", "ekfac", "defaults", 5),
    ("conv", "ekfac", "averaged", 5), ("sigma", "kfac", "averaged", 4),
    ("conv", "ekfac", "particles", 4), ("sigma", "kfac", "particles", 5),
    ("conv", "ekfac", "SGD", 5), ("sigma", "kfac", "SGD", 4),
]


@pytest.mark.parametrize(("run", "structure", "options", "steps"), CHECKPOINTS)
def test_a_run_is_resumed_bit_for_bit(run: str, structure: str, options: str, steps: int) -> None:
    batches = RUNS[run][1]()
    torch.manual_seed(1)
    straight = Training(run, structure, **OPTIONS[options])
    expected = straight.run(batches)
    torch.manual_seed(1)
    first = Training(run, structure, **OPTIONS[options])
    losses = first.run(batches[:steps])
    saved = first.save()
    first.run(batches[steps:7])  # a checkpoint must be a copy
    pyro.clear_param_store()  # another process
    torch.manual_seed(99)
    second = Training(run, structure, **OPTIONS[options])
    second.load(saved)
    losses += second.run(batches[steps:])
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(tensors(second), tensors(straight), strict=True))


class Alternating(PyroModule):
    """A parameter takes part in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(norm_net())
        self.shift = nn.Parameter(torch.zeros(2).double())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x) + (self.shift if self.calls % 2 == 0 else 0.0)
        self.calls += 1
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_parameter_of_some_steps_only_is_resumed(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "alternating", (Alternating, sigma_batches))
    batches = sigma_batches()
    torch.manual_seed(1)
    straight = Training("alternating", "kfac").run(batches)
    torch.manual_seed(1)
    first = Training("alternating", "kfac")
    losses = first.run(batches[:steps])
    second = Training("alternating", "kfac")
    second.load(first.save())
    assert losses + second.run(batches[steps:]) == straight


class Late(PyroModule):
    """Parameters that are met late, in some steps only, and not in the order of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(norm_net())
        self.shift = nn.Parameter(torch.zeros(2).double())
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x)
        if self.calls >= 3:
            mean = mean + pyro.param("late", torch.zeros(2).double())
        if self.calls % 3 == 1:
            mean = mean * pyro.param("often", torch.ones(2).double())
        if self.calls >= 2:
            mean = mean + self.shift
        self.calls += 1
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize(("steps", "options"), [
    (2, "defaults"), (2, "SGD"), (4, "SGD"), (6, "defaults"), (7, "SGD"),
])
def test_parameters_met_late_are_resumed(
    steps: int, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "late", (Late, sigma_batches))
    batches = sigma_batches()
    torch.manual_seed(1)
    straight = Training("late", "kfac", **OPTIONS[options]).run(batches)
    pyro.clear_param_store()
    torch.manual_seed(1)
    first = Training("late", "kfac", **OPTIONS[options])
    losses = first.run(batches[:steps])
    saved, store = first.save(), copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    pyro.get_param_store().set_state(store)
    second = Training("late", "kfac", **OPTIONS[options])
    second.load(saved)
    second.load(second.save())  # before the parameters are met again
    assert losses + second.run(batches[steps:]) == straight


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_back_to_its_checkpoint(run: str) -> None:
    batches, training = RUNS[run][1](), Training(run, "kfac")
    training.run(batches[:5])
    saved = training.save()
    expected = training.run(batches[5:])
    training.load(saved)
    assert training.run(batches[5:]) == expected


def test_a_run_goes_back_to_its_start() -> None:
    batches, training = sigma_batches(), Training("sigma", "kfac")
    training.guide(*batches[0])
    saved = training.save()
    expected = training.run(batches)
    training.load(saved)
    assert training.run(batches) == expected


def test_a_run_goes_on_whatever_else_draws_random_numbers() -> None:
    batches = conv_batches()
    runs = []
    for other_draws in (0, 5):
        torch.manual_seed(1)
        training = Training("conv", "kfac")
        training.guide(*batches[0])
        losses = []
        for batch in batches:
            torch.randn(other_draws)
            losses += training.run([batch])
        runs.append(losses)
    assert runs[0] == runs[1]


def test_the_seed_reaches_the_stream() -> None:
    batches, runs = conv_batches(), []
    for seed in (1, 1, 2):
        torch.manual_seed(7)
        training = Training("conv", "kfac")
        torch.manual_seed(seed)
        training.ngvi = NGVI(training.model, training.guide)
        runs.append([training.ngvi.step(*batch) for batch in batches])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("called", [True, False], ids=["guide called", "guide new"])
def test_a_step_leaves_the_global_generator_alone(called: bool) -> None:
    batches, training = conv_batches(), Training("conv", "kfac")
    if called:
        training.guide(*batches[0])
    before = torch.get_rng_state()
    training.run(batches[:3])
    assert torch.equal(torch.get_rng_state(), before)


# ---- states that do not fit ---------------------------------------------------------------------


def test_a_state_of_other_blocks() -> None:
    batches, training = conv_batches(), Training("conv", "kfac")
    training.run(batches[:2])
    other = Training("sigma", "kfac")
    other.run(sigma_batches()[:2])
    before = other.everything()
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        other.ngvi.load_state_dict(training.ngvi.state_dict())
    assert identical(other.everything(), before)


STRUCTURES: list[Any] = ["kfac", "block", "ekfac", "kfac-block", KFAC(rank=2), KFAC(rank=None)]


@pytest.mark.parametrize("there", STRUCTURES[1:], ids=str)
def test_a_state_of_another_structure(there: Any) -> None:
    """Of as many weights, in blocks of the same layers."""
    model, data = regressor(), regression_data()

    def make(structure: Any) -> NGVI:
        return NGVI(model, KFACGuide(model, structure={nn.Linear: structure}))

    ngvi, other = make(there), make("kfac")
    ngvi.step(*data)
    other.step(*data)
    before = everything(other)
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        other.load_state_dict(ngvi.state_dict())
    assert identical(everything(other), before)
    fresh = make("kfac")
    fresh.load_state_dict(ngvi.state_dict())
    fresh.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="it has net.0 .* where this one has net.0 "):
        fresh.step(*data)


@pytest.mark.parametrize("average", [True, False])
def test_a_state_with_another_average(average: bool) -> None:
    model, data = regressor(), regression_data()
    guide = KFACGuide(model)
    ngvi, other = NGVI(model, guide, average=average), NGVI(model, guide, average=not average)
    ngvi.step(*data)
    before = everything(other)
    with pytest.raises(ValueError, match=f"is of average={average}, this .* average={not average}"):
        other.load_state_dict(ngvi.state_dict())
    assert identical(everything(other), before)


def test_a_state_before_the_first_step() -> None:
    training, batches = Training("conv", "kfac"), conv_batches()
    state = training.ngvi.state_dict()
    training.ngvi.load_state_dict(state)
    training.run(batches[:2])


def test_a_state_has_its_temperature() -> None:
    data, model = regression_data(), regressor()
    ngvi = NGVI(model, KFACGuide(model), temperature=0.3, lr=0.05)
    ngvi.step(*data)
    other = NGVI(model, ngvi.guide)
    other.load_state_dict(ngvi.state_dict())
    assert other.temperature == 0.3 and other.optimizer.param_groups[0]["lr"] == 0.05
    assert other.evaluate_loss(*data).temperature == 0.3


def test_a_state_without_that_of_its_guide_is_noticed() -> None:
    def parts() -> tuple[NGVI, Any]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = regressor()
        return NGVI(model, KFACGuide(model), lr=0.1), regression_data()

    ngvi, data = parts()
    for _ in range(20):
        ngvi.step(*data)
    state, weights = ngvi.state_dict(), ngvi.guide.state_dict()
    ngvi, data = parts()
    ngvi.load_state_dict(state)
    with pytest.warns(UserWarning, match="load the guide's own state too"):
        ngvi.step(*data)
    ngvi, data = parts()
    ngvi.guide.load_state_dict(weights)
    ngvi.load_state_dict(state)
    ngvi.step(*data)
