"""Nothing that is not finite is committed, and the optimizers work under `inference_mode`."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer, ivon

N = 16
EVERY_OTHER = Curvature("fisher", every=2)
MAKE: dict[str, Callable[..., Any]] = {
    "second order": lambda net, **options: SecondOrderOptimizer(
        net, curvature=EVERY_OTHER, **options),
    "diagonal": lambda net, **options: SecondOrderOptimizer(net, structure="diag", **options),
    "variational": lambda net, **options: VIOptimizer(net, N, curvature=EVERY_OTHER, **options),
    "ivon": lambda net, **options: ivon(net, N, **options),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(N, 5, generator=generator),
            torch.randint(3, (N,), generator=generator))


def backward(net: nn.Module, optimizer: Any) -> None:
    x, y = data()
    optimizer.zero_grad()
    if not isinstance(optimizer, VIOptimizer):
        F.cross_entropy(net(x), y).backward()
        return
    with optimizer.sampled_params():
        F.cross_entropy(net(x), y).backward()


def state(net: nn.Module, optimizer: Any) -> list[Tensor]:
    saved = optimizer.state_dict()
    del saved["param_groups"]  # which the user has changed
    return [*(p.detach().clone() for p in net.parameters()),
            *torch.utils._pytree.tree_leaves(saved)]


def equal(before: list[Any], after: list[Any]) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


# ---- settings -----------------------------------------------------------------------------------

SETTINGS = ["lr", "damping", "momentum", "kl_clip"]
OF_ONE = {"second order": ["weight_decay"], "variational": ["temperature", "prior_precision"]}
ALL = [(name, key, value) for name, keys in OF_ONE.items() for key in [*SETTINGS, *keys]
       for value in (torch.inf, torch.nan, -1.0)]


@pytest.mark.parametrize(("name", "key", "value"), ALL)
def test_settings_are_finite(name: str, key: str, value: float) -> None:
    """When they are given, in a group that is added, and when they are changed by hand."""
    net = network()
    with pytest.raises(ValueError, match=f"{key}={value}: .* is needed"):
        MAKE[name](net, **{key: value})
    optimizer = MAKE[name](net, params=net[0].parameters())
    with pytest.raises(ValueError, match=f"{key}={value}: .* is needed"):
        optimizer.add_param_group({"params": [*net[2].parameters()], key: value})
    optimizer = MAKE[name](net)
    backward(net, optimizer)
    before = state(net, optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=f"{key}={value}: .* is needed"):
        optimizer.step()
    assert equal(before, state(net, optimizer))


@pytest.mark.parametrize("name", MAKE)
def test_a_schedule_that_overflows_is_refused(name: str) -> None:
    net = network()
    optimizer = MAKE[name](net)
    schedule = LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else torch.inf)
    backward(net, optimizer)
    optimizer.step()
    before = state(net, optimizer)
    schedule.step()
    with pytest.raises(ValueError, match="lr=inf"):
        backward(net, optimizer)
        optimizer.step()
    assert equal(before, state(net, optimizer))


@pytest.mark.parametrize("options", [{"fallback_lr": torch.inf}, {"augmentation": torch.inf}])
def test_settings_of_the_optimizer_are_finite(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        VIOptimizer(network(), N, **options)


@pytest.mark.parametrize(("name", "value"), [
    ("kl_warmup", -1), ("augmentation", torch.inf), ("num_data", 0), ("num_samples", 1.5),
])
def test_settings_of_the_optimizer_that_are_changed_later_are_checked(
    name: str, value: float
) -> None:
    net = network()
    optimizer = MAKE["variational"](net)
    backward(net, optimizer)
    before = state(net, optimizer)
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=f"{name}={value}: .* is needed"):
        optimizer.step()
    assert equal(before, state(net, optimizer))


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", MAKE)
def test_means_that_overflow_are_not_committed(name: str, first: bool) -> None:
    """A finite learning rate that is far too large."""
    net = network()
    optimizer = MAKE[name](net, kl_clip=None)
    if not first:
        backward(net, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    before = state(net, optimizer)
    backward(net, optimizer)
    optimizer.param_groups[0]["lr"] = 1e41
    with pytest.raises(FloatingPointError, match="overflow, with a learning rate of 1e"):
        optimizer.step()
    assert equal(before, state(net, optimizer))
    optimizer.param_groups[0]["lr"] = 0.01
    backward(net, optimizer)
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_parameter_of_adam_that_overflows_is_not_committed() -> None:
    """By the square of its gradient, which would stop it for good."""
    net = network()
    optimizer = SecondOrderOptimizer(net, structure={"0": "point"})
    backward(net, optimizer)
    before = state(net, optimizer)
    net[0].weight.grad.mul_(1e25)  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match="Adam, or its state, would not be finite"):
        optimizer.step()
    assert equal(before, state(net, optimizer))


def test_a_precision_that_overflows_is_not_committed() -> None:
    net = network()
    optimizer = VIOptimizer(net, N, temperature=1e-38, kl_clip=None)
    before = state(net, optimizer)
    with pytest.raises(FloatingPointError):
        backward(net, optimizer)
        optimizer.step()
    assert equal(before, state(net, optimizer))


@pytest.mark.parametrize("guide", [KFACGuide, DiagonalGuide, FullGuide])
def test_neither_does_a_guide_have_what_overflows(guide: Any) -> None:
    """The commit of `NGVI` is the same."""
    model = Classifier(bayesianize(network()), num_data=N)
    family = guide(model)
    ngvi = NGVI(model, family, kl_clip=None)
    ngvi.step(*data())
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    for lr in (torch.inf, 1e41):
        ngvi.optimizer.param_groups[0]["lr"] = lr
        with pytest.raises((FloatingPointError, ValueError)):
            ngvi.step(*data())
    assert all(torch.equal(value, pyro.param(name)) for name, value in before.items())


# ---- inference mode -----------------------------------------------------------------------------


def in_construction(make: Callable[..., Any], mode: bool) -> tuple[nn.Module, Any]:
    net = network()
    with torch.inference_mode(mode):
        return net, make(net)


def in_prediction(make: Callable[..., Any], mode: bool) -> tuple[nn.Module, Any]:
    """Before the first pass, and between steps."""
    net = network()
    optimizer = make(net)
    for _ in range(2):
        with torch.inference_mode(mode):
            net(data()[0])
            optimizer.summary(), optimizer.state_dict()
            if isinstance(optimizer, VIOptimizer):
                optimizer.predict(data()[0], num_samples=2), optimizer.kl()
        backward(net, optimizer)
        optimizer.step()
    return net, optimizer


def in_loading(make: Callable[..., Any], mode: bool) -> tuple[nn.Module, Any]:
    net = network()
    optimizer = make(net)
    backward(net, optimizer)
    optimizer.step()
    again = make(net)
    with torch.inference_mode(mode):
        again.load_state_dict(optimizer.state_dict())
    return net, again


def in_steps(make: Callable[..., Any], mode: bool) -> tuple[nn.Module, Any]:
    net = network()
    optimizer = make(net)
    for _ in range(2):
        backward(net, optimizer)
        with torch.inference_mode(mode):
            optimizer.step()
    return net, optimizer


def in_closures(make: Callable[..., Any], mode: bool) -> tuple[nn.Module, Any]:
    net, (x, y) = network(), data()
    optimizer = make(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        with torch.inference_mode(mode):
            optimizer.step(closure)
    return net, optimizer


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "where", [in_construction, in_prediction, in_loading, in_steps, in_closures],
    ids=lambda where: where.__name__,
)
def test_under_inference_mode_it_is_as_outside(name: str, where: Callable[..., Any]) -> None:
    def run(mode: bool) -> Tensor:
        net, optimizer = where(MAKE[name], mode)
        for _ in range(3):
            backward(net, optimizer)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(run(True), run(False))


def test_a_network_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        net = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="was made under torch.inference_mode"):
        SecondOrderOptimizer(net)
