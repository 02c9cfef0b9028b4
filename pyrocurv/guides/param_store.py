"""What makes a guide one of its own: its name in Pyro's store, through moves, copies and pickles.

Pyro's store goes by names. A parameter under a name that the store has is taken from there, so two
guides of one name are one guide, and a parameter that was replaced comes back at the next call.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.handlers.modules import named_modules
from pyrocurv.handlers.prototype import TraceSite

_instances: dict[str, Iterator[int]] = defaultdict(itertools.count)


class ParamStoreGuide(AutoGuide):
    """A guide with a name that no other guide of this process has.

    Pickles leave behind what the first call needs: the model, above all.
    """

    unpickled_attributes: ClassVar[tuple[str, ...]] = ("_base_model", "_init_loc_fn")

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[[TraceSite], Tensor],
        create_plates: Callable[..., Any] | None,
    ) -> None:
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._take_a_name()
        self.register_load_state_dict_post_hook(clear_param_store)
        self._base_model = (model,)
        self._init_loc_fn = init_loc_fn

    def _take_a_name(self) -> None:
        """For the guide and its parts."""
        kind = type(self).__name__
        number = next(_instances[kind])
        self._own_name = f"{kind}_{number}" if number else kind
        context = type(self._pyro_context)()
        for part in self.modules():
            if isinstance(part, PyroModule):
                part._pyro_context = context
        self._pyro_set_supermodule(self._own_name, context)

    def __getstate__(self) -> dict[str, Any]:
        left = dict.fromkeys(("master", "_model", *self.unpickled_attributes))
        return {**self.__dict__, **left, "_modules": _without_models(self._modules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._pyro_name == self._own_name:  # and not one from a module around it
            self._take_a_name()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamStoreGuide:
        """On the copy of its model if that was copied before in the same call."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name in self.unpickled_attributes:
            setattr(twin, name, getattr(self, name))
        twin._base_model = _followed(self._base_model, memo)
        for old, new in zip(_guides(self), _guides(twin), strict=True):
            new._model = _followed(old._model, memo)
        return twin

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Let the store forget parameters that a move replaces; it meets the new ones again."""
        before = _stored_parameters(self)
        result = super()._apply(*args, **kwargs)
        store = pyro.get_param_store()
        for name, new in _stored_parameters(self).items():
            old = before.get(name)
            if old is not new and name in store and store._params[name] is old:
                del store[name]
        return result


def clear_param_store(guide: nn.Module, incompatible: Any) -> None:
    """After `load_state_dict`: whatever the store has for the guide, the guide's own counts."""
    store = pyro.get_param_store()
    for name, own in _stored_parameters(guide).items():
        if name in store and store._params[name] is not own:
            del store[name]


def _stored_parameters(guide: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the store."""
    return {
        f"{part._pyro_name}.{name}": part._parameters[f"{name}_unconstrained"]
        for part in guide.modules() if isinstance(part, PyroModule) for name in part._pyro_params
    }


def _without_models(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules, Pyro's guides among them as shallow twins: to pickle one takes its model away.

    Pyro does that to the live guide.
    """
    return {name: _twin(m) if isinstance(m, AutoGuide) else m for name, m in modules.items()}


def _twin(guide: AutoGuide) -> AutoGuide:
    twin = object.__new__(type(guide))
    twin.__dict__.update(guide.__dict__, _modules=_without_models(guide._modules))
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
