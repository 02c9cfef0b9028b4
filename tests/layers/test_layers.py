"""Every kind of layer in every structure, against the dense oracles."""

import math
import warnings
from collections.abc import Collection
from functools import cache

import layer_cases
import oracles
import pytest
import torch
from designs import alternating, pairs
from layer_cases import HALF, HIDDEN, LAYERED, MISREAD, OPAQUE, WOVEN, InHalf
from oracles import assert_same
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from pyrocurv.curvature import EKFAC, KFAC, Curvature, estimate
from pyrocurv.layers.capture import Capture
from pyrocurv.structures import Kronecker

LIKELIHOODS = ["categorical", "normal"]
LIKELIHOODS_OF = {
    "categorical": lambda f: Categorical(logits=f), "normal": lambda f: Normal(f, 1.0),
}
BATCH = 3
each_layer = pytest.mark.parametrize("name", LAYERED)
each_net = pytest.mark.parametrize("name", {**LAYERED, **WOVEN})
each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
CURVATURES = ["ggn", "empirical"]


def cells(nets: Collection[str], start: int) -> pytest.MarkDecorator:
    """Each net under both likelihoods and both curvatures; tests of both starts, in all cells."""
    rows = pairs(nets, LIKELIHOODS, CURVATURES, start)
    return pytest.mark.parametrize(("name", "likelihood", "curvature"), rows)


@cache
def case(name: str, likelihood: str, batch: int = BATCH) -> tuple[nn.Module, Tensor, Tensor]:
    net, x = layer_cases.make(name, batch)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        f = net(x)
        classes = torch.randint(f.shape[-1], f.shape[:-1])
        return net, x, classes if likelihood == "categorical" else torch.randn_like(f)


@cache
def truth(name: str, likelihood: str, curvature: str, batch: int = BATCH) -> Tensor:
    return getattr(oracles, curvature)(*case(name, likelihood, batch), likelihood)


def estimated(name: str, likelihood: str, batch: int = BATCH, **kwargs) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name in OPAQUE else "error", "no supported op")
        matrix = estimate(*case(name, likelihood, batch), likelihood=likelihood, **kwargs)
    return matrix.dense()


def kept(name: str) -> list[list[str]]:
    """The names of the parameters that share a layer."""
    names = [n for n, _ in case(name, "normal")[0].named_parameters()]
    apart = {  # each a layer of its own, where their module's others would be
        "tied": ["embed.weight", "head.bias"],
        "two-biases": ["first.weight", "first.bias", "second.bias"],
        **{net: [n for n in names if n.startswith("attention.") and "out" not in n]
           for net in ("attention-apart", "attention-keys")},
        **{opaque: [n for n in names if n.startswith("recurrent.")] for opaque in OPAQUE},
    }.get(name, [])
    if name == "products":
        return [["w", "b"], ["v", "c"], ["scale"]]
    groups: dict[str, list[str]] = {}
    for one in names:
        groups.setdefault(one if one in apart else one.rpartition(".")[0], []).append(one)
    return list(groups.values())


def blocks_of(name: str, matrix: Tensor) -> Tensor:
    """The matrix with everything outside the layers' blocks put to zero."""
    label = {parameter: i for i, names in enumerate(kept(name)) for parameter in names}
    named = case(name, "normal")[0].named_parameters()
    labels = torch.cat([torch.full((p.numel(),), label[n]) for n, p in named])
    return torch.where(labels[:, None] == labels, matrix, 0.0)


# --- exact ------------------------------------------------------------------------------------


@cells({**LAYERED, **WOVEN}, 0)
def test_full(name: str, likelihood: str, curvature: str) -> None:
    actual = estimated(name, likelihood, curvature=curvature, structure="full")
    assert_same(actual, truth(name, likelihood, curvature))


@cells({**LAYERED, **WOVEN}, 1)
def test_block(name: str, likelihood: str, curvature: str) -> None:
    actual = estimated(name, likelihood, curvature=curvature, structure="block")
    assert_same(actual, blocks_of(name, truth(name, likelihood, curvature)))


@cells({**LAYERED, **WOVEN}, 0)
def test_diag(name: str, likelihood: str, curvature: str) -> None:
    actual = estimated(name, likelihood, curvature=curvature, structure="diag")
    assert_same(actual, torch.diag(truth(name, likelihood, curvature).diag()))


# --- Kronecker --------------------------------------------------------------------------------


@cells(LAYERED, 1)
def test_kfac(name: str, likelihood: str, curvature: str) -> None:
    actual = estimated(name, likelihood, curvature=curvature, structure="kfac")
    assert_same(actual, oracles.kfac_dense(*case(name, likelihood), likelihood, curvature))


@pytest.mark.parametrize(("name", "likelihood"), alternating(LAYERED, LIKELIHOODS))
def test_reduce(name: str, likelihood: str) -> None:
    actual = estimated(name, likelihood, curvature="ggn", structure=KFAC(sharing="reduce"))
    args = *case(name, likelihood), likelihood
    assert_same(actual, oracles.kfac_dense(*args, sharing="reduce"))


@cells(LAYERED, 0)
def test_ekfac(name: str, likelihood: str, curvature: str) -> None:
    actual = estimated(name, likelihood, curvature=curvature, structure="ekfac")
    expected = oracles.ekfac_dense(*case(name, likelihood), likelihood, curvature)
    assert_same(actual, expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "num_blocks", "curvature"), pairs(
    [name for name in LAYERED if "norm" not in name], [2, 3, (2, 1), (1, 2), 100], CURVATURES,
))
def test_factors_in_blocks(name: str, curvature: str, num_blocks) -> None:
    """A pair is (A, G); as many blocks as rows, or more, leave the diagonal."""
    actual = estimated(name, "normal", curvature=curvature, structure=KFAC(num_blocks=num_blocks))
    a, g = num_blocks if isinstance(num_blocks, tuple) else (num_blocks, num_blocks)
    args = *case(name, "normal"), "normal", curvature
    assert_same(actual, oracles.kfac_dense(*args, cuts=(g, a)))


@each_net
def test_one_block_is_kfac_and_two_are_its_short_name(name: str) -> None:
    one, kfac = (
        estimated(name, "normal", curvature="ggn", structure=structure)
        for structure in (KFAC(num_blocks=1), "kfac")
    )
    assert torch.equal(one, kfac)
    two, short = (
        estimated(name, "normal", curvature="ggn", structure=structure)
        for structure in (KFAC(num_blocks=2), "kfac-block")
    )
    assert torch.equal(two, short)


@cells([*(name for name in WOVEN if name not in OPAQUE), "grouped", "layer-norm"], 0)
def test_ekfac_is_no_farther_from_the_block_than_kfac(name, likelihood, curvature) -> None:
    true = blocks_of(name, truth(name, likelihood, curvature))
    kfac, ekfac = (
        estimated(name, likelihood, curvature=curvature, structure=structure) - true
        for structure in ("kfac", "ekfac")
    )
    assert ekfac.norm() <= kfac.norm() + 1e-10 * true.norm()


@pytest.mark.parametrize("name", sorted(OPAQUE))
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "kfac-block"])
def test_untraced_weights_are_diagonal_among_kronecker_factors(name, structure) -> None:
    with pytest.warns(UserWarning, match="recurrent.weight_ih_l0 .*diagonal") as caught:
        matrix = estimate(
            *case(name, "normal"), likelihood="normal", curvature="ggn", structure=structure
        ).dense()
    assert len(caught) == 1
    true, size = truth(name, "normal", "ggn"), len(matrix) - 6
    assert_same(matrix[:size, :size], torch.diag(true.diag()[:size]))
    assert not matrix[:size, size:].any()


def test_untraced_weights_take_one_backward_pass_for_each_example(monkeypatch) -> None:
    """Their number does not grow with that of the tensors."""
    net, x, y = case("lstm", "normal")
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    with pytest.warns(UserWarning, match="lstm|recurrent"):
        estimate(net, x, y, likelihood="normal", curvature="empirical", structure="diag")
    assert len(calls) == 2 + 1 + len(x)  # of the batch axis, the head, the examples


@each_net
def test_the_first_examples_have_the_rows_that_they_have_alone(name: str) -> None:
    net, x, _ = case(name, "normal")

    def rows(x: Tensor) -> list[Tensor]:
        with Capture(dict(net.named_parameters())) as capture:
            net(x)
        return [call.input_rows(2) for call in capture.trace().calls]

    for first, alone in zip(rows(x), rows(x[:2]), strict=True):
        torch.testing.assert_close(first, alone)


def together(f: Tensor) -> Independent:
    """One density for all examples."""
    return Independent(Normal(f, 1.0), 2)


def test_a_density_of_all_examples_is_enough_by_rows() -> None:
    kwargs = {"curvature": "empirical", "structure": "block"}
    actual = estimate(*case("grouped", "normal"), likelihood=together, **kwargs).dense()
    assert_same(actual, estimated("grouped", "normal", **kwargs))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="density for each example"):
        estimate(*case("lstm", "normal"), likelihood=together, **kwargs)


@pytest.mark.parametrize(("name", "curvature", "batch", "likelihood"), [
    (name, curvature, 3 + (i + j) % 2, LIKELIHOODS[((i + 1) // 2 + j) % 2])
    for i, name in enumerate(MISREAD)
    for j, curvature in enumerate(["ggn", "empirical", "hessian"])
])
def test_a_layer_that_does_not_see_the_examples(name, batch, likelihood, curvature) -> None:
    """Its input has four rows (or one, or none), as many as there are examples or not."""
    args, kwargs = case(name, likelihood, batch), {"likelihood": likelihood, "curvature": curvature}
    true = truth(name, likelihood, curvature, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diag = estimate(*args, structure="diag", **kwargs).dense()
    (message,) = {str(one.message) for one in caught}
    misread = MISREAD[name][2]
    assert {n for n, _ in args[0].named_parameters() if f"{n} (" in message} - {"code"} == misread
    assert_same(diag, torch.diag(true.diag()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no supported op")
        full, kfac = (estimate(*args, structure=s, **kwargs).dense() for s in ("full", "kfac"))
    assert_same(full, true)
    named = args[0].named_parameters()
    rows = torch.cat([torch.full((p.numel(),), n in misread) for n, p in named])
    assert_same(kfac[rows][:, rows], torch.diag(true.diag()[rows]))
    assert not kfac[rows][:, ~rows].any()


def test_examples_that_meet_by_hand() -> None:
    """No batch norm of torch's: what a layer before it does to one example is not known by rows."""
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.layer(x)
            return self.head((hidden - hidden.mean(0)).tanh())

    net, x, y = Centred(), torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.warns(UserWarning, match=r"layer.weight \(rows that affect more than their own"):
        estimate(net, x, y)


@pytest.mark.parametrize("structure", ["kfac", "diag"])
def test_examples_that_meet_in_batch_norm_are_taken_by_rows(structure: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    estimate(net.train(), torch.randn(6, 3), torch.randint(2, (6,)), structure=structure)


def test_nan_does_not_count_as_another_example() -> None:
    net, x, y = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3), torch.ones(4, 2)
    y[1] = math.nan
    estimate(net, x, y, likelihood=lambda f: Normal(f, 1.0, validate_args=False))
    x[1] = math.nan
    with pytest.raises(FloatingPointError, match="output at x is not finite"):
        estimate(net, x, y, likelihood=lambda f: Normal(f, 1.0, validate_args=False))


def test_targets_that_are_not_looked_at_need_no_value() -> None:
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    for curvature in ("ggn", "fisher"):
        estimate(net, x, torch.full((4,), -100), curvature=curvature)


def test_a_grouped_convolution_is_exact_in_blocks() -> None:
    """As a convolution without groups whose kernel is zero elsewhere, with factors in blocks."""
    net, x, y = case("depthwise", "normal")
    grouped, head = net[0], net[-1]
    dense = nn.Conv1d(3, 6, 2).double()
    mask = torch.zeros_like(dense.weight)
    for group in range(3):
        mask[2 * group : 2 * group + 2, group] = 1
    whole = nn.Sequential(dense, nn.Tanh(), nn.Flatten(), head)
    with torch.no_grad():
        dense.weight.copy_(mask * grouped.weight.repeat(1, 3, 1))
        dense.bias.copy_(grouped.bias)
    dense.bias.requires_grad_(False)
    net[0].bias.requires_grad_(False)
    try:
        kwargs = {"likelihood": "normal", "curvature": "ggn", "structure": KFAC(num_blocks=3)}
        matrix = estimate(whole, x, y, **kwargs).dense()[:36, :36]
        inside = mask.flatten().bool()
        expected = estimate(net, x, y, **{**kwargs, "structure": "kfac"}).dense()[:12, :12]
    finally:
        net[0].bias.requires_grad_(True)
    assert_same(matrix[inside][:, inside], expected)


def test_attention_is_what_it_is_by_hand() -> None:
    net, x, y = case("attention", "normal")
    hand = layer_cases.HandAttention().double()
    names = {"project": "attention.in_proj_", "out": "attention.out_proj.", "head": "head."}
    state = {f"{ours}.{part}": net.state_dict()[theirs + part]
             for ours, theirs in names.items() for part in ("weight", "bias")}
    hand.load_state_dict(state)
    names = "full", "block", "diag", "kfac", "ekfac", "kfac-block"
    for structure in (*names, KFAC(sharing="reduce")):
        kwargs = {"likelihood": "normal", "curvature": "ggn", "structure": structure}
        ours, theirs = (estimate(one, x, y, **kwargs).dense() for one in (net, hand))
        assert_same(ours, theirs, rtol=1e-7 if structure == "ekfac" else 1e-10)


@each_likelihood
def test_a_tied_weight_has_the_product_nearest_to_the_sum_of_its_uses(likelihood: str) -> None:
    net, x, y = case("tied", likelihood)
    free = layer_cases.Tied().double()
    free.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    free.load_state_dict(net.state_dict())
    kwargs = {"likelihood": likelihood, "curvature": "ggn", "structure": "kfac"}
    tied, apart = (estimate(one, x, y, **kwargs) for one in (net, free))
    (embed,) = [b for b, i in zip(apart.blocks, apart.index, strict=True) if i.min() == 0]
    (head,) = [b for b in apart.blocks if b.shape == (4, 4)]  # its last input is the bias
    (ours,) = [b for b, i in zip(tied.blocks, tied.index, strict=True) if i.min() == 0]
    assert embed.shape == ours.shape == (3, 4)  # the embedding is the first use: all are turned
    turned = Kronecker(head.input[:3, :3], head.output)
    assert_same(ours.dense(), embed.nearest_kronecker_sum(turned).dense())


@pytest.mark.parametrize(("name", "structure", "likelihood"), pairs(
    {**LAYERED, **WOVEN}, ["full", "block", "diag", "kfac", "kfac-block", "ekfac"], LIKELIHOODS,
))
def test_fisher_is_the_empirical_one_of_its_own_targets(name, likelihood, structure) -> None:
    """Drawn from the likelihood with the same seed: exact in every cell, one sample for each."""
    net, x, _ = case(name, likelihood)
    kwargs = {"likelihood": likelihood, "structure": structure}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "no supported op")
        torch.manual_seed(6)
        fisher = estimate(net, x, case(name, likelihood)[2], curvature="fisher", **kwargs)
        torch.manual_seed(6)
        targets = LIKELIHOODS_OF[likelihood](net(x)).sample()
        empirical = estimate(net, x, targets, curvature="empirical", **kwargs)
    assert_same(fisher.dense(), empirical.dense())
    if structure == "full":
        assert_same(fisher.dense(), oracles.empirical(net, x, targets, likelihood))


@pytest.mark.parametrize("name", ["grouped", "transposed-1d", "embedding", "batch-norm", "tied"])
@pytest.mark.parametrize("structure", ["full", "block", "diag", "ekfac"])
def test_fisher_averages_to_the_ggn(name: str, structure: str) -> None:
    """Within six standard errors of a mean over independent estimates, entry by entry."""
    kwargs = {"structure": structure}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kwargs["curvature"] = Curvature("fisher", num_samples=10)
        draws = torch.stack([estimated(name, "normal", **kwargs) for _ in range(30)])
    expected = estimated(name, "normal", curvature="ggn", structure=structure)
    if structure == "ekfac":  # each has a basis of its own: only the trace is unbiased
        draws, expected = (m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (draws, expected))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * error + 1e-10 * expected.norm()).all()


@pytest.mark.parametrize("structure", ["full", "block", "diag", "kfac", "ekfac"])
@pytest.mark.parametrize("curvature", ["ggn", "empirical", "hessian"])
def test_a_parameter_of_no_axis(structure: str, curvature: str) -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.log_t = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.log_t.exp()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = Temperature().double(), torch.randn(4, 3).double()
    y = torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match="log_t"):
        actual = estimate(net, x, y, curvature=curvature, structure=structure).dense()
    true = getattr(oracles, curvature)(net, x, y, "categorical")
    names = [n for n, _ in net.named_parameters()]
    place = sum(p.numel() for _, p in list(net.named_parameters())[: names.index("log_t")])
    torch.testing.assert_close(actual[place, place], true[place, place])
    if structure == "full":
        assert_same(actual, true)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize("structure", ["full", "block", "diag", "kfac"])
def test_a_scale_of_what_is_no_float(dtype: torch.dtype, structure: str) -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.rand(3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(((x > 0).to(dtype) * self.scale).tanh())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args = Switches().double(), torch.randn(4, 3), torch.randn(4, 2).double(), "normal"
    kwargs = {"likelihood": "normal", "curvature": "ggn", "structure": structure}
    actual, true = estimate(*args[:3], **kwargs).dense()[:3, :3], oracles.ggn(*args)[:3, :3]
    assert_same(actual, true if structure in ("full", "block") else torch.diag(true.diag()))


# --- mixed precision --------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "structure", "curvature"), pairs(
    HALF, ["kfac", "ekfac", "block", "diag"], ["ggn", "empirical", "hessian"],
))
def test_autocast(name: str, curvature: str, structure: str) -> None:
    """The rows come from bfloat16, of unit roundoff u = 2⁻⁸; the rest is in single precision.

    An entry is a sum of products of four numbers of the network (a, a, g, g), each with an error of
    about u for each layer on its way, forth and back; a second derivative comes by twice as long a
    way.
    """
    make, shape, layers = HALF[name]
    net, x = make(), torch.randn(32, *shape)
    y = torch.randint(net(x).shape[-1], (32,))
    kwargs = {"curvature": curvature, "structure": structure}
    plain = estimate(net, x, y, **kwargs).dense()
    inside = estimate(InHalf(net), x, y, **kwargs).dense()
    with torch.autocast("cpu", torch.bfloat16):
        around = estimate(net, x, y, **kwargs)
    around = around.dense()
    assert inside.dtype == around.dtype == torch.float32
    torch.testing.assert_close(inside, around)
    error = (inside - plain).norm() / plain.norm()
    assert 0 < error < 4 * layers * 2**-8 * (2 if curvature == "hessian" else 1)


# --- choice -----------------------------------------------------------------------------------


def test_a_structure_for_each_layer() -> None:
    net, x, y = case("batch-norm-2d", "normal")
    kwargs = {"likelihood": "normal", "curvature": "ggn"}
    mixed = estimate(
        net, x, y, structure={nn.Conv2d: "kfac", "2": "diag", "5": "block"}, **kwargs
    ).dense()
    kfac, diag, block = (estimate(net, x, y, structure=s, **kwargs).dense()
                         for s in ("kfac", "diag", "block"))
    conv, norm = slice(0, 10), slice(10, 14)
    head = slice(14, None)
    for rows, source in ((conv, kfac), (norm, diag), (head, block)):
        assert_same(mixed[rows, rows], source[rows, rows])
    assert not mixed[conv, norm].any() and not mixed[norm, head].any()


def test_a_type_that_no_layer_has() -> None:
    net, x, y = case("grouped", "normal")
    kwargs = {"likelihood": "normal", "curvature": "ggn"}
    with pytest.warns(UserWarning, match="no layer is of type LSTM; Conv2d, Linear exist"):
        found = estimate(net, x, y, structure={nn.LSTM: "full"}, **kwargs).dense()
    assert_same(found, estimate(net, x, y, **kwargs).dense())


def test_names_go_before_types_and_a_rule_may_abstain() -> None:
    net, x, y = case("grouped", "normal")
    kwargs = {"likelihood": "normal", "curvature": "ggn"}
    by_name = estimate(net, x, y, structure={nn.Module: "diag", "[0-9]": "block"}, **kwargs).dense()
    assert_same(by_name, estimate(net, x, y, structure="block", **kwargs).dense())
    seen = []

    def rule(name: str, module: nn.Module | None) -> str | None:
        seen.append((name, type(module)))
        return "full" if isinstance(module, nn.Linear) else None

    by_rule = estimate(net, x, y, structure=rule, **kwargs).dense()
    assert seen == [("0", nn.Conv2d), ("3", nn.Linear)]
    kfac = estimate(net, x, y, structure={"3": "block"}, **kwargs).dense()
    assert_same(by_rule, kfac)


@pytest.mark.parametrize(("structure", "error", "reason"), [
    ({"fc9": "kfac"}, ValueError, "no layer 'fc9'; 0, 3 exist"),
    ({"0": "kfack"}, ValueError, "'kfack': choose one of full"),
    ({3: "kfac"}, TypeError, "the key 3"),
    ({"0": "point"}, ValueError, "'point': choose one of"),
])  # fmt: skip
def test_a_wrong_choice_is_answered(structure, error, reason) -> None:
    net, x, y = case("grouped", "normal")
    with pytest.raises(error, match=reason):
        estimate(net, x, y, likelihood="normal", structure=structure)


@each_layer
@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_keeps_the_trace(name: str, rank: int) -> None:
    kfac = estimated(name, "normal", curvature="ggn", structure=KFAC(rank=None))
    for spec in (KFAC(rank=rank), EKFAC(rank=rank)):
        thin = estimated(name, "normal", curvature="ggn", structure=spec)
        if isinstance(spec, KFAC):
            torch.testing.assert_close(thin.trace(), kfac.trace())
        assert torch.linalg.eigvalsh(thin).min() > -1e-10 * thin.norm()


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("curvature", ["ggn", "empirical", "hessian"])
def test_untraced_ops_have_gradients(name, curvature) -> None:
    args, kwargs = case(name, "normal"), {"likelihood": "normal", "curvature": curvature}
    true = truth(name, "normal", curvature)
    for structure in ("full", "diag"):
        with pytest.warns(UserWarning, match="an op that could not be traced") as caught:
            found = estimate(*args, structure=structure, **kwargs).dense()
        (message,) = {str(one.message) for one in caught}
        named = {n for n, _ in args[0].named_parameters() if f"{n} (" in message}
        assert named == HIDDEN[name][2]
        assert_same(found, true if structure == "full" else torch.diag(true.diag()))


class Views(nn.Module):
    """Two views of each datum, stacked, whose features are added."""

    def __init__(self, other) -> None:
        super().__init__()
        self.layer, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), other

    def forward(self, x: Tensor) -> Tensor:
        features = self.layer(x).tanh()
        return self.head(features + self.other(features))


@pytest.mark.parametrize("batch", [2, 4, 6, 8, 10, 12, 16])
@pytest.mark.parametrize("other", [
    lambda x: x.roll(len(x) // 2, 0), lambda x: x.flip(0), lambda x: x.unflatten(0, (-1, 2)).flip(1)
    .flatten(0, 1), lambda x: x[:1].expand_as(x), lambda x: x[1:2].expand_as(x),
], ids=["half round", "reversed", "in pairs", "the first", "the second"])
def test_examples_that_meet_far_apart(batch, other) -> None:
    net, x = Views(other).double(), torch.randn(batch, 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="layer.weight .rows that affect more"):
        found = estimate(
            net, x, torch.zeros(batch, 2), likelihood="normal", curvature="ggn", structure="full"
        ).dense()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    jacobians = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (x,)))(weights)
    jacobian = torch.cat([jacobians[name].flatten(2) for name in weights], 2).flatten(0, 1)
    assert_same(found, jacobian.mT @ jacobian)
