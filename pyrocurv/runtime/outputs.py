"""The tensors in what a network returns: a tensor, a tuple, a mapping or an object of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def named_outputs(output: Any) -> dict[str, Tensor]:
    """{path: tensor} of all nested tensors in their order, "" for a tensor itself.

    Mappings, sequences and dataclasses are looked into, so that the `ModelOutput` of other
    libraries needs no registration.
    """
    return dict(_walk("", output))


def _walk(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    items: Iterator[tuple[Any, Any]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value):
        items = ((field.name, getattr(value, field.name)) for field in fields(value))
    elif (leaves := tree_leaves(value)) != [value]:
        items = iter(enumerate(leaves))
    else:
        return
    for name, item in items:
        yield from _walk(f"{path}.{name}" if path else str(name), item)


def logits_of(outputs: Mapping[str, Tensor], least: int) -> str | None:
    """The path of the tensor that a named likelihood is of, with `least` axes or more.

    It is the one called "logits", otherwise the first; None if there is no such tensor.
    """
    names = [name for name, x in outputs.items() if x.dim() >= least and x.is_floating_point()]
    return next((n for n in names if n.rpartition(".")[2] == "logits"), names[0] if names else None)


def replaced(output: Any, tensors: Mapping[str, Tensor], path: str = "") -> Any:
    """A copy of what a network returned, with other tensors at these paths."""
    if isinstance(output, Tensor):
        return tensors.get(path, output)
    prefix = f"{path}." if path else ""
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        for name, item in output.items():
            changed[name] = replaced(item, tensors, f"{prefix}{name}")
        return changed
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", range(len(output)))
        items = [replaced(x, tensors, f"{prefix}{n}") for n, x in zip(names, output, strict=True)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    if is_dataclass(output):
        changed = copy.copy(output)
        for item in fields(output):
            value = replaced(getattr(output, item.name), tensors, f"{prefix}{item.name}")
            object.__setattr__(changed, item.name, value)
        return changed
    return output


def stacked(outputs: Sequence[Any]) -> Any:
    """What a network returned several times, with its tensors stacked, [len(outputs), ...]."""
    columns = [named_outputs(output) for output in outputs]
    tensors = {name: torch.stack([column[name] for column in columns]) for name in columns[0]}
    return replaced(outputs[0], tensors)
