"""Every step of the mean under masks, averaging, autocast, gradient scalers and several priors."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn
from toys import EXACT, NUM_DATA, Line, exactly, linear, regression_data

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


NAMED = ["natural", "whitened-muon", "muon", "soap"]
UPDATES: dict[str, Any] = {**dict(zip(NAMED, NAMED, strict=True)), "adam": adam}
each_update = pytest.mark.parametrize("update", UPDATES)
each_optimizer = pytest.mark.parametrize("kind", ["vi", "second-order"])


def median(ngvi: NGVI) -> Tensor:
    return torch.cat([value.detach().flatten() for value in ngvi.guide.median().values()])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def optimizer_of(kind: str, net: nn.Module, update: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    if kind == "vi":
        return VIOptimizer(net, 64, update=update, **{"temperature": 0.1, **options})
    return SecondOrderOptimizer(net, update=update, weight_decay=0.3, **options)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def sampled(optimizer: Any) -> Any:
    return getattr(optimizer, "sampled_params", nullcontext)()


# ---- masks --------------------------------------------------------------------------------------


@each_update
def test_a_masked_batch_is_the_batch_without_these_rows(update: str) -> None:
    """Of two thirds of the data, with all of them in N; at the mean, since plates draw numbers."""
    x, y = regression_data()
    keep = torch.arange(NUM_DATA) % 3 != 1

    def observe(mean: Tensor, y: Tensor | None) -> None:
        """With noises of two sizes, so that the eigenvectors are unique."""
        noise = mean.new_tensor([0.3, 0.5])
        pyro.sample("obs", dist.Normal(mean, noise).to_event(1), obs=y)

    def masked(mean: Tensor, y: Tensor | None) -> None:
        with poutine.mask(mask=keep[: len(mean)]):
            observe(mean, y)

    def scaled(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=2 / 3):  # of the plate's 3 / 2
            observe(mean, y)

    found = []
    for likelihood, rows in ((masked, slice(None)), (scaled, keep)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model = Line(likelihood)
        ngvi = NGVI(
            model, KFACGuide(model), update=UPDATES[update], curvature=EXACT, num_particles=0
        )
        for _ in range(4):
            ngvi.step(x[rows], y[rows])
        found.append(median(ngvi))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


@each_update
@each_optimizer
def test_ignored_rows_are_none(kind: str, update: str) -> None:
    x, y = torch.randn(16, 4).double(), torch.arange(16) % 3
    ignored = torch.arange(16) % 4 == 2
    found = []
    for rows, labels in ((slice(None), y.masked_fill(ignored, -100)), (~ignored, y[~ignored])):
        net = network().double()
        optimizer = optimizer_of(kind, net, UPDATES[update], curvature=EXACT)
        for _ in range(4):
            optimizer.zero_grad()
            with sampled(optimizer):
                F.cross_entropy(net(x[rows]), labels).backward()
            optimizer.step()
        found.append(flat(net))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-8)


# ---- averaging ----------------------------------------------------------------------------------


@each_update
def test_the_average_is_the_running_mean_of_the_iterates(update: str) -> None:
    """With weight 4 / (t + 4); training goes on from the iterate."""
    x, y = regression_data()

    def start(average: bool) -> NGVI:
        pyro.clear_param_store()
        torch.manual_seed(0)
        rule = UPDATES[update]
        return exactly(linear("unequal"), "kfac", update=rule, lr=0.1, average=average)

    plainly, expected = start(False), torch.zeros(())
    for step in range(6):
        plainly.step(x, y)
        expected = expected + 4 / (step + 4) * (median(plainly) - expected)
    averaging = start(True)
    for _ in range(6):
        averaging.step(x, y)
    torch.testing.assert_close(median(averaging), expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(expected, median(plainly))


# ---- priors -------------------------------------------------------------------------------------


def test_each_group_descends_its_own_tempered_objective() -> None:
    """N nll + T KL over N at the mean, where the first step is; the gradient is autograd's."""
    net, (x, y) = network().double(), (torch.randn(16, 4).double(), torch.arange(16) % 3)
    deltas, temperatures = (3.0, 70.0), (0.5, 2.0)
    optimizer = VIOptimizer(net, 20, update=lambda p: torch.optim.SGD(p, lr=0.1), params=[
        {"params": net[n].parameters(), "prior_precision": delta, "temperature": temperature}
        for n, delta, temperature in zip((0, 2), deltas, temperatures, strict=True)
    ])
    before = [p.detach().clone() for p in net.parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), [*net.parameters()])
    with optimizer.sampled_params():
        F.cross_entropy(net(x), y).backward()
    optimizer.step()
    for n, (p, old, gradient) in enumerate(zip(net.parameters(), before, gradients, strict=True)):
        weight = deltas[n // 2] * temperatures[n // 2] / 20
        torch.testing.assert_close(p.detach(), old - 0.1 * (gradient + weight * old))


def test_weight_decay_of_each_group_is_in_the_gradient() -> None:
    net, (x, y) = network().double(), (torch.randn(16, 4).double(), torch.arange(16) % 3)
    optimizer = SecondOrderOptimizer(net, update=lambda p: torch.optim.SGD(p, lr=0.1), params=[
        {"params": net[0].parameters(), "weight_decay": 0.3},
        {"params": net[2].parameters(), "weight_decay": 2.0},
    ], lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    F.cross_entropy(net(x), y).backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    for n, (p, old, gradient) in enumerate(zip(net.parameters(), before, gradients, strict=True)):
        expected = old - 0.1 * (gradient + (0.3, 2.0)[n // 2] * old)
        torch.testing.assert_close(p.detach(), expected)


# ---- AMP ----------------------------------------------------------------------------------------


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def restored(state: Any) -> Any:
    torch.save(state, buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


def tensors(state: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(state)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def optimizer_run(kind: str, update: Any, cast: bool) -> tuple[Callable[[], Any], ...]:
    net, (x, y) = network(), (torch.randn(64, 4), torch.arange(64) % 3)
    prior = {"temperature": 1.0} if kind == "vi" else {}
    optimizer = optimizer_of(kind, net, update, curvature=Curvature("ggn", every=2), **prior)

    def step() -> None:
        optimizer.zero_grad()
        with sampled(optimizer), autocast(cast):
            loss = F.cross_entropy(net(x), y)
            loss.backward()
        optimizer.step()

    def load(state: Any) -> None:
        net.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])

    return step, lambda: [net.state_dict(), optimizer.state_dict()], load, lambda: flat(net)


def ngvi_run(update: Any, cast: bool) -> tuple[Callable[[], Any], ...]:
    pyro.clear_param_store()
    x, y = torch.randn(64, 4), torch.arange(64) % 3
    model = Classifier(bayesianize(network()), 64)
    guide = KFACGuide(model)
    torch.manual_seed(1)
    ngvi = NGVI(model, guide, update=update, temperature=0.1,
                curvature=Curvature("ggn", every=2))
    guide(x, y)

    def step() -> None:
        with autocast(cast):
            ngvi.step(x, y)

    def load(state: Any) -> None:
        guide.load_state_dict(state[0])
        ngvi.load_state_dict(state[1])

    return step, lambda: [guide.state_dict(), ngvi.state_dict()], load, lambda: median(ngvi)


@each_update
@pytest.mark.parametrize("kind", ["ngvi", "vi", "second-order"])
def test_under_autocast_the_state_stays_in_single_precision_and_is_resumed(
    kind: str, update: str
) -> None:
    """Bit for bit; the first step is that of float32 up to bfloat16's rounding.

    With a weight decay or a prior at T = 1: without one a cross entropy has no gradient along the
    sum of the classes, and rounding decides on the sign of a step of fixed length.
    """
    def run(cast: bool) -> tuple[Callable[[], Any], ...]:
        torch.manual_seed(3)
        rule = UPDATES[update]
        return ngvi_run(rule, cast) if kind == "ngvi" else optimizer_run(kind, rule, cast)

    step, state, _, weights = run(True)
    start = weights()
    step()
    first = weights()
    for _ in range(2):
        step()
    saved = restored(state())
    assert {x.dtype for x in tensors(saved)} == {torch.float32}
    for _ in range(2):
        step()
    end = weights()
    again, _, load, weights = run(True)
    load(saved)
    for _ in range(2):
        again()
    assert torch.equal(weights(), end)
    exact, _, _, weights = run(False)
    exact()
    way = (weights() - start).norm()
    assert 0 < (weights() - first).norm() < 0.06 * way


@each_update
@each_optimizer
def test_a_gradient_scaler_changes_nothing(kind: str, update: str) -> None:
    """And skips a step whose gradient overflows, which leaves all as it was."""
    found = []
    for scaled in (True, False):
        net, optimizer = (net := network()), optimizer_of(kind, net, UPDATES[update])
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        torch.manual_seed(2)
        for _ in range(4):
            x, y = torch.randn(16, 4), torch.arange(16) % 3
            optimizer.zero_grad()
            with sampled(optimizer):
                scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        found.append(flat(net))
        with sampled(optimizer):
            scaler.scale(F.cross_entropy(net(x), y)).backward()
        if scaled:
            net[0].weight.grad.fill_(torch.inf)
            before = tensors([net.state_dict(), optimizer.state_dict()["posterior"]])
            before = [x.clone() for x in before]
            scaler.step(optimizer)
            after = tensors([net.state_dict(), optimizer.state_dict()["posterior"]])
            assert all(map(torch.equal, before, after)) and len(before) == len(after)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
