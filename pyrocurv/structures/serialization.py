"""One codec for frozen dataclasses: to plain values for `torch.save`, and back.

A dataclass becomes {"kind": its registered name, field: value, ...} and a tuple a list; tensors,
numbers, strings and None stay. `torch.load(weights_only=True)` accepts the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from torch import Tensor

FORMAT_VERSION = 1  # of all state dicts; a change that older code cannot read increments it
T = TypeVar("T")
_classes: dict[str, type] = {}
_names: dict[type, str] = {}


def serializable(cls: type[T], name: str = "") -> type[T]:
    """Class decorator that registers a frozen dataclass under `name`, its class name by default.

    Raises ValueError for a name that another class has; a class defined anew takes its place.
    """
    name = name or cls.__name__
    known = _classes.get(name, cls)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"states already have a {name}, {known}: give {cls} another name")
    _names[cls], _classes[name] = name, cls
    return cls


def to_state(value: Any) -> Any:
    """Plain dicts, lists and tensors, from which `from_state` builds an equal value."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_state(item) for item in value]
    if is_dataclass(value):
        content = {field.name: to_state(getattr(value, field.name)) for field in fields(value)}
        if type(value) not in _names:
            raise TypeError(f"{type(value).__name__} is not registered: decorate it, @serializable")
        return {"kind": _names[type(value)], **content}
    return value


def from_state(state: Any) -> Any:
    """The value that `state` describes, with tuples in place of lists; ValueError if unknown."""
    if isinstance(state, (list, tuple)):
        return tuple(from_state(item) for item in state)
    if not isinstance(state, Mapping):
        return state
    cls = _classes.get(state.get("kind", ""))
    content = {name: from_state(value) for name, value in state.items() if name != "kind"}
    if cls is None or not _is_complete(cls, {*content}):
        raise ValueError(
            f"the state has a {state.get('kind')!r} with {', '.join(content)}, which this version "
            "of pyrocurv does not have: was it saved by another version, or is it a class of your "
            "own that is not imported?"
        )
    return cls(**content)


def _is_complete(cls: type, names: set[str]) -> bool:
    """Whether names are those of the fields; one with a default may be newer than the state."""
    known = {field.name: field.default is MISSING for field in fields(cls)}
    return names <= known.keys() and all(name in names for name, is_needed in known.items()
                                         if is_needed)


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """The same value with `function` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return function(value)  # type: ignore[return-value]  # T is Tensor
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map_tensors(item, function) for item in value)  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        content = {f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)}
        return type(value)(**content)
    return value


def cast(value: T, like: Tensor) -> T:
    """The same value in the dtype and on the device of `like`; integers keep their dtype."""
    return map_tensors(
        value, lambda x: x.to(like) if x.is_floating_point() else x.to(like.device)
    )


def check_version(state: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError for the state of a newer format than this one."""
    version = state.get("version", FORMAT_VERSION)
    if not isinstance(version, int):
        raise ValueError(f"the state of {owner} has no format version, but {version!r:.60}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"the state of {owner} has format version {version}, this version of pyrocurv reads "
            f"versions up to {FORMAT_VERSION}: update pyrocurv to load it"
        )
