"""Which of a network's layers have been met, and their blocks: more with each pass that meets more.

Layers of two parameter groups share no block, and a block keeps its place once it has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyrocurv.blocks import Block, partition
from pyrocurv.capture import Capture
from pyrocurv.choice import LEFT_OUT, Choice, choose
from pyrocurv.layers import Layer
from pyrocurv.optim.places import Places
from pyrocurv.rows import misread, said_by, summed
from pyrocurv.uses import Call, apart


@dataclass(frozen=True, eq=False)
class Layout:
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


def extended(
    layout: Layout, fresh: Sequence[Layer], structure: Choice, modules: Mapping[str, nn.Module],
    places: Places,
) -> Layout:
    """The layout with blocks for the layers that are `fresh`."""
    if not fresh:
        return layout
    chosen = choose(structure, "kfac", [*layout.layers, *fresh], modules, LEFT_OUT)
    group = {layer: id(places[layer.weight][1]) for layer in fresh}
    blocks = list(layout.blocks)
    for number in dict.fromkeys(group.values()):
        mine = [x for x in fresh if group[x] == number and chosen[x] not in LEFT_OUT]
        blocks += partition(mine, lambda x: "diag" if x.form == "opaque" else chosen[x])
    return Layout(chosen, tuple(blocks))


def unmet(layout: Layout, calls: Iterable[Call]) -> list[Layer]:
    """The layers of calls, without those that share a tensor with one that was met before."""
    known = layout.names
    return [x for x in dict.fromkeys(call.layer for call in calls) if not known & set(x.tensors)]


def opaque(names: Iterable[str], places: Places) -> list[Layer]:
    """Parameters that no supported op consumes, as layers."""
    return [Layer(name, None, tuple(places[name][0].shape), "opaque") for name in names]


def grouped(calls: Iterable[Call], places: Places) -> list[Call]:
    """The calls; in two where weight and bias are in two groups."""
    group = {name: id(group) for name, (_, group) in places.items()}
    return [
        part for call in calls for part in (
            [call] if call.layer.bias is None
            or group[call.layer.weight] == group[call.layer.bias] else apart(call)
        )
    ]


def refuse_misread(layout: Layout, capture: Capture, output: Any, count: int) -> None:
    """Have layers missed that do not see the examples as rows, where a layer is new."""
    calls = capture.calls
    if calls and layout.names >= {name for call in calls for name in call.layer.tensors}:
        return
    capture.note_hidden(summed(output))
    said = None if capture.coupled else said_by(output, count)
    capture.missed |= misread(calls, count, said)
