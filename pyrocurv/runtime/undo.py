"""Putting state back when an exception interrupts a change of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.runtime.foreach import copies

PLAIN = type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device


class Undo:
    """Restores all that was kept, bit for bit, if the body of the `with` statement raises."""

    def __init__(self) -> None:
        self._restore: list[Callable[[], Any]] = []

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back that was kept."""
        complete(lambda: [restore() for restore in reversed(self._restore)])

    def keep(self, restore: Callable[[], Any]) -> None:
        """Have `restore`, an idempotent function, called if the body raises."""
        self._restore.append(restore)

    def forget(self) -> None:
        """Restore nothing from now on."""
        self._restore.clear()

    @torch.no_grad()
    def keep_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Keep the values of tensors, which are changed in place."""
        tensors = [*tensors]
        values = copies(tensors)
        self.keep(lambda: [x.copy_(value) for x, value in zip(tensors, values, strict=True)])

    def keep_attributes(self, *objects: Any) -> None:
        """Keep the attributes of objects, also which items their dicts, lists and sets have."""
        for owner in objects:
            values = {
                name: value.copy() if isinstance(value, (dict, list, set)) else value
                for name, value in vars(owner).items()
            }
            self.keep(partial(_assign, owner, values))

    def keep_module(self, module: nn.Module) -> None:
        """Keep the parameters, buffers and attributes of a module and of all modules in it."""
        self.keep_attributes(*module.modules())
        self.keep_tensors([*module.parameters(), *module.buffers()])

    def keep_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep an optimizer's groups, state and attributes, but not its parameters.

        State may be nested, or in attributes, also of an optimizer that is wrapped.
        """
        groups, state = optimizer.param_groups, optimizer.state
        params = {id(param): param for group in groups for param in group["params"]}
        attributes = {
            name: value for name, value in vars(optimizer).items()
            if name not in ("param_groups", "state", "defaults")
            and (not name.startswith("_") or isinstance(value, PLAIN))
        }
        for value in attributes.values():
            if isinstance(value, torch.optim.Optimizer):
                self.keep_optimizer(value)
        tensors: list[Tensor] = []
        changing = {"groups": [*groups], "state": dict(state), "own": attributes}
        kept = _kept(changing, params, tensors)
        self.keep_tensors(tensors)

        def restore() -> None:
            vars(optimizer).update(kept["own"])
            groups[:] = kept["groups"]
            state.clear()
            state.update(kept["state"])

        self.keep(restore)


def _kept(value: Any, params: dict[int, Tensor], tensors: list[Tensor]) -> Any:
    """A copy of nested containers, with the tensors themselves, which are added to `tensors`."""
    if isinstance(value, Tensor):
        if id(value) not in params:
            tensors.append(value)
        return value
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same kind, as a defaultdict
        copied.update({key: _kept(item, params, tensors) for key, item in value.items()})
        return copied
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_kept(item, params, tensors) for item in value)
    if isinstance(value, (*PLAIN, torch.optim.Optimizer)) or callable(value):
        return value
    try:
        return copy.deepcopy(value, dict(params))
    except Exception:  # such as a lock or a process group, which stay as they are
        return value


def complete(function: Callable[[], Any], attempts: int = 3) -> None:
    """Call an idempotent function, again if an interrupt comes in between, and raise that then."""
    try:
        function()
    except BaseException:
        if attempts > 1:
            complete(function, attempts - 1)
        raise


def _assign(owner: Any, values: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(values)
