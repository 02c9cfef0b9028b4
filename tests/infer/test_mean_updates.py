"""How the mean moves, in NGVI and both optimizers: where it ends, resumed runs, errors."""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from toys import (
    EXACT,
    GUIDES,
    NOISE,
    PRIORS,
    class_data,
    classifier,
    everything,
    exactly,
    identical,
    leaves,
    linear,
    regression_data,
    sigma_model,
    truth,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer
from pyrocurv.posterior.muon import MuonUpdate

Parameters = list[nn.Parameter]


def adam(parameters: Parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def fast_adam(parameters: Parameters) -> torch.optim.Optimizer:
    """With a second moment that falls as fast as the gradient."""
    return torch.optim.Adam(parameters, lr=0.3, betas=(0.9, 0.9))


NAMED = ["natural", "whitened-muon", "muon", "soap"]
UPDATES = {**dict(zip(NAMED, NAMED, strict=True)), "adam": adam}
each_update = pytest.mark.parametrize("update", UPDATES)


# ---- where it ends ------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "update"), [
    *(("kfac", update) for update in UPDATES), ("diag", "soap"), ("full", "adam"),
])
def test_the_mean_ends_at_the_exact_posterior(structure: str, update: str) -> None:
    """At a learning rate that falls to 0, on a model whose posterior mean is known."""
    x, y = regression_data()
    mean, _, _ = truth(x, y, "unequal")
    rates = {"soap": 0.3, "whitened-muon": 0.3}
    rule = UPDATES[update] if update != "adam" else fast_adam
    ngvi = exactly(
        linear("unequal"), structure, update=rule, num_particles=0, lr=rates.get(update, 1.0),
        curvature=replace(EXACT, every=1000),
    )
    steps = {"natural": 1, "muon": 1800}.get(update, 300)  # Adam's moments of Muon's biases fade
    schedule = ExponentialLR(ngvi.optimizer, 1e-7 ** (1 / steps))
    for _ in range(steps):
        ngvi.step(x, y)
        schedule.step()
    torch.testing.assert_close(ngvi.guide.posterior.loc, mean, rtol=0, atol=1e-6)


def test_sgd_descends_the_tempered_objective() -> None:
    """N nll + T KL over N, whose gradient at the mean is autograd's."""
    x, y = regression_data()
    temperature, num_data = 0.3, len(x)
    model = linear("unequal")
    ngvi = NGVI(
        model, KFACGuide(model), temperature=temperature, num_particles=0,
        update=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    )
    ngvi.step(x, y)
    net = nn.Linear(3, 2).double()
    weight, bias = PRIORS["unequal"]
    with torch.no_grad():
        for name, value in ngvi.guide.median().items():
            net.get_parameter(name.removeprefix("net.")).copy_(value)
    # the momentum of the first step, from the way it went
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    state = ngvi.state_dict()["update_state"]
    for name, parameter in net.named_parameters():
        optimizer.state[parameter] = {
            "momentum_buffer": state[f"net.{name}"]["state"]["momentum_buffer"].clone()
        }
    for _ in range(3):
        optimizer.zero_grad()
        nll = (net(x) - y).square().sum() / (2 * NOISE**2)
        prior = net.weight.square().sum() / weight**2 + net.bias.square().sum() / bias**2
        ((nll + temperature * prior / 2) / num_data).backward()
        optimizer.step()
        ngvi.step(x, y)
    for name, value in ngvi.guide.median().items():
        expected = net.get_parameter(name.removeprefix("net."))
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)


# ---- resumed runs -------------------------------------------------------------------------------


def restored(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@each_update
@pytest.mark.parametrize("average", [False, True])
def test_a_run_is_resumed_bit_for_bit(update: str, average: bool) -> None:
    def make() -> NGVI:
        torch.manual_seed(0)
        model = sigma_model()
        return NGVI(
            model, KFACGuide(model), update=UPDATES[update], average=average, curvature="ggn"
        )

    x, y = regression_data()
    whole, first = make(), make()
    for _ in range(5):
        whole.step(x, y)
    for _ in range(3):
        first.step(x, y)
    parts = first.model.state_dict(), first.guide.state_dict(), first.state_dict()
    model_state, guide_state, state = restored(parts)
    second = make()
    second.guide(x, y)
    second.model.load_state_dict(model_state)
    second.guide.load_state_dict(guide_state)
    second.load_state_dict(state)
    for _ in range(2):
        second.step(x, y)
    states = ([*leaves(part.state_dict())] for part in (whole.guide, second.guide))
    assert identical(*states)


def optimizer_of(kind: str, update: str) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 3))
    if kind == "vi":
        return VIOptimizer(net, 32, update=UPDATES[update])
    return SecondOrderOptimizer(net, update=UPDATES[update])


def train(optimizer: Any, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(optimizer.net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@each_update
@pytest.mark.parametrize("kind", ["vi", "second-order"])
def test_optimizers_learn_and_are_resumed_bit_for_bit(kind: str, update: str) -> None:
    x, y = torch.randn(16, 1, 5), torch.randint(3, (16,))
    whole, first, second = (optimizer_of(kind, update) for _ in range(3))
    before = F.cross_entropy(whole.net.eval()(x), y)
    whole.net.train()
    train(whole, x, y, 5)
    train(first, x, y, 3)
    net_state, state = restored((first.net.state_dict(), first.state_dict()))
    second.net.load_state_dict(net_state)
    second.load_state_dict(state)
    train(second, x, y, 2)
    for a, b in zip(whole.net.state_dict().values(), second.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    train(whole, x, y, 20)
    assert F.cross_entropy(whole.net.eval()(x), y) < before


@each_update
@pytest.mark.parametrize("kind", ["vi", "second-order"])
def test_halves_of_a_batch_accumulate(kind: str, update: str) -> None:
    """Two halves, each loss divided by 2, are the whole batch; without batch norm."""
    x, y = torch.randn(16, 4).double(), torch.randint(3, (16,))
    found = []
    for parts in (1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        options: dict[str, Any] = {"curvature": Curvature("ggn"), "update": UPDATES[update]}
        make: Any = partial(VIOptimizer, num_data=32) if kind == "vi" else SecondOrderOptimizer
        optimizer = make(net, **options)
        for _ in range(4):
            optimizer.zero_grad()
            with getattr(optimizer, "sampled_params", nullcontext)():
                for rows in torch.arange(16).chunk(parts):
                    (F.cross_entropy(net(x[rows]), y[rows]) / parts).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


@each_update
@pytest.mark.parametrize("kind", ["vi", "second-order"])
def test_groups_have_learning_rates_of_their_own(kind: str, update: str) -> None:
    """A layer in a group of rate 0 stays; "torch" has a rate of its own, in proportion to it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    still = {"params": net[0].parameters(), "lr": 0.0, "initial_lr": 0.1}
    groups = [still, {"params": net[2].parameters()}]
    make: Any = partial(VIOptimizer, num_data=32) if kind == "vi" else SecondOrderOptimizer
    optimizer = make(net, params=groups, update=UPDATES[update])
    before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
    train(optimizer, torch.randn(16, 4), torch.randint(3, (16,)), 3)
    assert torch.equal(net[0].weight, before[0]) and not torch.equal(net[2].weight, before[1])


@pytest.mark.parametrize("kind", ["vi", "second-order"])
def test_an_optimizer_refuses_the_state_of_another_update(kind: str) -> None:
    x, y = torch.randn(16, 1, 5), torch.randint(3, (16,))
    optimizer, other = optimizer_of(kind, "muon"), optimizer_of(kind, "soap")
    train(optimizer, x, y, 1)
    with pytest.raises(ValueError, match="update='muon', this .* has update='soap'"):
        other.load_state_dict(optimizer.state_dict())


def test_ngvi_refuses_the_state_of_another_update() -> None:
    x, y = class_data()
    model = classifier()
    ngvi = NGVI(model, KFACGuide(model), update="muon")
    ngvi.step(x, y)
    other = NGVI(model, ngvi.guide, update="natural")
    with pytest.raises(ValueError, match="update='muon', this NGVI has update='natural'"):
        other.load_state_dict(ngvi.state_dict())


# ---- schedules ----------------------------------------------------------------------------------


def test_an_optimizer_of_the_user_follows_the_schedule() -> None:
    x, y = class_data()
    model, rates = classifier(), []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    ngvi = NGVI(model, KFACGuide(model), update=lambda p: Recorded(p, lr=0.8))
    schedule = LambdaLR(ngvi.optimizer, lambda t: 0.5**t)
    for _ in range(3):
        ngvi.step(x, y)
        schedule.step()
    assert rates == [0.8, 0.4, 0.2]


# ---- nothing is lost ----------------------------------------------------------------------------


class Breaks(torch.optim.Adam):
    """Changes half of its parameters, then raises."""

    broken = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        if self.broken:
            raise KeyboardInterrupt


def test_a_broken_step_changes_nothing() -> None:
    x, y = class_data()
    model, made = classifier(), []

    def make(parameters: Parameters) -> torch.optim.Optimizer:
        made.append(Breaks(parameters, lr=0.1))
        return made[-1]

    ngvi = NGVI(model, KFACGuide(model), update=make)
    ngvi.step(x, y)
    before = everything(ngvi)
    made[0].broken = True
    with pytest.raises(KeyboardInterrupt):
        ngvi.step(x, y)
    assert identical(before, everything(ngvi))


@each_update
def test_a_gradient_that_is_not_finite_changes_nothing(update: str) -> None:
    x, y = regression_data()
    ngvi = exactly(linear("equal"), "kfac", update=UPDATES[update], curvature=EXACT)
    ngvi.step(x, y)
    before = everything(ngvi)
    y = y.clone()
    y[0] = 1e308
    with pytest.raises(FloatingPointError):
        ngvi.step(x, y)
    assert identical(before, everything(ngvi))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["mu", "", "Natural"])
def test_unknown_names_are_refused(update: str) -> None:
    model = classifier()
    with pytest.raises(ValueError, match="update=.*'natural', 'whitened-muon', 'muon', 'soap'"):
        NGVI(model, KFACGuide(model), update=update)
    with pytest.raises(ValueError, match="update="):
        VIOptimizer(nn.Linear(2, 2), 4, update=update)


@pytest.mark.parametrize("update", [3, None, [torch.optim.SGD]])
def test_other_objects_are_refused(update: Any) -> None:
    with pytest.raises(TypeError, match="update: one of"):
        SecondOrderOptimizer(nn.Linear(2, 2), update=update)


@pytest.mark.parametrize("made", [None, "adam", torch.zeros(2)])
def test_a_callable_that_makes_no_optimizer_is_refused(made: Any) -> None:
    """At the first step, as update= and as optim=, which changes nothing."""
    x, y = regression_data()
    model = sigma_model()
    for options in ({"update": lambda _: made}, {"optim": lambda _: made}):
        ngvi = NGVI(model, KFACGuide(model), **options)
        ngvi.guide(x, y)
        before = everything(ngvi)
        with pytest.raises(TypeError, match="update or optim: a callable from parameters to a"):
            ngvi.step(x, y)
        assert identical(before, everything(ngvi))


def test_a_joint_gaussian_moves_by_the_natural_gradient() -> None:
    x, y = class_data()
    model = classifier()
    ngvi = NGVI(model, FullGuide(model), curvature="hessian", update="muon")
    with pytest.raises(ValueError, match="update='muon': one Gaussian over all latents"):
        ngvi.step(x, y)


def test_guides_of_all_structures_take_all_updates() -> None:
    x, y = class_data()
    for name, guide in GUIDES.items():
        for update in UPDATES.values():
            model = classifier()
            ngvi = NGVI(model, guide(model), update=update)
            losses = [ngvi.step(x, y) for _ in range(2)]
            assert all(torch.isfinite(torch.tensor(losses))), name


@pytest.mark.parametrize(("norm", "expected"), [(nn.BatchNorm1d, False), (nn.LayerNorm, True)])
def test_momentum_looks_ahead_for_point_estimates_and_transformers(
    norm: type[nn.Module], expected: bool
) -> None:
    """Nesterov's, where gradients are not those of a wide posterior's samples."""
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), norm(3), nn.Linear(3, 2))

    def is_nesterov(owner: Any) -> bool:
        return owner._mean_update.is_nesterov

    for update in ("muon", "whitened-muon"):
        assert is_nesterov(SecondOrderOptimizer(net(), update=update))
        assert is_nesterov(VIOptimizer(net(), num_data=10, update=update)) == expected
        model = Classifier(bayesianize(net()), num_data=10)
        assert is_nesterov(NGVI(model, KFACGuide(model), update=update)) == expected
        assert is_nesterov(NGVI(model, KFACGuide(model), update=update, num_particles=0))


def test_momentum_looks_ahead_if_asked() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    model = Classifier(bayesianize(copy.deepcopy(net)), num_data=10)
    makers = (
        partial(NGVI, model, KFACGuide(model)), partial(VIOptimizer, net, 10),
        partial(SecondOrderOptimizer, net),
    )
    for make in makers:
        for nesterov in (False, True):
            rule = make(update="muon", nesterov=nesterov)._mean_update
            assert isinstance(rule, MuonUpdate) and rule.is_nesterov is nesterov
        for update in ("natural", "soap", adam):
            make(update=update, nesterov=False)
            with pytest.raises(ValueError, match="nesterov=True: .* 'muon' and"):
                make(update=update, nesterov=True)
        with pytest.raises(TypeError, match="nesterov"):
            make(nesterov="yes")


# ---- decoupled weight decay ---------------------------------------------------------------------


@each_update
@pytest.mark.parametrize("prior", ["independent", "correlated"])
def test_decoupled_decay_pulls_the_means_to_those_of_the_prior(update: str, prior: str) -> None:
    """By lr λ in each step, besides the same step; scales of norm layers keep their size."""
    x, y = class_data()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    earlier: Any = "fan_in"
    if prior == "correlated":
        model = Classifier(bayesianize(copy.deepcopy(plain)), num_data=len(y))
        earlier = KFACGuide(model)
        NGVI(model, earlier, num_particles=0).step(x, y)
    nets = [bayesianize(copy.deepcopy(plain), prior=earlier) for _ in range(2)]

    def stepped(net: nn.Module, decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(1)
        model = Classifier(net, num_data=len(y))
        guide = KFACGuide(model)
        ngvi = NGVI(
            model, guide, lr=0.02, update=UPDATES[update], decoupled_weight_decay=decay,
        )
        guide(x, y)
        with torch.no_grad():
            for block in guide.blocks:
                block.raw_loc.add_(0.1)
        before = {name: value.clone() for name, value in guide.median().items()}
        ngvi.step(x, y)
        return before, guide.median()

    before, free = stepped(nets[0], 0.0)
    _, decayed = stepped(nets[1], 0.5)
    centers = {} if prior == "independent" else earlier.median()
    for name, value in before.items():
        rate = 0.0 if ".1." in name else 0.02 * 0.5
        expected = rate * (value - centers.get(name, torch.zeros(())))
        torch.testing.assert_close(free[name] - decayed[name], expected, rtol=1e-4, atol=1e-6)


def test_decoupled_decay_is_that_of_the_group() -> None:
    """And `VIOptimizer` takes the same step as NGVI."""
    x, y = class_data()
    net = nn.Linear(x.shape[1], 3).double()
    model = Classifier(bayesianize(copy.deepcopy(net)), num_data=len(y))
    guide = KFACGuide(model)
    options = dict[str, Any](
        lr=0.1, decoupled_weight_decay=0.5, update="muon", nesterov=True, temperature=1e-12
    )
    ngvi = NGVI(model, guide, num_particles=0, **options)
    optimizer = VIOptimizer(net, len(y), **options)
    for _ in range(3):
        ngvi.step(x, y)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert (net.weight - guide.median()["net.weight"]).abs().max() < 1e-3
    for owner in (ngvi.optimizer, optimizer):
        assert owner.param_groups[0]["decoupled_weight_decay"] == 0.5
        assert owner.state_dict()["param_groups"][0]["decoupled_weight_decay"] == 0.5
        owner.param_groups[0]["decoupled_weight_decay"] = -1.0
    with pytest.raises(ValueError, match="decoupled_weight_decay=-1"):
        ngvi.step(x, y)
    with pytest.raises(ValueError, match="decoupled_weight_decay=-1"), optimizer.sampled_params():
        raise AssertionError


def test_a_joint_gaussian_has_no_decoupled_decay() -> None:
    model = classifier()
    guide = FullGuide(model)
    with pytest.raises(ValueError, match="decoupled_weight_decay=0.1"):
        NGVI(model, guide, curvature="hessian", decoupled_weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled_weight_decay=-0.1"):
        NGVI(model, guide, decoupled_weight_decay=-0.1)
