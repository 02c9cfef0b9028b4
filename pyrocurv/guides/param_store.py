"""Guides in Pyro's parameter store, also after moves, copies and pickles.

The store maps names to tensors. It has all that a posterior consists of, the buffers of a guide
too, and it counts: before a guide is read it takes over what the store has under its names. The
names are those of the class, as in Pyro's guides, with a number where another guide has them.
Entries that no living guide has put there, as those of a file, belong to the first guide of the
class whose shapes they fit.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.guides.initialization import InitInside, checked_value
from pyrocurv.guides.store_entries import (
    Slot,
    forget_dead_guides,
    guide_names,
    has_entries,
    mismatch,
    owned_names,
    register,
    slots,
)
from pyrocurv.handlers.modules import named_modules
from pyrocurv.handlers.sites import TraceSite
from pyrocurv.runtime.inference_mode import outside_inference_mode, without_inference_tensors
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_state_dict, reading_state


class ParamStoreGuide(AutoGuide):
    """A guide whose entries in the store are no other guide's of this process.

    Pickles lack `unpickled_attributes`, which only the first call needs: above all the model.
    """

    unpickled_attributes: ClassVar[tuple[str, ...]] = ("_base_model", "_init_loc_fn")

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[[TraceSite], Tensor],
        create_plates: Callable[..., Any] | None,
    ) -> None:
        checked = functools.partial(checked_value, init_loc_fn)
        super().__init__(InitInside(checked)(model), create_plates=create_plates)
        self.times_restored = 0  # how often the store had other values
        self._set_unique_name()
        self.register_load_state_dict_post_hook(clear_param_store)
        self._base_model = (model,)  # in a tuple, so that it is not a submodule
        self._init_loc_fn = init_loc_fn

    # ---- names ----------------------------------------------------------------------------------

    def _set_unique_name(self) -> None:
        """Name the guide and its submodules; a name that is taken changes at the first call."""
        forget_dead_guides()
        self._unique_name = self._free_name() if slots(self) else type(self).__name__
        context = type(self._pyro_context)()
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_context = context
        self._pyro_set_supermodule(self._unique_name, context)

    def _free_name(self) -> str:
        """The class's name, with the least number that the store does not have."""
        kind = type(self).__name__
        taken = guide_names(kind)
        names = itertools.chain([kind], (f"{kind}_{number}" for number in itertools.count(1)))
        return next(name for name in names if name not in taken)

    def _rename(self, name: str) -> None:
        """Change the name; unlike `_pyro_set_supermodule` also during a call."""
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_name = name + module._pyro_name.removeprefix(self._unique_name)
        self._unique_name = name
        register(self).clear()

    # ---- the store ------------------------------------------------------------------------------

    def adopt_from_store(self) -> None:
        """Take the name under which the store has the parameters of such a guide, if it has any.

        Called once the guide knows its parameters. Raises ValueError for entries of the same names
        in other shapes.
        """
        if self._pyro_name != self._unique_name or pyro.settings.get("module_local_params"):
            return
        forget_dead_guides()
        prefix = f"{self._pyro_name}."
        expected = {n.removeprefix(prefix): s.tensor.shape for n, s in slots(self).items()}
        orphans = {
            name: shapes for name, shapes in guide_names(type(self).__name__).items() if shapes
        }
        for name, shapes in orphans.items():
            is_fallback = all(parameter.startswith("fallback.") for parameter in shapes)
            if expected.items() <= shapes.items() and (expected or is_fallback):
                self._rename(name)
                return
        for name, shapes in orphans.items():
            if expected and expected.keys() <= shapes.keys():
                raise ValueError(mismatch(name, expected, shapes))
        self._rename(self._free_name())
        if orphans:
            warn_user(
                f"the param store has {', '.join(orphans)}, not put there by a guide of this "
                f"process, for other latents than this {type(self).__name__} has, which starts anew"
            )

    def _leave_name_of_others(self) -> bool:
        """Take a free name if another living guide has entries under the present one."""
        is_nested = self._pyro_name != self._unique_name  # and is named by a guide around it
        prefix = f"{self._pyro_name}."
        if is_nested or not any(name.startswith(prefix) for name in owned_names(self)):
            return False
        self._rename(self._free_name())
        return True

    def sync_with_store(self) -> None:
        """Take over what the store has under the guide's names; add what it lacks.

        Raises ValueError if that is of other shapes, or a part only.
        """
        if not has_entries(self):
            self._sync()

    @outside_inference_mode
    @torch.no_grad()
    def _sync(self) -> None:
        if pyro.settings.get("module_local_params"):
            return
        own, stored = slots(self), pyro.get_param_store()._params
        foreign = {
            name: stored[name] for name, slot in own.items()
            if name in stored and stored[name] is not slot.tensor
        }
        if foreign and self._leave_name_of_others():
            own, foreign = slots(self), {}
        if foreign:
            self._take(own, foreign)
        store, entries = pyro.get_param_store(), register(self)
        for name, slot in own.items():
            if name not in store:
                store._params[name], store._constraints[name] = slot.tensor, slot.constraint
                store._param_to_name[slot.tensor] = name
            entries[name] = weakref.ref(slot.tensor)

    def _take(self, own: Mapping[str, Slot], foreign: Mapping[str, Tensor]) -> None:
        """Put tensors of the store into the modules."""
        store = pyro.get_param_store()
        expected = {name: own[name].tensor.shape for name in foreign}
        if expected != (shapes := {name: value.shape for name, value in foreign.items()}):
            raise ValueError(mismatch(self._pyro_name, expected, shapes))
        if missing := [name for name in own if name not in store]:
            raise ValueError(
                f"the param store has {', '.join([*foreign][:3])}, but not {', '.join(missing[:3])}"
                ": a posterior needs all of them"
            )
        for name, value in foreign.items():
            value = without_inference_tensors(value)
            slot, new = own[name], value
            if isinstance(slot.tensor, nn.Parameter) and not isinstance(value, nn.Parameter):
                new = nn.Parameter(value.detach())
                store._params[name], store._param_to_name[new] = new, name
            old, slot.tensors[slot.key] = slot.tensor, new
            self.times_restored += not (old.device == new.device and torch.equal(old, new))

    @outside_inference_mode
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
        self.sync_with_store()
        for slot in slots(self).values():
            slot.tensor.__dict__.pop("unconstrained", None)  # a weak reference, of the store
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
        self.sync_with_store()
        before = {name: slot.tensor for name, slot in slots(self).items()}
        result = super()._apply(*args, **kwargs)
        store = pyro.get_param_store()
        for name, slot in slots(self).items():
            old = before.get(name)
            if old is not slot.tensor and name in store and store._params[name] is old:
                del store[name]
        return result

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.sync_with_store()
        super()._save_to_state_dict(*args, **kwargs)


@contextmanager
def all_or_nothing(
    guide: nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> Iterator[None]:
    """Load a state into a guide inside; if that raises, the guide is as it was before.

    Raises ValueError for the state of a module that is not a guide.
    """
    check_state_dict(state_dict, type(guide).__name__)
    if strict and "_extra_state" not in state_dict:
        keys = ", ".join(map(str, [*state_dict][:5])) or "no keys"
        raise ValueError(f"the state is not of a {type(guide).__name__}: it has {keys}")
    with Undo() as undo, reading_state(type(guide).__name__):
        undo.keep_module(guide)
        undo.keep_attributes(pyro.get_param_store())
        yield


def clear_param_store(guide: ParamStoreGuide, incompatible: Any) -> None:
    """After `load_state_dict`: remove other tensors under the guide's names from the store."""
    guide._leave_name_of_others()
    store = pyro.get_param_store()
    for name, slot in slots(guide).items():
        if name in store and store._params[name] is not slot.tensor:
            del store[name]


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
