"""Packing of layers, the uses of weights that a capture records, and those it refuses."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrocurv.layers import Layer, structure_spec
from pyrocurv.layers.batch_axis import (
    is_row_independent,
    mark_wrong_batch_axis,
    random_projection,
)
from pyrocurv.layers.block import Block, BlockIndices, make_blocks
from pyrocurv.layers.calls import OpCall
from pyrocurv.layers.capture import Capture
from pyrocurv.layers.trace import Trace

Weights = dict[str, Tensor]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear_weights() -> Weights:
    return {"w": leaf(4, 3), "b": leaf(4)}


def tracked(weights: Weights, forward: Callable[[Weights], object]) -> Trace:
    with Capture(dict(weights)) as capture:
        forward(weights)
    return capture.trace()


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_edges_are_exact_under_in_place_activations(inplace: bool) -> None:
    """The gradient in the output before the ReLU, which overwrites it."""
    weights, x, pull = linear_weights(), tensor(5, 3), tensor(5, 4)
    with Capture(dict(weights)) as capture:
        output = F.relu(F.linear(x, weights["w"], weights["b"]), inplace=inplace)
    (call,) = capture.trace().calls
    (gradient,) = torch.autograd.grad((output * pull).sum(), [call.edge])
    before = F.linear(x, weights["w"], weights["b"])
    torch.testing.assert_close(call.output_gradient_rows(gradient, 5)[:, 0], pull * (before > 0))
    torch.testing.assert_close(call.input_rows(5)[:, 0], torch.cat([x, torch.ones(5, 1)], 1))


def conv_settings() -> list[dict[str, object]]:
    return [
        {}, {"stride": 2}, {"stride": (2, 1), "padding": (1, 0)}, {"padding": "same"},
        {"padding": "valid"}, {"dilation": (2, 1), "padding": 2},
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("settings", conv_settings(), ids=str)
def test_rows_and_gradients_of_a_convolution(settings: dict[str, object]) -> None:
    """W's gradient is sum_s g_s a_sᵀ, and the output is W a_s."""
    weights, x = {"w": leaf(3, 2, 3, 2), "b": leaf(3)}, tensor(4, 2, 7, 6)
    with Capture(dict(weights)) as capture:
        output = F.conv2d(x, weights["w"], weights["b"], **settings)
    (call,) = capture.trace().calls
    packed = call.layer.pack(weights).view(3, -1)
    rows = call.input_rows(4)  # [B, S, I]
    torch.testing.assert_close((rows @ packed.mT).mT.reshape(output.shape), output)
    scalar = output.sin().sum()
    gradient, *expected = torch.autograd.grad(scalar, [call.edge, *weights.values()])
    found = torch.einsum("bso,bsi->oi", call.output_gradient_rows(gradient, 4), rows).flatten()
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(call.layer.views(found)[name], value)


def test_only_the_first_examples_are_read() -> None:
    weights, x = linear_weights(), tensor(5, 2, 3)
    with Capture(dict(weights)) as capture:
        output = F.linear(x, weights["w"])
    (call,) = capture.trace().calls
    (gradient,) = torch.autograd.grad(output.square().sum(), [call.edge])
    assert call.batch_size == 5
    assert torch.equal(call.input_rows(2), x[:2])
    assert torch.equal(call.output_gradient_rows(gradient, 2), 2 * output.detach()[:2])
    zeros = torch.zeros(2, 2, 4, dtype=torch.float64)
    assert torch.equal(call.output_gradient_rows(None, 2), zeros)


@pytest.mark.parametrize("make", [
    lambda: nn.LayerNorm(4, eps=0.5), lambda: nn.GroupNorm(2, 4, eps=0.5),
    lambda: nn.RMSNorm(4, eps=0.5), lambda: nn.BatchNorm1d(4, eps=0.5),
    lambda: nn.BatchNorm1d(4, eps=0.5).eval(),
], ids=["layer norm", "group norm", "rms norm", "batch norm", "batch norm, eval"])
def test_rows_of_a_norm_layer(make: Callable[[], nn.Module]) -> None:
    """The outputs of the first examples; in batch norm their statistics are those of all."""
    norm, x = make().double(), tensor(6, 4)
    weights = dict(norm.named_parameters())
    for value in weights.values():
        nn.init.uniform_(value, 0.5, 1.5)
    with Capture(weights) as capture:
        output = norm(x)
    (call,) = capture.trace().calls
    matrix = call.layer.pack(weights).reshape(4, 1, 1, -1)
    found = (call.input_rows(3) * matrix).sum(-1, keepdim=True)
    torch.testing.assert_close(found, call.output_gradient_rows(output, 3))


def test_uses_under_no_grad_do_not_count() -> None:
    weights = linear_weights()
    with torch.no_grad(), Capture(dict(weights)) as capture:
        F.linear(tensor(5, 3), weights["w"], weights["b"])
    assert not capture.trace().layers and not capture.trace().unsupported


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_that_outputs_share_is_unsupported(shape: tuple[int, ...]) -> None:
    bias = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    weights = {"w": leaf(3, 4), "b": bias}
    trace = tracked(weights, lambda w: torch.addmm(w["b"], X, w["w"]))
    assert trace.layers == () and set(trace.unsupported.values()) == {
        "a bias that is shared by outputs"
    }


def test_an_input_that_is_changed_in_place_later() -> None:
    weights, x = linear_weights(), tensor(5, 3)
    with Capture(dict(weights)) as capture:
        F.linear(x, weights["w"], weights["b"])
        x.mul_(2)
    with pytest.raises(RuntimeError, match="input of 'w' was changed in place"):
        capture.trace().calls[0].input_rows(5)


@pytest.mark.parametrize("shape", [(4, 3), (4, 1, 3, 3)])
@pytest.mark.parametrize("bias", [None, "b"])
def test_packing(shape: tuple[int, ...], bias: str | None) -> None:
    layer = Layer("w", bias, shape)
    values = {name: tensor(*shape) for name, shape in layer.tensors.items()}
    packed = layer.pack(values)
    assert packed.shape == (layer.size,) == (layer.out_features * layer.in_features,)
    rows = torch.cat([value.reshape(4, -1) for value in values.values()], 1)
    assert torch.equal(packed, rows.flatten())
    for draws in (packed, packed.expand(2, 5, -1)):
        again = layer.views(draws)
        assert list(again) == list(values)
        assert all(torch.equal(again[n], v.expand_as(again[n])) for n, v in values.items())


def test_unpacked_weights_are_contiguous() -> None:
    for layer in (Layer("w", "b", (4, 3)), Layer("w", "b", (4, 1, 3, 3)), Layer("w", None, (4, 3))):
        block = Block((layer,), structure_spec.Block())
        assert all(v.is_contiguous() for v in block.unpack(tensor(2, layer.size)).values())


def test_positions_of_blocks_in_a_flat_vector() -> None:
    layers = Layer("w", "b", (2, 3)), Layer("v", None, (2, 2))
    order = {"v": (2, 2), "b": (2,), "w": (2, 3)}
    one, two = BlockIndices([Block((layer,), structure_spec.Block()) for layer in layers], order)
    assert one.tolist() == [6, 7, 8, 4, 9, 10, 11, 5] and two.tolist() == [0, 1, 2, 3]
    (joint,) = BlockIndices([Block(layers, structure_spec.Full())], order)
    assert joint.tolist() == one.tolist() + two.tolist()


def test_partitions() -> None:
    layers = [Layer("w", "b", (2, 3)), Layer("v", None, (2, 2))]
    for structure in ("block", "kfac", "ekfac"):
        assert [block.layers for block in make_blocks(layers, structure)] == [
            (layers[0],), (layers[1],)
        ]
    for structure in ("full", "diag"):
        (full,) = make_blocks(layers, structure)
        assert full.layers == tuple(layers) and full.size == 12
    values = {"w": tensor(2, 3), "b": tensor(2), "v": tensor(2, 2)}
    again = full.unpack(full.pack(values))
    assert all(torch.equal(again[name], value) for name, value in values.items())
    assert make_blocks([], "full") == []
    with pytest.raises(ValueError, match="'kfack': choose one of full, block, diag"):
        make_blocks(layers, "kfack")


# ---- recorded uses ------------------------------------------------------------------------------


def test_a_reused_layer_has_two_calls_and_is_one_layer() -> None:
    weights, x = {"w": leaf(3, 3), "b": leaf(3)}, tensor(5, 3)

    def forward(weights: Weights) -> None:
        F.linear(F.linear(x, weights["w"], weights["b"]).tanh(), weights["w"], weights["b"])

    trace = tracked(weights, forward)
    assert len(trace.calls) == 2
    assert trace.layers == (Layer("w", "b", (3, 3)),) and not trace.unsupported


def test_modules_keywords_and_functions_look_alike() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).double(), tensor(5, 3)
    trace = tracked(dict(net.named_parameters()), lambda _: net(x))
    first, last = Layer("0.weight", "0.bias", (4, 3)), Layer("1.weight", None, (2, 4))
    assert trace.layers == (first, last)
    weights = linear_weights()
    trace = tracked(weights, lambda w: F.linear(input=x, bias=w["b"], weight=w["w"]))
    assert trace.layers == (Layer("w", "b", (4, 3)),)


def test_untracked_weights_are_not_recorded() -> None:
    weights, x = linear_weights(), tensor(5, 3)
    trace = tracked(weights, lambda _: F.linear(x, tensor(2, 3), tensor(2)))
    assert not trace.calls and not trace.unsupported


@pytest.mark.parametrize("look", [
    lambda w: w.shape, lambda w: w.size(), lambda w: w.size(0), lambda w: w.dim(), len,
    lambda w: w.dtype, lambda w: w.numel(), lambda w: w.stride(), lambda w: w.requires_grad,
    lambda w: repr(w.device),
], ids=["shape", "size", "size0", "dim", "len", "dtype", "numel", "stride", "grad", "device"])
def test_reading_metadata_is_not_a_use(look: Callable[[Tensor], object]) -> None:
    weights, x = linear_weights(), tensor(5, 3)

    def forward(weights: Weights) -> None:
        look(weights["w"])
        F.linear(x, weights["w"], weights["b"])

    trace = tracked(weights, forward)
    assert trace.layers == (Layer("w", "b", (4, 3)),), trace.unsupported


@pytest.mark.parametrize("aside", [
    lambda w: w["w"].detach().square().sum(), lambda w: w["w"].data.norm(), lambda w: w["w"] > 0,
    lambda w: w["w"].detach().clone(), lambda w: w["w"].argmax(), lambda w: F.linear(X, w["w"]),
    lambda w: F.conv1d(X[:, :, None], w["w"][..., None]), lambda w: (X @ w["w"].T).mean(),
], ids=["detach", "data", "compare", "clone", "argmax", "linear", "other make", "mean"])
def test_uses_without_a_gradient_do_not_count(aside: Callable[[Weights], object]) -> None:
    """A statistic for the log, before and after the use that counts."""
    def forward(weights: Weights) -> None:
        with torch.no_grad():
            aside(weights)
        F.linear(X, weights["w"], weights["b"])
        with torch.no_grad():
            aside(weights)

    trace = tracked(linear_weights(), forward)
    assert trace.layers == LINEAR and len(trace.calls) == 1 and not trace.unsupported


def test_detached_uses_do_not_count() -> None:
    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"], weights["b"]) * weights["w"].detach().norm()

    trace = tracked(linear_weights(), forward)
    assert trace.layers == LINEAR and not trace.unsupported


def test_a_statistic_of_a_product_does_not_separate_it_from_its_bias() -> None:
    def forward(weights: Weights) -> None:
        product = X @ weights["w"].T
        assert product.shape == (5, 4) and product.detach().mean() is not None
        product + weights["b"]

    assert tracked(linear_weights(), forward).layers == LINEAR


# ---- unsupported uses ---------------------------------------------------------------------------

X = torch.ones(5, 3, dtype=torch.float64)
OTHER_USES: dict[str, tuple[Callable[[Weights], object], str]] = {
    "w @ x": (lambda w: w["w"] @ X.T, "the input of matmul"),
    "a number times w": (lambda w: F.linear(X, 2 * w["w"]), "a product that is not a scale"),
    "addmm with factors": (lambda w: torch.addmm(w["b"], X, w["w"].T, beta=2), "addmm with"),
    "w.sum()": (lambda w: w["w"].sum(), "sum"),
    "penalty": (lambda w: F.linear(X, w["w"], w["b"]).sum() + w["w"].square().sum(), "square"),
    "in a list": (lambda w: torch.cat([w["w"], w["w"]]), "cat"),
    "by keyword": (lambda w: torch.sum(input=w["w"]), "sum"),
    "unbind": (lambda w: w["w"].unbind(), "unbind"),
    "the input": (lambda w: F.linear(w["w"], torch.ones(2, 3).double()), "the input of linear"),
    "no batch": (lambda w: F.linear(X[0], w["w"], w["b"]), "without a batch axis"),
}


@pytest.mark.parametrize("use", OTHER_USES)
def test_other_uses_are_unsupported(use: str) -> None:
    forward, reason = OTHER_USES[use]
    trace = tracked(linear_weights(), forward)
    assert not any(layer.weight == "w" for layer in trace.layers)
    assert reason in trace.unsupported["w"]


def test_a_bias_stands_alone_where_its_weight_cannot() -> None:
    """Its weight has another use, or is not tracked: the bias is a layer with one input."""
    trace = tracked(linear_weights(), OTHER_USES["penalty"][0])
    assert trace.layers == (Layer("b", None, (4,), "bias"),) and set(trace.unsupported) == {"w"}
    trace = tracked({"b": leaf(4)}, lambda w: F.linear(X, tensor(4, 3), w["b"]))
    assert trace.layers == (Layer("b", None, (4,), "bias"),) and not trace.unsupported


def test_a_convolution_without_a_batch_is_refused() -> None:
    weights, reason = {"w": leaf(4, 2, 3, 3), "b": leaf(4)}, "2d convolution of an input without"
    trace = tracked(weights, lambda w: F.conv2d(tensor(2, 6, 6), w["w"], w["b"]))
    assert trace.layers == ()
    assert all(reason in trace.unsupported[name] for name in ("w", "b"))


def alone(*names: str) -> tuple[Layer, ...]:
    """Weights [4, 3] and biases [4] as separate layers."""
    layers = {"w": Layer("w", None, (4, 3)), "v": Layer("v", None, (4, 3))}
    return tuple(layers.get(name, Layer(name, None, (4,), "bias")) for name in names)


def test_a_weight_with_two_biases_is_separated_from_them() -> None:
    weights = {"w": leaf(4, 3), "b": leaf(4), "c": leaf(4)}

    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"], weights["b"])
        F.linear(X, weights["w"], weights["c"])

    trace = tracked(weights, forward)
    assert trace.layers == alone("w", "b", "c") and not trace.unsupported
    assert len(trace.calls) == 4


def test_a_weight_with_and_without_a_bias_is_separated_from_it() -> None:
    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"], weights["b"])
        F.linear(X, weights["w"])

    trace = tracked(linear_weights(), forward)
    assert trace.layers == alone("w", "b") and not trace.unsupported


def test_one_bias_in_two_layers_is_separated_from_both() -> None:
    weights = {"w": leaf(4, 3), "v": leaf(4, 3), "b": leaf(4)}

    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"], weights["b"])
        F.linear(X, weights["v"], weights["b"])

    trace = tracked(weights, forward)
    assert trace.layers == alone("w", "b", "v") and not trace.unsupported


def test_a_weight_with_two_layouts_is_unsupported() -> None:
    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"])
        F.conv1d(X[:, :, None], weights["w"][..., None])

    trace = tracked({"w": leaf(4, 3)}, forward)
    assert trace.layers == () and "w" in trace.unsupported


# ---- a trace is a value -------------------------------------------------------------------------


def content(trace: Trace) -> tuple[object, ...]:
    """Everything that a trace contains, with the identity of its calls."""
    calls = [id(call) for call in trace.calls]
    return trace.layers, calls, dict(trace.unsupported), trace.has_batch_coupling


def test_reading_twice_changes_nothing() -> None:
    """A weight with two layouts becomes unsupported when the layers are resolved."""
    def forward(weights: Weights) -> None:
        F.linear(X, weights["w"])
        F.conv1d(X[:, :, None], weights["w"][..., None])
        F.linear(X, weights["v"], weights["b"])
        weights["c"].square()

    weights = {"w": leaf(4, 3), "v": leaf(4, 3), "b": leaf(4), "c": leaf(4)}
    with Capture(dict(weights)) as capture:
        forward(weights)
    trace = capture.trace()
    before = content(trace)
    assert set(trace.unsupported) == {"w", "c"} and trace.layers == (Layer("v", "b", (4, 3)),)
    assert trace.tracked_names == trace.tracked_names == weights.keys()
    again = capture.trace()
    assert again.layers == trace.layers and again.unsupported == trace.unsupported
    assert content(trace) == before


def test_marking_returns_another_trace() -> None:
    weights = {**linear_weights(), "v": leaf(4, 4)}
    with Capture(dict(weights)) as capture:
        hidden = F.linear(X, weights["w"], weights["b"])
        output = F.linear(hidden, weights["v"]) * torch.vmap(torch.sum)(weights["v"])
    trace = capture.trace()
    before = content(trace)
    assert trace.layers == (*LINEAR, Layer("v", None, (4, 4))) and not trace.unsupported
    marked = trace.mark_untracked(output.sum())
    assert marked.layers == LINEAR and set(marked.unsupported) == {"v"}
    wrong = mark_wrong_batch_axis(trace, 4, None)
    assert wrong.layers == () and set(wrong.unsupported) == {"w", "b", "v"}
    alone = trace.mark_unsupported({"w": "a reason"})
    assert alone.layers == (Layer("b", None, (4,), "bias"), Layer("v", None, (4, 4)))
    assert mark_wrong_batch_axis(trace, 5, None) is trace
    assert content(trace) == before


# ---- products and sums without a module ---------------------------------------------------------

LINEAR = (Layer("w", "b", (4, 3)),)
TRANSPOSED = (Layer("v", "b", (3, 4), "in_out"),)
AS_LINEAR: dict[str, Callable[[Weights], Tensor]] = {
    "x @ w.T + b": lambda w: X @ w["w"].T + w["b"],
    "b + x @ w.mT": lambda w: w["b"] + X @ w["w"].mT,
    "matmul, t": lambda w: torch.matmul(X, w["w"].t()).add(w["b"]),
    "mm, transpose": lambda w: X.mm(w["w"].transpose(0, 1)) + w["b"],
    "twice": lambda w: F.linear(X, torch.transpose(w["w"].T, -1, 0).mT.T) + w["b"],
    "in place": lambda w: (X @ w["w"].T).add_(w["b"]),
    "linear and a sum": lambda w: F.linear(X, w["w"]) + w["b"],
    "addmm": lambda w: torch.addmm(w["b"], X, w["w"].T),
    "by keyword": lambda w: torch.mm(X, mat2=torch.transpose(w["w"], dim0=0, dim1=1)) + w["b"],
}  # fmt: skip


@pytest.mark.parametrize("form", AS_LINEAR)
def test_products_are_linear_layers(form: str) -> None:
    weights = linear_weights()
    with Capture(dict(weights)) as capture:
        output = AS_LINEAR[form](weights)
    trace = capture.trace()
    (call,) = trace.calls
    assert trace.layers == LINEAR and not trace.unsupported
    expected = F.linear(X, weights["w"], weights["b"])
    torch.testing.assert_close(output, expected)
    assert_gradient(call, output, weights)


def assert_gradient(call: OpCall, output: Tensor, weights: Weights) -> None:
    """W's gradient is sum_ns g a^T of the rows."""
    gradient, *expected = torch.autograd.grad(
        output.sin().sum(), [call.edge, *weights.values()], retain_graph=True
    )
    g, a = call.output_gradient_rows(gradient, call.batch_size), call.input_rows(call.batch_size)
    found = call.layer.views((g.flatten(-3, -2).mT @ a.flatten(-3, -2)).flatten())
    for name, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(found[name], value)


def test_an_in_out_weight() -> None:
    weights = {"v": leaf(3, 4), "b": leaf(4)}
    for forward in (lambda w: X @ w["v"] + w["b"], lambda w: F.linear(X, w["v"].T, w["b"])):
        with Capture(dict(weights)) as capture:
            output = forward(weights)
        trace = capture.trace()
        (call,) = trace.calls
        assert trace.layers == TRANSPOSED
        assert_gradient(call, output, weights)


@pytest.mark.parametrize("other", [
    lambda y, w: y.square(), lambda y, w: y + w["c"], lambda y, w: y * 2, lambda y, w: -y,
    lambda y, w: torch.cat([y, X], 1), lambda y, w: torch.stack((torch.ones(5, 4), y)),
])  # fmt: skip
def test_a_product_with_another_use_is_separated_from_its_bias(other) -> None:
    """The gradients in the product and in the sum differ."""
    weights = {**linear_weights(), "c": leaf(4)}

    def forward(weights: Weights) -> Tensor:
        y = X @ weights["w"].T
        return (y + weights["b"]).tanh().sum() + other(y, weights).sum()

    with Capture(dict(weights)) as capture:
        total = forward(weights)
    trace = capture.trace()
    calls = trace.calls
    assert trace.layers[:2] == alone("w", "b")
    found = torch.autograd.grad(total, [call.edge for call in calls], retain_graph=True)
    for call, edge in zip(calls, found, strict=True):
        (expected,) = torch.autograd.grad(total, weights[call.layer.weight], retain_graph=True)
        g, a = call.output_gradient_rows(edge, 5), call.input_rows(5)
        actual = (g.flatten(0, 1).mT @ a.flatten(0, 1)).view_as(expected)
        torch.testing.assert_close(actual, expected)


def test_a_bias_on_another_axis_than_the_outputs_is_a_layer() -> None:
    weights, x = {"w": leaf(4, 2, 3), "b": leaf(4)}, tensor(5, 2, 6)
    trace = tracked(weights, lambda w: F.conv1d(x, w["w"]) + w["b"])
    assert trace.layers == (Layer("w", None, (4, 2, 3)), Layer("b", None, (4,), "bias"))


def test_the_bias_of_groups_alone() -> None:
    """One vector over the outputs of all groups, in their order."""
    weights, x = {"b": leaf(6)}, tensor(5, 4, 3)
    with Capture(dict(weights)) as capture:
        output = F.conv1d(x, tensor(6, 2, 2), weights["b"], groups=2)
    (call,) = capture.trace().calls
    assert_gradient(call, output, weights)


def test_a_product_that_an_unrecorded_op_reads_is_separated_from_its_bias() -> None:
    weights = linear_weights()
    with Capture(dict(weights)) as capture:
        product = X @ weights["w"].T
        total = (product + weights["b"]).sum() + torch.vmap(torch.sin)(product).sum()
    assert capture.trace().layers == LINEAR
    assert capture.trace().mark_untracked(total).layers == alone("w", "b")


def test_a_scale_and_a_shift_for_each_unit() -> None:
    weights = {"w": leaf(3), "b": leaf(3)}
    for forward in (lambda w: X * w["w"] + w["b"], lambda w: w["w"] * X + w["b"]):
        with Capture(dict(weights)) as capture:
            output = forward(weights)
        trace = capture.trace()
        (call,) = trace.calls
        assert trace.layers == (Layer("w", "b", (3,), "per_unit"),)
        assert_gradient(call, output, weights)


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_linear_maps_of_attention(batch_first: bool) -> None:
    """Each example's gradients, with more examples than positions."""
    attention = nn.MultiheadAttention(4, 2, batch_first=batch_first).double()
    named, x = dict(attention.named_parameters()), tensor(5, 3, 4)
    with Capture(dict(named)) as capture:
        output, _ = attention(*[x if batch_first else x.transpose(0, 1)] * 3)
    trace = capture.trace()
    calls = trace.calls
    assert trace.layers == (
        Layer("in_proj_weight", "in_proj_bias", (12, 4)),
        Layer("out_proj.weight", "out_proj.bias", (4, 4)),
    )
    totals = (output if batch_first else output.transpose(0, 1)).sin().sum((1, 2))  # [B]
    edges = torch.autograd.grad(totals.sum(), [call.edge for call in calls], retain_graph=True)
    for call, edge in zip(calls, edges, strict=True):
        g, a = call.output_gradient_rows(edge, 5), call.input_rows(5)
        found = call.layer.views(torch.einsum("bso,bsi->boi", g, a).flatten(1))
        for name, value in found.items():
            for total, actual in zip(totals, value, strict=True):
                (expected,) = torch.autograd.grad(total, named[name], retain_graph=True)
                torch.testing.assert_close(actual, expected)


# ---- the mode -----------------------------------------------------------------------------------


def test_nothing_is_recorded_outside() -> None:
    weights = linear_weights()
    capture = Capture(dict(weights))
    F.linear(X, weights["w"])
    with capture:
        pass
    F.linear(X, weights["w"])
    assert not capture.trace().calls and not capture.trace().unsupported


def test_an_exception_ends_the_capture() -> None:
    weights = linear_weights()
    capture = Capture(dict(weights))
    with pytest.raises(ZeroDivisionError), capture:
        F.linear(X, weights["w"], weights["b"])
        raise ZeroDivisionError
    F.linear(X, weights["w"])
    assert len(capture.trace().calls) == 1


def test_an_op_that_fails_is_the_callers_error() -> None:
    weights = linear_weights()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), Capture(dict(weights)):
        F.linear(X[:, :2], weights["w"])
    with pytest.raises(TypeError), Capture(dict(weights)):
        F.linear(X)


def test_captures_nest() -> None:
    weights = linear_weights()
    with Capture({"w": weights["w"]}) as outer, Capture(dict(weights)) as inner:
        F.linear(X, weights["w"], weights["b"])
    assert [len(outer.trace().calls), len(inner.trace().calls)] == [1, 1]
    assert outer.trace().layers == (Layer("w", None, (4, 3)),)


def test_no_gradient_is_left_on_the_weights() -> None:
    weights = linear_weights()
    with Capture(dict(weights)) as capture:
        output = F.linear(X, weights["w"], weights["b"])
    torch.autograd.grad(output.sum(), [call.edge for call in capture.trace().calls])
    assert all(value.grad is None for value in weights.values())


def test_rows_that_the_graph_keeps_apart() -> None:
    """Plain chains are recognized; ops that may join or transpose rows are left to gradients."""
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    hidden = x.tanh()
    assert is_row_independent(random_projection(nn.functional.linear(hidden, w)))
    assert is_row_independent(random_projection((hidden @ w.mT).relu() + (x.sigmoid() @ w.mT)))
    assert is_row_independent(random_projection(hidden.view(4, 3, 1).view(4, 3)))
    square, column = hidden @ w.mT, hidden @ torch.randn(3, requires_grad=True)
    joined = {
        "broadcast": square + column, "transposed": square.mT, "second": w.tanh() @ hidden.mT,
        "centred": hidden - hidden.mean(0), "first": hidden[:1].expand(4, 3),
        "softmax": hidden.softmax(0), "view": hidden.view(3, 4).view(4, 3), "cumulative":
        hidden.cumsum(0),
    }
    for name, output in joined.items():
        assert not is_row_independent(random_projection(output)), name


@pytest.mark.parametrize("rows", [2, 5])
def test_a_layer_with_more_or_fewer_rows_than_examples(rows: int) -> None:
    """It alone is marked, with the layer of the examples still tested by gradients."""
    weights = {"w": leaf(3, 3), "v": leaf(3, 3)}
    with Capture(dict(weights)) as capture:
        code = F.linear(tensor(rows, 3), weights["v"]).sum(0)
        per_example = (F.linear(tensor(4, 3), weights["w"]) * code).sum(1)
    trace = capture.trace()
    marked = mark_wrong_batch_axis(trace, 4, per_example)
    assert marked.layers == (Layer("w", None, (3, 3)),)
    assert f"{rows} rows where there are 4 examples" in marked.unsupported["v"]


def test_a_projection_depends_on_outputs_whose_sum_is_constant() -> None:
    x = leaf(4, 3)
    (gradient,) = torch.autograd.grad(random_projection(x.softmax(-1)).sum(), x)
    assert (gradient.norm(dim=-1) > 1e-3).all()


def test_block_indices_outlive_their_context() -> None:
    """Computed in inference mode they can be used in gradients; pickled they name no device."""
    block = Block((Layer("w", "b", (2, 3)),), structure_spec.Block())
    index = BlockIndices([block], {"b": (2,), "w": (2, 3)})
    with torch.inference_mode():
        (found,) = index
    assert not found.is_inference()
    (loaded,) = pickle.loads(pickle.dumps(index))
    assert torch.equal(loaded, found)
