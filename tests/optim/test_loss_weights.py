"""The curvature is that of the loss as it is: its weights, its scale, its masks, its outputs.

One linear layer is a generalized linear model: a step of Gauss-Newton is Newton's on the user's own
loss, whose Hessian `torch.autograd.functional.hessian` gives.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal

from pyrocurv.curvature import Curvature
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

Loss = Callable[[Any], Tensor]
SPEC = Curvature("ggn", batch=None, initial=0.0)
EXACT = {"momentum": 0.0, "damping": 0.0, "kl_clip": None, "structure": "full"}
DECAY = 0.1
pytestmark = pytest.mark.usefixtures("double")


class Image(nn.Module):
    """A linear map of images whose classes are on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight).movedim(-1, 1)


class Heads(nn.Module):
    """Several outputs in a mapping, one of which no loss is of."""

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.layer, self.as_tuple = nn.Linear(4, 7), as_tuple

    def forward(self, x: Tensor) -> Any:
        names = {"classes": slice(0, 3), "mean": slice(3, 5), "bits": slice(5, 7)}
        outputs = {name: self.layer(x)[:, where] for name, where in names.items()}
        return tuple(outputs.values()) if self.as_tuple else outputs


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    loss: Loss
    likelihood: Any = "categorical"


N = 24
GENERATOR = torch.Generator().manual_seed(3)
Y = torch.randint(4, (N,), generator=GENERATOR)
PIXELS = torch.randint(4, (N, 2, 3), generator=GENERATOR)
BITS = torch.randint(2, (N, 3), generator=GENERATOR).double()
W = torch.tensor([0.2, 1.0, 3.0, 8.0]).double()
EACH = torch.rand(N, generator=GENERATOR).double() + 0.1


def linear(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(4, outputs)


def bce(f: Tensor, **options: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, BITS, **options)


def heads_loss(f: Any, ignored: int = -100) -> Tensor:
    classes, _, bits = f.values() if isinstance(f, dict) else f
    y = torch.where(torch.arange(N) < 9, ignored, Y % 3)
    one_bit = F.binary_cross_entropy_with_logits(bits[:, :1], BITS[:, :1], reduction="sum")
    return F.cross_entropy(classes, y, weight=W[:3]) + 0.3 * one_bit


def heads(f: Any) -> list[Any]:
    classes, _, bits = f.values() if isinstance(f, dict) else f
    return [Categorical(logits=classes), Bernoulli(logits=bits)]


def masked_pixels(f: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(f, torch.where(PIXELS == 3, -100, PIXELS), **options)


CASES = {
    "mean": Case(linear(4), (4,), lambda f: F.cross_entropy(f, Y)),
    "sum": Case(linear(4), (4,), lambda f: F.cross_entropy(f, Y, reduction="sum")),
    "class weights": Case(linear(4), (4,), lambda f: F.cross_entropy(f, Y, weight=W)),
    "class weights, summed": Case(
        linear(4), (4,), lambda f: F.cross_entropy(f, Y, weight=W, reduction="sum")),
    "weights of examples": Case(
        linear(4), (4,), lambda f: (EACH * F.cross_entropy(f, Y, reduction="none")).mean()),
    "ignored and weighted": Case(
        linear(4), (4,), lambda f: F.cross_entropy(f, Y, weight=W, ignore_index=1)),
    "nll_loss": Case(linear(4), (4,), lambda f: 3 * F.nll_loss(f.log_softmax(-1), Y, weight=W)),
    "smoothed, summed": Case(
        linear(4), (4,), lambda f: F.cross_entropy(f, Y, label_smoothing=0.2, reduction="sum")),
    "tokens": Case(
        linear(4), (6, 4), lambda f: F.cross_entropy(
            f.flatten(0, 1), PIXELS.flatten(), weight=W, ignore_index=2, reduction="sum") / N),
    "two classes": Case(
        linear(2), (4,), lambda f: F.cross_entropy(f, Y % 2, weight=W[1:3], reduction="sum")),
    "pixels": Case(Image, (3, 2, 3), masked_pixels),
    "pixels, weighted": Case(Image, (3, 2, 3), lambda f: masked_pixels(f, weight=W)),
    "pixels of a callable": Case(
        Image, (3, 2, 3), masked_pixels, lambda f: Categorical(logits=f.movedim(1, -1))),
    "pixels of a callable, summed": Case(
        Image, (3, 2, 3), lambda f: masked_pixels(f, weight=W, reduction="sum"),
        lambda f: Categorical(logits=f.movedim(1, -1))),
    "bits": Case(linear(3), (4,), bce, "bernoulli"),
    "bits, summed": Case(linear(3), (4,), lambda f: bce(f, reduction="sum"), "bernoulli"),
    "pos_weight": Case(linear(3), (4,), lambda f: bce(f, pos_weight=W[1:]), "bernoulli"),
    "bits weighted by example": Case(
        linear(3), (4,), lambda f: bce(f, weight=EACH[:, None]), "bernoulli"),
    "masked bits": Case(
        linear(3), (4,), lambda f: bce(f, weight=(Y[:, None] > torch.arange(3)).double()),
        "bernoulli"),
    "bits of a callable": Case(
        linear(3), (4,), lambda f: bce(f, pos_weight=W[1:], reduction="sum"),
        lambda f: Bernoulli(logits=f)),
    "masked squares": Case(
        linear(3), (4,), lambda f: ((f - BITS).square() / 2)[Y > 1].mean(), "normal"),
    "masked squares of a callable": Case(
        linear(3), (4,), lambda f: ((f - BITS).square() / 2)[Y > 1].mean(),
        lambda f: Normal(f, 1.0)),
    "heads in a dict": Case(Heads, (4,), heads_loss, heads),
    "heads in a tuple": Case(lambda: Heads(as_tuple=True), (4,), heads_loss, heads),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Case, Tensor, Tensor]:
    """A case with the gradient of its loss and the Hessian of loss and weight decay."""
    case = CASES[name]
    net, x = case.make(), torch.randn(N, *case.inputs)
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return case.loss(torch.func.functional_call(net, weights, (x,)))

    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    return net, x, case, gradient, hessian


def in_block(net: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix over weight and bias with the bias as the last input, as in the layer's block."""
    if not isinstance(net, nn.Linear):
        return matrix
    numbers = torch.arange(len(matrix))
    index = torch.cat([numbers[: -net.out_features].view(net.weight.shape),
                       numbers[-net.out_features:, None]], 1).flatten()
    return matrix[index][:, index]


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_newtons_on_the_loss_itself(name: str) -> None:
    net, x, case, gradient, hessian = problem(name)
    start = nn.utils.parameters_to_vector(net.parameters()).detach()
    optimizer = SecondOrderOptimizer(
        net, 1.0, likelihood=case.likelihood, curvature=SPEC, weight_decay=DECAY, **EXACT
    )
    case.loss(net(x)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    matrix = hessian + DECAY * torch.eye(len(start))
    wanted = start - torch.linalg.solve(matrix, gradient + DECAY * start)
    found = nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["class weights", "pixels, weighted", "masked bits", "sum"])
def test_a_posterior_is_of_the_loss_itself(name: str) -> None:
    net, x, case, _, hessian = problem(name)
    optimizer = VIOptimizer(
        net, 100, likelihood=case.likelihood, curvature=SPEC, structure="full",
        prior_precision=2.0, temperature=1.0,
    )
    with optimizer.sampled_params():
        case.loss(net(x)).backward()
    optimizer.step()
    (state,) = optimizer._posterior.blocks
    wanted = in_block(net, 100 * hessian + 2 * torch.eye(len(hessian)))
    torch.testing.assert_close(state.precision.dense(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["fisher", "empirical", "hessian"])
@pytest.mark.parametrize("name", ["class weights", "pixels, weighted", "pos_weight"])
def test_the_other_kinds_have_the_weights_too(kind: str, name: str) -> None:
    """Twice the loss has twice the curvature, and its weights are those of the entries."""
    def curvature(factor: float) -> Tensor:
        torch.manual_seed(0)
        net, x, case, _, hessian = problem(name)
        optimizer = SecondOrderOptimizer(
            net, 0.1, likelihood=case.likelihood, structure="full",
            curvature=Curvature(kind, batch=None, initial=0.0),
        )
        (factor * case.loss(net(x))).backward()
        optimizer.step()
        found = optimizer._posterior.blocks[0].curvature.curvature.dense()
        if kind == "hessian":
            torch.testing.assert_close(found, factor * in_block(net, hessian), rtol=1e-6, atol=1e-9)
        return found

    torch.testing.assert_close(curvature(7.0), 7 * curvature(1.0))


def test_an_empirical_fisher_is_of_the_weighted_gradients() -> None:
    """The sum of w_n g_n g_nᵀ, with g_n the gradient of an example's own loss."""
    net, x = nn.Linear(4, 4), torch.randn(N, 4)
    optimizer = SecondOrderOptimizer(
        net, structure="full", curvature=Curvature("empirical", batch=None, initial=0.0)
    )
    logits = net(x)
    F.cross_entropy(logits, Y, weight=W).backward()
    optimizer.step()
    residual = logits.detach().softmax(-1) - F.one_hot(Y, 4)
    rows = torch.cat([x, torch.ones(N, 1)], 1)
    gradients = (residual[:, :, None] * rows[:, None]).flatten(1)
    share = W[Y] / W[Y].sum()
    found = optimizer._posterior.blocks[0].curvature.curvature.dense()
    torch.testing.assert_close(found, torch.einsum("n,ni,nj->ij", share, gradients, gradients))


def test_a_class_axis_that_is_given_is_taken() -> None:
    """Also where the gradient shows none: the loss is no cross entropy."""
    net, x = Image(), torch.randn(N, 3, 2, 4)
    optimizer = SecondOrderOptimizer(net, class_dim=1, curvature=SPEC, structure="full")
    with pytest.warns(UserWarning, match="does not sum to 0"):
        net(x).square().mean().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="class_dim=3: an output"):
        other = SecondOrderOptimizer(nn.Linear(4, 3), class_dim=3)
        F.cross_entropy(other.net(torch.randn(5, 4)), torch.arange(5) % 3).backward()
        other.step()


def test_a_class_axis_is_found_once_and_saved() -> None:
    net, x = Image(), torch.randn(N, 3, 2, 3)
    optimizer = SecondOrderOptimizer(net)
    masked_pixels(net(x)).backward()
    optimizer.step()
    state = optimizer.state_dict()
    again = SecondOrderOptimizer(net)
    again.load_state_dict(state)
    assert state["class_dim"] == 1 and again.state_dict()["class_dim"] == 1


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_soft_targets_are_a_mean_and_said_once(likelihood: str) -> None:
    net, x = nn.Linear(4, 4), torch.randn(N, 4)
    soft = torch.rand(N, 4).softmax(-1)
    losses = {"categorical": F.cross_entropy,
              "bernoulli": F.binary_cross_entropy_with_logits}
    optimizer = SecondOrderOptimizer(
        net, 0.0, likelihood=likelihood, curvature=Curvature("ggn", every=1, batch=None,
                                                             initial=0.0), structure="full",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            losses[likelihood](net(x), soft).backward()
            optimizer.step()
    assert [("mean over all entries" in str(one.message)) for one in caught] == [True]
    p = net(x).detach()
    h = p.softmax(-1).diag_embed() - p.softmax(-1)[:, :, None] * p.softmax(-1)[:, None]
    if likelihood == "bernoulli":
        h = (p.sigmoid() * (1 - p.sigmoid())).diag_embed() / 4
    rows = torch.cat([x, torch.ones(N, 1)], 1)
    wanted = torch.einsum("nij,nk,nl->ikjl", h, rows, rows).reshape(20, 20) / N
    found = optimizer._posterior.blocks[0].curvature.curvature.dense()
    torch.testing.assert_close(found, wanted)


def test_dropout_does_not_hide_the_weights() -> None:
    """The pass that is repeated draws another mask; the weights are read off the first."""
    net = nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.5), nn.Linear(9, 4))
    x = torch.randn(N, 4)
    optimizer = SecondOrderOptimizer(net, likelihood=lambda f: Categorical(logits=f))
    F.cross_entropy(net(x), Y, weight=W, reduction="sum").backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer._likelihood.total_weight == pytest.approx(float(W[Y].sum()))


@pytest.mark.parametrize(("loss", "clip"), [
    ("class weights", None), ("pos_weight", None), ("sum", None), ("class weights", 0.01),
])
def test_a_scaled_loss_is_weighed_as_without_its_scale(loss: str, clip: float | None) -> None:
    def run(scaled: bool) -> Tensor:
        torch.manual_seed(0)
        net, x, case, *_ = problem(loss)
        optimizer = SecondOrderOptimizer(net, likelihood=case.likelihood, curvature=SPEC)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**16)
        scaler.scale(case.loss(net(x))).backward()
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        scaler.step(optimizer)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.parametrize("loss", ["mean", "pos_weight"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_scaled_sample_is_weighed_as_without_its_scale(loss: str, inside: bool) -> None:
    """A scale that is taken away after the sample is known of a mean, and refused of others."""
    def run(scaled: bool) -> Tensor:
        torch.manual_seed(0)
        net, x, case, *_ = problem(loss)
        optimizer = VIOptimizer(net, 100, likelihood=case.likelihood, curvature=SPEC)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**16)
        with optimizer.sampled_params():
            scaler.scale(case.loss(net(x))).backward()
            if inside:
                scaler.unscale_(optimizer)
        if not inside:
            scaler.unscale_(optimizer)
        if scaled and not inside and loss == "pos_weight":
            with pytest.raises(RuntimeError, match="inside `with optimizer.sampled_params"):
                scaler.step(optimizer)
            return torch.zeros(())
        scaler.step(optimizer)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    scaled = run(True)
    if scaled.dim():
        torch.testing.assert_close(scaled, run(False))


# ---- accumulation -------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A network of tokens that do not see each other; `kind` is an argument of no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, kind: int = 0) -> Tensor:
        return self.last(self.first(x).tanh())


def curvature_of(
    structure: str, kind: str, batches: list[tuple[Tensor, Tensor, int]], variational: bool = False
) -> list[Tensor]:
    """After one step on the mean over all tokens of several batches (x, y, kind)."""
    torch.manual_seed(0)
    net, number = Tokens(), sum(y.numel() for _, y, _ in batches)
    spec = Curvature(kind, batch=None, initial=0.0)
    optimizer: Any = (
        VIOptimizer(net, 100, curvature=spec, structure=structure) if variational
        else SecondOrderOptimizer(net, curvature=spec, structure=structure)
    )
    with optimizer.sampled_params() if variational else nullcontext():
        for x, y, each in batches:
            loss = F.cross_entropy(net(x, each).flatten(0, -2), y.flatten(), reduction="sum")
            (loss / number).backward()
    optimizer.step()
    return [state.curvature.curvature.dense() for state in optimizer._posterior.blocks]


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("structure", ["full", "block", "diag"])
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_batches_of_several_lengths_count_all(
    structure: str, kind: str, variational: bool
) -> None:
    """As all tokens in one batch; their number in an example does not matter."""
    batches = [(torch.randn(b, t, 4), torch.randint(3, (b, t)), 0) for b, t in [(5, 2), (3, 4)]]
    x, y = (torch.cat([b[i].flatten(0, 1) for b in batches]) for i in (0, 1))
    several = curvature_of(structure, kind, batches, variational)
    torch.testing.assert_close(several, curvature_of(structure, kind, [(x, y, 0)], variational))


@pytest.mark.parametrize("structure", ["kfac", "kfac-block", "full"])
def test_groups_of_passes_count_by_their_examples(structure: str) -> None:
    """Passes with other arguments cannot be joined: their factors are."""
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    parts = [(x[:3], y[:3], 1), (x[3:8], y[3:8], 2), (x[8:], y[8:], 1)]
    apart = curvature_of(structure, "ggn", parts)
    torch.testing.assert_close(apart, curvature_of(structure, "ggn", [(x, y, 0)]))


def test_of_many_lengths_no_more_examples_are_kept_than_of_one() -> None:
    net = Tokens()
    optimizer = SecondOrderOptimizer(net, curvature=Curvature("ggn", batch=8))
    rows = []
    net.first.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    for length in (2, 3, 4, 5):
        y = torch.randint(3, (10, length))
        F.cross_entropy(net(torch.randn(10, length, 4)).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    assert rows[4:] == [2, 2, 2, 2]
