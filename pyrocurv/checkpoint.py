"""Checkpoints that a run goes on from, on as many processes as before or on another number of them.

A checkpoint is written beside the last one, synced to disk, and then takes its place at once, by
`os.replace`. Whatever interrupts the writing leaves the last one as it was.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.runtime import safetensors_file
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_flag, check_is, check_module
from pyrocurv.runtime.workers import AUTO, Workers

__all__ = ["load", "load_guide", "save", "save_guide"]

LATEST = "latest"  # the file in a folder that names the checkpoint that counts
STRUCTURE = "structure"


def save(
    path: str | os.PathLike[str], objects: Mapping[str, Any], *, sharded: bool = False,
    process_group: Any = AUTO,
) -> None:
    """Write the states of objects to `path`, in place of the checkpoint that is there.

    All processes of a group have to call it. What it writes does not depend on their number:
    networks in `DistributedDataParallel` are saved without it.

    Args:
        path: a file, or with `sharded` a folder, that all processes can read.
        objects: by name, what has a `state_dict` (model, guide, `NGVI`, optimizer, scheduler), and
            plain values as the number of the epoch, which are the same on all processes.
        sharded: share the writing out over the processes by `torch.distributed.checkpoint`, for
            large or sharded models. Otherwise rank 0 writes one file with `torch.save`.
        process_group: as of `pyrocurv.infer.NGVI`.

    Raises:
        TypeError: for a path or objects that are none, or without `sharded` for sharded tensors.
        OSError: rank 0 could not write; RuntimeError on the other ranks, and with `sharded` on all.
            The last checkpoint is as it was.

    Example:
        >>> import os, tempfile, torch
        >>> from pyrocurv.optim import SecondOrderOptimizer
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = SecondOrderOptimizer(net)
        >>> path = os.path.join(tempfile.mkdtemp(), "run.pt")
        >>> save(path, {"net": net, "optimizer": optimizer, "epoch": 1})
        >>> load(path, {"net": net, "optimizer": optimizer})
        {'epoch': 1}
    """
    target, workers = _path(path), Workers.of(process_group)
    _check_objects(objects)
    check_flag("sharded", sharded)
    if not sharded and target.is_dir():
        raise TypeError(f"path={str(target)!r} is a folder: a file is needed, or sharded=True")
    if sharded and target.is_file():
        raise TypeError(f"path={str(target)!r} is a file: a folder is needed, or sharded=False")
    states = {
        name: _state(value, workers) if _has_state(value) else value
        for name, value in objects.items()
    }
    kinds = {name: _has_state(value) for name, value in objects.items()}
    content = {"states": states, "has_state": kinds}
    if sharded:
        _save_folder(target, content, workers)
        return
    if any(_is_sharded(x) for x in _flatten(content)[1].values()):
        raise TypeError("objects have sharded tensors (DTensor): use sharded=True")
    _on_rank_0(workers, lambda: _save_file(target, lambda file: torch.save(content, file)))


def load(path: str | os.PathLike[str], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Load the states of a checkpoint into objects, and return its plain values by name.

    Each process reads it on its own.

    Args:
        path: of a checkpoint that `save` has written.
        objects: by name, those that have a `state_dict`.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, is of other objects, or an object refuses its state. The objects
            are as they were then.
    """
    source = _path(path)
    _check_objects(objects)
    owners = {name: _inner(value) for name, value in objects.items()}
    if lacking := [name for name, value in objects.items() if not _has_state(value)]:
        raise TypeError(f"objects: {', '.join(lacking)} has no load_state_dict")
    content = _read_folder(source, owners) if source.is_dir() else _read_file(source)
    states, has_state = content["states"], content["has_state"]
    saved = {name for name in states if has_state[name]}
    if saved != owners.keys():
        raise ValueError(
            f"objects are {', '.join(owners) or 'none'}, and the checkpoint {str(source)!r} has "
            f"states of {', '.join(sorted(saved)) or 'none'}"
        )
    with Undo() as undo:
        for name, owner in owners.items():
            if isinstance(owner, nn.Module):
                undo.keep_module(owner)
            else:
                before = copy.deepcopy(owner.state_dict())
                undo.keep(partial(owner.load_state_dict, before))
            owner.load_state_dict(states[name])
    return {name: value for name, value in states.items() if not has_state[name]}


def save_guide(
    path: str | os.PathLike[str], guide: nn.Module, *, process_group: Any = AUTO
) -> None:
    """Write the state of a guide as a safetensors file: a posterior to publish and to load safely.

    All processes of a group have to call it; rank 0 writes. A model with statistics of batch norm,
    or other weights without a posterior, has a state of its own. To go on training use `save`.

    Args:
        path: of the file, "posterior.safetensors".
        guide: one of `pyrocurv.guides`, or another module whose state is of tensors and plain
            values.
        process_group: as of `pyrocurv.infer.NGVI`.

    Raises:
        ImportError: safetensors is not installed, `pip install safetensors`.
        TypeError: for a path or a guide that is none, or values in its state that are no JSON.
        OSError: rank 0 could not write, RuntimeError on the other ranks; the last file is as it
            was.

    Example:
        >>> import torch, pyrocurv
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=10)
        >>> guide = pyrocurv.guides.KFACGuide(model)
        >>> weights = guide(torch.randn(10, 4), torch.randint(3, (10,)))
        >>> save_guide("posterior.safetensors", guide)  # doctest: +SKIP
        >>> fresh = pyrocurv.guides.KFACGuide(model)
        >>> load_guide("posterior.safetensors", fresh)  # doctest: +SKIP
    """
    target = _path(path)
    check_module("guide", guide)
    content = safetensors_file.to_bytes(guide.state_dict())
    _on_rank_0(Workers.of(process_group), lambda: _save_file(
        target, lambda file: file.write(content)
    ))


def load_guide(path: str | os.PathLike[str], guide: nn.Module) -> None:
    """Load the state that `save_guide` has written into a guide of the same class and network.

    Args:
        path: of the file.
        guide: as of `save_guide`; one that is new needs no data first.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of something else, or the guide refuses the state; the guide is
            as it was then.
    """
    source = _path(path)
    check_module("guide", guide)
    if not source.is_file():
        raise FileNotFoundError(f"path={str(source)!r}: there is no such file")
    guide.load_state_dict(safetensors_file.read(source))


# ---- objects ------------------------------------------------------------------------------------


def _path(path: str | os.PathLike[str]) -> Path:
    check_is("path", path, (str, os.PathLike), "a path")
    return Path(path)


def _check_objects(objects: Mapping[str, Any]) -> None:
    check_is("objects", objects, Mapping, "a mapping from names to objects")
    for name in objects:
        check_is("a name in objects", name, str, "a string")


def _has_state(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _inner(value: Any) -> Any:
    return value.module if isinstance(value, DistributedDataParallel) else value


def _state(value: Any, workers: Workers) -> dict[str, Any]:
    """The state of an object; of an optimizer whose ranks have a part each, that of all."""
    state = _inner(value).state_dict()
    return workers.broadcast(value.full_state_dict()) if "sharding" in state else state


def _is_sharded(x: Tensor) -> bool:
    return type(x).__name__ == "DTensor"


def _on_rank_0(workers: Workers, write: Callable[[], Any]) -> None:
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


# ---- a file -------------------------------------------------------------------------------------


def _save_file(path: Path, write: Callable[[Any], Any]) -> None:
    scratch = path.with_name(path.name + ".part")
    try:
        with scratch.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on disk before it takes the place of the last one
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Have the names of a folder on disk too, where the system can open one."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r}: there is no checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a zip file, a pickle or what it holds, whatever is wrong
        raise _damaged(path, error) from error
    if not isinstance(content, dict) or content.keys() != {"states", "has_state"}:
        raise _damaged(path, "not written by pyrocurv.checkpoint.save")
    return content


def _damaged(path: Path, why: Any) -> ValueError:
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else why
    return ValueError(f"path={str(path)!r} is no checkpoint, or a damaged one: {reason}")


# ---- a folder -----------------------------------------------------------------------------------


def _save_folder(path: Path, content: Any, workers: Workers) -> None:
    """Write a numbered folder in `path`, and the file that says which one counts."""
    import torch.distributed.checkpoint as dcp  # takes long

    structure, tensors = _flatten(content)
    torch.save(structure, file := io.BytesIO())
    last = _latest(path) if workers.rank == 0 else None
    number = workers.broadcast(0 if last is None else int(last.name) + 1)
    folder = path / str(number)

    def clear() -> None:
        path.mkdir(parents=True, exist_ok=True)
        for other in path.iterdir():
            if other.is_dir() and other.name.isdecimal() and other != last:
                shutil.rmtree(other)  # of a run that was interrupted

    _on_rank_0(workers, clear)
    packed = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    with _plain_errors(dcp):
        dcp.save(
            {STRUCTURE: packed, **tensors}, storage_writer=dcp.FileSystemWriter(folder),
            process_group=workers.group, no_dist=workers.is_alone,
        )

    def finish() -> None:
        _sync_folder(folder)
        _save_file(path / LATEST, lambda out: out.write(str(number).encode()))
        if last is not None:
            shutil.rmtree(last)

    _on_rank_0(workers, finish)


def _latest(path: Path) -> Path | None:
    """The folder of the checkpoint that counts."""
    file = path / LATEST
    if not file.exists():
        return None
    name = file.read_text()
    if not name.isdecimal():
        raise _damaged(path, f"{LATEST!r} says {name!r:.40}")
    return path / name


def _read_folder(path: Path, owners: Mapping[str, Any]) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    if (folder := _latest(path)) is None:
        raise FileNotFoundError(f"path={str(path)!r}: there is no checkpoint in this folder")
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        states = {name: owner.state_dict() for name, owner in owners.items()}
        sharded = {
            key: x for key, x in _flatten({"states": states})[1].items() if _is_sharded(x)
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
        return _unflatten(torch.load(packed, weights_only=True), tensors)
    except Exception as error:
        raise _damaged(path, error) from error


@contextmanager
def _plain_errors(dcp: Any) -> Iterator[None]:
    """What a rank has raised, in place of dcp's BaseException; without its warning of one process.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # an interrupt
            raise cause from error
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


def _flatten(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """The value with the names of its tensors in their place, in tuples, and the tensors by name.

    The names are the paths to them. Containers become ["list" | "tuple" | "dict", content].
    """
    if isinstance(value, Tensor):
        return ("tensor", path), {path: value.detach()}
    if isinstance(value, Mapping):
        parts = {key: _flatten(item, f"{path}/{key}") for key, item in value.items()}
        structure: Any = {key: part for key, (part, _) in parts.items()}
        found = [tensors for _, tensors in parts.values()]
    elif isinstance(value, (list, tuple)):
        items = [_flatten(item, f"{path}/{number}") for number, item in enumerate(value)]
        structure, found = [part for part, _ in items], [tensors for _, tensors in items]
    else:
        return ("value", value), {}
    kind = "dict" if isinstance(value, Mapping) else "tuple" if isinstance(value, tuple) else "list"
    return (kind, structure), {name: x for tensors in found for name, x in tensors.items()}


def _unflatten(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    kind, content = structure
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content
