"""Whether the rows of what a layer reads are the examples, as curvature by rows takes them to be.

They are not where a network makes weights of its own from a code, looks up positions, or has the
sequence first; the number of rows tells, and where it is that of the examples by chance, gradients,
unless autograd's graph is made of nothing that joins rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.trace import Trace


def mark_wrong_batch_axis(trace: Trace, count: int, per_example: Tensor | None) -> Trace:
    """The trace without the layers that do not see `count` examples as rows.

    A scalar `per_example` [B] of each example, its log density or one of its outputs, is pulled
    back, that of one half of the examples and then that of the other: neither may reach a row of
    the other half. It is None where batch norm in training mode joins the rows of correct layers
    too: then the rows are only counted. No gradient is taken where the graph of `per_example` keeps
    the examples apart.
    """
    reasons: dict[str, str] = {}
    calls = []
    for call in trace.calls:
        if call.batch == count:
            calls.append(call)
        else:
            reasons |= _named(call, f"{call.batch} rows where there are {count} examples")
    if not (
        per_example is None or per_example.dim() == 0 or count < 2
        or is_row_independent(per_example)
    ):
        half = _half(count).to(per_example.device)
        for rows, other_rows in ((half, ~half), (~half, half)):
            for call, gradient in _pulled(calls, per_example[rows].sum()):
                others = call.gradients(gradient, count).movedim(-3, 0)[other_rows]
                if bool((others.abs() > 0).any()):  # not where a masked example has made it NaN
                    reasons |= _named(call, "rows that reach more than their own example")
    return trace.mark_unsupported(reasons)


@functools.cache
def _half(count: int) -> Tensor:
    """Which of the examples are in one half: no shift of them all leaves the halves as they are.

    The Thue-Morse sequence, the parity of the ones in the binary number; and an odd number of them,
    which no pairing of all examples leaves as they are, a reversal say.
    """
    half = torch.tensor([bool(number.bit_count() % 2) for number in range(count)])
    if count % 4 == 0:
        half[0] = True
    return half


ENTRYWISE = ("Relu", "Tanh", "Sigmoid", "Gelu", "Silu", "Softplus", "LeakyRelu", "Elu")
ROWWISE = ("Mv", "Mm", "Convolution", "MaxPool2DWithIndices", "View", "UnsafeView", *ENTRYWISE)
ROWS = {  # of an op, the places of inputs whose rows are its output's where they are as many
    **dict.fromkeys(ROWWISE, (0,)), "Addmm": (1,), "Add": (0, 1),
}


def is_row_independent(said: Tensor) -> bool:
    """Whether a number of each example [B] hangs, node by node, on nothing but its own rows.

    Known of a chain of common ops alone, whose other inputs are leaves: False may be either.
    """
    count, ahead, seen = len(said), [said.grad_fn], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().removesuffix("Backward0")
        inputs = {place: before for place, (before, _) in enumerate(node.next_functions)
                  if before is not None and not _is_leaf(before)}
        shapes = [_shape(one) for one in (node, *inputs.values())]
        if shapes[0][:1] != [count] or not inputs.keys() <= {*ROWS.get(name, ())}:
            return False
        if name == "Add" and len({len(shape) for shape in shapes}) > 1:
            return False  # broadcast, which may make columns of rows
        ahead += inputs.values()
    return True


def _shape(node: Node) -> list[int]:
    """Of the op's output."""
    return [*node._input_metadata[0].shape]


def _is_leaf(node: Node) -> bool:
    """A weight, or one turned over."""
    if node.name() in ("TBackward0", "TransposeBackward0"):
        ((before, _),) = node.next_functions
        return before is not None and _is_leaf(before)
    return node.name().endswith("AccumulateGrad")


def random_projection(output: Tensor) -> Tensor:
    """A number [B] that hangs on all outputs of an example; their plain sum may be constant."""
    rows = output.reshape(len(output), -1)
    return rows @ torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)


def per_example_scalar(output: Any, count: int) -> Tensor | None:
    """`random_projection`, over all tensors of a nest that have a row for each example; None:
    there is none."""
    heads = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    each = [random_projection(x) for x in heads if x.shape[:1] == (count,)]
    return functools.reduce(torch.add, each) if each else None


def total_output(output: Any) -> Tensor:
    """A number that hangs on all outputs."""
    heads = [x.sum() for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    return functools.reduce(torch.add, heads) if heads else torch.zeros(())


def _pulled(calls: Sequence[LayerCall], total: Tensor) -> list[tuple[LayerCall, Tensor]]:
    """The calls that the total hangs on, with its gradient onto their outputs."""
    if not calls or not total.requires_grad:
        return []
    edges = [call.edge for call in calls]
    found = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
    return [(call, g) for call, g in zip(calls, found, strict=True) if g is not None]


def _named(call: LayerCall, why: str) -> dict[str, str]:
    return dict.fromkeys(call.layer.tensors, f"{why}: the batch is not its input's first axis")
