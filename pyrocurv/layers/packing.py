"""The vectors of several blocks at once: what is dispatched does not grow with their number.

The vectors of blocks of several tensors are cut from one tensor, and the values of all are copied
or averaged by one or two calls of `torch._foreach_*`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyrocurv.layers.block import Block


def pack(
    blocks: Sequence[Block], values: Mapping[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The vectors [P_b] of the blocks with {name: [*shape]} in them, and the views of these."""
    packed: dict[int, Tensor] = {}
    views: dict[str, Tensor] = {}
    for members in _alike(blocks, [values[next(iter(block.tensors))] for block in blocks]):
        chosen = [blocks[index] for index in members]
        first = values[next(iter(chosen[0].tensors))]
        vectors = _cut(first.new_empty(sum(block.size for block in chosen)), chosen)
        targets = _views(chosen, vectors)
        torch._foreach_copy_([*targets.values()], [values[name] for name in targets])
        packed.update(zip(members, vectors, strict=True))
        views.update(targets)
    return [
        packed[index] if index in packed else block.pack(values)
        for index, block in enumerate(blocks)
    ], views


def lerp(
    blocks: Sequence[Block], vectors: Sequence[Tensor], values: Mapping[str, Tensor], weight: float
) -> list[Tensor]:
    """vectors + weight · (values - vectors), for values {name: [*shape]}."""
    moved: dict[int, Tensor] = {}
    for members in _alike(blocks, vectors):
        if flat := [index for index in members if blocks[index].is_flat]:
            ends = [values[next(iter(blocks[index].tensors))].reshape(-1) for index in flat]
            starts = [vectors[index] for index in flat]
            moved.update(zip(flat, torch._foreach_lerp(starts, ends, weight), strict=True))
        if others := [index for index in members if index not in moved]:
            chosen = [blocks[index] for index in others]
            results = _cut(torch.cat([vectors[index] for index in others]), chosen)
            targets = _views(chosen, results)
            torch._foreach_lerp_([*targets.values()], [values[name] for name in targets], weight)
            moved.update(zip(others, results, strict=True))
    return [
        moved[index] if index in moved else torch.lerp(vector, block.pack(values), weight)
        for index, (block, vector) in enumerate(zip(blocks, vectors, strict=True))
    ]


def _alike(blocks: Sequence[Block], tensors: Sequence[Tensor]) -> list[list[int]]:
    """The positions of blocks with views, by the device and the dtype of a tensor of each."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, (block, tensor) in enumerate(zip(blocks, tensors, strict=True)):
        if block.has_views:
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    return [*groups.values()]


def _cut(whole: Tensor, blocks: Sequence[Block]) -> list[Tensor]:
    """The vectors [P_b] of the blocks in one tensor [Σ P_b]."""
    return [*whole.split([block.size for block in blocks])]


def _views(blocks: Sequence[Block], vectors: Sequence[Tensor]) -> dict[str, Tensor]:
    views: dict[str, Tensor] = {}
    for block, vector in zip(blocks, vectors, strict=True):
        views.update(block.strided_views(vector))
    return views
