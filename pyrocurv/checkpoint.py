"""Checkpoints that a run goes on from, on as many processes as before or on another number of them.

A checkpoint is written beside the last one, synced to disk, and then takes its place at once, by
`os.replace`. Whatever interrupts the writing leaves the last one as it was.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pyrocurv.runtime import safetensors_file
from pyrocurv.runtime.replaced_file import on_rank_0, read_file, save_file
from pyrocurv.runtime.sharded_folder import flatten, is_sharded, read_folder, save_folder
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_flag, check_is, check_module
from pyrocurv.runtime.workers import AUTO, Workers

__all__ = ["load", "load_guide", "save", "save_guide"]


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
            Of a network that `fully_shard` has sharded, or had for `NGVI`, the states of all ranks.
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
        save_folder(target, content, workers)
        return
    if any(is_sharded(x) for x in flatten(content)[1].values()):
        raise TypeError("objects have sharded tensors (DTensor): use sharded=True")
    on_rank_0(workers, lambda: save_file(target, lambda file: torch.save(content, file)))


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
    content = read_folder(source, owners) if source.is_dir() else read_file(source)
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
    workers = Workers.of(process_group)
    content = safetensors_file.to_bytes(_state(guide, workers))
    on_rank_0(workers, lambda: save_file(
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
    """The state of an object; of one whose ranks have a part each, that of all."""
    state = _inner(value).state_dict()
    extra = state.get("_extra_state") if isinstance(value, nn.Module) else None
    is_part = "sharding" in state or isinstance(extra, Mapping) and "sharding" in extra
    return workers.broadcast(value.full_state_dict()) if is_part else state
