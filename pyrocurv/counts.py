"""How often the curvature of each block was estimated, and how often it is now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyrocurv import engine
from pyrocurv.blocks import Block
from pyrocurv.curvature import Curvature
from pyrocurv.state import State


class Updates(NamedTuple):
    """Of a block's curvature."""

    updates: int
    interval: int


def counts(spec: Curvature, blocks: Sequence[Block], state: State) -> dict[str, Updates]:
    """{name of the block: how often it was estimated, at which interval of steps it is now}."""
    found = {}
    for block, one in zip(blocks, state.blocks, strict=True):
        updates = 0 if one.running is None else one.running.count
        sensed = engine.is_sensed(spec, block)
        found[block.name] = Updates(updates, 1 if sensed else spec.interval(state.step, one.clock))
    return found
