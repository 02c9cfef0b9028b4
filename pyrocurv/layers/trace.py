"""The layers that one forward pass used and their calls, resolved from the recorded ops.

A weight and a bias that are always used together are one layer; otherwise, as a weight with two
biases, each is a separate layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from pyrocurv.layers import Layer
from pyrocurv.layers.autograd_graph import consumers, sequence_number
from pyrocurv.layers.calls import OpCall, OpRecord


@dataclass(frozen=True, eq=False)
class Recording:
    """The ops that a `Capture` recorded, and the unsupported tensors {name: reason}."""

    tracked: Mapping[str, Tensor]
    ops: tuple[OpRecord, ...]
    reused: frozenset[int]  # ids of the ops whose product has another use than the sum with a bias
    nodes: Mapping[int, bool]  # sequence numbers of the autograd nodes; False: of an op's result
    unsupported: Mapping[str, str]
    has_batch_coupling: bool


@dataclass(frozen=True, eq=False)
class Trace:
    """The layers whose uses are all supported, in order of first use, and their calls.

    `unsupported` {name: reason} are the other tensors that were used. `has_batch_coupling` says
    whether a batch norm in training mode joined the examples.
    """

    layers: tuple[Layer, ...]
    calls: tuple[OpCall, ...]
    unsupported: Mapping[str, str]
    has_batch_coupling: bool
    recording: Recording

    @staticmethod
    def of(recording: Recording) -> Trace:
        """The trace of a recording."""
        calls, unsupported = _resolve(recording)
        layers = tuple(dict.fromkeys(call.layer for call in calls))
        return Trace(layers, tuple(calls), unsupported, recording.has_batch_coupling, recording)

    @property
    def tracked_names(self) -> set[str]:
        """The tensors that a recorded op consumed."""
        return {*self.unsupported, *(name for layer in self.layers for name in layer.tensors)}

    def mark_unsupported(self, reasons: Mapping[str, str]) -> Trace:
        """The trace without the tensors in `reasons` {name: reason}."""
        if not reasons:
            return self
        unsupported = {**self.unsupported, **reasons}
        return Trace.of(replace(self.recording, unsupported=unsupported))

    def mark_untracked(self, total: Tensor) -> Trace:
        """The trace without the tensors that `total` depends on through an unrecorded op.

        Such ops are inside `torch.vmap` or an `autograd.Function`, or in the backward pass of a
        derivative that the model takes.
        """
        recording, readers = self.recording, consumers(total)
        untracked = {
            name: "an op that could not be traced" for name, tensor in recording.tracked.items()
            if name not in self.unsupported and _has_untracked_use(tensor, readers, recording.nodes)
        }
        reused = {
            id(record.product) for record in recording.ops if record.product is not None and any(
                sequence_number(node) not in recording.nodes
                for node in readers.get(record.product.edge.node, ())
            )
        }
        return Trace.of(replace(
            recording, unsupported={**self.unsupported, **untracked},
            reused=recording.reused | reused,
        ))


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


class _Layout(NamedTuple):
    """How an op uses a weight as a matrix."""

    orientation: str
    groups: int
    shape: tuple[int, ...]


def _resolve(recording: Recording) -> tuple[list[OpCall], dict[str, str]]:
    """The calls of the layers, and the unsupported tensors.

    A weight with two layouts that are not each other's transpose becomes unsupported.
    """
    records = _join_added_biases(recording)
    layouts: dict[str, list[_Layout]] = defaultdict(list)
    partners: dict[str, set[str | None]] = defaultdict(set)
    for record in records:
        weight, bias = record.names
        if record.weight is not None:
            layouts[record.weight.name].append(
                _Layout(record.orientation, record.groups, record.weight.shape)
            )
            partners[record.weight.name].add(bias)
        if record.bias is not None:
            partners[record.bias.name].add(weight)
    biases = {record.bias.name for record in records if record.bias is not None}
    unsupported = dict(recording.unsupported)
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
            layer = Layer(weight, bias if joined else None, shape, orientation, groups)
            calls.append(OpCall(layer, record, record.orientation != orientation))
        if record.bias is not None and not joined and bias not in unsupported:
            layer = Layer(record.bias.name, None, record.bias.shape, "bias")
            calls.append(OpCall(layer, record))
    return calls, unsupported


def _join_added_biases(recording: Recording) -> list[OpRecord]:
    """The ops, with a bias that was added to a product of no other use joined to the product."""
    additions = {
        id(record.product): record for record in recording.ops
        if record.product is not None and _can_join(record.product, recording.reused)
    }
    return [
        replace(record, bias=additions[id(record)].bias) if id(record) in additions else record
        for record in recording.ops if id(record.product) not in additions
    ]


def _can_join(product: OpRecord, reused: Container[int]) -> bool:
    return (
        id(product) not in reused
        and product.weight is not None and product.weight.row_slice is None
    )


def _are_transposes(layouts: Sequence[_Layout]) -> bool:
    """Whether they are one matrix and its transpose."""
    orientations, groups, shapes = map(set, zip(*layouts, strict=True))
    is_matrix = all(len(shape) == 2 for shape in shapes)
    return is_matrix and orientations <= {"out_in", "in_out"} and groups == {1}
