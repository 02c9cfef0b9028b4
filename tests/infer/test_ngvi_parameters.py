"""Parameters without a Gaussian, and learning-rate schedules, under `NGVI`."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from toys import (
    EXACT,
    NATURAL,
    NUM_DATA,
    norm_net,
    regression_data,
    regressor,
)

from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Regressor, bayesianize

# ---- schedules ----------------------------------------------------------------------------------


def test_a_schedule_turns_the_learning_rates() -> None:
    """Of the mean, and in proportion that of a torch optimizer of the rest."""
    data, model = regression_data(), regressor(noise=None)
    made: list[torch.optim.Optimizer] = []

    def optim(params: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(params, lr=0.5))
        return made[-1]

    ngvi = NGVI(model, KFACGuide(model), lr=0.2, optim=optim)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, T_max=4)
    for t in range(4):
        ngvi.step(*data)
        factor = (1 + math.cos(math.pi * t / 4)) / 2
        assert ngvi.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * factor)
        assert all(g["lr"] == pytest.approx(0.5 * factor) for g in made[0].param_groups)
        schedule.step()
    assert len(made) == 1
    before = ngvi.guide.posterior.loc.clone()
    ngvi.step(*data)  # at a rate of 0
    torch.testing.assert_close(ngvi.guide.posterior.loc, before, rtol=0, atol=1e-12)


def test_the_trust_region_is_that_of_the_base_learning_rate() -> None:
    """A schedule shortens steps that the trust region bounds as much as others."""
    data, model = regression_data(), regressor()
    start = KFACGuide(model)
    start(*data)
    changes = []
    for factor in (1.0, 0.25):
        ngvi = NGVI(
            model, KFACGuide(model), lr=0.5, curvature=EXACT, kl_clip=1e-4, momentum=0.0, **NATURAL
        )
        torch.optim.lr_scheduler.LambdaLR(ngvi.optimizer, lambda _, factor=factor: factor)
        ngvi.step(*data)
        changes.append(ngvi.guide.posterior.loc - start.posterior.loc)
    assert changes[0].any()
    torch.testing.assert_close(changes[1], changes[0] / 4)


@pytest.mark.parametrize("schedule", [
    partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=20,
            cycle_momentum=False),
    partial(torch.optim.lr_scheduler.StepLR, step_size=2),
    partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: 1 / (t + 1)),
    partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=1),
], ids=["one cycle", "step", "lambda", "plateau"])
def test_other_schedules(schedule: Any) -> None:
    data, model = regression_data(), regressor()
    ngvi = NGVI(model, KFACGuide(model))
    scheduler = schedule(ngvi.optimizer)
    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    for _ in range(5):
        loss = ngvi.step(*data)
        scheduler.step(loss) if plateau else scheduler.step()


def test_the_optimizer_alone_makes_no_step() -> None:
    model = regressor()
    with pytest.raises(RuntimeError, match=r"call ngvi.step\(...\)"):
        NGVI(model, KFACGuide(model)).optimizer.step()


# ---- parameters of the model and of the fallback guide ------------------------------------------


OPTIMS: dict[str, Any] = {
    "default": None,
    "class": torch.optim.Adam,
    "factory": lambda params: torch.optim.AdamW(params, lr=0.05),
    "PyroOptim": pyro.optim.Adam({"lr": 0.05}),
    "PyroOptim, clipped": pyro.optim.ClippedAdam({"lr": 0.05}),
}


@pytest.mark.parametrize("optim", OPTIMS)
def test_the_rest_is_trained_by_optim(optim: str) -> None:
    """Parameters of a module, a `pyro.param`, and the fallback guide of sigma."""

    class Mixed(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(
                nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
            )
            self.spread = PyroParam(torch.ones(2).double(), dist.constraints.positive)

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x) * self.spread
            factor = pyro.param("factor", lambda: torch.ones(2).double(),
                                constraint=dist.constraints.positive)
            sigma = pyro.sample("sigma", dist.LogNormal(x.new_zeros(()), 1.0))
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(factor * mean, sigma).to_event(1), obs=y)

    model, data = Mixed(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), optim=OPTIMS[optim])
    ngvi.guide(*data)
    params = {**dict(model.named_parameters()), **dict(ngvi.guide.fallback.named_parameters())}
    before = {name: value.detach().clone() for name, value in params.items()}
    assert {"net.1.weight", "net.1.bias", "spread_unconstrained"} <= set(before)
    assert len(before) == 5
    losses = [ngvi.step(*data) for _ in range(30)]
    assert all(not torch.equal(value, before[name]) for name, value in params.items())
    assert (pyro.param("factor") != 1).all()
    assert losses[-1] < losses[0]


def test_parameters_that_take_no_part_stay() -> None:
    model, data = regressor(), regression_data()
    model.spare = nn.Parameter(torch.ones(3))
    ngvi = NGVI(model, KFACGuide(model), optim=partial(torch.optim.AdamW, weight_decay=0.5))
    ngvi.step(*data), ngvi.step(*data)
    assert torch.equal(model.spare, torch.ones(3))


@pytest.mark.parametrize("local", [False, True], ids=["store", "local"])
@pytest.mark.parametrize("called", [False, True], ids=["guide new", "guide called"])
def test_frozen_parameters_stay_frozen(local: bool, called: bool) -> None:
    """A posterior over the last layer of a network whose other layers are kept as they are."""
    with pyro.settings.context(module_local_params=local):
        net = norm_net()
        net.requires_grad_(False)
        model, data = Regressor(bayesianize(net, layers=["3"]), NUM_DATA), regression_data()
        before = {name: value.clone() for name, value in model.named_parameters()}
        ngvi = NGVI(model, KFACGuide(model))
        if called:
            ngvi.guide(*data)
        for _ in range(3):
            ngvi.step(*data)
        assert list(ngvi.guide.sites) == ["net.3.weight", "net.3.bias"] and len(before) == 4
        assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert not any(value.requires_grad for value in model.parameters())


def test_a_step_under_no_grad() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with torch.no_grad():
        losses = [ngvi.step(*data) for _ in range(3)]
    assert all(map(math.isfinite, losses))


def test_nobodys_grad_is_touched() -> None:
    model, data = Regressor(bayesianize(norm_net()), NUM_DATA), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.guide(*data)
    params = [*model.parameters(), *ngvi.guide.parameters()]
    assert len(params) > 4
    for p in params[::2]:
        p.grad = torch.full_like(p, 7.0)
    held = [p.grad for p in params]
    for _ in range(3):
        ngvi.step(*data)
    assert all(p.grad is g for p, g in zip(params, held, strict=True))
    assert all((g == 7).all() for g in held if g is not None)


class LearnedNoise(PyroModule):
    """Its scale is a parameter, no latent."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.sigma = net, PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, self.sigma), obs=y)


@pytest.mark.parametrize("make", [lambda net: Regressor(net, 100), LearnedNoise])
def test_the_default_optimizer_forgets_early_gradients(make: Callable[[nn.Module], Any]) -> None:
    """Of a latent noise scale and of a parameter alike; what for, the next test shows for one."""
    model = make(bayesianize(nn.Linear(3, 1)))
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(torch.randn(100, 3), torch.randn(100))
    groups = ngvi._auxiliary._optimizer.param_groups
    assert groups and all(group["betas"] == (0.9, 0.99) for group in groups)


def test_a_bad_start_of_the_weights_does_not_spoil_the_noise_scale() -> None:
    """Its first gradients are a hundred times those that count."""
    steps, x, net = 1500, torch.randn(100, 3), nn.Linear(3, 1)
    y = x.sum(-1) + 0.5 * torch.randn(100)
    nn.init.constant_(net.weight, 5.0)
    model = Regressor(bayesianize(net, 100.0), 100)
    ngvi = NGVI(model, KFACGuide(model), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, steps)
    for _ in range(steps):
        ngvi.step(x, y)
        schedule.step()
    residuals = y - (x @ torch.linalg.lstsq(x, y[:, None]).solution).squeeze(-1)
    error = 1 / math.sqrt(2 * 96)  # of a log standard deviation, as 96 degrees of freedom tell it
    found = ngvi.guide.median()["sigma"]
    assert abs(found.log() - residuals.std().log()) < 2 * error


def test_a_store_that_is_loaded_on_the_way(tmp_path: Path) -> None:
    """The model's parameter is another tensor then; its optimizer goes on with it."""
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 1))
            self.noise = PyroParam(torch.tensor(1.0), dist.constraints.positive)

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x).squeeze(-1)
            with pyro.plate("data", 30):
                pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)

    model, x = Model(), torch.randn(30, 3)
    ngvi = NGVI(model, KFACGuide(model))
    for _ in range(3):
        ngvi.step(x, x[:, 0])
    pyro.get_param_store().save(tmp_path / "store")
    ngvi.step(x, x[:, 0])
    pyro.get_param_store().load(tmp_path / "store")
    before = model.noise.item()
    for _ in range(3):
        ngvi.step(x, x[:, 0])
    assert model.noise.item() != before
    copied = copy.deepcopy((model, ngvi))
    copied[1].step(x, x[:, 0])
    assert len(ngvi.state_dict()["auxiliary"]) == 1
