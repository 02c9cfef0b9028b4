"""The Hessian in every structure, against the dense oracles on the table of small nets."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import layer_cases
import oracles
import pytest
import test_layers
import torch
from designs import alternating, pairs
from layer_cases import LAYERED, WOVEN
from test_estimate import (
    LIKELIHOODS,
    MODELS,
    ONE_POSITION,
    STRUCTURES,
    Twice,
    assert_same,
    case,
    each_model,
    estimated,
    make_net,
    mlp,
    true_blocks,
    true_matrix,
)
from test_structures import projectors
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace
from toys import (
    GUIDES,
    NUM_DATA,
    class_data,
    classifier,
    exactly,
    linear,
    normal_prior,
    regression_data,
    regressor,
    truth,
)

import pyrocurv
from pyrocurv.curvature import (
    Curvature,
    estimate,
    hessian,
    hessian_outputs,
    hessian_weights,
    particle,
    running_average,
    running_curvature,
)
from pyrocurv.curvature.collect import assemble
from pyrocurv.curvature.likelihood import ExampleSelection, LikelihoodTerm, as_likelihood
from pyrocurv.infer import NGVI
from pyrocurv.layers.block import Block
from pyrocurv.layers.capture import Capture
from pyrocurv.layers.structure_spec import EKFAC, KFAC, parse_structure
from pyrocurv.runtime.workers import ALONE
from pyrocurv.structures import Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
KRONECKER = ["kfac", "ekfac"]
TRUTHS = ["full", "block", "diag"], KRONECKER  # those of one dense matrix, and of factors
EXACT = Curvature("hessian", every=1, batch=None, initial=0.0)
PIECEWISE_LINEAR = {  # and no layer runs twice
    name: row for name, row in MODELS.items()
    if name.startswith(("relu", "deep", "conv")) and name != "conv-image"
}

each_structure = pytest.mark.parametrize("structure", STRUCTURES)
each_kronecker = pytest.mark.parametrize("structure", KRONECKER)
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def found(model: str, likelihood: str, structure: str, batch: int = 4, **options: Any) -> Tensor:
    curvature = Curvature("hessian", **options)
    return estimated(model, likelihood, batch, curvature=curvature, structure=structure)


@cache
def true(model: str, likelihood: str, structure: str) -> Tensor:
    if structure == "full":
        return true_matrix(model, likelihood, "hessian")
    if structure == "block":
        return true_blocks(model, likelihood, "hessian")
    if structure == "diag":
        return torch.diag(true_matrix(model, likelihood, "hessian").diag())
    oracle = getattr(oracles, f"hessian_{structure}_dense")
    return oracle(*case(model, likelihood), likelihood)


# --- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "likelihood", "structures"), [
    (name, row[2][(i + j) % len(row[2])], structures)
    for i, (name, row) in enumerate(MODELS.items()) for j, structures in enumerate(TRUTHS)
])
def test_every_structure(model: str, likelihood: str, structures: list[str]) -> None:
    for structure in structures:
        expected = true(model, likelihood, structure)
        # eigenvectors answer to rounding divided by the gaps between eigenvalues
        rtol = 1e-7 if structure == "ekfac" else 1e-10
        assert_same(found(model, likelihood, structure), expected, rtol)


@pytest.mark.parametrize(("model", "structure", "likelihood"), pairs(
    PIECEWISE_LINEAR, ["block", "diag", *KRONECKER], LIKELIHOODS,
))
def test_layer_blocks_are_those_of_the_ggn_where_the_net_is_piecewise_linear(
    model: str, likelihood: str, structure: str
) -> None:
    ggn = estimated(model, likelihood, curvature="ggn", structure=structure)
    rtol = 1e-7 if structure == "ekfac" else 1e-10
    assert_same(found(model, likelihood, structure), ggn, rtol)


@each_structure
def test_it_is_not_the_ggn_where_the_net_is_curved(structure: str) -> None:
    ggn = estimated("tanh", "normal", curvature="ggn", structure=structure)
    assert (found("tanh", "normal", structure) - ggn).norm() > 0.1 * ggn.norm()


@pytest.mark.parametrize(("model", "likelihood", "structure"), pairs(
    ONE_POSITION, LIKELIHOODS, KRONECKER,
))
def test_kronecker_is_exact_on_one_datum(model: str, likelihood: str, structure: str) -> None:
    expected = true_blocks(model, likelihood, "hessian", batch=1)
    assert_same(found(model, likelihood, structure, batch=1), expected)


@each_model
def test_ekfac_is_no_farther_from_the_block_than_kfac(model: str, likelihood: str) -> None:
    block = true(model, likelihood, "block")
    kfac, ekfac = (found(model, likelihood, structure) - block for structure in KRONECKER)
    assert ekfac.norm() <= kfac.norm() + 1e-10 * block.norm()
    assert_same(found(model, likelihood, "ekfac").trace(), block.trace())


@each_structure
def test_an_indefinite_estimate_keeps_its_signs(structure: str) -> None:
    args = case("tanh", "normal")
    matrix = estimate(*args, likelihood="normal", curvature="hessian", structure=structure)
    values = torch.linalg.eigvalsh(matrix.dense())
    assert values[0] < -1e-3 * values[-1]
    assert_same(matrix.eigenvalues(), values)
    assert_same(matrix.shift(2.0).dense(), matrix.dense() + 2 * torch.eye(len(values)).double())
    assert (matrix.psd().eigenvalues() >= -1e-12 * values[-1]).all()


def test_chunks_of_vectors_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "MAX_ELEMENTS", 200)
    for structure in STRUCTURES:
        expected = true("conv1d", "categorical", structure)
        assert_same(found("conv1d", "categorical", structure), expected, 1e-7)


class Cube(torch.autograd.Function):
    """x³, with a derivative that looks at its numbers and so has no batched form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        still = float(gradient.detach().abs().sum()) == 0
        return gradient * 0 if still else gradient * 3 * x.square()


class Cubic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


def test_ops_without_a_batched_form_go_one_by_one() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mlp(3, 4, 2, activation=Cubic).double()
        x, y = torch.randn(5, 3).double(), torch.randint(2, (5,))
    output = net(x).square().sum()
    (gradient,) = torch.autograd.grad(output, [net[0].weight], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(
            gradient, [net[0].weight], torch.ones(2, *gradient.shape).double(),
            is_grads_batched=True,
        )
    args = net, x, y
    for structure, oracle in (("full", oracles.hessian), ("kfac", oracles.hessian_kfac_dense)):
        matrix = estimate(*args, curvature="hessian", structure=structure)
        assert_same(matrix.dense(), oracle(*args, "categorical"))


# --- every kind of layer ----------------------------------------------------------------------

each_layer = pytest.mark.parametrize("name", LAYERED)


def of_layers(name: str, likelihood: str, structure: Any) -> Tensor:
    return test_layers.estimated(name, likelihood, curvature="hessian", structure=structure)


@pytest.mark.parametrize(("name", "likelihood"), alternating(
    {**LAYERED, **WOVEN}, ["categorical", "normal"],
))
def test_exact_structures_of_every_layer(name: str, likelihood: str) -> None:
    whole = test_layers.truth(name, likelihood, "hessian")
    expected = {
        "full": whole, "block": test_layers.blocks_of(name, whole), "diag": torch.diag(whole.diag())
    }
    for structure, matrix in expected.items():
        assert_same(of_layers(name, likelihood, structure), matrix)


@pytest.mark.parametrize(("name", "structure", "likelihood"), pairs(
    LAYERED, KRONECKER, ["categorical", "normal"],
))
def test_kronecker_structures_of_every_layer(name: str, likelihood: str, structure: str) -> None:
    oracle = getattr(oracles, f"hessian_{structure}_dense")
    expected = oracle(*test_layers.case(name, likelihood), likelihood)
    rtol = 1e-6 if structure == "ekfac" else 1e-10
    assert_same(of_layers(name, likelihood, structure), expected, rtol)


@each_layer
@pytest.mark.parametrize("options", [{"sharing": "reduce"}, {"num_blocks": 2}], ids=str)
def test_options_of_kfac(name: str, options: dict[str, Any]) -> None:
    cuts = {"cuts": (2, 2)} if "num_blocks" in options else options
    args = *test_layers.case(name, "categorical"), "categorical"
    if "norm" in name and "cuts" in cuts:
        pytest.skip("a unit's exact block is not cut by the oracle")
    expected = oracles.hessian_kfac_dense(*args, **cuts)
    assert_same(of_layers(name, "categorical", KFAC(**options)), expected)


@pytest.mark.parametrize("name", [*WOVEN, "grouped", "layer-norm"])  # the others have an oracle
def test_ekfac_is_no_farther_than_kfac_in_any_layer(name: str) -> None:
    block = test_layers.blocks_of(name, test_layers.truth(name, "normal", "hessian"))
    kfac, ekfac = (of_layers(name, "normal", structure) for structure in KRONECKER)
    assert (ekfac - block).norm() <= (kfac - block).norm() + 1e-9 * block.norm()
    assert_same(ekfac.trace(), block.trace())


# --- random signs -----------------------------------------------------------------------------

NUM_SAMPLES = 400


def probed(monkeypatch: pytest.MonkeyPatch, *args: Any, draws: int = 1, **options: Any) -> Tensor:
    """Estimates by random signs alone, [draws, P, P]."""
    monkeypatch.setattr(hessian_weights, "MAX_PASSES", 0)
    return torch.stack([found(*args, **options) for _ in range(draws)])


def assert_unbiased(error: Tensor, standard_error: Tensor, scale: Tensor) -> None:
    """|z| below the expected largest of n standard normals, sqrt(2 log n), and 3 more."""
    bound = math.sqrt(2 * math.log(error.numel())) + 3
    assert (error.abs() <= bound * standard_error + 1e-10 * scale).all()


@pytest.mark.parametrize(
    ("model", "likelihood"), alternating(["tanh", "twice", "conv1d"], LIKELIHOODS)
)
def test_hutchinson_diagonal(monkeypatch: pytest.MonkeyPatch, model: str, likelihood: str) -> None:
    """Of each layer by itself, with the variance 2 sum_j≠i H_ij² of one sample."""
    (matrix,) = probed(monkeypatch, model, likelihood, "diag", num_samples=NUM_SAMPLES)
    block = true(model, likelihood, "block")
    variance = 2 * (block.square().sum(1) - block.diag().square()) / NUM_SAMPLES
    error = matrix.diag() - block.diag()
    assert error.norm() > 1e-6 * block.diag().norm()  # it is by signs
    assert_unbiased(error, variance.sqrt(), block.norm())


@pytest.mark.parametrize(
    ("model", "likelihood"), alternating(["twice", "conv1d", "conv-image"], ["bernoulli", "normal"])
)
def test_positions_by_signs(monkeypatch, model: str, likelihood: str) -> None:
    """Without bias, and the variance falls as 1 / num_samples."""
    expected = true(model, likelihood, "kfac")
    several = probed(monkeypatch, model, likelihood, "kfac", draws=60, num_samples=2)
    assert_unbiased_draws(several, expected)
    more = probed(monkeypatch, model, likelihood, "kfac", draws=60, num_samples=8)
    ratio = several.var(0).sum() / more.var(0).sum()  # 4, with a standard deviation
    assert 4 / 1.8 < ratio < 4 * 1.8  # of 0.26 in its logarithm if one direction has all the noise


@pytest.mark.parametrize(
    ("model", "likelihood"), [("conv1d", "bernoulli"), ("conv-image", "normal")]
)
def test_eigenvalues_by_signs_in_the_outputs(monkeypatch, model: str, likelihood: str) -> None:
    exact_factors(monkeypatch)
    several = probed(monkeypatch, model, likelihood, "ekfac", draws=60, num_samples=3)
    assert_unbiased_draws(several, true(model, likelihood, "ekfac"))


@pytest.mark.parametrize("name", ["grouped", "layer-norm", "batch-norm", "depthwise"])
def test_groups_by_signs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of K-FAC: groups, and the exact blocks of the units of a norm layer."""
    expected = of_layers(name, "normal", "kfac")
    monkeypatch.setattr(hessian_weights, "MAX_PASSES", 0)
    draws = torch.stack([of_layers(name, "normal", "kfac") for _ in range(60)])
    assert_unbiased_draws(draws, expected)


@pytest.mark.parametrize("name", ["tied", "layer-norm", "batch-norm"])
def test_eigenvalues_by_signs_in_the_weights(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of layers whose outputs do not say all."""
    expected = of_layers(name, "normal", "ekfac")
    exact_factors(monkeypatch)
    monkeypatch.setattr(hessian_weights, "MAX_PASSES", 0)
    draws = torch.stack([of_layers(name, "normal", "ekfac") for _ in range(60)])
    assert_unbiased_draws(draws, expected)


def assert_unbiased_draws(draws: Tensor, expected: Tensor) -> None:
    error, scale = draws.std(0) / math.sqrt(len(draws)), expected.norm()
    assert error.norm() > 1e-6 * scale  # it is by signs
    # eigenvectors answer to rounding divided by the gaps between eigenvalues
    assert_unbiased(draws.mean(0) - expected, error + 1e-8 * scale, scale)


def exact_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """For eigenvalues in the true basis, which is not known from signs."""
    for owner, name in (
        (hessian_outputs.OutputHessian, "kronecker"), (hessian_weights.WeightHessian, "groups")
    ):
        function = getattr(owner, name)

        def exactly(*args: Any, function: Callable[..., Any] = function) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(hessian_weights, "MAX_PASSES", 10**6)
                return function(*args)

        monkeypatch.setattr(owner, name, exactly)


@pytest.mark.parametrize(
    ("model", "likelihood"), alternating(["tanh", "relu-inplace", "no-bias", "conv1d"], LIKELIHOODS)
)
def test_the_diagonal_of_a_larger_layer_goes_through_its_outputs(
    monkeypatch: pytest.MonkeyPatch, model: str, likelihood: str
) -> None:
    """Exactly, in fewer passes than it has weights."""
    smallest = min(oracles.block_sizes(make_net(model)))
    monkeypatch.setattr(hessian_weights, "MAX_PASSES", smallest - 1)
    taken = []
    through = hessian_outputs.OutputHessian.diagonal
    monkeypatch.setattr(
        hessian_outputs.OutputHessian, "diagonal", lambda self: taken.append(self) or through(self)
    )
    assert_same(found(model, likelihood, "diag"), true(model, likelihood, "diag"))
    assert taken


@each_structure
def test_nothing_is_random_where_the_answer_is_exact(structure: str) -> None:
    state = torch.get_rng_state()
    found("conv1d", "categorical", structure, num_samples=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_examples_that_meet_in_batch_norm() -> None:
    """Through the weights nothing is left out; the blocks are the Hessian of the whole sum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    names, tensors = zip(*net.named_parameters(), strict=True)
    sizes = [t.numel() for t in tensors]

    def loss(flat: Tensor) -> Tensor:
        parts = [p.view_as(t) for p, t in zip(flat.split(sizes), tensors, strict=True)]
        f = torch.func.functional_call(net, dict(zip(names, parts, strict=True)), (x,))
        return nn.functional.cross_entropy(f, y, reduction="sum")

    flat = torch.cat([t.detach().flatten() for t in tensors])
    whole = torch.autograd.functional.hessian(loss, flat)
    full = estimate(net, x, y, curvature="hessian", structure="full").dense()
    assert_same(full, whole)
    diag = estimate(net, x, y, curvature="hessian", structure="diag").dense()
    assert_same(diag, torch.diag(whole.diag()))
    alone = oracles.sum_of(oracles.hessian(net.eval(), a, b, "categorical")
                           for a, b in zip(x.split(1), y.split(1), strict=True))
    assert (alone - whole).norm() > 0.1 * whole.norm()


# --- losses that do not bend ------------------------------------------------------------------


class Tilt(Distribution):
    """Of log density Σ f y: linear in its parameter."""

    def __init__(self, f: Tensor) -> None:
        self.f = f
        super().__init__(f.shape[:1], f.shape[1:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.f * value).sum(-1)


@each_structure
@pytest.mark.parametrize("likelihood", [Tilt, lambda f: Laplace(f, 1.0)], ids=["tilt", "laplace"])
def test_a_loss_that_is_linear_in_a_layer(structure: str, likelihood: Any) -> None:
    net, (_, x, y) = mlp(3, 2).double(), case("tanh", "normal")
    matrix = estimate(net, x, y[:, :2], likelihood=likelihood, curvature="hessian",
                      structure=structure)
    assert torch.equal(matrix.dense(), torch.zeros(8, 8).double())


class Idle(nn.Module):
    """A layer that runs for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.used = nn.Linear(3, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        return self.used(x)


@each_structure
def test_a_layer_that_the_loss_does_not_see(structure: str) -> None:
    net, (_, x, y) = Idle().double(), case("tanh", "normal")
    matrix = estimate(net, x, y, likelihood="normal", curvature="hessian", structure=structure)
    alone = estimate(net.used, x, y, likelihood="normal", curvature="hessian", structure=structure)
    assert_same(matrix.dense(), torch.block_diag(torch.zeros(8, 8).double(), alone.dense()))


# --- what is left alone -----------------------------------------------------------------------


@each_structure
def test_the_users_net_and_gradients_are_untouched(structure: str) -> None:
    net, (_, x, y) = make_net("tanh").eval(), case("tanh", "categorical")
    first, *rest = net.parameters()
    first.grad = kept = torch.ones_like(first)
    with torch.no_grad():
        matrix = estimate(net, x, y, curvature="hessian", structure=structure)
    assert not matrix.dense().requires_grad
    assert_same(matrix.dense(), true("tanh", "categorical", structure), rtol=1e-7)
    assert first.grad is kept and torch.equal(kept, torch.ones_like(first))
    assert all(p.grad is None and p.requires_grad for p in rest) and not net.training


@each_structure
@pytest.mark.parametrize("frozen", [["0.weight", "0.bias"], ["0.bias"]], ids=str)
def test_frozen_parameters_have_no_rows(structure: str, frozen: list[str]) -> None:
    net, (_, x, y) = make_net("tanh"), case("tanh", "categorical")
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    args = net, x, y, "categorical"
    whole = oracles.hessian(*args)
    expected = {
        "full": lambda: whole,
        "block": lambda: oracles.blocks(whole, oracles.block_sizes(net)),
        "diag": lambda: torch.diag(whole.diag()),
        "kfac": lambda: oracles.hessian_kfac_dense(*args),
        "ekfac": lambda: oracles.hessian_ekfac_dense(*args),
    }[structure]()
    actual = estimate(net, x, y, curvature="hessian", structure=structure)
    assert_same(actual.dense(), expected, rtol=1e-7 if structure == "ekfac" else 1e-10)


@each_structure
def test_single_precision(structure: str) -> None:
    net, x, y = case("tanh", "categorical")
    net = make_net("tanh").float()
    actual = estimate(net, x.float(), y, curvature="hessian", structure=structure).dense()
    assert actual.dtype == torch.float32
    expected = true("tanh", "categorical", structure)
    assert (actual - expected).norm() < 1e-4 * expected.norm()


# --- one block, weights and masks -------------------------------------------------------------


def blocks_of(
    net: nn.Module, x: Tensor, structure: str, *terms: Callable[[Tensor], LikelihoodTerm],
    count: int, kept: Tensor | None = None,
) -> list[hessian.HessianStatistics]:
    """The Hessians of each layer in one structure, from terms of the output."""
    with Capture(dict(net.named_parameters())) as capture:
        output = net(x)
    trace = capture.trace()
    blocks = [Block((layer,), parse_structure(structure)) for layer in trace.layers]
    seen = [term(output) for term in terms]
    examples = ExampleSelection(count, kept)
    return [*hessian.hessians(blocks, seen, trace.calls, examples, 1)]


def assembled(statistics: hessian.HessianStatistics) -> Any:
    """In the block's structure."""
    return assemble(statistics.block.structure, statistics)


@pytest.mark.parametrize("structure", ["block", "kfac"])
def test_weights_masks_and_the_first_examples(structure: str) -> None:
    """Two terms on the first 3 of 4 examples, one with a mask and weights, one tempered."""
    net, x, y = case("tanh", "categorical")
    mask, weight = torch.tensor([True, False, True, True]), torch.tensor([2.0, 1.0, 0.5, 9.0])
    density = as_likelihood("categorical")
    seen = blocks_of(
        net, x, structure,
        lambda f: LikelihoodTerm(density(f), y, weight.double(), mask),
        lambda f: LikelihoodTerm(density(f), 2 - y, 0.3), count=3,
    )
    order = [oracles.parameter_order(*size, bias=True) for size in ((4, 4), (3, 5))]
    found = torch.block_diag(*[
        assembled(one).dense()[rows][:, rows] for one, rows in zip(seen, order, strict=True)
    ])
    if structure == "block":
        parts = [
            mask[n] * weight[n] * oracles.hessian(net, x[n:n + 1], y[n:n + 1], "categorical")
            + 0.3 * oracles.hessian(net, x[n:n + 1], 2 - y[n:n + 1], "categorical")
            for n in range(3)
        ]
        assert_same(found, oracles.blocks(sum(parts), oracles.block_sizes(net)))
        return
    layers = [net[0], net[2]]
    factors = []
    for layer in layers:
        G, A = 0.0, 0.0
        for n in range(3):
            for targets, factor in ((y, mask[n] * weight[n]), (2 - y, 0.3)):
                args = net, x[n:n + 1], targets[n:n + 1], "categorical"
                (seen_there,) = oracles.layer_output_hessians(*args)[layer]
                g, a = oracles.hessian_factors(seen_there)
                G, A = G + factor * g, A + a / 2
        factors.append(torch.kron(G, A / 3))
    factors = [f[rows][:, rows] for f, rows in zip(factors, order, strict=True)]
    assert_same(found, torch.block_diag(*factors))


def test_examples_that_are_not_kept_are_in_neither_factor() -> None:
    """As if they had not been in the batch."""
    net, x, y = case("conv1d", "categorical")
    density, kept = as_likelihood("categorical"), torch.tensor([0, 2, 3])
    mask = torch.tensor([True, False, True, True])
    masked = blocks_of(
        net, x, "ekfac", lambda f: LikelihoodTerm(density(f), y, 1.0, mask), count=4, kept=kept
    )
    alone = blocks_of(
        net, x[kept], "ekfac", lambda f: LikelihoodTerm(density(f), y[kept]), count=3
    )
    for one, other in zip(masked, alone, strict=True):
        assert_same(assembled(one).dense(), assembled(other).dense())
        basis = assembled(other).eigen()
        assert_same(one.eigenvalues(basis).spectrum, other.eigenvalues(basis).spectrum)
        for (pair,), (same,) in zip(one.layers, other.layers, strict=True):
            assert_same(pair.a, same.a)
            assert_same(pair.g, same.g)


@pytest.mark.parametrize(("model", "ranks", "in_units"), pairs(
    ["tanh", "conv-stride", "sequence"], [(1, 2), (2, 2), (1, 50), (50, 2)], [False, True],
))
def test_a_truncated_basis_has_the_means_over_its_eigenspaces(model, ranks, in_units) -> None:
    net, x, y = case(model, "categorical")
    density = as_likelihood("categorical")
    seen = blocks_of(net, x, "ekfac", lambda f: LikelihoodTerm(density(f), y), count=len(x))
    hessians = oracles.layer_output_hessians(net, x, y, "categorical").values()
    for one, (per_example,) in zip(seen, hessians, strict=True):
        factors: Kronecker = assembled(one)
        rows, columns = factors.shape
        p = torch.arange(1.0, rows + 1).double() if in_units else torch.ones(rows).double()
        r = torch.arange(1.0, columns + 1).double() if in_units else torch.ones(columns).double()
        basis = factors.rescaled(p, r).eigen((min(rows, ranks[0]), min(columns, ranks[1])))
        scaling = KroneckerScaling(torch.ones(()).double(), (p, r)) if in_units else None
        eigen = one.eigenvalues(basis, scaling)
        root = torch.outer(p, r).flatten()
        C = oracles.output_block(per_example) / torch.outer(root, root)
        expected = torch.tensor([
            [torch.kron(left, right).mul(C).sum() / (left.trace() * right.trace())
             for right in projectors(basis.input_basis)]
            for left in projectors(basis.output_basis)
        ]).double()
        assert isinstance(eigen, KroneckerEigen)
        assert_same(eigen.spectrum, expected)
        assert_same(eigen.trace(), C.trace())


# --- natural gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "full"])
@pytest.mark.parametrize("priors", ["equal", "unequal"])
def test_one_step_finds_the_exact_posterior(structure: str, priors: str) -> None:
    x, y = regression_data()
    mean, covariance, evidence = truth(x, y, priors)
    ngvi = exactly(linear(priors), structure, curvature=EXACT)
    ngvi.step(x, y)
    posterior = ngvi.guide.posterior
    torch.testing.assert_close(posterior.loc, mean, rtol=1e-10, atol=1e-10)
    inverse = torch.linalg.inv(posterior.precision.dense())
    torch.testing.assert_close(inverse, covariance, rtol=1e-10, atol=1e-10)
    assert -ngvi.evaluate_loss(x, y) == pytest.approx(float(evidence), rel=1e-11, abs=1e-9)


def test_a_diagonal_guide_has_the_diagonal_of_the_exact_precision() -> None:
    x, y = regression_data()
    _, covariance, _ = truth(x, y, "unequal")
    ngvi = exactly(linear("unequal"), "diag", curvature=EXACT)
    ngvi.step(x, y)
    found = ngvi.guide.posterior.precision.diag()
    torch.testing.assert_close(found, torch.linalg.inv(covariance).diag(), rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("structure", GUIDES)
@pytest.mark.parametrize("problem", ["regression", "classification"])
def test_training_keeps_the_precision_positive(structure: str, problem: str) -> None:
    """No smaller than the prior's, though the curvature at hand is indefinite."""
    regression = problem == "regression"
    data = regression_data() if regression else class_data()
    model = regressor() if regression else classifier()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1, curvature=EXACT)
    negative = 0
    for _ in range(6):
        assert math.isfinite(ngvi.step(*data))
        values = torch.linalg.eigvalsh(ngvi.guide.posterior.precision.dense())
        assert values[0] > (1 - 1e-9) / 1.5**2  # the prior's of the biases
        held = [block.curvature for block in ngvi._posterior.blocks]
        negative += any(one.curvature.eigenvalues()[0] < -1e-6 for one in held)
    assert negative or structure == "kfac"  # whose eigenvectors are those of the projected factors


@pytest.mark.parametrize("structure", ["block", "kfac", "ekfac"])
def test_the_average_is_of_the_hessians_as_they_are(structure: str) -> None:
    """Not of projections of them, which are larger."""
    likelihood, running, parts = as_likelihood("normal"), None, []
    for model in ("tanh", "deep-linear"):  # a second estimate with another H, of the same shape
        net, x, y = case("tanh", "normal")
        net = net if model == "tanh" else nn.Sequential(net[0], nn.Sigmoid(), net[2])
        term = lambda f, y=y: LikelihoodTerm(likelihood(f), y)  # noqa: E731
        (seen, _) = blocks_of(net, x, structure, term, count=len(x))
        running = running or running_average.zero_curvature(seen.block, x, None)
        begun = running_average.begin_update(
            running_curvature.DueBlock(seen.block, running, None), seen, len(x), 0.9, True
        )
        (running,) = running_average.finish_updates([begun], len(x), ALONE)
        parts.append(assembled(seen).dense() / len(x))
    assert running is not None
    for part in parts:
        assert torch.linalg.eigvalsh(part)[0] < -1e-3
    if structure == "block":
        assert_same(running.curvature.dense(), (parts[0] + parts[1]) / 2)
    held = running.curvature.eigenvalues()[0]
    assert (held >= 0) if structure == "kfac" else (held < -1e-4)
    assert running.semidefinite("hessian").eigenvalues()[0] > -1e-12
    if running.factors is not None:
        assert torch.linalg.eigvalsh(running.factors.output)[0] < -1e-4


@pytest.mark.parametrize("spec", [KFAC(rank=2), EKFAC(rank=2)], ids=str)
@pytest.mark.parametrize("in_units", [False, True])
def test_truncated_sides_need_no_factor_of_the_inputs(monkeypatch, spec, in_units) -> None:
    """Of the first estimate the leading part is that of G ⊗ A, which is not formed."""
    net, x, y = case("conv-stride", "normal")
    density = as_likelihood("normal")
    term = lambda f: LikelihoodTerm(density(f), y)  # noqa: E731
    for one in blocks_of(net, x, "kfac", term, count=len(x)):
        seen = replace(one, block=Block(one.block.layers, spec))
        units = tuple(torch.arange(1.0, 1.0 + n).double() for n in one.block.layers[0].matrix_shape)
        units = units if in_units else tuple(map(torch.ones_like, units))
        scaling = KroneckerScaling(torch.ones(()).double(), units)
        factors = assembled(one).rescaled(*units)
        zero = running_average.zero_curvature(seen.block, x, scaling)
        due = running_curvature.DueBlock(seen.block, zero, scaling)
        with monkeypatch.context() as patch:
            patch.setattr(hessian_outputs.OutputHessian, "kronecker", None)
            begun = running_average.begin_update(due, seen, len(x), 0.9, True)
            (running,) = running_average.finish_updates([begun], len(x), ALONE)
        expected = factors.eigen((2, 2)).psd()
        if isinstance(spec, EKFAC):
            expected = one.eigenvalues(expected, scaling)
        assert_same(running.curvature.dense(), expected.dense() / len(x), rtol=1e-8)
        assert running.factors is None
        # the first sample of several that the layer has a part in
        late = particle.Particle(2, 4)
        begun = running_average.begin_update(due, seen, len(x), 0.9, True, late)
        (again,) = running_average.finish_updates([begun], len(x), ALONE)
        assert_same(again.curvature.dense(), running.curvature.dense(), rtol=1e-8)


def test_a_large_convolution_by_signs() -> None:
    """More passes than `MAX_PASSES` for an exact answer: still a few steps of training."""
    torch.manual_seed(1)
    conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(784, 2))
    model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(conv), num_data=NUM_DATA)
    x, y = torch.randn(NUM_DATA, 1, 14, 14), torch.randint(2, (NUM_DATA,))
    for structure in ("kfac", "ekfac", "diag"):
        ngvi = NGVI(model, GUIDES[structure](model), curvature=Curvature("hessian", every=1))
        losses = [ngvi.step(x, y) for _ in range(3)]
        assert all(map(math.isfinite, losses))


@pytest.mark.filterwarnings("ignore:no supported op")
@pytest.mark.parametrize("name", ["attention", "layer-norm", "grouped", "embedding"])
@pytest.mark.parametrize("structure", GUIDES)
def test_training_of_other_layers(name: str, structure: str) -> None:
    """Attention without its fused kernels, which have no second derivative."""
    net, x = layer_cases.make(name, 8)
    outputs = net(x).shape[-1]
    prior = normal_prior(0.8, 1.5)
    net = pyrocurv.nn.bayesianize(net, prior, layers=[nn.Module])
    model = pyrocurv.nn.Classifier(net, num_data=8)
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.05, curvature=EXACT)
    for _ in range(3):
        assert math.isfinite(ngvi.step(x, torch.randint(outputs, (8,))))
        values = torch.linalg.eigvalsh(ngvi.guide.posterior.precision.dense())
        assert values[0] > (1 - 1e-9) / 1.5**2


def test_twice_leaves_out_what_later_inputs_owe_to_the_layer() -> None:
    """Through the outputs the block lacks that part; in the weights it is whole."""
    args = case("twice", "normal")
    assert isinstance(args[0], Twice)
    (seen,) = oracles.layer_output_hessians(*args, "normal")[args[0].inner]
    order = oracles.parameter_order(3, 4, bias=True)
    through = oracles.output_block(seen)[order][:, order]
    whole = true("twice", "normal", "block")[:12, :12]
    assert (through - whole).norm() > 0.01 * whole.norm()
    diag = found("twice", "normal", "diag").diag()[:12]
    assert_same(diag, whole.diag())
