"""The modules that a model is made of: a module, a function around one, a method, a `partial`."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import _bound_partial
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import Tensor, nn

MAX_CONTAINER = 100  # items of a container that is searched for modules


def unwrap_model(model: Any) -> tuple[Any, bool]:
    """The model inside of `poutine` handlers, and whether one of them hides sites."""
    blocked = False
    while not isinstance(model, nn.Module):
        if isinstance(model, ReparamHandler):
            model = model.fn
        elif isinstance(model, _bound_partial):
            handler, model = model.args
            blocked |= isinstance(handler, poutine.block_messenger.BlockMessenger)
        elif isinstance(model, functools.partial) and isinstance(model.func, nn.Module):
            model = model.func
        else:
            break
    return model, blocked


def modules(model: Any) -> list[nn.Module]:
    """The modules of a model, also of one inside of `poutine` handlers, each once."""
    return list(dict.fromkeys(module for root in _roots(model) for module in root.modules()))


def root_modules(model: Any) -> list[nn.Module]:
    """The model if it is a module; otherwise the outermost modules that it refers to."""
    return [*_roots(model)]


def named_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a model by name; those of a function are the ones that it refers to."""
    named: dict[str, nn.Module] = {}
    for root in _roots(model):
        for name, module in root.named_modules():
            named.setdefault(name, module)
    return named


def module_tensors(model: Any) -> dict[str, Tensor]:
    """The parameters and buffers of a model's modules by name."""
    return {
        f"{path}.{name}".lstrip("."): x for path, module in named_modules(model).items()
        for name, x in {**module._parameters, **module._buffers}.items() if x is not None
    }


def _roots(model: Any) -> Iterator[nn.Module]:
    """The model if it is a module, otherwise the outermost modules that it refers to."""
    queue, visited = [unwrap_model(model)[0]], set[int]()
    while queue:
        value = queue.pop(0)
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            queue += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            owner = value.__self__
            is_module = isinstance(owner, nn.Module)
            queue += [value.__func__, *([owner] if is_module else _attributes(owner))]
        elif isinstance(value, types.FunctionType):
            queue += _references(value)
        elif isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            queue += [item for item in items if isinstance(item, nn.Module)]
        elif callable(value):
            queue += _attributes(value)


def _attributes(value: Any) -> list[Any]:
    """The attributes of an object that may lead to a module."""
    return [*filter(_may_hold_module, getattr(value, "__dict__", {}).values())]


def _references(function: types.FunctionType) -> list[Any]:
    """What a function refers to that may lead to a module; other functions only of its own file."""
    closure = [cell.cell_contents for cell in function.__closure__ or () if _is_bound(cell)]
    globals_ = [function.__globals__.get(name) for name in function.__code__.co_names]
    values = (*closure, *globals_, *(function.__defaults__ or ()))
    return [value for value in values if _may_hold_module(value) and (
        not isinstance(value, types.FunctionType) or value.__globals__ is function.__globals__
    )]


def _may_hold_module(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return len(value) < MAX_CONTAINER
    return isinstance(value, (nn.Module, functools.partial, types.MethodType, types.FunctionType))


def _is_bound(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the variable has not been assigned yet
        return False
