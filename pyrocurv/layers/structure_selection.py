"""The structure of each layer: one for all, or by module type, by name or by a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pyrocurv.layers import Layer
from pyrocurv.layers.structure_spec import StructureSpec, parse_structure
from pyrocurv.runtime.choices import StructureName
from pyrocurv.runtime.user_warnings import warn_user

LEFT_OUT = ("point", "frozen")  # no posterior: trained by `optim`, or kept unchanged
Rule = Callable[[str, "nn.Module | None"], Any]
StructureChoice = StructureName | StructureSpec | Mapping[Any, Any] | Rule | None


def check_structure(choice: Any, left_out: Sequence[str] = ()) -> None:
    """Raise what `select_structures` raises without layers: for an unknown name or a wrong type."""
    is_rule = callable(choice) and not isinstance(choice, (type, nn.Module))
    if choice is None or is_rule or isinstance(choice, str) and choice in left_out:
        return
    if not isinstance(choice, Mapping):
        parse_structure(choice)
        return
    for key, value in choice.items():
        if not isinstance(key, (str, type)):
            raise TypeError(f"structure: the key {key!r} is neither a module type nor a name")
        check_structure(value, left_out)


def select_structures(
    choice: StructureChoice, default: Any, layers: Sequence[Layer],
    modules: Mapping[str, nn.Module], left_out: Sequence[str] = (),
) -> dict[Layer, Any]:
    """The structure of each layer, or a name in `left_out`.

    Args:
        choice: a structure for all layers; or {module type, or name with * and ?: structure}, where
            names take precedence over types and the first match counts; or a rule (name, module) ->
            structure, or None for the default; or None. A layer's name is that of its module, or of
            the tensor if no module owns it; the module is then None.
        modules: by name, as in `named_modules()`.

    Warns about a type that no layer has: one mapping may serve several networks.

    Raises:
        ValueError: an unknown structure, or a name that matches no layer.
        TypeError: a key that is neither a type nor a name.
    """
    check_structure(choice, left_out)
    owners = {layer: modules.get(layer.weight.rpartition(".")[0]) for layer in layers}
    rule = _as_rule(choice, owners)
    structures = {}
    for layer, owner in owners.items():
        value = rule(layer.name, owner)
        value = default if value is None else value
        structures[layer] = value if value in left_out else parse_structure(value)
    return structures


def _as_rule(choice: StructureChoice, owners: Mapping[Layer, nn.Module | None]) -> Rule:
    if callable(choice) and not isinstance(choice, type):
        return choice
    if not isinstance(choice, Mapping):
        return lambda name, module: choice
    patterns = [key for key in choice if isinstance(key, str)]
    types = [key for key in choice if isinstance(key, type)]
    names = [layer.name for layer in owners]
    for pattern in patterns if names else ():  # without any layer the guide says why
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(f"structure: no layer {pattern!r}; {', '.join(names)} exist")
    for module_type in types if names else ():
        if not any(isinstance(owner, module_type) for owner in owners.values()):
            have = {_user_type(owner): None for owner in owners.values() if owner is not None}
            warn_user(
                f"structure: no layer is of type {module_type.__name__}; {', '.join(have)} exist"
            )

    def rule(name: str, module: nn.Module | None) -> Any:
        for pattern in patterns:
            if _matches(name, pattern):
                return choice[pattern]
        return next((choice[kind] for kind in types if isinstance(module, kind)), None)

    return rule


def _user_type(module: nn.Module) -> str:
    """The name of its type before Pyro made it a PyroModule."""
    types = type(module).__mro__
    return next(cls.__name__ for cls in types if not cls.__module__.startswith("pyro."))


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight", pattern)
