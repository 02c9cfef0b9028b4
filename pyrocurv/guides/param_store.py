"""Names of guides in Pyro's parameter store, also after moves, copies and pickles.

The store maps names to parameters. A module whose parameter has a name that is in the store takes
the parameter from there, so two guides of one name share their parameters, and a parameter that was
replaced in the module returns at the next call.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.handlers.modules import named_modules
from pyrocurv.handlers.sites import TraceSite
from pyrocurv.runtime.undo import Undo

_counters: dict[str, Iterator[int]] = defaultdict(itertools.count)


class ParamStoreGuide(AutoGuide):
    """A guide whose name is unique in this process.

    Pickles lack `unpickled_attributes`, which only the first call needs: above all the model.
    """

    unpickled_attributes: ClassVar[tuple[str, ...]] = ("_base_model", "_init_loc_fn")

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[[TraceSite], Tensor],
        create_plates: Callable[..., Any] | None,
    ) -> None:
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        self._set_unique_name()
        self.register_load_state_dict_post_hook(clear_param_store)
        self._base_model = (model,)  # in a tuple, so that it is not a submodule
        self._init_loc_fn = init_loc_fn

    def _set_unique_name(self) -> None:
        """Name the guide and its submodules."""
        kind = type(self).__name__
        number = next(_counters[kind])
        self._unique_name = f"{kind}_{number}" if number else kind
        context = type(self._pyro_context)()
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_context = context
        self._pyro_set_supermodule(self._unique_name, context)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module.load_state_dict`, but an error leaves everything unchanged.

        Raises ValueError for the state of another class, structure or network, or of a newer
        version.
        """
        with all_or_nothing(self, state_dict, strict):
            return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(("master", "_model", *self.unpickled_attributes))
        return {**self.__dict__, **dropped, "_modules": _shallow_copies(self._modules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._pyro_name == self._unique_name:  # otherwise a module around it has named it
            self._set_unique_name()

    def __deepcopy__(self, memo: dict[int, Any]) -> ParamStoreGuide:
        """A copy for the same model, or for the copy of the model if that is in `memo`."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        for name in self.unpickled_attributes:
            setattr(copied, name, getattr(self, name))
        copied._base_model = _copied_model(self._base_model, memo)
        for old, new in zip(_autoguides(self), _autoguides(copied), strict=True):
            new._model = _copied_model(old._model, memo)
        return copied

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Remove parameters that a move replaces from the store; the next call adds the new."""
        before = _stored_parameters(self)
        result = super()._apply(*args, **kwargs)
        store = pyro.get_param_store()
        for name, new in _stored_parameters(self).items():
            old = before.get(name)
            if old is not new and name in store and store._params[name] is old:
                del store[name]
        return result


@contextmanager
def all_or_nothing(
    guide: nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> Iterator[None]:
    """Load a state into a guide inside; if that raises, the guide is as it was before.

    Raises ValueError for the state of a module that is not a guide.
    """
    if strict and "_extra_state" not in state_dict:
        keys = ", ".join(map(str, [*state_dict][:5])) or "no keys"
        raise ValueError(f"the state is not of a {type(guide).__name__}: it has {keys}")
    with Undo() as undo:
        undo.keep_module(guide)
        undo.keep_attributes(pyro.get_param_store())
        yield


def clear_param_store(guide: nn.Module, incompatible: Any) -> None:
    """After `load_state_dict`: remove other parameters under the guide's names from the store."""
    store = pyro.get_param_store()
    for name, parameter in _stored_parameters(guide).items():
        if name in store and store._params[name] is not parameter:
            del store[name]


def _stored_parameters(guide: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the store."""
    return {
        f"{module._pyro_name}.{name}": module._parameters[f"{name}_unconstrained"]
        for module in guide.modules() if isinstance(module, PyroModule)
        for name in module._pyro_params
    }


def _shallow_copies(modules: dict[str, Any]) -> dict[str, Any]:
    """The modules, with shallow copies in place of Pyro's guides.

    Pyro removes the model of a guide that is pickled, which the original should keep.
    """
    return {n: _shallow_copy(m) if isinstance(m, AutoGuide) else m for n, m in modules.items()}


def _shallow_copy(guide: AutoGuide) -> AutoGuide:
    copied = object.__new__(type(guide))
    copied.__dict__.update(guide.__dict__, _modules=_shallow_copies(guide._modules))
    return copied


def _autoguides(guide: nn.Module) -> list[AutoGuide]:
    return [module for module in guide.modules() if isinstance(module, AutoGuide)]


def _copied_model(holder: Any, memo: dict[int, Any]) -> Any:
    """A model in a tuple, or its copy with the handlers around it if the model was copied."""
    if not holder:
        return holder
    (model,) = holder
    innermost = next(iter(named_modules(model).values()), model)
    return copy.deepcopy(holder, memo) if id(innermost) in memo else holder
