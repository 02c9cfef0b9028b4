"""Which process has which blocks, where each block has one process that keeps its matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pyrocurv.layers.block import Block
from pyrocurv.runtime.workers import assign


def cost(block: Block) -> float:
    """The multiplications of an eigendecomposition, up to a factor, and the size."""
    if not block.structure.is_kronecker:
        return block.size
    *groups, outputs, inputs = block.layers[0].matrix_shape
    return math.prod(groups) * (outputs**3 + inputs**3) + block.size


def owners_of(
    new: Sequence[Block], size: int, known: Sequence[Block] = (),
    ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """{name of a block: the rank that has it} of new blocks, by what they cost.

    The `known` ones have their `ranks` already.
    """
    loads = [0.0] * size
    for block in known:
        loads[(ranks or {})[block.name]] += cost(block)
    owners = assign([*map(cost, new)], size, loads)
    return dict(zip((block.name for block in new), owners, strict=True))


def one_layer_each(blocks: Sequence[Block]) -> list[Block]:
    """The blocks, with one for each layer where several share a diagonal."""
    return [
        part for block in blocks for part in (
            [Block((x,), block.structure) for x in block.layers] if block.kind == "diag"
            else [block]
        )
    ]


def check_supported(block: Block, remedy: str) -> None:
    """Raise ValueError for a structure that one process alone cannot have."""
    if block.structure.is_kronecker:
        *_, outputs, inputs = block.layers[0].matrix_shape
        if block.ranks != (outputs, inputs):
            raise ValueError(
                f"structure: {block.name} [{outputs}, {inputs}] would have truncated factors, "
                "which a sharded network cannot have: use KFAC(rank=None) or EKFAC(rank=None)"
            )
    elif block.kind != "diag":
        raise ValueError(f"structure={block.label!r} for {block.name}: {remedy}")


def check_count(blocks: Sequence[Block], size: int, remedy: str) -> None:
    """Raise ValueError for fewer blocks than processes."""
    if 0 < len(blocks) < size:
        raise ValueError(
            f"net: {len(blocks)} layers have a curvature, less than the {size} ranks that it is "
            f"sharded over: {remedy}"
        )
