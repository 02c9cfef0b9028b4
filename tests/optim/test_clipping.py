"""Clipped gradients: the curvature is that of the loss, with a GradScaler or without.

Whether gradients have shrunk by clipping or by unscaling is told by the factor, and by the weights
of the loss.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer, ivon
from pyrocurv.optim.loss_scale import LossSize, WeightSum

SCALE = 2.0**16
SPEC = Curvature("ggn", batch=None, initial=0.0, every=1)
W = torch.tensor([0.2, 1.0, 3.0, 8.0])
Loss = Callable[[Tensor, Tensor], Tensor]
UNSCALED = pytest.raises(RuntimeError, match="times larger .* call scaler.unscale_")


def mean(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def total(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="sum")


LOSSES: dict[str, Loss] = {
    "mean": mean,
    "sum": total,
    "class weights": lambda f, y: F.cross_entropy(f, y, weight=W),
    "class weights, summed": lambda f, y: F.cross_entropy(f, y, weight=W, reduction="sum"),
    "ignored": lambda f, y: F.cross_entropy(f, y, ignore_index=1),
    "ignored, summed": lambda f, y: F.cross_entropy(f, y, ignore_index=1, reduction="sum"),
}
PARTS: dict[str, tuple[Loss, int]] = {
    "means over 4": (lambda f, y: mean(f, y) / 4, 4),
    "sums over 4": (lambda f, y: total(f, y) / 4, 4),
    "sums": (total, 4),
}


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 5, generator=generator)
    return x, torch.randint(4, (size,), generator=generator)


def curvature_of(
    loss: Loss, size: int, *, variational: bool = False, scaled: str = "", shrink: float = 1.0,
    parts: int = 1, spec: Curvature = SPEC, likelihood: Any = "categorical",
) -> Tensor:
    """After one step whose gradients were clipped to 1/shrink of their norm.

    `scaled` is "" without a GradScaler, "inside" or "late" by when it is taken away.
    """
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(5, 4), batch(size)
    options: Any = {"curvature": spec, "structure": "kfac", "likelihood": likelihood}
    optimizer: Any = (
        VIOptimizer(net, 10000, **options) if variational
        else SecondOrderOptimizer(net, **options)
    )
    scaler = torch.amp.GradScaler("cpu", enabled=bool(scaled), init_scale=SCALE)
    with optimizer.sampled_params() if variational else nullcontext():
        for part, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
            scaler.scale(loss(net(part), targets)).backward()
        if scaled == "inside":
            scaler.unscale_(optimizer)
    if scaled == "late":
        scaler.unscale_(optimizer)
    if shrink != 1:
        norm = nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(net.parameters(), float(norm) / shrink)
    scaler.step(optimizer)
    (state,) = optimizer._posterior.blocks
    found: Tensor = state.curvature.curvature.dense()
    return found


# ---- of one batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 24, 300, 512, 1024, 4096])
@pytest.mark.parametrize("shrink", [1.0, 1.3, 473.0, 1e5])
@pytest.mark.parametrize("scaled", ["", "inside"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_a_step_has_the_curvature_of_the_loss(
    loss: str, scaled: str, shrink: float, size: int
) -> None:
    found = curvature_of(LOSSES[loss], size, scaled=scaled, shrink=shrink)
    torch.testing.assert_close(found, curvature_of(LOSSES[loss], size), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 24, 300, 512, 1024, 4096])
@pytest.mark.parametrize("shrink", [1.0, 1.3, 473.0])
@pytest.mark.parametrize("scaled", ["", "inside", "late"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_a_sample_has_the_curvature_of_the_loss(
    loss: str, scaled: str, shrink: float, size: int
) -> None:
    """Of a sum whose scale is taken away after the sample, the step is refused."""
    def run(**options: Any) -> Tensor:
        return curvature_of(LOSSES[loss], size, variational=True, **options)

    if loss == "sum" and scaled == "late" and size > 1:
        with UNSCALED:
            run(scaled=scaled, shrink=shrink)
    else:
        found = run(scaled=scaled, shrink=shrink)
        torch.testing.assert_close(found, run(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [2, 256])
def test_what_looks_like_a_mean_is_taken_for_one(size: int) -> None:
    """A sum of a power of 2 at 2¹⁶, clipped by more than that, is as a mean at a larger scale."""
    found = curvature_of(total, size, scaled="inside", shrink=1000.0)
    torch.testing.assert_close(found, curvature_of(mean, size), rtol=1e-3, atol=1e-5)
    found = curvature_of(total, size, scaled="inside", shrink=1.3)
    torch.testing.assert_close(found, curvature_of(total, size), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("shrink", [1.0, 3.0, 700.0])
@pytest.mark.parametrize(("name", "scaled"), [
    *((name, "") for name in LOSSES),
    *((name, "inside") for name in LOSSES if name != "class weights, summed"),
])
def test_weights_and_masks_have_the_curvature_of_the_loss(
    name: str, scaled: str, shrink: float, variational: bool
) -> None:
    loss = LOSSES[name]
    found = curvature_of(loss, 300, variational=variational, scaled=scaled, shrink=shrink)
    wanted = curvature_of(loss, 300, variational=variational)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["class weights", "ignored"])
@pytest.mark.parametrize("size", [128, 300, 1024])
def test_a_scale_is_seen_in_a_part_of_the_batch(name: str, size: int) -> None:
    """Whose weights add up to about the scale."""
    spec = Curvature("ggn", batch=32, initial=0.0)
    found = curvature_of(LOSSES[name], size, scaled="inside", shrink=700.0, spec=spec)
    wanted = curvature_of(LOSSES[name], size, spec=spec)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shrink", [1.0, 700.0])
@pytest.mark.parametrize("scaled", ["", "inside", "late"])
def test_confident_examples_do_not_hide_a_scale(scaled: str, shrink: float) -> None:
    """Their gradient is exactly 0, so the others' weights add up to less than that of a mean."""
    def confident(logits: Tensor, y: Tensor) -> Tensor:
        first = (torch.arange(len(y)) < 40)[:, None] * F.one_hot(y, 4)
        return mean(logits + 1e4 * first, y)

    def run(**options: Any) -> Tensor:
        return curvature_of(
            confident, 300, variational=True, **options,
            likelihood=lambda f: torch.distributions.Categorical(logits=f),
        )

    found = run(scaled=scaled, shrink=shrink)
    torch.testing.assert_close(found, run(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shrink", [1.0, 3.0, 700.0])
@pytest.mark.parametrize("scaled", ["", "inside"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bits_are_entries(reduction: str, scaled: str, shrink: float) -> None:
    def bits(logits: Tensor, y: Tensor) -> Tensor:
        hot = F.one_hot(y, 4).to(logits)
        return F.binary_cross_entropy_with_logits(logits, hot, reduction=reduction)

    found = curvature_of(bits, 300, scaled=scaled, shrink=shrink, likelihood="bernoulli")
    wanted = curvature_of(bits, 300, likelihood="bernoulli")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


# ---- several batches, several steps -------------------------------------------------------------


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("shrink", [1.0, 3.0, 5000.0])
@pytest.mark.parametrize("name", PARTS)
def test_accumulated_batches_are_one_loss(name: str, shrink: float, variational: bool) -> None:
    loss, parts = PARTS[name]
    found = curvature_of(loss, 4096, variational=variational, shrink=shrink, parts=parts)
    whole: Loss = {"means over 4": mean, "sums over 4": lambda f, y: total(f, y) / 4}.get(
        name, total
    )
    wanted = curvature_of(whole, 4096, variational=variational)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shrink", [1.0, 3.0, 5000.0])
def test_a_scale_is_seen_in_accumulated_batches(shrink: float) -> None:
    loss, parts = PARTS["means over 4"]
    found = curvature_of(loss, 1200, scaled="inside", shrink=shrink, parts=parts)
    wanted = curvature_of(loss, 1200, parts=parts)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [24, 300, 1000])
def test_a_sum_whose_gradients_are_divided_is_a_mean(size: int) -> None:
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(5, 4), batch(size)
    optimizer = SecondOrderOptimizer(net, curvature=SPEC)
    total(net(x), y).backward()
    for p in net.parameters():
        assert p.grad is not None
        p.grad /= size
    optimizer.step()
    found = optimizer._posterior.blocks[0].curvature.curvature.dense()
    torch.testing.assert_close(found, curvature_of(mean, size), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [VIOptimizer, ivon])
def test_a_sum_is_clipped(make: Callable[[nn.Module, int], VIOptimizer]) -> None:
    """Also where the curvature is of the gradients themselves, which may have shrunk by any number.
    """
    net, (x, y) = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 4)), batch(1000)
    optimizer = make(net, 2000)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            total(net(3 * x), y).backward()
        assert nn.utils.clip_grad_norm_(net.parameters(), 1.0) > 256
        optimizer.step()


def test_a_scale_may_halve_between_estimates() -> None:
    """The weights of the last estimate say nothing of the scale on a step without one."""
    net, (x, y) = nn.Linear(5, 4), batch(64)
    optimizer, scaler = VIOptimizer(net, 64), torch.amp.GradScaler("cpu", init_scale=SCALE)
    for number in range(5):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            scaler.scale(mean(net(x), y)).backward()
        if number == 2:
            assert net.weight.grad is not None
            net.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 2


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
def test_a_layer_without_a_trace_wants_its_gradients_unscaled() -> None:
    """Also where the other layers' curvature would allow for the scale."""
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.first(x)[0][:, -1])
            return logits

    net, (x, y) = Recurrent(), batch(24)
    spec = Curvature("ggn", batch=None, every=1)
    optimizer, scaler = VIOptimizer(net, 24, curvature=spec), torch.amp.GradScaler("cpu")
    with optimizer.sampled_params():
        mean(net(x[:, None]), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with optimizer.sampled_params():
        scaler.scale(mean(net(x[:, None]), y)).backward()
    with UNSCALED:
        scaler.step(optimizer)


# ---- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "ratio", "scale"), [
    (WeightSum(1.0, 300, 300, 300), 700.0, 1.0),
    (WeightSum(1.0, 300, 300, 300), 1024.0, 1.0),  # a loss that was never scaled
    (WeightSum(SCALE, 300, 300, 300), SCALE, SCALE),
    (WeightSum(SCALE, 300, 300, 300), 3 * SCALE, SCALE),
    (WeightSum(SCALE, 300, 300, 300), 3.0, 1.0),  # not unscaled
    (WeightSum(1.7 * SCALE, 300, 300, 300), SCALE, SCALE),  # of weights as they come
    (WeightSum(1.7 * SCALE, 300, 300, 300, False), 1.5 * SCALE, SCALE),
    (WeightSum(1024.0, 4096, 4096, 4096), 3000.0, 1.0),  # sums over 4, of four batches
    (WeightSum(1024.0, 3000, 3000, 3000), 3000.0, 1024.0),
    (WeightSum(1024.0, 32 * 1024, 32 * 1024, 32), 3000.0, 1.0),  # a mean of sums of 1024 tokens
    (WeightSum(512.0, 512 * 9, 512 * 9, 512), 3000.0, 1.0),  # a sum of means of 9 tokens
    (WeightSum(SCALE, 2 * SCALE, 2 * SCALE, 128), 3 * SCALE, SCALE),  # a mean over tokens
    (WeightSum(5000.0, 128, 128, 128), 9000.0, 1.0),  # 5000 times a mean
    (WeightSum(0.0, 0, 128, 128), 9000.0, 1.0),
    (WeightSum(1e-320, 128, 128, 128), 9000.0, 1.0),
    (WeightSum(float("inf"), 128, 128, 128), 9000.0, 1.0),
])
def test_the_scale_that_gradients_have_lost(
    weights: WeightSum, ratio: float, scale: float
) -> None:
    examples = weights.examples
    assert LossSize(examples, examples, ratio).gradient_scale(weights) == scale
