"""What a saved state of `NGVI` must have in common with the one that goes on from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pyrocurv.guides.families import Family
from pyrocurv.layers.block import Block
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures.serialization import from_state, to_state

Place = Sequence[float]
Layout = Sequence[Mapping[str, Any]]  # `Block.state()` of each block


def layout(blocks: Sequence[Block]) -> Layout:
    """The blocks in plain values."""
    return to_state(blocks)


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
        warn_user(
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
    block = from_state(one)
    return f"{block.name} ({block.structure!r} over {block.size} weights {list(block.tensors)})"


class DatasetSizeCheck:
    """Notices, once, a model whose data in all are as many as happen to be in the batch."""

    def __init__(self) -> None:
        self._seen: list[float] = []  # two at most

    def note(self, num_data: float) -> None:
        """One step's N."""
        if num_data in self._seen or len(self._seen) > 1:
            return
        if self._seen:
            warn_user(
                f"the model had {self._seen[0]:g} data in all, and has {num_data:g} now: the "
                "posterior is that of so many. A plate says how many there are, of which a call "
                'has a batch: pyro.plate("data", N, subsample=torch.arange(len(x)))'
            )
        self._seen.append(num_data)
