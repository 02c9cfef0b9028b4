"""Which guide has which entries of Pyro's parameter store, and entries of guides that are gone.

An entry belongs to the guide that has put it there, also if its tensor has been replaced since, as
by `set_state`; after `pyro.clear_param_store()` it belongs to nobody.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

Entries = dict[str, weakref.ref[Tensor]]
# what each living guide has in the store, by name; and what guides had that live no more
_entries: weakref.WeakKeyDictionary[nn.Module, Entries] = weakref.WeakKeyDictionary()
_abandoned: list[Entries] = []


class Slot(NamedTuple):
    """Where a module keeps a tensor that the store has too."""

    tensors: dict[str, Any]  # the module's parameters or buffers
    key: str
    constraint: constraints.Constraint

    @property
    def tensor(self) -> Tensor:
        return self.tensors[self.key]


def slots(guide: nn.Module) -> dict[str, Slot]:
    """The parameters and buffers of all Pyro modules in a guide, by their names in the store."""
    found: dict[str, Slot] = {}
    for module in guide.modules():
        if not isinstance(module, PyroModule):
            continue
        prefix = f"{module._pyro_name}."
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                name = key.removesuffix("_unconstrained")
                constraint, _ = module._pyro_params.get(name, (constraints.real, None))
                if tensor is not None:
                    found[prefix + name] = Slot(tensors, key, constraint)
    return found


def guide_names(kind: str) -> dict[str, dict[str, torch.Size]]:
    """Guides of a class in the store, {name: {parameter: shape}}; living ones without shapes."""
    owned = owned_names()
    found: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in pyro.get_param_store()._params.items():
        guide, _, parameter = name.partition(".")
        base, _, number = guide.rpartition("_")
        if guide == kind or base == kind and number.isdigit():
            shapes = found.setdefault(guide, {})
            if name not in owned:
                shapes[parameter] = tensor.shape
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def owned_names(but_for: nn.Module | None = None) -> set[str]:
    """The names of entries in the store that belong to living guides, `but_for` one."""
    store = pyro.get_param_store()
    return {
        name for guide, entries in _entries.items() if guide is not but_for
        for name, reference in entries.items() if name in store._params
        and ((own := reference()) is store._params[name] or own in store._param_to_name)
    }


def has_entries(guide: nn.Module) -> bool:
    """Whether the store has just what a guide has put there last."""
    stored, entries = pyro.get_param_store()._params, _entries.get(guide) or {}
    return bool(entries) and all(stored.get(name) is ref() for name, ref in entries.items())


def register(guide: nn.Module) -> Entries:
    """The entries of a guide, to be added to; they can be removed once it does not live."""
    if guide not in _entries:
        _entries[guide] = {}
        weakref.finalize(guide, _abandoned.append, _entries[guide]).atexit = False
    return _entries[guide]


def forget_dead_guides() -> None:
    """Remove from the store what guides have put there that do not exist any more."""
    store = pyro.get_param_store()
    while _abandoned:
        for name, reference in _abandoned.pop().items():
            tensor = store._params.get(name)
            if tensor is not None and tensor is reference():
                del store[name]


def mismatch(
    name: str, expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size]
) -> str:
    different = [key for key, shape in expected.items() if found[key] != shape]
    details = ", ".join(
        f"{key} {tuple(found[key])} in place of {tuple(expected[key])}" for key in different[:3]
    )
    return (
        f"the param store has {name} of another model: {details}; load the store that was saved "
        "with this model, or pyro.clear_param_store()"
    )
