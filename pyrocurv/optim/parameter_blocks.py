"""The layers of a network that forward passes have shown so far, and the blocks they form.

Layers of two parameter groups share no block, and a block keeps its place once it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyrocurv.curvature.collect import by_example
from pyrocurv.layers import Layer
from pyrocurv.layers.batch_axis import (
    mark_wrong_batch_axis,
    mixing_calls,
    per_example_scalar,
    total_output,
)
from pyrocurv.layers.block import Block, make_blocks
from pyrocurv.layers.calls import LayerCall, OpCall, split_weight_and_bias
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, select_structures
from pyrocurv.layers.trace import Trace
from pyrocurv.optim.parameter_store import NamedParameters
from pyrocurv.posterior.summary import format_table


@dataclass(frozen=True, eq=False)
class ParameterBlocks:
    """The known layers, each with its structure (or "point", "frozen"), and their blocks."""

    layers: Mapping[Layer, Any]
    blocks: tuple[Block, ...] = ()

    @property
    def names(self) -> set[str]:
        """The names of all tensors of known layers."""
        return {name for layer in self.layers for name in layer.tensors}

    @property
    def frozen(self) -> set[str]:
        """The names of all tensors that are never changed."""
        return {n for layer, kind in self.layers.items() if kind == "frozen" for n in layer.tensors}


def add_layers(
    layout: ParameterBlocks, layers: Sequence[Layer], structure: StructureChoice,
    modules: Mapping[str, nn.Module], named: NamedParameters,
) -> ParameterBlocks:
    """The layout with blocks for new layers."""
    if not layers:
        return layout
    structures = select_structures(structure, "kfac", [*layout.layers, *layers], modules, LEFT_OUT)
    group = {layer: id(named[layer.weight][1]) for layer in layers}
    blocks = list(layout.blocks)
    for number in dict.fromkeys(group.values()):
        members = [x for x in layers if group[x] == number and structures[x] not in LEFT_OUT]
        blocks += make_blocks(members, structures.__getitem__)
    return ParameterBlocks(structures, tuple(blocks))


def new_layers(layout: ParameterBlocks, calls: Iterable[LayerCall]) -> list[Layer]:
    """The layers of calls, without those that share a tensor with a known layer."""
    known = layout.names
    return [x for x in dict.fromkeys(call.layer for call in calls) if not known & set(x.tensors)]


def untraced_layers(names: Iterable[str], named: NamedParameters) -> list[Layer]:
    """Parameters that no supported op consumes, as layers."""
    return [Layer(name, None, tuple(named[name][0].shape), "untraced") for name in names]


def split_by_group(calls: Iterable[OpCall], named: NamedParameters) -> list[OpCall]:
    """The calls; in two where weight and bias are in two groups."""
    group = {name: id(group) for name, (_, group) in named.items()}
    return [
        part for call in calls for part in (
            [call] if call.layer.bias is None
            or group[call.layer.weight] == group[call.layer.bias] else split_weight_and_bias(call)
        )
    ]


def check_batch_axis(
    layout: ParameterBlocks, trace: Trace, output: Any, batch_size: int
) -> Trace:
    """The trace without layers whose rows are not the examples; checked if any layer is new."""
    if trace.layers and layout.names >= {name for x in trace.layers for name in x.tensors}:
        return trace
    trace = trace.mark_untracked(total_output(output))
    scalar = None if trace.has_batch_coupling else per_example_scalar(output, batch_size)
    return mark_wrong_batch_axis(trace, batch_size, scalar)


def calls_by_example(calls: Sequence[LayerCall], output: Any, count: int) -> list[LayerCall]:
    """The calls; of layers whose rows are not the `count` examples, by a pass for each example."""
    scalar = per_example_scalar(output, count)
    same = [call for call in calls if isinstance(call, OpCall) and call.batch_size == count]
    mixing = [] if scalar is None or count == 1 else mixing_calls(same, scalar)
    return by_example(calls, count, {id(call) for call in mixing})


def parameter_table(layout: ParameterBlocks, named: NamedParameters) -> str:
    """A table of every parameter: name, shape, structure, size."""
    kinds = {n: kind for layer, kind in layout.layers.items() if kind in LEFT_OUT
             for n in layer.tensors}
    kinds |= {name: block.label for block in layout.blocks for name in block.tensors}
    rows = [
        (name, p, kinds.get(name, "adam" if p.requires_grad else "frozen"))
        for name, (p, _) in named.items()
    ]
    size = sum(block.size for block in layout.blocks)
    return format_table(rows, size, "parameter", "a curvature")
