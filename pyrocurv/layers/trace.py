"""The layers that one forward pass used and their calls, resolved from the recorded ops.

A weight and a bias that are always used together are one layer; otherwise, as a weight with two
biases, each is a separate layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from pyrocurv.layers import Layer
from pyrocurv.layers.autograd_graph import consumers, sequence_number
from pyrocurv.layers.calls import Layout, OpCall, OpRecord
from pyrocurv.layers.linear import EMBEDDING


@dataclass(frozen=True, eq=False)
class Trace:
    """The ops that a `Capture` recorded, and the layers whose uses are all supported."""

    tracked: Mapping[str, Tensor]
    ops: tuple[OpRecord, ...]
    reused: frozenset[int]  # ids of the ops whose product has another use than the sum with a bias
    nodes: Mapping[int, bool]  # sequence numbers of the autograd nodes; False: of an op's result
    refused: Mapping[str, str]  # {name: reason} of tensors in other ops
    has_batch_coupling: bool  # whether a batch norm in training mode joined the examples

    @cached_property
    def _resolved(self) -> tuple[list[OpCall], dict[str, str]]:
        return _resolve(_join_added_biases(self.ops, self.reused), self.refused)

    @property
    def calls(self) -> list[OpCall]:
        """The calls of the layers."""
        return self._resolved[0]

    @property
    def unsupported(self) -> Mapping[str, str]:
        """{name: reason} of the other tensors that were used."""
        return self._resolved[1]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers in order of first use."""
        return tuple(dict.fromkeys(call.layer for call in self.calls))

    @property
    def tracked_names(self) -> set[str]:
        """The tensors that a recorded op consumed."""
        return {*self.unsupported, *(name for layer in self.layers for name in layer.tensors)}

    def mark_unsupported(self, reasons: Mapping[str, str]) -> Trace:
        """The trace without the tensors in `reasons` {name: reason}."""
        return replace(self, refused={**self.unsupported, **reasons}) if reasons else self

    def mark_untracked(self, total: Tensor) -> Trace:
        """The trace without the tensors that `total` depends on through an unrecorded op.

        Such ops are inside `torch.vmap` or an `autograd.Function`, or in the backward pass of a
        derivative that the model takes.
        """
        readers = consumers(total)
        untracked = {
            name: "an op that could not be traced" for name, tensor in self.tracked.items()
            if name not in self.unsupported and _has_untracked_use(tensor, readers, self.nodes)
        }
        reused = {
            id(record.product) for record in self.ops if record.product is not None and any(
                sequence_number(node) not in self.nodes
                for node in readers.get(record.product.edge.node, ())
            )
        }
        refused = {**self.unsupported, **untracked}
        return replace(self, refused=refused, reused=self.reused | reused)


def _has_untracked_use(
    tensor: Tensor, readers: Mapping[Node, Sequence[Node]], nodes: Mapping[int, bool]
) -> bool:
    """Whether a node that was not recorded reads the tensor, directly or inside recorded ops."""
    ahead = [get_gradient_edge(tensor).node] if tensor.requires_grad else []
    while ahead:
        for node in readers.get(ahead.pop(), ()):
            is_inside = nodes.get(sequence_number(node))
            if is_inside is None:
                return True
            if is_inside:  # a node inside an op, whose own readers count too
                ahead.append(node)
    return False


# ---- layers from ops ----------------------------------------------------------------------------


def _resolve(
    records: Sequence[OpRecord], refused: Mapping[str, str]
) -> tuple[list[OpCall], dict[str, str]]:
    """The calls of the layers, and the unsupported tensors.

    A weight with two layouts that are not each other's transpose becomes unsupported.
    """
    layouts: dict[str, list[Layout]] = defaultdict(list)
    partners: dict[str, set[str | None]] = defaultdict(set)
    for record in records:
        weight, bias = record.names
        if weight is not None:
            layouts[weight].append(record.layout)
            partners[weight].add(bias)
        if bias is not None:
            partners[bias].add(weight)
    biases = {record.names[1] for record in records}
    lookups = {weight for weight in layouts if all(
        record.op is EMBEDDING for record in records if record.names[0] == weight
    )}
    unsupported = dict(refused)
    for name, uses in layouts.items():
        if len(set(uses)) > 1 and not _are_transposes(uses) or name in biases:
            unsupported.setdefault(name, "a weight in two layers of different kinds")

    def are_one_layer(weight: str | None, bias: str | None) -> bool:
        return (
            weight is not None and bias is not None
            and partners[weight] == {bias} and partners[bias] == {weight}
            and len(set(layouts[weight])) == 1 and not {weight, bias} & unsupported.keys()
        )

    calls: list[OpCall] = []
    for record in records:
        weight, bias = record.names
        joined = are_one_layer(weight, bias)
        if weight is not None and weight not in unsupported:
            orientation, groups, shape = layouts[weight][0]
            kind = "lookup" if weight in lookups else orientation
            layer = Layer(weight, bias if joined else None, shape, kind, groups)
            calls.append(OpCall(layer, record, record.orientation != orientation))
        if record.bias is not None and not joined and bias not in unsupported:
            layer = Layer(record.bias.name, None, record.bias.shape, "bias")
            calls.append(OpCall(layer, record))
    return calls, unsupported


def _join_added_biases(ops: Sequence[OpRecord], reused: frozenset[int]) -> list[OpRecord]:
    """The ops, with a bias that was added to a product of no other use joined to the product."""
    additions = {
        id(product): record for record in ops
        if (product := record.product) is not None and id(product) not in reused
        and product.weight is not None and product.weight.row_slice is None
    }
    return [
        replace(record, bias=additions[id(record)].bias) if id(record) in additions else record
        for record in ops if id(record.product) not in additions
    ]


def _are_transposes(layouts: Sequence[Layout]) -> bool:
    """Whether they are one matrix and its transpose."""
    orientations, groups, shapes = map(set, zip(*layouts, strict=True))
    is_matrix = all(len(shape) == 2 for shape in shapes)
    return is_matrix and orientations <= {"out_in", "in_out"} and groups == {1}
