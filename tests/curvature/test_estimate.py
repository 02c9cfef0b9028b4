"""`pyrocurv.curvature.estimate` against the dense oracles, one table of small nets for all."""

import math
import re
import warnings
from collections.abc import Callable
from functools import cache

import oracles
import pyro.distributions as dist
import pytest
import torch
from designs import alternating, pairs
from oracles import assert_same
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, Poisson

from pyrocurv.curvature import Curvature, estimate
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.output_gradients import pullback
from pyrocurv.layers.capture import Capture

# an even kernel with padding="same" is the case of uneven padding, and torch warns of a slow path
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

STRUCTURES = ["full", "block", "diag", "kfac", "ekfac"]
LIKELIHOODS = ["categorical", "bernoulli", "normal"]
BATCH = 4


class Twice(nn.Module):
    """Weight sharing: one linear layer runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(x).tanh()).tanh())


class Functional(nn.Module):
    """Weights without layers: the parameters go to the functional op."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, **kwargs) -> nn.Sequential:
    pairs = zip(widths[:-1], widths[1:], strict=True)
    layers = [module for pair in pairs for module in (nn.Linear(*pair, **kwargs), activation())]
    return nn.Sequential(*layers[:-1])


def relu() -> nn.Module:
    return nn.ReLU(inplace=True)


def conv_net(*convs: nn.Module, features: int) -> nn.Sequential:
    layers = [module for conv in convs for module in (conv, relu())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 2))


def strided() -> nn.Module:
    convs = nn.Conv2d(1, 2, 3, stride=(2, 1), padding=(1, 0)), nn.Conv2d(2, 3, 2)
    return conv_net(*convs, features=12)


def image_to_image() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 2, 2))


# name: (make the net, shape of one example, likelihoods); the nets are made with one seed
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "tanh": (lambda: mlp(3, 4, 3), (3,), LIKELIHOODS),
    "relu-inplace": (lambda: mlp(3, 6, 5, 3, activation=relu), (3,), LIKELIHOODS),
    "no-bias": (lambda: mlp(3, 4, 2, bias=False), (3,), LIKELIHOODS),
    "deep-linear": (lambda: mlp(3, 4, 2, activation=nn.Identity), (3,), LIKELIHOODS),
    "sequence": (lambda: mlp(3, 4, 3), (2, 3), LIKELIHOODS),
    "twice": (Twice, (3,), LIKELIHOODS),
    "conv-stride": (strided, (1, 5, 5), LIKELIHOODS),
    "conv-dilated": (
        lambda: conv_net(nn.Conv2d(2, 2, 2, dilation=(2, 1), bias=False), features=12),
        (2, 4, 4),
        LIKELIHOODS,
    ),
    "conv-same": (
        lambda: conv_net(nn.Conv2d(1, 2, (2, 3), padding="same"), features=24),
        (1, 3, 4),
        LIKELIHOODS,
    ),
    "conv-circular": (
        lambda: conv_net(
            nn.Conv2d(1, 2, (3, 2), padding=(1, 0), padding_mode="circular"), features=16
        ),
        (1, 4, 3),  # three rows would make A cyclic, with paired eigenvalues: no one eigenbasis
        LIKELIHOODS,
    ),
    "conv1d": (
        lambda: conv_net(nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), features=9),
        (2, 5),
        LIKELIHOODS,
    ),
    "conv3d": (
        lambda: conv_net(
            nn.Conv3d(1, 2, (2, 1, 2), stride=(1, 2, 1), padding=(0, 1, 1)), features=24
        ),
        (1, 2, 4, 3),
        LIKELIHOODS,
    ),
    "conv-image": (image_to_image, (1, 3, 4), ["bernoulli", "normal"]),
}
CASES = [(name, likelihood) for name, row in MODELS.items() for likelihood in row[2]]
ONE_POSITION = ["tanh", "relu-inplace", "no-bias", "deep-linear"]  # S = 1 in every layer
every_case = pytest.mark.parametrize(("model", "likelihood"), CASES)
both_curvatures = pytest.mark.parametrize("curvature", ["ggn", "empirical"])
# each case with one curvature; tests of the one and of the other have both
even_cases, odd_cases = (
    pytest.mark.parametrize(
        ("model", "likelihood", "curvature"),
        [(*case, kind) for case, kind in alternating(CASES, ["ggn", "empirical"], start)],
    )
    for start in (0, 1)
)
# each net with one likelihood
each_model = pytest.mark.parametrize(("model", "likelihood"), [
    (name, row[2][i % len(row[2])]) for i, (name, row) in enumerate(MODELS.items())
])


def make_net(model: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return MODELS[model][0]().double()


def make_targets(likelihood: str, outputs: torch.Size) -> Tensor:
    if likelihood == "categorical":
        return torch.randint(outputs[-1], outputs[:-1])
    y = torch.randn(outputs, dtype=torch.float64)
    return y if likelihood == "normal" else (y > 0).double()


@cache
def case(model: str, likelihood: str, batch: int = BATCH) -> tuple[nn.Module, Tensor, Tensor]:
    net = make_net(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = torch.randn(batch, *MODELS[model][1], dtype=torch.float64)
        return net, x, make_targets(likelihood, net(x).shape)


@cache
def true_matrix(model: str, likelihood: str, curvature: str, batch: int = BATCH) -> Tensor:
    return getattr(oracles, curvature)(*case(model, likelihood, batch), likelihood)


def true_blocks(model: str, likelihood: str, curvature: str, batch: int = BATCH) -> Tensor:
    sizes = oracles.block_sizes(make_net(model))
    return oracles.blocks(true_matrix(model, likelihood, curvature, batch), sizes)


def estimated(model: str, likelihood: str, batch: int = BATCH, **kwargs) -> Tensor:
    return estimate(*case(model, likelihood, batch), likelihood=likelihood, **kwargs).dense()


# --- exact ------------------------------------------------------------------------------------


@even_cases
def test_full(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="full")
    assert_same(actual, true_matrix(model, likelihood, curvature))


@odd_cases
def test_block(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="block")
    assert_same(actual, true_blocks(model, likelihood, curvature))


@even_cases
def test_diag(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="diag")
    assert_same(actual, torch.diag(true_matrix(model, likelihood, curvature).diag()))


@odd_cases
def test_kfac(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="kfac")
    net, x, y = case(model, likelihood)
    assert_same(actual, oracles.kfac_dense(net, x, y, likelihood, curvature))


@even_cases
def test_ekfac(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="ekfac")
    net, x, y = case(model, likelihood)
    # eigenvectors answer to rounding divided by the gaps between eigenvalues
    assert_same(actual, oracles.ekfac_dense(net, x, y, likelihood, curvature), rtol=1e-7)


@odd_cases
def test_kfac_block(model: str, likelihood: str, curvature: str) -> None:
    actual = estimated(model, likelihood, curvature=curvature, structure="kfac-block")
    net, x, y = case(model, likelihood)
    assert_same(actual, oracles.kfac_dense(net, x, y, likelihood, curvature, cuts=(2, 2)))


@odd_cases
def test_ekfac_is_no_farther_from_the_block_than_kfac(model, likelihood, curvature) -> None:
    true = true_blocks(model, likelihood, curvature)
    kfac, ekfac = (
        estimated(model, likelihood, curvature=curvature, structure=structure) - true
        for structure in ("kfac", "ekfac")
    )
    assert ekfac.norm() <= kfac.norm() + 1e-10 * true.norm()


@pytest.mark.parametrize(("model", "likelihood", "structure"), pairs(
    ONE_POSITION, LIKELIHOODS, ["kfac", "ekfac"],
))
@both_curvatures
def test_kronecker_is_exact_on_one_datum(model, likelihood, structure, curvature) -> None:
    actual = estimated(model, likelihood, batch=1, curvature=curvature, structure=structure)
    assert_same(actual, true_blocks(model, likelihood, curvature, batch=1))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker_is_exact_on_a_deep_linear_net_with_squared_error(structure: str) -> None:
    actual = estimated("deep-linear", "normal", curvature="ggn", structure=structure)
    assert_same(actual, true_blocks("deep-linear", "normal", "ggn"))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_verbs_agree_with_the_dense_matrix(structure: str) -> None:
    """A linear layer on more data than inputs: positive definite in every structure."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = mlp(2, 2).double()
        x, y = torch.randn(2, 8, 2, dtype=torch.float64)
    matrix = estimate(net, x, y, likelihood="normal", curvature="ggn", structure=structure)
    dense, v = matrix.dense(), torch.arange(6, dtype=torch.float64) - 1
    assert_same(matrix.diag(), dense.diag())
    assert_same(matrix @ v, dense @ v)
    assert_same(matrix.solve(v), torch.linalg.solve(dense, v))
    assert_same(torch.as_tensor(matrix.trace(), dtype=torch.float64), dense.trace())
    assert_same(torch.as_tensor(matrix.logdet(), dtype=torch.float64), dense.logdet())


# --- Monte Carlo ------------------------------------------------------------------------------

NUM_SAMPLES = 400


@cache
def moments(model: str, likelihood: str, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    net, x, _ = case(model, likelihood, batch)
    return oracles.fisher_moments(net, x, likelihood)


def sampled(*args, seed: int = 0, num_samples: int = NUM_SAMPLES, **kwargs) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return estimated(*args, curvature=Curvature("fisher", num_samples=num_samples), **kwargs)


def assert_within_noise(actual: Tensor, mean: Tensor, variance: Tensor) -> None:
    """|z| below the expected largest of n standard normals, sqrt(2 log n), and 3 more.

    Elements that do not vary must be right up to rounding.
    """
    error = (variance / NUM_SAMPLES).clamp(min=0).sqrt()
    bound = math.sqrt(2 * math.log(mean.numel())) + 3
    assert ((actual - mean).abs() <= bound * error + 1e-10 * mean.norm()).all()


@each_model
def test_full_fisher_averages_to_the_ggn(model: str, likelihood: str) -> None:
    actual = sampled(model, likelihood, structure="full")
    assert_within_noise(actual, *moments(model, likelihood))


@pytest.mark.parametrize(("model", "likelihood", "structure"), pairs(
    ["relu-inplace", "sequence", "twice", "conv-stride"], LIKELIHOODS, ["block", "diag"],
))
def test_fisher_averages_to_the_ggn(model: str, likelihood: str, structure: str) -> None:
    actual = sampled(model, likelihood, structure=structure)
    net = make_net(model)
    sizes = oracles.block_sizes(net) if structure == "block" else [1] * len(actual)
    assert_within_noise(actual, *(oracles.blocks(m, sizes) for m in moments(model, likelihood)))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker_fisher_averages_to_the_ggn_on_one_datum(likelihood, structure) -> None:
    """There both are sum_k u_k u_k^T of the layer, so the moments are those of the block."""
    actual = sampled("tanh", likelihood, batch=1, structure=structure)
    sizes = oracles.block_sizes(make_net("tanh"))
    mean, variance = (oracles.blocks(m, sizes) for m in moments("tanh", likelihood, batch=1))
    assert_within_noise(actual, mean, variance)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fisher_samples_anew_and_repeats_with_the_seed(structure: str) -> None:
    first, again, other = (
        sampled("tanh", "normal", seed=seed, num_samples=1, structure=structure)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).norm() > 1e-3 * first.norm()


def test_fisher_is_short_for_one_sample() -> None:
    net, x, y = case("tanh", "categorical")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actual = estimate(net, x, y, likelihood="categorical", curvature="fisher", structure="full")
    assert_same(actual.dense(), sampled("tanh", "categorical", num_samples=1, structure="full"))


# --- likelihoods that are callables -----------------------------------------------------------


def poisson(f: Tensor) -> Poisson:
    return Poisson(f.exp())


@cache
def counts() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = mlp(2, 3, 1).double()
        x = torch.randn(5, 2, dtype=torch.float64)
        return net, x, poisson(net(x).detach()).sample()


def test_empirical_fisher_of_a_callable() -> None:
    args = counts()
    actual = estimate(*args, likelihood=poisson, curvature="empirical", structure="full")
    assert_same(actual.dense(), oracles.empirical(*args, poisson))


def test_fisher_of_a_callable() -> None:
    net, x, y = counts()
    curvature = Curvature("fisher", num_samples=NUM_SAMPLES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        actual = estimate(net, x, y, likelihood=poisson, curvature=curvature, structure="full")
    support = torch.arange(60, dtype=torch.float64)
    assert_within_noise(actual.dense(), *oracles.fisher_moments(net, x, poisson, support))


CALLABLES = {
    "categorical": lambda f: Categorical(logits=f),
    "bernoulli": lambda f: Bernoulli(logits=f),
    "normal": lambda f: Independent(Normal(f, 1.0), 1),
}


@pytest.mark.parametrize("model", ["tanh", "sequence"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@both_curvatures
def test_a_callable_gives_what_its_name_gives(model, likelihood, curvature) -> None:
    net, x, y = case(model, likelihood)
    called = estimate(
        net, x, y, likelihood=CALLABLES[likelihood], curvature=curvature, structure="full"
    )
    assert_same(called.dense(), true_matrix(model, likelihood, curvature))


ENTRIES = torch.arange(8).reshape(4, 2) % 3 > 0
EXAMPLES = torch.tensor([True, False, True, True])
MASKED: dict[str, tuple[Callable[[Tensor], Distribution], Tensor]] = {  # and what is left
    "normal entries": (lambda f: dist.Normal(f, 0.5).mask(ENTRIES).to_event(1), ENTRIES),
    "normal": (lambda f: dist.Normal(f, 0.5).mask(ENTRIES), ENTRIES),
    "normal examples": (lambda f: dist.Normal(f, 0.5).to_event(1).mask(EXAMPLES), EXAMPLES),
    "normal nothing": (lambda f: dist.Normal(f, 0.5).mask(False).to_event(1), EXAMPLES & False),
    "bernoulli entries": (lambda f: dist.Bernoulli(logits=f).mask(ENTRIES).to_event(1), ENTRIES),
    "bernoulli": (lambda f: dist.Bernoulli(logits=f).to_event(1).mask(EXAMPLES), EXAMPLES),
    "categorical": (lambda f: dist.Categorical(logits=f).mask(EXAMPLES), EXAMPLES),
}


@pytest.mark.parametrize("name", MASKED)
def test_what_a_mask_drops_from_a_likelihood_has_no_curvature(name: str) -> None:
    """The Gauss-Newton matrix of a linear layer is its Hessian."""
    likelihood, kept = MASKED[name]
    net, x = mlp(3, 2).double(), torch.randn(4, 3).double()
    y = torch.ones(4 if name == "categorical" else (4, 2)).double()
    ggn, hessian, fisher = (
        estimate(net, x, y, likelihood=likelihood, curvature=curvature, structure="full").dense()
        for curvature in ("ggn", "hessian", "fisher")
    )
    torch.testing.assert_close(ggn, hessian)
    assert ggn.any() == fisher.any() == kept.any()


@pytest.mark.parametrize("kind", ["fisher", "empirical", "ggn"])
def test_each_example_has_the_weight_it_is_given(kind: str) -> None:
    """A vector is scaled by the root of its example's weight."""
    net, x, y = case("tanh", "normal")
    weight, pulled = torch.tensor([0.5, 1.0, 2.0, 4.0]).double(), []
    for share in (weight, 1.0):
        with Capture(dict(net.named_parameters())) as capture:
            output = net(x)
        term = LikelihoodTerm(Independent(Normal(output, 1.0), 1), y, share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pulled.append(pullback(kind, [term], capture.trace().calls, BATCH, 1, BATCH))
    for scaled, plain in zip(*pulled, strict=True):
        torch.testing.assert_close(scaled, plain * weight.sqrt()[:, None, None])


# --- what is left alone, left out or refused --------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical"])
def test_the_users_net_and_gradients_are_untouched(structure: str, curvature: str) -> None:
    net, (_, x, y) = make_net("tanh").eval(), case("tanh", "categorical")
    first, *rest = net.parameters()
    first.grad = kept = torch.ones_like(first)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        estimate(net, x, y, likelihood="categorical", curvature=curvature, structure=structure)
    assert first.grad is kept and torch.equal(kept, torch.ones_like(first))
    assert all(p.grad is None for p in rest)
    assert all(p.requires_grad for p in net.parameters()) and not net.training
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


@both_curvatures
def test_nothing_random_without_sampling(curvature: str) -> None:
    state = torch.get_rng_state()
    estimated("tanh", "categorical", curvature=curvature, structure="kfac")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_works_without_grad_mode_and_leaves_no_graph(structure: str) -> None:
    net, x, y = case("tanh", "categorical")
    kwargs = {"likelihood": "categorical", "curvature": "ggn", "structure": structure}
    expected = estimate(net, x, y, **kwargs).dense()
    with torch.no_grad():
        actual = estimate(net, x, y, **kwargs).dense()
    assert not expected.requires_grad
    assert_same(actual, expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "frozen", [["0.weight", "0.bias"], ["0.bias"], ["2.weight"], ["0.weight", "2.bias"]], ids=str
)
def test_frozen_parameters_have_no_rows(structure: str, frozen: list[str]) -> None:
    net, (_, x, y) = make_net("tanh"), case("tanh", "categorical")
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    args = net, x, y, "categorical"
    ggn = oracles.ggn(*args)
    expected = {
        "full": lambda: ggn,
        "block": lambda: oracles.blocks(ggn, oracles.block_sizes(net)),
        "diag": lambda: torch.diag(ggn.diag()),
        "kfac": lambda: oracles.kfac_dense(*args),
        "ekfac": lambda: oracles.ekfac_dense(*args),
    }[structure]()
    actual = estimate(net, x, y, likelihood="categorical", curvature="ggn", structure=structure)
    assert_same(actual.dense(), expected, rtol=1e-7 if structure == "ekfac" else 1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_weights_without_a_layer(structure: str) -> None:
    layer, (_, x, y) = make_net("tanh")[0], case("tanh", "normal")
    y = torch.cat([y, y[:, :1]], dim=1)
    kwargs = {"likelihood": "normal", "curvature": "ggn", "structure": structure}
    expected = estimate(layer, x, y, **kwargs)
    assert_same(estimate(Functional(layer), x, y, **kwargs).dense(), expected.dense())


@pytest.mark.parametrize(
    ("wrong", "known"),
    [
        ({"curvature": "ggnn"}, ["ggn", "fisher", "empirical"]),
        ({"structure": "kfack"}, STRUCTURES),
        ({"likelihood": "gauss"}, LIKELIHOODS),
    ],
    ids=["curvature", "structure", "likelihood"],
)
def test_an_unknown_name_is_answered_with_those_that_exist(wrong, known) -> None:
    net, x, y = case("tanh", "categorical")
    right = {"likelihood": "categorical", "curvature": "ggn", "structure": "full"}
    with pytest.raises(ValueError) as error:
        estimate(net, x, y, **{**right, **wrong})
    assert {*wrong.values(), *known} <= set(re.findall(r"\w+", str(error.value)))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        ("normal", 1, (4,)), ("normal", 2, (4, 1)), ("normal", 2, (2,)), ("bernoulli", 1, (4,)),
        ("categorical", 3, (4, 1)), ("categorical", 3, (1,)), (poisson, 1, (4,)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical", "hessian"])
def test_targets_are_not_broadcast(likelihood, outputs, targets, curvature) -> None:
    net, y = nn.Linear(3, outputs), torch.zeros(targets, dtype=torch.long)
    wanted = (4,) if likelihood == "categorical" else (4, outputs)
    both = f"{re.escape(str(targets))}.*{re.escape(str(wanted))}"
    with pytest.raises(ValueError, match=both):
        estimate(net, torch.randn(4, 3), y, likelihood=likelihood, curvature=curvature)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_parameter_that_takes_no_part_is_named(structure) -> None:
    net, (_, x, y) = make_net("tanh"), case("tanh", "categorical")
    net.register_parameter("idle", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="no gradient with respect to idle"):
        estimate(net, x, y, likelihood="categorical", curvature="ggn", structure=structure)


class Heads(nn.Module):
    """Mean and log scale, apart."""

    def __init__(self, make: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.mean, self.log_scale, self.make = nn.Linear(3, 1), nn.Linear(3, 1), make

    def forward(self, x: Tensor) -> object:
        return self.make(self.mean(x)[:, 0], self.log_scale(x)[:, 0])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("curvature", ["ggn", "empirical", "hessian"])
def test_outputs_in_a_tuple_or_a_dict(structure, curvature) -> None:
    net = Heads(lambda mean, log_scale: torch.stack([mean, log_scale], -1)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    found = []
    for make, density in (
        (net.make, lambda f: Normal(f[:, 0], f[:, 1].exp())),
        (lambda *both: both, lambda f: Normal(f[0], f[1].exp())),
        (lambda a, b: {"a": a, "b": b}, lambda f: Normal(f["a"], f["b"].exp())),
    ):
        net.make = make
        kwargs = {"likelihood": density, "curvature": curvature, "structure": structure}
        found.append(estimate(net, x, y, **kwargs).dense())
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical", "hessian"])
@pytest.mark.parametrize(("likelihood", "x", "y", "match"), [
    ("categorical", torch.randn(0, 3), torch.zeros(0, dtype=torch.long), "no examples"),
    ("categorical", torch.randn(2, 3), torch.tensor([1, -100]), "from -100 to 1, the .* 0 to 1"),
    ("categorical", torch.randn(2, 3), torch.tensor([2, 0]), "from 0 to 2, the classes are 0 to 1"),
], ids=["empty", "ignored", "too many"])
def test_targets_that_are_none(likelihood, x, y, match, curvature) -> None:
    with pytest.raises(ValueError, match=match):
        estimate(nn.Linear(3, 2), x, y, likelihood=likelihood, curvature=curvature)


def test_a_net_without_parameters_to_train() -> None:
    with pytest.raises(ValueError, match="no parameter of the network has requires_grad"):
        estimate(nn.Linear(3, 2).requires_grad_(False), torch.randn(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", [torch.bool, torch.long])
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical", "hessian"])
def test_bits_of_any_type(kind, curvature) -> None:
    net, x, y = nn.Linear(3, 1), torch.randn(5, 3), torch.randint(2, (5, 1))
    kwargs = {"likelihood": "bernoulli", "curvature": curvature, "structure": "full"}
    found = []
    for targets in (y.to(kind), y.float()):
        torch.manual_seed(0)
        found.append(estimate(net, x, targets, **kwargs).dense())
    assert torch.equal(*found)


def test_a_wrong_double_backward_is_noticed() -> None:
    """That of torch's weight norm; of the others the Hessian is symmetric without a word."""
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate(net, x, y, curvature="hessian", structure="full")
    v, g = torch.randn(4, 3, requires_grad=True), torch.rand(4, 1, requires_grad=True)
    v, g = v.double(), g.double()
    try:
        torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0).sin(), (v, g))
        is_right = True
    except GradcheckError:
        is_right = False
    assert is_right != any("not symmetric" in str(one.message) for one in caught)
