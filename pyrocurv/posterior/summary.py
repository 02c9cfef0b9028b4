"""The table that `summary` prints: each tensor with its structure, and how many are in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import uses_sample_gradients


def format_table(rows: Iterable[tuple[str, Tensor, str]], here: int, what: str, kind: str) -> str:
    """A line for each (name, tensor, structure), and how many numbers there are `here`.

    `what` is the name of a row, `kind` what the numbers here have.
    """
    rows = list(rows)
    cells = [(what, "shape", "structure", "numbers")]
    cells += [(name, str(tuple(x.shape)), how, str(x.numel())) for name, x, how in rows]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], width, strict=False)),
                   row[3].rjust(width[3])])
        for row in cells
    ]
    every = sum(x.numel() for _, x, _ in rows)
    return "\n".join([*lines, f"{here:,} of {every:,} numbers have {kind} here"])


class UpdateCount(NamedTuple):
    """Of a block's curvature."""

    updates: int
    interval: int


def update_counts(
    spec: Curvature, blocks: Sequence[Block], state: Posterior
) -> dict[str, UpdateCount]:
    """{name of the block: how often it was estimated, at which interval of steps it is now}."""
    found = {}
    for block, one in zip(blocks, state.blocks, strict=True):
        updates, interval = 0, spec.interval(state.step)
        if one.running is not None:
            updates = one.running.count
            interval = spec.interval(state.step, one.running.interval)
        sensed = uses_sample_gradients(spec, block)
        found[block.name] = UpdateCount(updates, 1 if sensed else interval)
    return found


def summary(
    latents: Mapping[str, Tensor], blocks: Sequence[Block], excluded: Mapping[str, str],
    fallback: str, modules: Mapping[str, nn.Module],
) -> str:
    """A row for each latent and each parameter, and how many numbers have a posterior in blocks."""
    structure = {name: block.label for block in blocks for name in block.tensors} | {**excluded}
    rows = [(name, value, structure.get(name, fallback)) for name, value in latents.items()]
    rows += [
        (f"{owner}.{name}".lstrip("."), p, "point" if p.requires_grad else "frozen")
        for owner, module in modules.items() for name, p in module.named_parameters(recurse=False)
    ]
    return format_table(rows, sum(block.size for block in blocks), "site", "a posterior")
