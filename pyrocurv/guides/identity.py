"""What makes a guide one of its own: its name in Pyro's store, through moves, copies and pickles.

Pyro's store goes by names. A parameter under a name that the store has is taken from there, so two
guides of one name are one guide, and a parameter that was replaced comes back at the next call.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import nn

from pyrocurv.prototype import named_modules

LEFT_BEHIND = ("_base_model", "_init_loc_fn", "_choice")  # by pickles: what the first call needs
_instances: dict[str, Iterator[int]] = defaultdict(itertools.count)


def take_a_name(guide: Any) -> None:
    """Give a guide and its parts a name that no other guide of this process has."""
    kind = type(guide).__name__
    number = next(_instances[kind])
    guide._own_name = f"{kind}_{number}" if number else kind
    context = type(guide._pyro_context)()
    for part in guide.modules():
        if isinstance(part, PyroModule):
            part._pyro_context = context
    guide._pyro_set_supermodule(guide._own_name, context)


def is_by_itself(guide: Any) -> bool:
    """Whether a guide has the name it took, and not one from a module around it."""
    return guide._pyro_name == guide._own_name


def _held(guide: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the store."""
    return {
        f"{part._pyro_name}.{name}": part._parameters[f"{name}_unconstrained"]
        for part in guide.modules() if isinstance(part, PyroModule) for name in part._pyro_params
    }


@contextmanager
def followed_by_the_store(guide: nn.Module) -> Iterator[None]:
    """Let the store forget parameters that are replaced meanwhile; it meets the new ones again."""
    before = _held(guide)
    yield
    store = pyro.get_param_store()
    for name, new in _held(guide).items():
        old = before.get(name)
        if old is not new and name in store and store._params[name] is old:
            del store[name]


def forget(guide: nn.Module, incompatible: Any) -> None:
    """After `load_state_dict`: whatever the store has for the guide, the guide's own counts."""
    store = pyro.get_param_store()
    for name, own in _held(guide).items():
        if name in store and store._params[name] is not own:
            del store[name]


# ---- copies and pickles -------------------------------------------------------------------------


def without_models(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules, Pyro's guides among them as shallow twins: to pickle one takes its model away.

    Pyro does that to the live guide.
    """
    return {name: _twin(m) if isinstance(m, AutoGuide) else m for name, m in modules.items()}


def _twin(guide: AutoGuide) -> AutoGuide:
    twin = object.__new__(type(guide))
    twin.__dict__.update(guide.__dict__, _modules=without_models(guide._modules))
    return twin


def copied(guide: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, on the copy of its model if that was copied before in the same call."""
    twin = object.__new__(type(guide))
    memo[id(guide)] = twin
    twin.__setstate__(copy.deepcopy(guide.__getstate__(), memo))
    for name in LEFT_BEHIND:
        setattr(twin, name, getattr(guide, name))
    twin._base_model = _followed(guide._base_model, memo)
    for old, new in zip(_guides(guide), _guides(twin), strict=True):
        new._model = _followed(old._model, memo)
    return twin


def _guides(guide: nn.Module) -> list[AutoGuide]:
    return [part for part in guide.modules() if isinstance(part, AutoGuide)]


def _followed(held: Any, memo: dict[int, Any]) -> Any:
    """A model, held as (model,), or its copy with the handlers around it."""
    if not held:
        return held
    (model,) = held
    innermost = next(iter(named_modules(model).values()), model)
    return copy.deepcopy(held, memo) if id(innermost) in memo else held
