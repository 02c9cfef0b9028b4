"""A file that is replaced at once, by rank 0 for all: the last one stays until the new is on disk.

What is written goes into a file beside it, which is synced and then takes its place by
`os.replace`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyrocurv.runtime.workers import Workers


def on_rank_0(workers: Workers, write: Callable[[], Any]) -> None:
    """Have rank 0 write, and all others wait for it; an error there is one on all of them."""
    error: BaseException | None = None
    if workers.rank == 0:
        try:
            write()
        except BaseException as caught:
            error = caught
    message = workers.broadcast(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"rank 0 could not write the checkpoint: {message}")


def save_file(path: Path, write: Callable[[Any], Any]) -> None:
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on disk before it takes the place of the last one
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names of a folder on disk too, where the system can open one."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r}: there is no checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a zip file, a pickle or what it holds, whatever is wrong
        raise damaged(path, error) from error
    if not isinstance(content, dict) or content.keys() != {"states", "has_state"}:
        raise damaged(path, "not written by pyrocurv.checkpoint.save")
    return content


def damaged(path: Path, why: Any) -> ValueError:
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return ValueError(f"path={str(path)!r} is no checkpoint, or a damaged one: {reason}")
