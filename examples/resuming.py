"""Going on from a checkpoint, or refusing to: shared by the larger examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyrocurv import checkpoint


class Refusal(Exception):
    """A request that cannot be met; the message says what to do, in one line."""


def load_run(path: Path, resume: bool, objects: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a checkpoint that exists; the objects have its states."""
    if not resume:
        raise Refusal(f"--checkpoint {path} is there already: pass --resume to go on from it")
    try:
        return checkpoint.load(path, objects)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise Refusal(f"--resume: {path} is of another run, or damaged: {reason}") from error
