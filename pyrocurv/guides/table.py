"""The table that `summary` prints: what has a posterior, and what stays a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from pyrocurv.blocks import Block


def table(
    latents: Mapping[str, Tensor], blocks: Sequence[Block], left_out: Mapping[str, str],
    fallback: str, modules: Mapping[str, nn.Module],
) -> str:
    """A row for each latent and each parameter, and how many numbers have a posterior in blocks."""
    structure = {name: block.label for block in blocks for name in block.tensors} | {**left_out}
    points = {
        f"{owner}.{name}".lstrip("."): parameter for owner, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
    }
    rows = [("site", "shape", "structure", "numbers")]
    rows += [_row(name, value, structure.get(name, fallback)) for name, value in latents.items()]
    rows += [
        _row(name, value, "point" if value.requires_grad else "frozen")
        for name, value in points.items()
    ]
    here = sum(block.size for block in blocks)
    every = sum(value.numel() for value in (*latents.values(), *points.values()))
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], width, strict=False)),
                   row[3].rjust(width[3])])
        for row in rows
    ]
    return "\n".join([*lines, f"{here:,} of {every:,} numbers have a posterior here"])


def _row(name: str, value: Tensor, structure: str) -> tuple[str, str, str, str]:
    return name, str(tuple(value.shape)), structure, str(value.numel())
