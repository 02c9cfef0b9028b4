"""The covariance of outputs that are those of the only layer with a distribution, in closed form.

If the outputs at a place are W a, with inputs a [I] and W [O, I] ~ N(M, Λ⁻¹), their covariance is

    U diag(w) Uᵀ,  w_i = Σ_j (v_jᵀ a)² / λ_ij      Kronecker eigenbasis U, V, eigenvalues λ
    diag(w),       w_i = Σ_j a_j² / λ_ij           diagonal
    Aᵀ Λ⁻¹ A,      A = I ⊗ a                       otherwise

One product with the inputs replaces a backward pass for each output. Kristiadi, Hein & Hennig 2020,
arXiv:2002.10118, appendix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pyrocurv.curvature.output_covariance import (
    BlockCovariance,
    OutputCovariance,
    SpectralCovariance,
    output_weights,
)
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, OpCall
from pyrocurv.structures import Diagonal, KroneckerEigen, Rescaled, Structure

MAX_ELEMENTS = 2**23  # of the inputs of one chunk
MAX_WEIGHTS = 4096  # of a layer whose dense covariance is formed
MAX_NUMBER = 2**23  # exact in single precision
REARRANGEMENTS = {
    f"{name}Backward{number}" for number in (0, 1) for name in (
        "View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Squeeze", "Unsqueeze",
        "Alias", "Clone", "Expand",
    )
}


def last_layer_covariance(
    blocks: Sequence[Block], precisions: Sequence[Structure], output: Tensor,
    calls: Sequence[LayerCall], size: int, any_shift: bool,
) -> OutputCovariance | None:
    """S for the outputs [B, ...], in groups of `size`; None where there is no closed form.

    Args:
        blocks, precisions: the weights that have a distribution, and Λ of each block.
        output: the outputs; they may be the layer's with other axes.
        calls: the calls of all layers.
        size: C, the number of outputs at a place.
        any_shift: whether a term that all outputs of a place share may be left out, as the
            normalization of logits.
    """
    call = _only_call(blocks, calls)
    if call is None or call.layer.out_features != size and size != 1:
        return None
    precision, scales = precisions[0], None
    if isinstance(precision, Rescaled) and isinstance(precision.inner, KroneckerEigen):
        root, precision = precision.root.view(precision.inner.shape), precision.inner
        scales = root[:, 0].reciprocal(), root[0, :1] / root[0]  # of outputs and inputs
    if not isinstance(precision, (KroneckerEigen, Diagonal)) and precision.size > MAX_WEIGHTS:
        return None
    numbers = _numbers(output, call, any_shift)
    if numbers is None:
        return None
    with torch.no_grad():
        if size != 1:
            order = numbers[:, 0].argsort()
            wanted = torch.arange(numbers.numel(), device=numbers.device).view(-1, size)
            return _covariance(call, precision, scales, order) if bool(
                (numbers[order] == wanted).all()
            ) else None
        variances = _covariance(call, precision, scales).diag().reshape(len(output), -1)
        return SpectralCovariance(variances[:, numbers.flatten().argsort()].reshape(-1, 1))


def _only_call(blocks: Sequence[Block], calls: Sequence[LayerCall]) -> OpCall | None:
    """The call of the only layer with a distribution, if it is called once."""
    if len(blocks) != 1 or len(blocks[0].layers) != 1:
        return None
    (layer,) = blocks[0].layers
    own = [call for call in calls if call.layer == layer]
    if len(own) != 1 or not isinstance(own[0], OpCall) or own[0].transposed:
        return None
    if layer.lead or layer.orientation == "bias" or own[0].record.sequence_first_batch is not None:
        return None
    return own[0]


def _covariance(
    call: OpCall, precision: Structure, scales: tuple[Tensor, Tensor] | None,
    order: Tensor | None = None,
) -> OutputCovariance:
    """S at all positions of the layer, in an order of those of each example."""
    eigen = isinstance(precision, KroneckerEigen)
    inverse = None if eigen or isinstance(precision, Diagonal) else _inverse(precision)
    parts = []
    for a in _inputs(call, order):
        a = a if scales is None else a * scales[1]
        parts.append(_fields(a, precision, inverse, call.layer.matrix_shape))
    weights, *rest = (torch.cat([*field]) for field in zip(*parts, strict=True))
    if inverse is not None:
        return BlockCovariance(weights)
    basis = precision.output_basis if isinstance(precision, KroneckerEigen) else None
    return SpectralCovariance(weights, basis, rest[0] if rest else None, scales and scales[0])


def _inputs(call: OpCall, order: Tensor | None) -> Iterator[Tensor]:
    """The inputs a [b·S, I] at each position, of a few examples at a time."""
    positions = call.record.output_shape.numel() // (call.batch_size * call.layer.out_features)
    step = max(1, MAX_ELEMENTS // (positions * call.layer.in_features))
    for input in call.record.input.split(step):
        rows = replace(call, record=replace(call.record, input=input)).input_rows(len(input))
        yield (rows if order is None else rows[:, order]).flatten(0, 1)


def _inverse(precision: Structure) -> Tensor:
    """Λ⁻¹ [P, P]."""
    diagonal = precision.diag()
    return precision.solve(torch.eye(precision.size, dtype=diagonal.dtype, device=diagonal.device))


def _fields(
    a: Tensor, precision: Structure, inverse: Tensor | None, shape: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The fields of the covariance at positions with inputs a [N, I], for a weight [O, I]."""
    if isinstance(precision, KroneckerEigen):
        weights, rest = output_weights(a, precision)
        return (weights,) if rest is None else (weights, rest)
    if inverse is None:
        return (a.square() @ precision.inverse_diag().view(shape).mT,)
    outputs, inputs = shape
    step = max(1, MAX_ELEMENTS // (outputs * outputs * inputs))
    halves = (part @ inverse.view(outputs, inputs, -1) for part in a.split(step))  # [O, n, O·I]
    return (torch.cat([
        (half.unflatten(-1, shape) @ part.unsqueeze(-1)).squeeze(-1).movedim(0, 1)
        for half, part in zip(halves, a.split(step), strict=True)
    ]),)


def _numbers(output: Tensor, call: OpCall, any_shift: bool) -> Tensor | None:
    """Which of an example's outputs those of the layer are [S, O]; None if they are others.

    The outputs are numbered, and the numbers are pulled back to the layer: where they are only
    rearranged on the way, they arrive unchanged.
    """
    edge = _source(get_gradient_edge(output), call.edge.node, any_shift)
    count, size = len(output), output[0].numel()
    if edge is None or size > MAX_NUMBER or output.dtype not in (torch.float32, torch.float64):
        return None
    numbers = torch.arange(size, dtype=output.dtype, device=output.device)
    numbers = numbers.expand(count, -1).reshape(output.shape)
    if edge.node is not call.edge.node:
        (numbers,) = torch.autograd.grad([edge], [call.edge], [numbers], retain_graph=True)
    rows = call.output_gradient_rows(numbers, count)  # [B, S, O]
    found = rows[0].long()
    if found.numel() != size or not bool((rows == rows[:1]).all()):
        return None
    in_order = found.flatten().sort().values
    return found if bool((in_order == torch.arange(size, device=found.device)).all()) else None


def _source(edge: GradientEdge, layer: Node, any_shift: bool) -> GradientEdge | None:
    """The edge from which on, up to the layer, values are only rearranged; None if it is not so.

    With `any_shift`, normalizations over the last axis that come last are left out.
    """
    while any_shift and (_is_normalization(edge.node) or _is_expansion_to_itself(edge.node)):
        before, number = edge.node.next_functions[0]
        if before is None:
            return None
        edge = GradientEdge(before, number)
    node: Node | None = edge.node
    while node is not layer:
        if node is None or node.name() not in REARRANGEMENTS:
            return None
        node = node.next_functions[0][0]
    return edge


def _is_expansion_to_itself(node: Node) -> bool:
    """Whether a node expands a tensor to the shape it has, as a plate does with a distribution."""
    before = node.next_functions[0][0] if node.next_functions else None
    if before is None or node.name() != "ExpandBackward0":
        return False
    return before._input_metadata[0].shape == node._input_metadata[0].shape


def _is_normalization(node: Node) -> bool:
    """Whether a node is x - logsumexp(x) or log_softmax(x), over the last axis."""
    if node.name() == "SubBackward0":
        (before, _), (norm, _) = node.next_functions
        if norm is None or norm.name() != "LogsumexpBackward0":
            return False
        return norm.next_functions[0][0] is before and _is_last_axis(norm)
    return node.name() == "LogSoftmaxBackward0" and _is_last_axis(node)


def _is_last_axis(node: Any) -> bool:
    """Whether the axis that a node reduces is the last; autograd saves it without a sign."""
    saved, axes = node._saved_dim, len(node._input_metadata[0].shape)
    axis = saved[0] if isinstance(saved, tuple) and len(saved) == 1 else saved
    return axis in (axes - 1, -1, 2**64 - 1)
