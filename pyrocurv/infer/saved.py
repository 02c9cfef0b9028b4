"""What a saved state of `NGVI` must have in common with the one that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pyrocurv.blocks import Block

Layout = Sequence[Mapping[str, Any]]  # `Block.state()` of each block


def layout(blocks: Sequence[Block]) -> Layout:
    """The blocks in plain values."""
    return [block.state() for block in blocks]


def check_layout(saved: Layout, here: Layout) -> None:
    """Raises ValueError that names the first block which is another one."""
    for then, now in zip_longest(saved, here):
        if then != now:
            raise ValueError(
                f"the state is of another guide: it has {_named(then)} where this one has "
                f"{_named(now)}"
            )


def check_average(saved: bool, here: bool) -> None:
    """Raises ValueError where one averages and the other does not."""
    if saved != here:
        raise ValueError(f"the state is of average={saved}, this NGVI has average={here}")


def _named(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "no block"
    block = Block.from_state(one)
    return f"{block.name} ({block.structure!r} over {block.size} weights {list(block.tensors)})"
