"""Whether the rows of a layer's input are the examples, as the curvature per example assumes.

They are not if a network computes its weights from a code, looks up positions, or has the sequence
first. The number of rows reveals most cases. If it equals the number of examples by chance,
gradients decide, unless autograd's graph has only ops that keep rows apart.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from pyrocurv.layers.autograd_graph import ancestors
from pyrocurv.layers.calls import OpCall
from pyrocurv.layers.trace import Trace


def mark_wrong_batch_axis(trace: Trace, count: int, per_example: Tensor | None) -> Trace:
    """The trace without the layers that do not see `count` examples as rows.

    A scalar `per_example` [B] of each example, its log density or one of its outputs, is pulled
    back, that of one half of the examples and then that of the other: neither may reach a row of
    the other half. It is None where batch norm in training mode joins the rows of correct layers
    too: then the rows are only counted.
    """
    wrong = [(call, f"{call.batch_size} rows where there are {count} examples")
             for call in trace.calls if call.batch_size != count]
    if per_example is not None and per_example.dim() and count > 1:
        calls = [call for call in trace.calls if call.batch_size == count]
        wrong += [(call, "rows that affect more than their own example")
                  for call in mixing_calls(calls, per_example)]
    return trace.mark_unsupported({
        name: f"{reason}: the batch is not its input's first axis"
        for call, reason in wrong for name in call.layer.tensors
    })


def mixing_calls(calls: Sequence[OpCall], per_example: Tensor) -> list[OpCall]:
    """The calls with rows that affect an example of the other half."""
    if not calls or is_row_independent(per_example):
        return []
    count, edges, mixing = len(per_example), [call.edge for call in calls], []
    half = _half(count).to(per_example.device)
    for rows in (half, ~half):
        total = per_example[rows].sum()
        gradients = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
        for call, gradient in zip(calls, gradients, strict=True):
            others = call.output_gradient_rows(gradient, count).movedim(-3, 0)[~rows]
            if bool((others.abs() > 0).any()):  # false for NaN, which a masked example may have
                mixing.append(call)
    return mixing


@functools.cache
def _half(count: int) -> Tensor:
    """A mask of half of the examples that no shift of all examples leaves unchanged.

    It is the Thue-Morse sequence, the parity of the ones in the binary number. The number of
    examples in it is odd, so no pairing of all examples, as a reversal, leaves it unchanged.
    """
    half = torch.tensor([bool(number.bit_count() % 2) for number in range(count)])
    if count % 4 == 0:
        half[0] = True
    return half


# ---- ops that keep rows apart -------------------------------------------------------------------

ELEMENTWISE = ("Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Softplus", "LeakyRelu", "Elu")
ROWWISE = ("Mv", "Mm", "Convolution", "MaxPool2DWithIndices", "View", "UnsafeView", *ELEMENTWISE)
ROW_INPUTS = {  # {op: the inputs whose rows become those of the output, if they are as many}
    **dict.fromkeys(ROWWISE, (0,)), "Addmm": (1,), "Add": (0, 1),
}


def is_row_independent(per_example: Tensor) -> bool:
    """Whether each entry [B] is known to depend on nothing but its own rows, node by node.

    Only chains of common ops whose other inputs are leaves are recognized: False may be either.
    """
    for node in ancestors(per_example):
        if _is_leaf(node):
            continue
        name = node.name().removesuffix("Backward0")
        inputs = {
            position: before for position, (before, _) in enumerate(node.next_functions)
            if before is not None and not _is_leaf(before)
        }
        shape, *others = ([*n._input_metadata[0].shape] for n in (node, *inputs.values()))
        if shape[:1] != [len(per_example)] or not inputs.keys() <= {*ROW_INPUTS.get(name, ())}:
            return False
        if name == "Add" and any(len(other) != len(shape) for other in others):
            return False  # a broadcast may turn rows into columns
    return True


def _is_leaf(node: Node) -> bool:
    """Whether a node is a leaf or the transpose of one."""
    if node.name() in ("TBackward0", "TransposeBackward0"):
        ((before, _),) = node.next_functions
        return before is not None and _is_leaf(before)
    return node.name().endswith("AccumulateGrad")


# ---- scalars of the outputs ---------------------------------------------------------------------


def random_projection(output: Tensor) -> Tensor:
    """A scalar [B] that depends on all outputs of an example; their plain sum may be constant."""
    rows = output.reshape(len(output), -1)
    return rows @ torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)


def per_example_scalar(output: Any, count: int) -> Tensor | None:
    """`random_projection`, summed over all nested tensors with `count` rows; None without any."""
    projections = [random_projection(x) for x in _outputs(output) if x.shape[:1] == (count,)]
    return functools.reduce(torch.add, projections) if projections else None


def total_output(output: Any) -> Tensor:
    """A scalar that depends on all outputs."""
    return functools.reduce(torch.add, [x.sum() for x in _outputs(output)] or [torch.zeros(())])


def _outputs(output: Any) -> list[Tensor]:
    """The nested tensors that have a gradient."""
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
