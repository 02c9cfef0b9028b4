"""Which weights share a block of the curvature, in which order: the partition and its packing.

`block` and the Kronecker structures have a block for each layer, `full` and, for speed, `diag` one
for all; inside a block the layers follow each other, each as its matrix [O, I] row-major.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.layers import Layer

STRUCTURES = ("full", "block", "diag", "kfac", "ekfac")


def check_structure(name: str) -> str:
    """`name`, if it is a structure; otherwise a ValueError that says which there are."""
    if name not in STRUCTURES:
        raise ValueError(f"structure={name!r}: choose one of {', '.join(STRUCTURES)}")
    return name


@dataclass(frozen=True)
class Block:
    """Layers whose weights are one vector [P], and the structure of the matrix over it."""

    layers: tuple[Layer, ...]
    structure: str

    @property
    def size(self) -> int:
        """P."""
        return sum(layer.size for layer in self.layers)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is packed, in order."""
        return {name: shape for layer in self.layers for name, shape in layer.tensors.items()}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P]."""
        parts = [layer.pack(values) for layer in self.layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}."""
        if len(self.layers) == 1:
            return self.layers[0].unpack(packed)
        parts = packed.split([layer.size for layer in self.layers], -1)
        values: dict[str, Tensor] = {}
        for layer, part in zip(self.layers, parts, strict=True):
            values.update(layer.unpack(part))
        return values


def partition(layers: Sequence[Layer], structure: str) -> list[Block]:
    """The blocks that `structure` makes of the layers."""
    if check_structure(structure) in ("full", "diag"):
        return [Block(tuple(layers), structure)] if layers else []
    return [Block((layer,), structure) for layer in layers]


def positions(blocks: Sequence[Block], order: Mapping[str, Sequence[int]]) -> tuple[Tensor, ...]:
    """For each block, where its entries [P_b] stand in the flat vector of `order` {name: shape}."""
    places: dict[str, Tensor] = {}
    start = 0
    for name, shape in order.items():
        size = torch.Size(shape).numel()
        places[name] = torch.arange(start, start + size).reshape(*shape)
        start += size
    return tuple(block.pack(places) for block in blocks)
