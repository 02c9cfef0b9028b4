"""Parameters and buffers of a model that a handler gives, with its sample of the latents.

A sample from a mixture is more than its latents where the components' models differ in statistics
of batch norm, say: it has those too, under their names in the model. While the model runs at such a
sample, its modules use them in the place of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyrocurv.handlers.modules import named_modules


@functools.singledispatch
def value_given_by(handler: Any, name: str) -> Tensor | None:
    """The value that a handler has for a sample site of this name, if it has one."""
    return None


@value_given_by.register
def _(handler: ConditionMessenger, name: str) -> Tensor | None:
    data = handler.data
    return _traced(data, name) if isinstance(data, Trace) else data.get(name)


@value_given_by.register
def _(handler: ReplayMessenger, name: str) -> Tensor | None:
    return None if handler.trace is None else _traced(handler.trace, name)


def _traced(trace: Trace, name: str) -> Any:
    return trace.nodes[name]["value"] if name in trace.nodes else None


def model_tensors(model: Any) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a model by name, but for counters of batches."""
    return {
        f"{path}.{name}".lstrip("."): x for path, module in named_modules(model).items()
        for name, x in {**module._parameters, **module._buffers}.items()
        if x is not None and name not in module._non_persistent_buffers_set
        and not (isinstance(module, _NormBase) and name == "num_batches_tracked")
    }


def use_given_tensors(model: Any, names: Iterable[str]) -> None:
    """Have the modules of a model use the tensors of these names that a handler gives.

    The hooks are on the owners of the tensors and on all modules around them, since a module may
    read the weights of another one without calling it. Without a handler they do nothing.

    Raises ValueError for a parameter with a constraint, whose value is in Pyro's store.
    """
    named = named_modules(model)
    for name in names:
        parts = name.split(".")
        owner, attribute = named[".".join(parts[:-1])], parts[-1]
        if attribute.removesuffix("_unconstrained") in owner.__dict__.get("_pyro_params", ()):
            raise ValueError(f"{name} is a PyroParam, which is of the model alone, not of a sample")
        for end in range(len(parts)):
            module = named.get(".".join(parts[:end]))
            if module is None:
                continue
            if "_given_tensors" not in module.__dict__:
                module.__dict__["_given_tensors"], module.__dict__["_replaced"] = {}, []
                module.register_forward_pre_hook(_replace)
                module.register_forward_hook(_put_back, always_call=True)
            module.__dict__["_given_tensors"][name] = owner, attribute


_now: set[tuple[int, str]] = set()  # what is replaced: (id of the owner, attribute)


def _replace(module: nn.Module, args: Any) -> None:
    handlers = [handler for handler in reversed(_PYRO_STACK) if _may_give(type(handler))]
    replaced: list[Any] = []
    module.__dict__["_replaced"].append(replaced)
    for name, (owner, attribute) in module.__dict__["_given_tensors"].items() if handlers else ():
        is_buffer = attribute in owner._buffers
        if isinstance(owner, _NormBase) and owner.training and is_buffer:
            continue  # uses the statistics of the batch
        tensors: dict[str, Any] = owner._buffers if is_buffer else owner._parameters
        own, key = tensors[attribute], (id(owner), attribute)
        if key in _now:
            continue  # by a module around this one
        given = (value_given_by(handler, name) for handler in handlers)
        value = next((x for x in given if x is not None), None)
        if value is not None:
            replaced.append((key, tensors, own))
            _now.add(key)
            tensors[attribute] = value.reshape(own.shape)


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    for key, tensors, own in module.__dict__["_replaced"].pop():
        _now.remove(key)
        tensors[key[1]] = own


def _may_give(kind: type) -> bool:
    return value_given_by.dispatch(kind) is not value_given_by.dispatch(object)


HOOKS = (_replace, _put_back)  # all that are registered here
