"""Which of a network's layers have been met, and their blocks: more with each pass that meets more.

Layers of two parameter groups share no block, and a block keeps its place once it has one.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.layers import Layer
from pyrocurv.layers.batch_axis import mark_wrong_batch_axis, per_example_scalar, total_output
from pyrocurv.layers.block import Block, make_blocks
from pyrocurv.layers.calls import LayerCall, OpCall, split_weight_and_bias
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, select_structures
from pyrocurv.layers.trace import Trace


@dataclass(frozen=True, eq=False)
class ParameterBlocks:
    """The layers met so far, each with its structure (or "point", "frozen"), and their blocks."""

    layers: Mapping[Layer, Any]
    blocks: tuple[Block, ...] = ()

    @property
    def names(self) -> set[str]:
        """Of all tensors met."""
        return {name for layer in self.layers for name in layer.tensors}

    @property
    def frozen(self) -> set[str]:
        """Names of what stays as it is."""
        return {n for layer, kind in self.layers.items() if kind == "frozen" for n in layer.tensors}


def add_layers(
    layout: ParameterBlocks, fresh: Sequence[Layer], structure: StructureChoice, modules: Mapping[
        str, nn.Module
    ],
    places: NamedParameters,
) -> ParameterBlocks:
    """The layout with blocks for the layers that are `fresh`."""
    if not fresh:
        return layout
    chosen = select_structures(structure, "kfac", [*layout.layers, *fresh], modules, LEFT_OUT)
    group = {layer: id(places[layer.weight][1]) for layer in fresh}
    blocks = list(layout.blocks)
    for number in dict.fromkeys(group.values()):
        mine = [x for x in fresh if group[x] == number and chosen[x] not in LEFT_OUT]
        blocks += make_blocks(mine, chosen.__getitem__)
    return ParameterBlocks(chosen, tuple(blocks))


def new_layers(layout: ParameterBlocks, calls: Iterable[LayerCall]) -> list[Layer]:
    """The layers of calls, without those that share a tensor with one that was met before."""
    known = layout.names
    return [x for x in dict.fromkeys(call.layer for call in calls) if not known & set(x.tensors)]


def untraced_layers(names: Iterable[str], places: NamedParameters) -> list[Layer]:
    """Parameters that no supported op consumes, as layers."""
    return [Layer(name, None, tuple(places[name][0].shape), "untraced") for name in names]


def split_by_group(calls: Iterable[OpCall], places: NamedParameters) -> list[OpCall]:
    """The calls; in two where weight and bias are in two groups."""
    group = {name: id(group) for name, (_, group) in places.items()}
    return [
        part for call in calls for part in (
            [call] if call.layer.bias is None
            or group[call.layer.weight] == group[call.layer.bias] else split_weight_and_bias(call)
        )
    ]


def check_batch_axis(layout: ParameterBlocks, trace: Trace, output: Any, count: int) -> Trace:
    """The trace without layers that do not see the examples as rows, where a layer is new."""
    if trace.layers and layout.names >= {name for x in trace.layers for name in x.tensors}:
        return trace
    trace = trace.mark_untracked(total_output(output))
    scalar = None if trace.has_batch_coupling else per_example_scalar(output, count)
    return mark_wrong_batch_axis(trace, count, scalar)


Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[Group]
# {name in the network: (parameter, its group)}
NamedParameters = Mapping[str, tuple[nn.Parameter, Group]]


def name_parameters(net: nn.Module, groups: Sequence[Group]) -> NamedParameters:
    """The places of the groups' parameters.

    Raises ValueError for a parameter that is none of the network's.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    split_by_group = [(p, group) for group in groups for p in group["params"]]
    strange = [tuple(p.shape) for p, _ in split_by_group if id(p) not in names]
    if strange:
        raise ValueError(
            f"parameters of shapes {strange} are none of the network's, which has "
            f"{', '.join(names.values())}"
        )
    return {names[id(p)]: (p, group) for p, group in split_by_group}


def first_parameter(block: Block, places: NamedParameters) -> tuple[nn.Parameter, Group]:
    """A block's first parameter, and the group of them all."""
    return places[next(iter(block.tensors))]


def read_block(block: Block, places: NamedParameters) -> Tensor:
    """A copy [P] of what the parameters are."""
    packed = block.pack({name: places[name][0].detach() for name in block.tensors})
    return packed.clone() if len(block.tensors) == 1 else packed


@torch.no_grad()
def write_blocks(
    blocks: Sequence[Block], packed: Sequence[Tensor], places: NamedParameters,
    names: Container[str] | None = None,
) -> None:
    """Have the parameters be these, [P] each; of some `names` alone, if they are given."""
    for block, values in zip(blocks, packed, strict=True):
        for name, value in block.strided_views(values).items():
            if names is None or name in names:
                places[name][0].copy_(value)
