"""What a saved state of `NGVI` must have in common with the one that goes on from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pyrocurv.blocks import Block
from pyrocurv.families import Family
from pyrocurv.notice import notice

Place = Sequence[float]
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


def place(families: Iterable[Family]) -> Place:
    """Where a guide's means are, in short: the sum of each block."""
    return [float(family.raw_loc.detach().double().sum()) for family in families]


def check_place(saved: Place | None, here: Place) -> None:
    """Warn where the guide is not where the state left it: its own state may not be loaded."""
    if saved and not all(
        math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3) for a, b in zip(saved, here, strict=True)
    ):
        notice(
            "the guide is not where it was when this state of NGVI was taken: load the guide's "
            "own state too, guide.load_state_dict(...)"
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
