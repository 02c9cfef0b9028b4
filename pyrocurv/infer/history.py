"""The record of a training: one line for each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, overload

MAX_LINES = 20  # of a printed table
COLUMNS = {  # header: (field, format)
    "epoch": ("epoch", "d"), "loss": ("loss", ".4f"), "nll": ("nll", ".4f"), "kl": ("kl", ".4f"),
    "T": ("temperature", ".3g"), "lr": ("lr", ".2e"), "held-out": ("held_out", ".4f"),
    "seconds": ("seconds", ".1f"),
}


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        epoch: its number, from 1.
        step: number of steps that were taken up to its end, without skipped ones.
        loss: nll + T kl, in nats per datum, with the T of each step. Losses are means over the
            steps of the epoch, as they were before each step; NaN if all of them were skipped.
        nll: negative log likelihood at the samples, in nats per datum.
        kl: divergence from the prior, in nats per datum, not multiplied by T.
        lr: learning rate of the last step.
        temperature: T of the last step.
        held_out: log predictive density of the held-out data, in nats per datum; None without them.
        seconds: that it took, with the held-out data.
    """

    epoch: int
    step: int
    loss: float
    nll: float
    kl: float
    lr: float
    temperature: float
    held_out: float | None = None
    seconds: float = field(default=0.0, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """The values that there are, by name, for a logger."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, repr=False)
class History(Sequence[Epoch]):
    """The epochs of a training, in their order; prints as a table, with * at the best one.

    Attributes:
        epochs: the records.
        stopped_early: whether patience or a callback ended the training before the last epoch.
    """

    epochs: tuple[Epoch, ...] = ()
    stopped_early: bool = False

    @property
    def best(self) -> Epoch | None:
        """The first epoch with the highest held-out density; None without held-out data."""
        scored = [e for e in self.epochs if e.held_out is not None and math.isfinite(e.held_out)]
        return max(scored, key=lambda e: e.held_out or 0.0, default=None)

    def __len__(self) -> int:
        return len(self.epochs)

    @overload
    def __getitem__(self, index: int) -> Epoch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Epoch]: ...

    def __getitem__(self, index: int | slice) -> Epoch | Sequence[Epoch]:
        return self.epochs[index]

    def __iter__(self) -> Iterator[Epoch]:
        return iter(self.epochs)

    def __repr__(self) -> str:
        best = -1 if self.best is None else self.epochs.index(self.best)
        shown = {*range(len(self))}
        if len(self) > MAX_LINES:
            half = MAX_LINES // 2
            shown = {*range(half), *range(len(self) - half, len(self)), best} - {-1}
        rows, marks, last = [], [], -1
        for number in sorted(shown):
            if number > last + 1:
                rows.append(["..."] * len(COLUMNS))
                marks.append("")
            epoch, last = self.epochs[number], number
            rows.append([_shown(getattr(epoch, name), spec) for name, spec in COLUMNS.values()])
            marks.append(" *" if number == best else "")
        table = [[*COLUMNS], *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + mark
            for row, mark in zip(table, ["", *marks], strict=True)
        ]
        end = f"stopped early after {len(self)} epochs" if self.stopped_early else ""
        return "\n".join([*lines, end] if end else lines)


def _shown(value: Any, spec: str) -> str:
    return "-" if value is None else format(value, spec)
