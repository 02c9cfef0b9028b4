"""Interrupts at the ops of a step: they leave the old state or the new one, bit for bit.

An op that is dispatched raises in place of running. A state is everything that a user can see:
parameters, buffers, gradients, random streams, Pyro's store and what a checkpoint has.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from snapshots import contents, differences, modules_state, store_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrocurv.curvature import Curvature
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

X, Y = torch.linspace(-1, 2, 12).reshape(6, 2).sin(), torch.arange(6) % 2
ERRORS = KeyboardInterrupt, torch.OutOfMemoryError, MemoryError
EVERY_OTHER = Curvature("fisher", every=2)


class Interrupt(TorchDispatchMode):
    """Raises `error` in place of the n-th op, for each n in `at`."""

    def __init__(self, at: Sequence[int] = (), error: type[BaseException] = MemoryError) -> None:
        super().__init__()
        self.count, self.raised = 0, 0
        self._at, self._error = at, error

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self.count in self._at:
            self.raised += 1
            raise self._error("from the test")
        return func(*args, **(kwargs or {}))


def nothing() -> None:
    pass


class Case(NamedTuple):
    """A call to be interrupted, what precedes it each time, and the state that it changes."""

    call: Callable[[], Any]
    state: Callable[[], Any]
    prepare: Callable[[], Any] = nothing


# ---- NGVI ---------------------------------------------------------------------------------------


def batch_norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))


def classifier() -> tuple[Any, Any, dict[str, Any]]:
    model = Classifier(bayesianize(batch_norm_net()), 12)
    return model, KFACGuide(model), {"curvature": EVERY_OTHER}


def averaging() -> tuple[Any, Any, dict[str, Any]]:
    model, guide, options = classifier()
    return model, guide, {**options, "average": True}


def unknown_noise() -> tuple[Any, Any, dict[str, Any]]:
    model = Regressor(bayesianize(nn.Linear(2, 1)), 12, noise=None)
    return model, KFACGuide(model), {"curvature": EVERY_OTHER}


def without_network() -> tuple[Any, Any, dict[str, Any]]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 6):
            pyro.sample("obs", dist.Normal(x @ weight, scale), obs=y)

    return model, FullGuide(model), {"curvature": "hessian", "num_particles": 2}


def ngvi(
    make: Callable[[], tuple[Any, Any, dict[str, Any]]], steps: int,
    at_last: Callable[[Any, Tensor], Any] | None = None,
) -> Case:
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide, options = make()
    trainer = NGVI(model, guide, **options)
    y = {unknown_noise: X[:, :1], without_network: X[:, 0]}.get(make, Y)
    for _ in range(steps):
        trainer.step(X, y)
    if at_last is not None:
        at_last(guide, y)
    modules = [module for module in (guide, model) if isinstance(module, nn.Module)]

    def state() -> Any:
        return contents({
            **modules_state(*modules), "store": store_state(guide), "ngvi": trainer.state_dict(),
            "sites": [guide.sites, guide.fallback_sites, guide.is_joint, guide.is_laplace],
            "counts": trainer.update_counts(), "is set up": guide.prototype_trace is not None,
        })

    return Case(lambda: trainer.step(X, y), state)


def call(guide: Any, y: Tensor) -> None:
    guide(X, y)


def clear(guide: Any, y: Tensor) -> None:
    pyro.clear_param_store()


# ---- optimizers ---------------------------------------------------------------------------------


class Network(nn.Module):
    """Weights of layers, and one that no supported op consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.shift = batch_norm_net(), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.shift.cumsum(0))


def optimizer_state(optimizer: Any, net: nn.Module) -> dict[str, Any]:
    samples = getattr(optimizer, "_samples", None)
    return {
        **modules_state(net), "optimizer": optimizer.state_dict(),
        "counts": optimizer.update_counts(), "passes": len(optimizer._recorder.passes),
        "samples": samples and [samples.count, samples.price, samples.gradient_norm],
    }


def second_order(steps: int, **options: Any) -> Case:
    torch.manual_seed(0)
    net = Network()
    optimizer = SecondOrderOptimizer(net, curvature=EVERY_OTHER, weight_decay=0.1, **options)
    F.cross_entropy(net(X), Y).backward()
    for _ in range(steps):
        optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
    return Case(optimizer.step, lambda: contents(optimizer_state(optimizer, net)))


class Variational:
    """A `VIOptimizer` after some steps."""

    def __init__(self, steps: int, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = Network()
        options = {"curvature": EVERY_OTHER, "num_samples": 2, **options}
        self.optimizer = VIOptimizer(self.net, 12, **options)
        for _ in range(steps):
            self.sample()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.buffers = [buffer.clone() for buffer in self.net.buffers()]

    def sample(self) -> None:
        with self.optimizer.sampled_params():
            F.cross_entropy(self.net(X), Y).backward()

    def closure(self) -> Tensor:
        loss = F.cross_entropy(self.net(X), Y)
        loss.backward()
        return loss

    def enter(self) -> None:
        self.context = self.optimizer.sampled_params()
        self.context.__enter__()

    def prepare(self) -> None:
        """A sample up to its backward pass, which the user's program has run."""
        self.optimizer.zero_grad()
        for buffer, value in zip(self.net.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        self.enter()
        F.cross_entropy(self.net(X), Y).backward()

    def leave(self) -> None:
        self.context.__exit__(None, None, None)

    def fail(self) -> None:
        self.context.__exit__(ValueError, ValueError(), None)

    def state(self) -> Any:
        return contents(optimizer_state(self.optimizer, self.net))

    def posterior_state(self) -> Any:
        """Without what the closure, the user's, changes."""
        state = {"parameters": [*self.net.parameters()], "random": torch.get_rng_state()}
        return contents({**state, "optimizer": self.optimizer.state_dict()})


def variational(steps: int, call: str, **options: Any) -> Case:
    case = Variational(steps, **options)
    if call == "closure":
        step = case.optimizer.step
        return Case(lambda: step(case.closure), case.posterior_state)
    if call == "enter":
        return Case(case.enter, case.state)
    if call == "step":
        case.sample()
        case.sample()
        return Case(case.optimizer.step, case.state)
    case.prepare()
    case.fail()
    return Case(case.leave if call == "leave" else case.fail, case.state, case.prepare)


# ---- the interrupts -----------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*consumed by no supported op")

CASES: dict[str, tuple[Callable[[], Case], int]] = {  # and the stride between interrupts, in ops
    "K-FAC, first call": (lambda: ngvi(classifier, 0), 48),
    "K-FAC, first step of a guide that was called": (lambda: ngvi(classifier, 0, call), 48),
    "K-FAC, step": (lambda: ngvi(classifier, 1), 3),
    "K-FAC, step with an empty store": (lambda: ngvi(classifier, 1, clear), 16),
    "K-FAC, step with curvature": (lambda: ngvi(classifier, 2), 8),
    "averaging, first call": (lambda: ngvi(averaging, 0), 48),
    "averaging, step": (lambda: ngvi(averaging, 1), 4),
    "noise, first call": (lambda: ngvi(unknown_noise, 0), 64),
    "noise, step": (lambda: ngvi(unknown_noise, 1), 4),
    "no network, first call": (lambda: ngvi(without_network, 0), 64),
    "no network, step": (lambda: ngvi(without_network, 1), 6),
    "second order, first step": (lambda: second_order(0), 9),
    "second order, step": (lambda: second_order(1), 1),
    "second order, step with curvature": (lambda: second_order(2), 10),
    "variational, first sample": (lambda: variational(0, "leave"), 9),
    "variational, first step": (lambda: variational(0, "step"), 1),
    "variational, entering a sample": (lambda: variational(1, "enter"), 1),
    "variational, leaving a sample with curvature": (lambda: variational(2, "leave"), 7),
    "variational, leaving by an exception": (lambda: variational(2, "fail"), 1),
    "variational, step": (lambda: variational(1, "step"), 1),
    "variational, closure": (lambda: variational(1, "closure"), 10),
}
SHORT = {  # calls of a few milliseconds: each error at each op but the last
    "second order, step", "variational, entering a sample", "variational, step",
}
TAIL = 20  # at the end, where a step is written, every op is interrupted


def interrupt(make: Callable[[], Case], ops: Callable[[int], Sequence[Sequence[int]]]) -> Counter:
    """How often an interrupt has left the old state, and how often the new one."""
    case = make()
    before = case.state()
    case.prepare()
    with Interrupt() as undisturbed:
        case.call()
    after, case, outcomes = case.state(), make(), Counter[str]()
    for number, at in enumerate(ops(undisturbed.count)):
        case.prepare()
        error = ERRORS[number % len(ERRORS)]
        mode = Interrupt(at, error)
        try:
            with mode:
                case.call()
            assert not mode.raised or error is torch.OutOfMemoryError  # which may have a remedy
        except error:
            pass
        state = case.state()
        if state == before:
            outcomes["old"] += mode.raised
            continue
        assert state == after, (
            f"op {at} of {undisturbed.count}: {differences(before, state)} differ from the state "
            f"before, {differences(after, state)} from the state after"
        )
        outcomes["new"] += mode.raised  # 0 if caches have made the call shorter than the first one
        case = make()
    case.prepare()
    case.call()
    assert case.state() == after  # nothing is left of all the interrupts
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_leaves_the_old_state_or_the_new_one(name: str) -> None:
    make, stride = CASES[name]

    def ops(count: int) -> list[tuple[int]]:
        times, start = len(ERRORS) if name in SHORT else 1, count - TAIL + 1
        early = [(n,) for n in range(1, start) if n % stride == 0 for _ in range(times)]
        return [*early, *((n,) for n in range(max(start, 1), count + 1))]

    assert interrupt(make, ops)["old"]


@pytest.mark.parametrize("name", CASES)
def test_so_do_two_interrupts(name: str) -> None:
    """The second one while the first is being undone, or the step completed."""
    make, stride = CASES[name]

    def ops(count: int) -> list[tuple[int, int]]:
        every = max(1, min(24 * stride, count // 4))
        numbers = range(1, count + 1)
        return [(n, n + 1) for n in numbers if n % every == 0 or n > count - TAIL // 3]

    assert interrupt(make, ops)["old"]


# ---- every step of the mean ---------------------------------------------------------------------


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("update", ["muon", "soap", sgd])
@pytest.mark.parametrize("kind", ["NGVI", "second order", "variational"])
def test_so_do_interrupts_of_the_other_steps_of_the_mean(kind: str, update: Any) -> None:
    """A few, and those of the commit; the state has the moments of the update."""
    def updated() -> tuple[Any, Any, dict[str, Any]]:
        model, guide, options = classifier()
        return model, guide, {**options, "update": update}

    make = {
        "NGVI": lambda: ngvi(updated, 1),
        "second order": lambda: second_order(1, update=update),
        "variational": lambda: variational(1, "step", update=update),
    }[kind]

    def ops(count: int) -> list[tuple[int]]:
        return [(n,) for n in [*range(2, count - 6, max(1, count // 6)), *range(count - 5, count)]]

    assert interrupt(make, ops)["old"]
