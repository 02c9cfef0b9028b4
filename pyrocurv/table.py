"""The table that `summary` prints: each tensor with its structure, and how many are in blocks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def table(rows: Iterable[tuple[str, Tensor, str]], here: int, what: str, kind: str) -> str:
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
