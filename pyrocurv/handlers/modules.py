"""The modules that a model is made of: a module, a function around one, a method, a `partial`."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import _bound_partial
from pyro.poutine.reparam_messenger import ReparamHandler
from torch import nn

from pyrocurv.runtime.module_state import save_buffers, still_frozen


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """With the model's modules in eval mode, in which no buffer moves."""
    training: list[nn.Module] = [module for module in modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unwrap_model(model: Any) -> tuple[Any, bool]:
    """What is under the `poutine` handlers around a model, and whether one hides sites."""
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
    """The modules of a model, whatever `poutine` handlers are around it."""
    module, _ = unwrap_model(model)
    if isinstance(module, nn.Module):
        return list(module.modules())
    return list({id(part): part for part in named_modules(model).values()}.values())


def named_modules(model: Any) -> dict[str, nn.Module]:
    """The same by name; those of a function are the ones that it holds on to."""
    named: dict[str, nn.Module] = {}
    for root in _roots(model):
        for name, part in root.named_modules():
            named.setdefault(name, part)
    return named


def _roots(model: Any) -> Iterator[nn.Module]:
    """A model that is a module, or the modules that a function or a method of an object uses."""
    ahead, seen = [unwrap_model(model)[0]], set[int]()
    while ahead:
        part = ahead.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            yield part
        elif isinstance(part, functools.partial):
            ahead += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            owner = part.__self__
            ahead += [part.__func__, owner] if isinstance(owner, nn.Module) else [
                part.__func__, *_attributes(owner)
            ]
        elif isinstance(part, types.FunctionType):
            ahead += _held(part)
        elif isinstance(part, (list, tuple, dict)):
            several = part.values() if isinstance(part, dict) else part
            ahead += [one for one in several if isinstance(one, nn.Module)]
        elif callable(part):
            ahead += _attributes(part)


def _attributes(value: Any) -> list[Any]:
    """What an object of a class of one's own holds."""
    return [one for one in getattr(value, "__dict__", {}).values() if _may_hold(one)]


def _held(function: types.FunctionType) -> list[Any]:
    """What a function closes over, and the globals of its file that it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_full(cell)]
    named = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [one for one in (*cells, *named, *(function.__defaults__ or ())) if _may_hold(one) and (
        not isinstance(one, types.FunctionType) or one.__globals__ is function.__globals__
    )]


def _may_hold(value: Any) -> bool:
    """Whether there may be a module in it; of containers, in small ones."""
    if isinstance(value, (list, tuple, dict)):
        return len(value) < 100
    return isinstance(
        value, (nn.Module, functools.partial, types.MethodType, types.FunctionType)
    )


def _is_full(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the name is not bound yet
        return False


@contextmanager
def frozen_buffers(model: Any) -> Iterator[None]:
    """Leave the model's persistent buffers as they were, and frozen parameters frozen."""
    parts = modules(model)
    restore = save_buffers(parts)
    try:
        with still_frozen(parts):
            yield
    finally:
        restore()
