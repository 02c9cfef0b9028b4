"""Which structure each layer gets: one for all, by the type of its module, by name, by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pyrocurv.layers import Layer
from pyrocurv.layers.structure_spec import StructureSpec, parse_structure
from pyrocurv.runtime.user_warnings import warn_user

LEFT_OUT = ("point", "frozen")  # no posterior: trained by `optim`, or kept as it is
Rule = Callable[[str, "nn.Module | None"], Any]
Owners = Mapping[Layer, "nn.Module | None"]
StructureChoice = str | StructureSpec | Mapping[Any, Any] | Rule | None


def select_structures(
    choice: StructureChoice, default: Any, layers: Sequence[Layer], modules: Mapping[
        str, nn.Module
    ],
    left_out: Sequence[str] = (),
) -> dict[Layer, Any]:
    """The structure of each layer, or a name in `left_out`.

    Args:
        choice: a structure for all layers; or {module type, or name with * and ?: structure}, where
            names go before types and the first that fits counts; or a rule (name, module) ->
            structure, or None for the default; or None. A layer's name is that of its module, or of
            the tensor where no module owns it; the module is then None.
        modules: by name, as in `named_modules()`.

    Warns of a type that no layer has: one mapping may serve several networks.

    Raises:
        ValueError: an unknown structure, or a name that fits no layer.
        TypeError: a key that is neither a type nor a name.
    """
    owners = {layer: modules.get(layer.weight.rpartition(".")[0]) for layer in layers}
    rule = _rule(choice, owners)
    chosen = {}
    for layer, owner in owners.items():
        value = rule(_name(layer), owner)
        value = default if value is None else value
        chosen[layer] = value if value in left_out else parse_structure(value)
    return chosen


def _name(layer: Layer) -> str:
    return layer.weight.removesuffix(".weight")


def _rule(choice: StructureChoice, owners: Owners) -> Rule:
    if isinstance(choice, Mapping):
        return _by_key(choice, owners)
    if callable(choice) and not isinstance(choice, type):
        return choice
    return lambda name, module: choice


def _by_key(choice: Mapping[Any, Any], owners: Owners) -> Rule:
    names = [key for key in choice if isinstance(key, str)]
    types = [key for key in choice if isinstance(key, type)]
    for key in choice:
        if not isinstance(key, (str, type)):
            raise TypeError(f"structure: the key {key!r} is neither a module type nor a name")
    have = [_name(layer) for layer in owners]
    for pattern in names:
        if not any(_fits(name, pattern) for name in have):
            raise ValueError(f"structure: no layer {pattern!r}; {', '.join(have)} exist")
    for kind in types:
        if not any(isinstance(owner, kind) for owner in owners.values()):
            found = {_plain(owner).__name__: None for owner in owners.values() if owner is not None}
            warn_user(f"structure: no layer is of type {kind.__name__}; {', '.join(found)} exist")

    def rule(name: str, module: nn.Module | None) -> Any:
        for pattern in names:
            if _fits(name, pattern):
                return choice[pattern]
        return next((choice[kind] for kind in types if isinstance(module, kind)), None)

    return rule


def _plain(module: nn.Module) -> type:
    """The type that its user gave it, before Pyro made it one of its own."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("pyro."))


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)
