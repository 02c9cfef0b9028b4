"""SecondOrderOptimizer: exact steps where they are known, and PyTorch's conventions one by one."""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import layer_cases
import pytest
import torch
import torch.nn.functional as F
from designs import pairs
from layer_cases import LAYERED, OPAQUE, WOVEN
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from pyrocurv.curvature import EKFAC, KFAC, Curvature, estimate
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

STRUCTURES = ("full", "block", "diag", "kfac", "ekfac", KFAC(num_blocks=2))
LOSSES: dict[str, tuple[Callable[[int], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "categorical": (lambda n: torch.randint(3, (n,)), F.cross_entropy),
    "bernoulli": (lambda n: torch.rand(n, 3).round(), F.binary_cross_entropy_with_logits),
    "normal": (lambda n: torch.randn(n, 3), lambda mean, y: F.mse_loss(mean, y) / 2),
}
NATURAL = {"update": "natural", "momentum": 0.0, "kl_clip": None, "damping": 0.01}
EXACT = {**NATURAL, "damping": 0.0}


def plain(kind: str, **options: Any) -> Curvature:
    """Of the whole batch, with nothing added."""
    return Curvature(kind, batch=None, initial=0.0, **options)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])  # type: ignore[union-attr]


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def classes(size: int = 16, inputs: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(size, inputs), torch.randint(3, (size,))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, **rows: Any) -> None:
    """On data that are the same every time."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(16, 5, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


# ---- exact steps --------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("structure", ["full", "block", "kfac", "ekfac"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_step_solves_least_squares(structure: str, decay: float) -> None:
    net, x, y = nn.Linear(6, 2), torch.randn(40, 6), torch.randn(40, 2)
    optimizer = SecondOrderOptimizer(
        net, 1.0, likelihood="normal", curvature=plain("ggn"), structure=structure,
        weight_decay=decay, **EXACT,
    )
    (F.mse_loss(net(x), y) / 2).backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(40, 1)], 1)
    gram = rows.mT @ rows / 80 + decay * torch.eye(7)  # a mean over 40 x 2 entries
    weights = torch.linalg.solve(gram, rows.mT @ y / 80).mT
    torch.testing.assert_close(torch.cat([net.weight, net.bias[:, None]], 1).detach(), weights)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_a_step_of_one_softmax_layer_is_newton(kind: str) -> None:
    net, (x, y) = nn.Linear(5, 3), classes()
    start = flat(net)

    def loss(w: Tensor) -> Tensor:
        logits = F.linear(x, w[:15].view(3, 5), w[15:])
        return F.cross_entropy(logits, y) + 0.05 * w.square().sum()

    w = start.clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, w)
    newton = torch.linalg.solve(hessian, torch.autograd.grad(loss(w), w)[0])
    optimizer = SecondOrderOptimizer(
        net, 1.0, curvature=plain(kind), structure="full", weight_decay=0.1, **EXACT
    )
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(flat(net), start - newton)


@pytest.mark.usefixtures("double")
def test_a_kfac_step_of_a_deep_linear_net_is_the_block_step() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2))
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    start = flat(net)
    blocks = estimate(net, x, y, likelihood="normal", curvature="ggn", structure="block").dense()
    optimizer = SecondOrderOptimizer(
        net, 1.0, likelihood="normal", curvature=plain("ggn"), structure="kfac",
        **NATURAL,
    )
    (F.mse_loss(net(x), y) / 2).backward()
    wanted = torch.linalg.solve(blocks / 60 + 0.01 * torch.eye(len(start)), gradient(net))
    optimizer.step()
    torch.testing.assert_close(flat(net), start - wanted)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("structure", "kind", "likelihood"), pairs(
    STRUCTURES, ["ggn", "empirical", "hessian"], ["categorical", "bernoulli", "normal"],
), ids=str)
def test_a_step_is_that_of_the_curvature_estimated(
    kind: str, structure: Any, likelihood: str
) -> None:
    net, x = small(), torch.randn(8, 5)
    targets, loss = LOSSES[likelihood]
    y = targets(8)
    matrix = estimate(net, x, y, likelihood=likelihood, curvature=kind, structure=structure)
    optimizer = SecondOrderOptimizer(
        net, 1.0, likelihood=likelihood, curvature=plain(kind), structure=structure,
        **NATURAL,
    )
    loss(net(x), y).backward()
    start, entries = flat(net), 8 if likelihood == "categorical" else 24
    dense = matrix.psd().dense() / entries + 0.01 * torch.eye(len(start))
    wanted = torch.linalg.solve(dense, gradient(net))
    optimizer.step()
    torch.testing.assert_close(flat(net), start - wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("double")
def test_the_initial_curvature_fades_between_estimates_of_every_auto() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(
        net, 0.0, curvature=Curvature("ggn", every="auto", initial=10.0), structure="diag"
    )
    damped = []
    for _ in range(45):
        train(net, optimizer, 1)
        (state, *_) = optimizer._posterior.blocks
        damped.append(state.preconditioner.diag().min().item())
    for step in (0, 20, 40):
        assert damped[step] == pytest.approx(10 * 0.99**step + 3e-3, abs=0.01)


def test_sampled_targets_average_to_the_exact_fisher() -> None:
    net, (x, y) = nn.Linear(5, 3, bias=False), classes()
    exact = estimate(net, x, y, curvature="ggn", structure="full").dense() / 16
    draws = 1000
    optimizer = SecondOrderOptimizer(
        net, curvature=plain("fisher", num_samples=draws), structure="full"
    )
    p = net(x).softmax(-1).detach()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    found = optimizer._posterior.blocks[0].curvature.curvature.dense()
    # one draw's second moment: Σ_n E[(v_i v_j)²] / 16², over the classes
    v = (torch.eye(3)[:, None] - p)[..., None] * x[None, :, None]  # [class, n, O, I]
    products = torch.einsum("kni,knj->knij", v.flatten(2), v.flatten(2)).square()
    error = (torch.einsum("nk,knij->ij", p, products) / 16**2 / draws).sqrt()
    assert ((found - exact).abs() / error).max() < 4.5  # of 225 entries


# ---- conventions --------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "kind", "every"), pairs(
    STRUCTURES, ["fisher", "empirical", "ggn", "hessian"], [2, "auto"],
), ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(structure: Any, kind: str, every: Any) -> None:
    def made() -> tuple[nn.Module, SecondOrderOptimizer, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = SecondOrderOptimizer(
            net, structure=structure, curvature=Curvature(kind, every=every, batch=8)
        )
        return net, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def go(net: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
        for number in steps:
            torch.manual_seed(number)
            x, y = classes()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()

    whole = made()
    go(*whole, range(9))
    first = made()
    go(*first, range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = made()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*second, range(5, 9))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


@pytest.mark.parametrize("make", [
    lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=10, cycle_momentum=True),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
    lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=True),
    lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
])
def test_schedulers_turn_the_learning_rate(make: Callable[[Any], Any]) -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, 0.02)
    schedule = make(optimizer)
    for _ in range(4):
        train(net, optimizer, 1)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_a_plateau_scheduler_and_a_learning_rate_of_zero() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, 0.02)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    train(net, optimizer, 1)
    for _ in range(3):
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4)
    optimizer.param_groups[0]["lr"] = 0.0
    before = flat(net)
    train(net, optimizer, 2)
    assert torch.equal(flat(net), before)


def test_groups_have_their_own_numbers() -> None:
    def run(groups: Callable[[nn.Sequential], Any], **numbers: Any) -> nn.Sequential:
        torch.manual_seed(0)
        net = small()
        optimizer = SecondOrderOptimizer(
            net, 0.02, params=groups(net), curvature="ggn", update="natural", kl_clip=None,
            **numbers,
        )
        train(net, optimizer, 3)
        return net

    one = run(lambda net: net.parameters())
    two = run(lambda net: [{"params": net[0].parameters()}, {"params": net[2].parameters()}])
    torch.testing.assert_close(flat(one), flat(two))  # the same numbers: the same steps
    torch.manual_seed(0)
    start = small()
    still = run(lambda net: [
        {"params": net[0].parameters(), "lr": 0.0}, {"params": net[2].parameters()}
    ])
    assert torch.equal(still[0].weight, start[0].weight)
    assert not torch.equal(still[2].weight, start[2].weight)
    for name, value in (("weight_decay", 0.5), ("damping", 1.0), ("momentum", 0.0)):
        other = run(lambda net, name=name, value=value: [  # type: ignore[misc]
            {"params": net[0].parameters(), name: value}, {"params": net[2].parameters()}
        ])
        assert not torch.allclose(other[0].weight, two[0].weight, atol=1e-5), name


def test_a_bias_may_be_in_another_group() -> None:
    net = small()
    decayed = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    optimizer = SecondOrderOptimizer(
        net, params=[{"params": decayed, "weight_decay": 1e-2}, {"params": others}]
    )
    train(net, optimizer)
    names = {name for block in optimizer.layout.blocks for name in block.tensors}
    assert names == {name for name, _ in net.named_parameters()}
    assert len(optimizer.layout.blocks) == 4


def test_a_layer_that_joins_later_has_a_block() -> None:
    net = small()
    for p in net[0].parameters():
        p.requires_grad_(False)
    optimizer = SecondOrderOptimizer(net, params=net[2].parameters(), curvature=Curvature(
        "fisher", every=2))
    train(net, optimizer, 1)
    before = net[0].weight.clone()
    train(net, optimizer, 2)
    assert torch.equal(before, net[0].weight)
    for p in net[0].parameters():
        p.requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.01})
    with pytest.warns(UserWarning, match="0.weight, 0.bias not used yet in a pass") as caught:
        train(net, optimizer, 1)  # the next estimate is a step away
        train(net, optimizer, 2)
    assert len(caught) == 1
    assert not torch.equal(before, net[0].weight)
    assert {n for b in optimizer.layout.blocks for n in b.tensors} >= {"0.weight", "2.weight"}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", ["fisher", "empirical", "ggn", "hessian"])
@pytest.mark.parametrize("batch", [10, None])
def test_accumulated_gradients_step_as_the_large_batch(kind: str, batch: int | None) -> None:
    def run(parts: int) -> Tensor:
        torch.manual_seed(0)
        net, x, y = small(), torch.randn(24, 5), torch.randint(3, (24,))
        optimizer = SecondOrderOptimizer(net, curvature=Curvature(kind, batch=batch, every=1))
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(net(a), b) / parts).backward()
            optimizer.step()
        return flat(net)

    torch.testing.assert_close(run(4), run(1))


@pytest.mark.parametrize("kind", ["fisher", "empirical"])
def test_other_passes_between_steps_change_nothing(kind: str) -> None:
    def run(others: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.3), nn.Linear(6, 3))
        optimizer = SecondOrderOptimizer(net, curvature=Curvature(kind, every=1))
        for number in range(4):
            if others:
                net.eval()
                with torch.no_grad():
                    net(torch.ones(3, 5))
                net(torch.ones(9, 5)).sum()  # with a graph that nothing comes back through
                net.train()
            torch.manual_seed(number)
            x, y = classes()
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            if others:
                with torch.no_grad():
                    net.eval()(x)
                    net.train()
            loss.backward()
            optimizer.step()
        return flat(net)

    assert torch.equal(run(True), run(False))


def test_two_passes_before_a_step_are_both_seen() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, curvature=Curvature("fisher", batch=None))
    x, y = classes()
    (F.cross_entropy(net(x[:10]), y[:10]) + F.cross_entropy(net(x[10:]), y[10:])).backward()
    assert sum(one.batch for one in optimizer._recorder.passes) == 16
    optimizer.step()
    assert optimizer._recorder.passes == []


def test_a_step_leaves_gradients_buffers_and_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3))
    optimizer = SecondOrderOptimizer(net)
    x, y = classes()
    F.cross_entropy(net(x), y).backward()
    grads = gradient(net)
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(grads, gradient(net))
    for name, value in net.named_buffers():
        assert torch.equal(value, buffers[name]), name
    optimizer.zero_grad(set_to_none=False)  # the momentum is not in the gradients' memory
    assert all(state.momentum.abs().sum() > 0 for state in optimizer._posterior.blocks)


def test_how_large_an_outlier_among_gradients_is_makes_no_difference() -> None:
    """Far outside the trust region; momentum by itself would take 200 steps from 1e15 to 1e6."""
    def run(factor: float) -> Tensor:
        torch.manual_seed(0)
        net = small()
        optimizer = SecondOrderOptimizer(net, update="natural")
        train(net, optimizer, 20)
        F.cross_entropy(net(torch.ones(4, 5)), torch.arange(4) % 3).backward()
        for p in net.parameters():
            p.grad.mul_(factor)  # type: ignore[union-attr]
        optimizer.step()
        train(net, optimizer, 150)
        return flat(net)

    usual, large, huge = map(run, (1.0, 1e6, 1e15))
    assert (huge - large).norm() < 0.01 * (large - usual).norm()


def test_clipped_gradients_are_what_is_stepped_from() -> None:
    def run(scale: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        net, (x, y) = small(), classes()
        optimizer = SecondOrderOptimizer(
            net, curvature="ggn", update="natural", kl_clip=None
        )
        start = flat(net)
        F.cross_entropy(net(x), y).backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), scale)
        optimizer.step()
        return flat(net) - start, norm

    whole, norm = run(1e6)
    half, _ = run(float(norm) / 2)
    torch.testing.assert_close(2 * half, whole, rtol=1e-3, atol=1e-6)


def test_a_closure_is_called_with_gradients_on() -> None:
    net, (x, y) = small(), classes()
    optimizer = SecondOrderOptimizer(net)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        for _ in range(20):
            last = optimizer.step(closure)
    assert last < first


@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical"])
def test_amp_with_a_scaler_steps_as_without(kind: str) -> None:
    def run(scaled: bool) -> Tensor:
        torch.manual_seed(0)
        net = small()
        optimizer = SecondOrderOptimizer(net, curvature=Curvature(kind, every=1))
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for number in range(4):
            torch.manual_seed(number)
            x, y = classes()
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return flat(net)

    torch.testing.assert_close(run(True), run(False))


def test_a_scaler_skips_a_step_that_overflows() -> None:
    net, (x, y) = small(), classes()
    optimizer = SecondOrderOptimizer(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = flat(net)
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    net[0].weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert torch.equal(before, flat(net))


def test_bf16_autocast_trains() -> None:
    torch.manual_seed(0)
    net, (x, y) = small(), classes()
    optimizer = SecondOrderOptimizer(net, 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_as_the_original(copied: Callable[[Any], Any]) -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, curvature=Curvature("fisher", every=1))
    lr_scheduler.StepLR(optimizer, 5)
    train(net, optimizer)
    other_net, other = copied((net, optimizer))
    train(net, optimizer)
    train(other_net, other)
    assert torch.equal(flat(net), flat(other_net))
    alone = copied(net)  # its hooks have nobody to tell
    assert alone(torch.randn(2, 5)).shape == (2, 3)


@pytest.mark.filterwarnings("ignore:Guards may run slower")  # of Python 3.13.0
@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_net_trains(how: str) -> None:
    torch.manual_seed(0)
    net, (x, y) = small(), classes()
    if how == "wrapped":
        called = torch.compile(net, backend="eager")
        optimizer = SecondOrderOptimizer(called)
    else:
        called, optimizer = net, SecondOrderOptimizer(net)
        net.compile(backend="eager")
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(optimizer.layout.blocks) == 2


def test_hooks_of_the_user_stay() -> None:
    net, seen = small(), []
    handle = net[0].register_forward_hook(lambda *_: seen.append("forward"))
    net[0].weight.register_hook(lambda grad: seen.append("gradient"))
    optimizer = SecondOrderOptimizer(net)
    train(net, optimizer, 2)
    assert seen.count("gradient") == 2  # the extra pass goes onto outputs, not onto weights
    assert handle.id in net[0]._forward_hooks


# ---- what has no block --------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(1))[0][:, -1])


def test_adam_trains_what_no_op_supports_and_says_so_once() -> None:
    net = Recurrent()
    adam_net = copy.deepcopy(net)
    optimizer = SecondOrderOptimizer(net, fallback_lr=0.01, lr=0.0)
    with pytest.warns(UserWarning, match=r"rnn\.weight_ih_l0.*Adam trains them") as caught:
        train(net, optimizer)
    assert sum("Adam trains" in str(one.message) for one in caught) == 1
    assert not any("rnn" in name for b in optimizer.layout.blocks for name in b.tensors)
    assert not torch.equal(net.rnn.weight_ih_l0, adam_net.rnn.weight_ih_l0)
    adam = torch.optim.Adam(adam_net.rnn.parameters(), 0.01)
    train(adam_net, adam)
    torch.testing.assert_close(net.rnn.weight_ih_l0, adam_net.rnn.weight_ih_l0)


@pytest.mark.parametrize("kind", ["point", "frozen"])
def test_layers_can_be_left_out(kind: str) -> None:
    net = small()
    start = copy.deepcopy(net)
    optimizer = SecondOrderOptimizer(net, structure={"0": kind, nn.Linear: EKFAC()})
    train(net, optimizer)
    assert [list(b.tensors) for b in optimizer.layout.blocks] == [["2.weight", "2.bias"]]
    assert torch.equal(net[0].weight, start[0].weight) == (kind == "frozen")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    train(net, optimizer)
    assert torch.equal(net[0].weight, start[0].weight) == (kind == "frozen")


def test_frozen_parameters_stay() -> None:
    net = small()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    train(net, SecondOrderOptimizer(net))
    assert torch.equal(before, net[0].weight)


@pytest.mark.parametrize("structure", ["kfac", "diag", "full"])
@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.bias"]])
def test_what_is_frozen_later_stays_too(structure: str, names: list[str]) -> None:
    """Also beside weights of its block that go on."""
    net = small()
    optimizer = SecondOrderOptimizer(net, structure=structure, weight_decay=0.1)
    train(net, optimizer)
    parameters = dict(net.named_parameters())
    for name in names:
        parameters[name].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    train(net, optimizer)
    for name, p in parameters.items():
        assert torch.equal(before[name], p) == (name in names)


class Coded(nn.Module):
    """A weight that works on a code of 16 rows, as many as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.randn(16, 5))
        self.make, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.make(self.code).mT / 4) @ self.code)


def test_a_layer_that_does_not_see_the_examples_is_left_to_adam() -> None:
    net = Coded()
    with pytest.warns(UserWarning, match=r"make\.weight .*affect more than their own example"):
        optimizer = SecondOrderOptimizer(net)
        train(net, optimizer)
    assert [list(b.tensors) for b in optimizer.layout.blocks] == [["head.weight", "head.bias"]]


class Both(nn.Module):
    """A mapping goes in, a mean and a log scale come out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mean, self.log_scale = (
            nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        )

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.a(batch["a"]) + self.b(batch["b"]))
        return self.mean(hidden).squeeze(-1), self.log_scale(hidden).squeeze(-1)


@pytest.mark.parametrize("kind", ["fisher", "ggn"])
def test_inputs_and_outputs_of_any_make(kind: str) -> None:
    def normal(output: tuple[Tensor, Tensor]) -> torch.distributions.Normal:
        return torch.distributions.Normal(output[0], output[1].exp())

    net, batch = Both(), {"a": torch.randn(40, 4), "b": torch.randn(40, 3)}
    optimizer = SecondOrderOptimizer(net, 0.1, likelihood=normal, curvature=kind)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -normal(net(batch)).log_prob(batch["a"][:, 0]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert len(optimizer.layout.blocks) == 4


# ---- what is refused ----------------------------------------------------------------------------


def test_a_step_before_any_forward_pass() -> None:
    optimizer = SecondOrderOptimizer(small())
    with pytest.raises(RuntimeError, match="before any forward pass"):
        optimizer.step()


@pytest.mark.parametrize("options", [
    {"lr": -1.0}, {"momentum": 1.0}, {"damping": -1.0}, {"weight_decay": -1.0}, {"kl_clip": 0.0},
    {"structure": "kfack"}, {"curvature": "fischer"}, {"curvature": "noise"},
    {"likelihood": "poisson"}, {"fallback_lr": 0.0},
    {"likelihood": lambda out: torch.distributions.Poisson(out.exp()), "curvature": "hessian"},
])
def test_bad_numbers_and_names(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        SecondOrderOptimizer(small(), **options)


def test_parameters_twice_or_of_another_net() -> None:
    net = small()
    with pytest.raises(ValueError, match="more than one parameter group"):
        SecondOrderOptimizer(net, params=[
            {"params": net[0].parameters()}, {"params": net.parameters()}
        ])
    optimizer = SecondOrderOptimizer(net, params=nn.Linear(2, 3).parameters())
    F.cross_entropy(net(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(ValueError, match="do not belong to the network"):
        optimizer.step()


@pytest.mark.parametrize(("likelihood", "net"), [
    ("categorical", nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))),
    (lambda out: out, nn.Linear(5, 3)),
    (lambda out: torch.distributions.Normal(out.mean(), 1.0), nn.Linear(5, 3)),
    (lambda out: torch.distributions.Normal(out.mT, 1.0), nn.Linear(5, 3)),
])
def test_a_likelihood_that_does_not_fit(likelihood: Any, net: nn.Module) -> None:
    optimizer = SecondOrderOptimizer(net, likelihood=likelihood)
    before = flat(net)
    net(torch.randn(4, 5)).square().mean().backward()
    with pytest.raises(ValueError, match="likelihood="):
        optimizer.step()
    assert torch.equal(flat(net), before)
    assert optimizer.state_dict()["step"] == 0


@pytest.mark.parametrize("steps", [0, 3])
def test_gradients_that_are_not_finite_change_nothing(steps: int) -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, curvature=Curvature("fisher", every=1))
    train(net, optimizer, steps)
    x, y = classes()
    F.cross_entropy(net(x), y).backward()
    net[2].bias.grad[0] = torch.nan
    before, state = flat(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    assert torch.equal(flat(net), before)
    after = optimizer.state_dict()
    blocks, known = after["posterior"]["blocks"], state["posterior"]["blocks"]
    assert after["step"] == state["step"] and len(blocks) == len(known)
    for a, b in zip(blocks, known, strict=True):
        assert torch.equal(a["momentum"], b["momentum"])
    optimizer.zero_grad()
    train(net, optimizer, 1)


def test_nor_where_adam_has_all_layers() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, structure=lambda name, module: "point")
    train(net, optimizer, 1)
    x, y = classes()
    F.cross_entropy(net(x), y).backward()
    net[2].bias.grad[0] = torch.nan
    before = flat(net)
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step()
    assert torch.equal(flat(net), before)


def test_a_state_of_another_net_is_refused() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net)
    train(net, optimizer, 1)
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="the state is of parameters"):
        SecondOrderOptimizer(other).load_state_dict(optimizer.state_dict())


def test_no_pyro_is_imported() -> None:
    import subprocess
    import sys

    code = "import sys, pyrocurv.optim; sys.exit('pyro' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_warning_on_an_ordinary_run() -> None:
    net = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, SecondOrderOptimizer(net))


def test_a_summary_and_counts_tell_what_has_a_curvature() -> None:
    net = nn.Sequential(
        nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 3)
    )
    optimizer = SecondOrderOptimizer(net, structure={
        "0": "diag", "4": "point", "5": "frozen", "2": KFAC(num_blocks=2),
    }, curvature=Curvature("fisher", every=2))
    assert optimizer.update_counts() == {} and optimizer.summary().count("adam") == 8
    train(net, optimizer, 5)
    rows = [line.split() for line in optimizer.summary().splitlines()[1:-1]]
    assert {row[0]: row[-2] for row in rows} == {
        "0.weight": "diag", "0.bias": "diag", "2.weight": "kfac-block", "2.bias": "kfac-block",
        "4.weight": "point", "4.bias": "point", "5.weight": "frozen", "5.bias": "frozen",
    }
    assert optimizer.summary().endswith("44 of 71 parameters have a curvature")
    assert optimizer.update_counts() == {"0": (3, 2), "2": (3, 2)}


def test_weights_out_of_sight_are_adams_with_a_warning() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    forward = net.forward
    net.forward = lambda x: torch.vmap(forward)(x)  # type: ignore[method-assign]
    optimizer = SecondOrderOptimizer(net)
    reason = "0.weight .an op that could not be traced.* Adam trains them"
    with pytest.warns(UserWarning, match=reason):
        train(net, optimizer, 1)
    train(net, optimizer, 2)
    assert optimizer.summary().count("adam") == 4


@pytest.mark.parametrize(("name", "structure", "kind"), pairs(
    [n for n in {**LAYERED, **WOVEN} if n not in OPAQUE],
    ["full", "diag", "kfac", "ekfac", "kfac-block"], ["ggn", "hessian"],
))
def test_a_step_of_every_layer_is_that_of_the_curvature_estimated(
    name: str, structure: str, kind: str
) -> None:
    net, x = layer_cases.make(name, 6)
    y = torch.randn_like(net(x))
    matrix = estimate(net, x, y, likelihood="normal", curvature=kind, structure=structure)
    optimizer = SecondOrderOptimizer(
        net, 1.0, likelihood="normal", curvature=plain(kind), structure=structure,
        **NATURAL,
    )
    (F.mse_loss(net(x), y) / 2).backward()
    start = flat(net)
    dense = matrix.psd().dense() / y.numel() + 0.01 * torch.eye(len(start), dtype=start.dtype)
    wanted = torch.linalg.solve(dense, gradient(net))
    optimizer.step()
    torch.testing.assert_close(start - flat(net), wanted, rtol=1e-5, atol=1e-7)


MEANS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {  # of outputs [16, 4], by likelihood
    "cross entropy": ("categorical", lambda f: F.cross_entropy(
        f, torch.arange(16) % 4, torch.rand(4))),
    "smoothed": ("categorical", lambda f: F.cross_entropy(
        f, torch.arange(16) % 4, label_smoothing=0.1)),
    "one that ignores": ("categorical", lambda f: F.cross_entropy(
        f, torch.arange(16) % 5 - 1, ignore_index=-1)),
    "bits": ("bernoulli", lambda f: F.binary_cross_entropy_with_logits(f, (f > 0.2).to(f))),
    "squares": ("normal", lambda f: F.mse_loss(f, torch.randn(16, 4)) / 2),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_that_is_not_of_the_likelihood_is_noticed(
    name: str, likelihood: str, autocast: bool
) -> None:
    """Once, by the sums of a cross entropy's gradient or by weights that no hard target has.

    Nothing tells "normal" under bfloat16's rounding.
    """
    wanted, loss = MEANS[name]
    net, x = nn.Linear(5, 4), torch.randn(16, 5)
    optimizer = SecondOrderOptimizer(net, likelihood=likelihood)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss(net(x)).backward()
            optimizer.step()
    is_seen = wanted != likelihood
    if likelihood == "normal":
        is_seen = wanted == "categorical" and not autocast
    said = [f"likelihood={likelihood!r}" in str(one.message) for one in caught]
    assert said == is_seen * [True]


@pytest.mark.parametrize("classes", [2, 4])
def test_a_network_that_fits_its_data_is_not_taken_for_another_likelihood(classes: int) -> None:
    """Its gradients are of the size of rounding; a warning is an error here."""
    net, y = nn.Linear(classes, classes), torch.arange(16) % classes
    with torch.no_grad():
        net.weight.copy_(torch.eye(classes))
    optimizer = SecondOrderOptimizer(net, lr=1e-6, curvature=Curvature("fisher", every=1))
    for size in (14.0, 17.0, 20.0):
        optimizer.zero_grad()
        F.cross_entropy(net(size * F.one_hot(y, classes).float()), y).backward()
        optimizer.step()


def test_one_class_is_none() -> None:
    net = nn.Linear(5, 1)
    optimizer = SecondOrderOptimizer(net)
    net(torch.randn(16, 5)).square().mean().backward()
    with pytest.raises(ValueError, match=r"an output \(16, 1\) has one class alone"):
        optimizer.step()
    with pytest.raises(ValueError, match="has one class alone"):
        estimate(net, torch.randn(16, 5), torch.zeros(16).long())


# ---- what counts --------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_passes_whose_gradients_were_cleared_do_not_count(curvature: str) -> None:
    """As of a discriminator in its generator's turn."""
    def run(turns: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = SecondOrderOptimizer(net, curvature=curvature)
        x, y, other = torch.randn(16, 3), torch.arange(16) % 3, 5 * torch.randn(64, 3)
        for _ in range(3):
            if turns:
                net(other).square().sum().backward()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    assert all(map(torch.equal, run(True), run(False)))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("structure", "curvature", "pads"), pairs(
    ["full", "block", "diag", "kfac", "ekfac"], ["ggn", "hessian"], [0.0, 7.0],
))
def test_entries_that_the_loss_ignores(curvature: str, structure: str, pads: float) -> None:
    """Tokens that do not see each other: the step is that from those that count alone."""
    def run(alone: bool) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        x, y, keep = torch.randn(8, 6, 3), torch.randint(3, (8, 6)), torch.rand(8, 6) < 0.4
        x = torch.where(keep[..., None], x, torch.full((), pads))
        spec = Curvature(curvature, every=1, batch=None, initial=0.0)
        optimizer = SecondOrderOptimizer(
            net, 1.0, curvature=spec, structure=structure, kl_clip=None
        )
        if alone:
            F.cross_entropy(net(x[keep]), y[keep]).backward()
        else:
            labels = torch.where(keep, y, -100)
            F.cross_entropy(net(x).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.testing.assert_close(run(False), run(True))


# ---- which passes count -------------------------------------------------------------------------


def attack(net: nn.Module, x: Tensor, y: Tensor) -> None:
    """The sign of the gradient in the inputs."""
    x = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(net(x), y), x)


def attack_by_backward(net: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    F.cross_entropy(net(x), y).backward(inputs=[x])


def attack_on_frozen(net: nn.Module, x: Tensor, y: Tensor) -> None:
    net.requires_grad_(False)
    F.cross_entropy(net(x.clone().requires_grad_()), y).backward()
    net.requires_grad_(True)


def hessian_of_inputs(net: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.functional.hessian(lambda row: F.cross_entropy(net(row), y[:1]), x[:1])


def gradient_norm_for_the_log(net: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(F.cross_entropy(net(x), y), [*net.parameters()])


def gradients_by_example(net: nn.Module, x: Tensor, y: Tensor) -> None:
    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, weights, (x[None],)), y[None])

    torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(net.named_parameters()), x, y)


def failed(net: nn.Module, x: Tensor, y: Tensor) -> None:
    output = net(x.requires_grad_())
    x.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.sum().backward(inputs=[x])
    x.requires_grad_(False)


OTHERS = [attack, attack_by_backward, attack_on_frozen, hessian_of_inputs,
          gradient_norm_for_the_log, gradients_by_example, failed]


@pytest.mark.parametrize("other", OTHERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make", [
    lambda net: SecondOrderOptimizer(net, curvature="ggn"),
    lambda net: VIOptimizer(net, 16, curvature="ggn"),
], ids=["second order", "variational"])
def test_passes_count_whose_gradient_reaches_the_parameters(
    make: Callable[[nn.Module], Any], other: Callable[[nn.Module, Tensor, Tensor], None]
) -> None:
    def run(disturbed: bool) -> Tensor:
        torch.manual_seed(0)
        net, (x, y) = small(), classes()
        optimizer = make(net)
        for _ in range(2):
            optimizer.zero_grad()
            with getattr(optimizer, "sampled_params", nullcontext)():
                if disturbed:
                    other(net, 9 * x[:12], y[:12])
                F.cross_entropy(net(x), y).backward()
                if disturbed:
                    other(net, 9 * x[:12], y[:12])
            optimizer.step()
        return flat(net)

    assert torch.equal(run(True), run(False))


def test_a_pass_that_trains_another_network_does_not_count() -> None:
    """Two optimizers on parts of one network: each counts what reaches its own part."""
    net, (x, y) = small(), classes()
    first = SecondOrderOptimizer(net, params=net[0].parameters())
    last = SecondOrderOptimizer(net, params=net[2].parameters())
    F.cross_entropy(net(x), y).backward(inputs=[*net[2].parameters()])
    assert (len(first._recorder.passes), len(last._recorder.passes)) == (0, 1)


def test_a_second_backward_pass_counts_after_the_first_was_cleared() -> None:
    net, (x, y) = small(), classes()
    optimizer = SecondOrderOptimizer(net)
    loss = F.cross_entropy(net(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    (recorded,) = optimizer._recorder.passes
    wanted = (net(x).softmax(-1) - F.one_hot(y, 3)) / 16
    torch.testing.assert_close(recorded.gradients[""], wanted.detach())


def test_a_reentrant_checkpoint_counts() -> None:
    """Its parameters get their gradients in a backward pass inside of another."""
    def run(reentrant: bool) -> Tensor:
        torch.manual_seed(0)
        body, (x, y) = small(), classes()

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = body

            def forward(self, x: Tensor) -> Tensor:
                if not reentrant:
                    return self.body(x)
                return checkpoint(self.body, x, use_reentrant=True)

        net = Net()
        optimizer = SecondOrderOptimizer(net)
        F.cross_entropy(net(x.requires_grad_()), y).backward()
        assert len(optimizer._recorder.passes) == 1
        return optimizer._recorder.passes[0].gradients[""]

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize(("net", "expected"), [
    (nn.Linear(2, 2), 0.3),
    (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.3),
    (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), 0.1),
    (nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2)), 0.1),
    (nn.TransformerEncoderLayer(4, 2, 4), 0.1),
    (nn.Sequential(nn.Linear(2, 2), type("LlamaRMSNorm", (nn.Identity,), {})()), 0.1),
])
def test_the_default_decay_depends_on_layer_norms(net: nn.Module, expected: float) -> None:
    optimizer = SecondOrderOptimizer(net)
    assert optimizer.state_dict()["update"] == "whitened-muon"
    assert optimizer.defaults["decoupled_weight_decay"] == expected
    for options in ({"update": "whitened-muon"}, {"weight_decay": 0.1}):
        assert SecondOrderOptimizer(net, **options).defaults["decoupled_weight_decay"] == 0


@pytest.mark.parametrize("update", ["natural", "muon", "whitened-muon", "soap", torch.optim.SGD])
@pytest.mark.parametrize("structure", ["kfac", "diag"])
def test_decoupled_decay_shortens_the_weights_of_layers(update: Any, structure: str) -> None:
    """By lr λ in each step, besides the same step; scales of norm layers keep their size."""
    def trained(decay: float) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
        optimizer = SecondOrderOptimizer(
            net, 0.02, update=update, structure={nn.Linear: structure, nn.LayerNorm: "diag"},
            decoupled_weight_decay=decay,
        )
        x, y = torch.randn(16, 4, dtype=torch.double), torch.randint(3, (16,))
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        return before, dict(net.named_parameters())

    before, plain = trained(0.0)
    _, decayed = trained(0.5)
    for name, value in before.items():
        rate = 0.0 if name.startswith("1.") else 0.02 * 0.5
        torch.testing.assert_close(plain[name] - decayed[name], rate * value)


def test_decoupled_decay_follows_groups_and_schedules() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = SecondOrderOptimizer(net, 0.1, params=[
        {"params": net[0].parameters(), "decoupled_weight_decay": 0.2},
        {"params": net[1].parameters(), "decoupled_weight_decay": 0.0},
    ])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(net.state_dict())
    F.cross_entropy(net(torch.randn(8, 3)), torch.randint(2, (8,))).backward()
    optimizer.step()
    schedule.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        SecondOrderOptimizer(net, decoupled_weight_decay=-1.0)
    with pytest.raises(ValueError, match="decoupled_weight_decay='no'"):
        SecondOrderOptimizer(net, decoupled_weight_decay="no")
    assert VIOptimizer(net, 10).state_dict()["update"] == "whitened-muon"


def test_groups_with_a_weight_decay_have_no_automatic_one() -> None:
    """Nor have those that a copy gets later; a number that was given stays."""
    def decays(**options: Any) -> list[float]:
        net = small()
        optimizer = SecondOrderOptimizer(net, params=[
            {"params": [net[0].weight]}, {"params": [net[0].bias], "weight_decay": 0.0},
        ], **options)
        net, optimizer = copy.deepcopy((net, optimizer))
        optimizer.add_param_group({"params": net[2].parameters(), "weight_decay": 1e-3})
        return [group["decoupled_weight_decay"] for group in optimizer.param_groups]

    assert decays() == [0.3, 0.0, 0.0]
    assert decays(decoupled_weight_decay=0.2) == [0.2, 0.2, 0.2]
    assert decays(update="natural") == [0.0, 0.0, 0.0]


def test_a_decay_that_overflows_changes_nothing() -> None:
    net = small()
    optimizer = SecondOrderOptimizer(net, 1.0, decoupled_weight_decay=1e38)
    with torch.no_grad():
        net[0].weight.mul_(100)
    before = flat(net)
    with pytest.raises(FloatingPointError, match="the means overflow"):
        train(net, optimizer, 1)
    assert torch.equal(flat(net), before)


def test_a_state_from_before_decoupled_decay_loads() -> None:
    def without_decay(value: Any) -> Any:
        if isinstance(value, dict):
            names = [name for name in value if name not in ("decay", "decoupled_weight_decay")]
            return {name: without_decay(value[name]) for name in names}
        return [*map(without_decay, value)] if isinstance(value, list) else value

    net = small()
    optimizer = SecondOrderOptimizer(net, decoupled_weight_decay=0.0)
    train(net, optimizer, 1)
    other_net = copy.deepcopy(net)
    other = SecondOrderOptimizer(other_net)
    other.load_state_dict(without_decay(copy.deepcopy(optimizer.state_dict())))
    train(net, optimizer, 1)
    train(other_net, other, 1)
    assert torch.equal(flat(net), flat(other_net))
