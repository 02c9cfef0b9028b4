"""A checkpoint in a folder, written by all ranks through `torch.distributed.checkpoint`.

The folder has one numbered folder for each checkpoint, and a file that names the one that counts.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrocurv.runtime.replaced_file import damaged, on_rank_0, save_file, sync_folder
from pyrocurv.runtime.workers import Workers

LATEST = "latest"  # the file that names the checkpoint that counts
STRUCTURE = "structure"


def save_folder(path: Path, content: Any, workers: Workers) -> None:
    """Write a numbered folder in `path`, and the file that says which one counts."""
    import torch.distributed.checkpoint as dcp  # takes long

    structure, tensors = flatten(content)
    torch.save(structure, file := io.BytesIO())
    last = _latest(path) if workers.rank == 0 else None
    number = workers.broadcast(0 if last is None else int(last.name) + 1)
    folder = path / str(number)

    def clear() -> None:
        path.mkdir(parents=True, exist_ok=True)
        for other in path.iterdir():
            if other.is_dir() and other.name.isdecimal() and other != last:
                shutil.rmtree(other)  # of a run that was interrupted

    on_rank_0(workers, clear)
    packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    with _plain_errors(dcp):
        dcp.save(
            {STRUCTURE: packed, **tensors}, storage_writer=dcp.FileSystemWriter(folder),
            process_group=workers.group, no_dist=workers.is_alone,
        )

    def finish() -> None:
        sync_folder(folder)
        save_file(path / LATEST, lambda out: out.write(str(number).encode()))
        if last is not None:
            shutil.rmtree(last)

    on_rank_0(workers, finish)


def _latest(path: Path) -> Path | None:
    """The folder of the checkpoint that counts."""
    file = path / LATEST
    if not file.exists():
        return None
    name = file.read_text()
    if not name.isdecimal():
        raise damaged(path, f"{LATEST!r} says {name!r:.40}")
    return path / name


def read_folder(path: Path, owners: Mapping[str, Any]) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    if (folder := _latest(path)) is None:
        raise FileNotFoundError(f"path={str(path)!r}: there is no checkpoint in this folder")
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        states = {name: owner.state_dict() for name, owner in owners.items()}
        sharded = {
            key: x for key, x in flatten({"states": states})[1].items() if is_sharded(x)
        }
        tensors = {
            key: sharded[key] if key in sharded else
            torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in stored.items()
            if isinstance(entry, dcp.TensorStorageMetadata)
        }
        reader = dcp.FileSystemReader(folder)
        with _plain_errors(dcp):
            dcp.load(tensors, storage_reader=reader, no_dist=not sharded)
        packed = io.BytesIO(tensors.pop(STRUCTURE).numpy().tobytes())
        return unflatten(torch.load(packed, weights_only=True), tensors)
    except Exception as error:
        raise damaged(path, error) from error


@contextmanager
def _plain_errors(dcp: Any) -> Iterator[None]:
    """What a rank has raised, in place of dcp's BaseException; without its warnings of one process,
    and of what it uses itself in older versions of torch.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # an interrupt
            raise cause from error
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


def flatten(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """The value with the names of its tensors in their place, in tuples, and the tensors by name.

    The names are the paths to them. Containers become ["list" | "tuple" | "dict", content].
    """
    if isinstance(value, Tensor):
        return ("tensor", path), {path: value.detach()}
    if isinstance(value, Mapping):
        parts = {key: flatten(item, f"{path}/{key}") for key, item in value.items()}
        structure: Any = {key: part for key, (part, _) in parts.items()}
        found = [tensors for _, tensors in parts.values()]
    elif isinstance(value, (list, tuple)):
        items = [flatten(item, f"{path}/{number}") for number, item in enumerate(value)]
        structure, found = [part for part, _ in items], [tensors for _, tensors in items]
    else:
        return ("value", value), {}
    kind = "dict" if isinstance(value, Mapping) else "tuple" if isinstance(value, tuple) else "list"
    return (kind, structure), {name: x for tensors in found for name, x in tensors.items()}


def unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = structure
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [unflatten(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def is_sharded(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"
