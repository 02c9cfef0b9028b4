"""`update=` as a callable from parameters to an optimizer of torch, and learning rates."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 3
KINDS = pytest.mark.parametrize("kind", ["ngvi", "vi", "second-order"])


class Trainer:
    """One interface to what takes an `update=`."""

    def __init__(self, kind: str, normalized: bool = False, **options: Any) -> None:
        pyro.clear_param_store()
        torch.manual_seed(0)
        scales = [nn.LayerNorm(5, bias=False)] if normalized else []
        net = nn.Sequential(nn.Linear(4, 5), *scales, nn.Tanh(), nn.Linear(5, 3))
        self.kind, self.net = kind, net
        if kind == "ngvi":
            net = bayesianize(net)
            self.model = Classifier(net, num_data=32)
            self.ngvi = NGVI(self.model, KFACGuide(self.model), temperature=0.1, **options)
            self.optimizer: Any = self.ngvi.optimizer
        elif kind == "vi":
            self.optimizer = VIOptimizer(net, num_data=32, temperature=0.1, **options)
        else:
            self.optimizer = SecondOrderOptimizer(net, **options)

    @property
    def owner(self) -> Any:
        return self.ngvi if self.kind == "ngvi" else self.optimizer

    def step(self, x: Tensor = X, y: Tensor = Y) -> None:
        if self.kind == "ngvi":
            self.ngvi.step(x, y)
            return
        self.optimizer.zero_grad()
        if self.kind == "vi":
            with self.optimizer.sampled_params():
                F.cross_entropy(self.net(x), y).backward()
        else:
            F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()

    def means(self) -> dict[str, Tensor]:
        """Those of all weights, also without a block."""
        found = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        if self.kind == "ngvi":
            median = self.ngvi.guide.median()
            found |= {name.removeprefix("net."): x.clone() for name, x in median.items()}
        return found

    def saved(self) -> dict[str, Any]:
        guide = self.ngvi.guide.state_dict() if self.kind == "ngvi" else None
        return copy.deepcopy([self.net.state_dict(), self.owner.state_dict(), guide])

    def load(self, saved: Any) -> None:
        if self.kind == "ngvi":
            self.step()  # which makes the guide's parameters
            self.ngvi.guide.load_state_dict(saved[2])
        self.net.load_state_dict(saved[0])
        self.owner.load_state_dict(saved[1])


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_shape(parameters: list[nn.Parameter], lr: float = 1e-2) -> torch.optim.Optimizer:
    """As is usual: no decay for biases."""
    matrices = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 30.0},
                              {"params": others, "weight_decay": 0.0, "lr": 2 * lr}], lr=lr)


# ---- groups that the callable makes -------------------------------------------------------------


@KINDS
def test_groups_of_the_callable(kind: str) -> None:
    made: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(by_shape(parameters))
        return made[-1]

    trainer = Trainer(kind, update=make)
    schedule = LambdaLR(trainer.optimizer, lambda step: 0.5**step)
    for _ in range(3):
        trainer.step()
        schedule.step()
    groups = made[0].param_groups
    assert [group["lr"] for group in groups] == [2.5e-3, 5e-3]
    assert [[p.dim() for p in group["params"]] for group in groups] == [[2, 2], [1, 1]]


@KINDS
def test_groups_of_the_callable_are_those_of_torch(kind: str) -> None:
    """A step of SGD with decay for the matrices is lr times the decay away from one without."""
    def make(parameters: list[nn.Parameter], decay: float) -> torch.optim.Optimizer:
        matrices = [p for p in parameters if p.dim() > 1]
        others = [p for p in parameters if p.dim() < 2]
        return torch.optim.SGD([{"params": matrices, "weight_decay": decay}, {"params": others}],
                               lr=0.1)

    found = []
    for decay in (0.0, 0.5):
        trainer = Trainer(kind, update=partial(make, decay=decay))
        if kind == "ngvi":
            trainer.ngvi.guide(X, Y)  # makes it
        before = trainer.means()
        trainer.step()
        found.append(trainer.means())
    for name, mean in found[1].items():
        decayed = 0.1 * 0.5 * before[name] if mean.dim() > 1 else 0.0
        torch.testing.assert_close(mean, found[0][name] - decayed)


@KINDS
def test_groups_of_the_callable_resume(kind: str) -> None:
    first = Trainer(kind, update=by_shape)
    for _ in range(3):
        first.step()
    saved = first.saved()
    first.step()
    first.step()
    expected = first.means()
    second = Trainer(kind, update=by_shape)
    second.load(saved)
    second.step()
    second.step()
    assert_same(second.means(), expected)


@KINDS
def test_a_state_has_the_options_of_its_optimizer(kind: str) -> None:
    """Also the learning rate, as for an optimizer of torch alone."""
    made: list[torch.optim.Optimizer] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, lr=1e-3))
        return made[-1]

    first = Trainer(kind, update=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5))
    first.step()
    saved = first.saved()
    second = Trainer(kind, update=make)
    second.load(saved)
    second.step()
    (group,) = made[-1].param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-2, 0.5)


# ---- what cannot be an update -------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("make, kind_of_error, text", [
    (torch.optim.LBFGS, TypeError, "LBFGS.step needs a closure"),
    (lambda parameters: torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), ValueError,
     "the SGD has other parameters"),
    (lambda parameters: torch.optim.SGD(parameters[:1], 0.1), ValueError, "needs all of them"),
    (lambda parameters: nn.Linear(2, 2), TypeError, "a torch.optim.Optimizer is needed"),
])
def test_what_is_no_update(
    kind: str, make: Make, kind_of_error: type[Exception], text: str
) -> None:
    trainer = Trainer(kind, update=make)
    if kind == "ngvi":
        trainer.ngvi.guide(X, Y)  # makes it
    before = trainer.means()
    with pytest.raises(kind_of_error, match=text):
        trainer.step()
    assert_same(trainer.means(), before)


@pytest.mark.parametrize("kind", ["ngvi", "vi"])
def test_a_decay_beside_an_optimizer_of_torch(kind: str) -> None:
    """It would be in units of a learning rate that nobody has chosen."""
    with pytest.raises(ValueError, match="decoupled_weight_decay=0.1 is a multiple of lr="):
        Trainer(kind, update=by_shape, decoupled_weight_decay=0.1)
    Trainer(kind, update=by_shape, decoupled_weight_decay=0.1, lr=0.01).step()


# ---- learning rates -----------------------------------------------------------------------------


def changed_by(how: str, optimizer: torch.optim.Optimizer) -> None:
    """Divide the learning rate by 10."""
    if how == "a schedule":
        LambdaLR(optimizer, lambda step: 0.1)
    elif how == "hand":
        optimizer.param_groups[0]["lr"] *= 0.1
    else:
        plateau = ReduceLROnPlateau(optimizer, patience=0)
        plateau.step(1.0)
        plateau.step(1.0)


@KINDS
@pytest.mark.parametrize("how", ["a schedule", "hand", "a plateau"])
@pytest.mark.parametrize("update", ["natural", "whitened-muon", "muon", "soap", "torch"])
def test_a_tenth_of_the_learning_rate_is_a_tenth_of_the_step(
    kind: str, update: str, how: str
) -> None:
    """Also where the trust region is active, and for parameters that Adam moves."""
    choice: Any = partial(torch.optim.SGD, lr=0.5) if update == "torch" else update
    steps = []
    for is_changed in (False, True):
        trainer = Trainer(
            kind, normalized=True, update=choice, lr=1.0, kl_clip=1e-6, momentum=0.0
        )
        trainer.step() if kind == "ngvi" else None  # which makes the guide
        before = trainer.means()
        if is_changed:
            changed_by(how, trainer.optimizer)
        trainer.step()
        steps.append({name: mean - before[name] for name, mean in trainer.means().items()})
    for name, moved in steps[0].items():
        torch.testing.assert_close(steps[1][name], 0.1 * moved, rtol=1e-3, atol=1e-7)


@KINDS
def test_a_cycle_does_not_change_the_base_of_the_learning_rate(kind: str) -> None:
    rates: list[float] = []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    trainer = Trainer(kind, update=partial(Recorded, lr=0.5), lr=0.2)
    schedule = OneCycleLR(trainer.optimizer, max_lr=0.2, total_steps=10)
    for _ in range(9):
        trainer.step()
        schedule.step()
    assert max(rates) == pytest.approx(0.5, rel=0.05) and min(rates) < 0.03


@pytest.mark.parametrize("kind", ["vi", "second-order"])
@pytest.mark.parametrize("update", ["natural", "muon", "torch"])
def test_a_group_without_a_learning_rate_stays(kind: str, update: str) -> None:
    choice: Any = partial(torch.optim.SGD, lr=0.5) if update == "torch" else update
    net = Trainer(kind).net
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}]
    make: Any = partial(VIOptimizer, num_data=32) if kind == "vi" else SecondOrderOptimizer
    trainer = Trainer(kind)
    trainer.net, trainer.optimizer = net, make(net, params=groups, update=choice)
    before = [layer.weight.detach().clone() for layer in (net[0], net[2])]
    trainer.step()
    assert torch.equal(net[0].weight, before[0]) and not torch.equal(net[2].weight, before[1])


# ---- nothing is lost ----------------------------------------------------------------------------


class Statistics:
    """An object in the state of an optimizer."""

    def __init__(self) -> None:
        self.total = torch.zeros(())


class Keeps(torch.optim.SGD):
    """Keeps what it has seen in all places that there are, and moves by it."""

    breaks = False

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.count, self.seen, self.lock = 0, [torch.zeros(())], threading.Lock()
        self.inner = torch.optim.Adam([p for g in self.param_groups for p in g["params"]], lr=0.01)
        for group in self.param_groups:
            group["sum"] = torch.zeros(())

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(parts=[torch.zeros_like(p)], nested={"a": torch.zeros(())},
                                 object=Statistics())
                state["parts"][0].add_(p.grad)
                state["nested"]["a"] += p.grad.sum()
                state["object"].total += p.grad.abs().sum()
                group["sum"] += p.grad.sum()
                self.seen[0] += p.grad.sum()
                factor = 1 + 0.1 * torch.tanh(
                    state["nested"]["a"] + state["object"].total + group["sum"] + self.seen[0]
                )
                p.grad = p.grad * factor + 0.01 * state["parts"][0] * self.count
        super().step()
        self.inner.step()
        if self.breaks:
            raise KeyboardInterrupt


@KINDS
@pytest.mark.parametrize("failure", ["an interrupt", "NaN"])
def test_a_failed_step_leaves_no_trace_in_an_optimizer(kind: str, failure: str) -> None:
    found = []
    for fails in (False, True):
        made: list[Keeps] = []

        def make(parameters: list[nn.Parameter], made: list[Keeps] = made) -> Keeps:
            made.append(Keeps(parameters))
            return made[-1]

        trainer = Trainer(kind, update=make)
        trainer.step()
        trainer.step()
        before = trainer.means()
        if fails and failure == "NaN":
            with pytest.raises(FloatingPointError):
                trainer.step(torch.full_like(X, torch.nan))
        elif fails:
            made[0].breaks = True
            with pytest.raises(KeyboardInterrupt):
                trainer.step()
            made[0].breaks = False
        assert_same(trainer.means(), before)
        assert made[0].count == 2
        if kind == "vi" and fails:
            trainer.optimizer.zero_grad()  # the sample of the failed step
        trainer.step()
        trainer.step()
        found.append(trainer.means())
    assert_same(found[0], found[1])
