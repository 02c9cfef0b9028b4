"""Checks of arguments, each with an error that names the argument, what was got and what is needed.

A number is finite, and a bool is not a number. Numbers and names that are not possible raise
ValueError, objects of a wrong kind TypeError.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from math import isfinite
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

# of allocators that raise a plain RuntimeError: torch's on the CPU, the drivers of accelerators
MEMORY_MESSAGES = ("DefaultCPUAllocator", "out of memory")
MODULE_ERROR = "Error(s) in loading state_dict for "  # of `torch.nn.Module.load_state_dict`
OPTIMIZER_ERROR = "loaded state dict "  # of `torch.optim.Optimizer.load_state_dict`
MAX_INTEGER = 2**63 - 1  # of torch
_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


def shown(value: Any) -> str:
    """A value in an error message: its repr, shortened; of tensors and modules their kind."""
    if isinstance(value, Tensor):
        return f"<Tensor of shape {tuple(value.shape)} and dtype {value.dtype}>"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    return _short.repr(value)


# ---- numbers and names --------------------------------------------------------------------------


def is_integer(value: Any, minimum: int) -> bool:
    """Whether a value is an integer of at least `minimum` (and at most 64 bits)."""
    is_plain = isinstance(value, int) and not isinstance(value, bool)
    return is_plain and minimum <= value <= MAX_INTEGER


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number, and an integer of 64 bits at most."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, Fraction)):
        return False
    return abs(value) <= MAX_INTEGER if isinstance(value, int) else isfinite(value)


def as_number(value: Any) -> Any:
    """The number in a real tensor without axes, NumPy's integers as int, all else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Tensor) and not (value.dim() or value.is_meta or value.is_complex()):
        return value.item()
    return value


def check_integer(name: str, value: Any, minimum: int, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`, or one of `allowed`."""
    if not is_integer(value, minimum):
        _check_allowed(name, value, f"an integer of at least {minimum}", allowed)


def check_positive(name: str, value: Any, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is a positive number, or one of `allowed`."""
    if not (is_number(value) and value > 0):
        _check_allowed(name, value, "a positive number", allowed)


def check_nonnegative(name: str, value: Any, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is a number of at least 0, or one of `allowed`."""
    if not (is_number(value) and value >= 0):
        _check_allowed(name, value, "a number from 0", allowed)


def check_fraction(name: str, value: Any, *allowed: str | None) -> None:
    """Raise ValueError unless `value` is a number in [0, 1), or one of `allowed`."""
    if not (is_number(value) and 0 <= value < 1):
        _check_allowed(name, value, "a number in [0, 1)", allowed)


def _check_allowed(name: str, value: Any, kind: str, allowed: tuple[str | None, ...]) -> None:
    if not (value is None or isinstance(value, str)) or value not in allowed:
        *first, last = [kind, *map(repr, allowed)]
        options = f"{', '.join(first)} or {last}" if first else last
        raise ValueError(f"{name}={shown(value)}: {options} is needed")


def check_choice(name: str, value: Any, options: Collection[str], others: str = "") -> None:
    """Raise ValueError unless `value` is one of the names; `others` says what else is possible."""
    if not (isinstance(value, str) and value in options):
        names = [*options]
        choose = f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(map(repr, names))
        raise ValueError(f"{name}={shown(value)}: choose {choose}{others}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={shown(value)}: True or False is needed")


# ---- objects ------------------------------------------------------------------------------------


def check_is(name: str, value: Any, kind: type | tuple[type, ...], needed: str) -> None:
    """Raise TypeError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: {needed} is needed, got {_described(value)}")


def check_callable(name: str, value: Any, needed: str) -> None:
    """Raise TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: {needed} is needed, got {_described(value)}")


def is_function_of(value: Any, *args: Any) -> bool:
    """Whether a value can be called with such arguments, as far as its signature tells."""
    if not callable(value) or isinstance(value, Tensor):
        return False
    try:
        inspect.signature(value).bind(*args)
    except ValueError:  # of C, without a signature
        return True
    except TypeError:
        return False
    return True


def check_method(name: str, value: Any, method: str, needed: str) -> None:
    """Raise TypeError unless `value` is an object with a method, whose class is not imported."""
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        raise TypeError(f"{name}: {needed} is needed, got {_described(value)}")


def check_module(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a `torch.nn.Module`."""
    check_is(name, value, nn.Module, "a torch.nn.Module")


def check_distribution(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a `Distribution`."""
    check_is(name, value, Distribution, "a Distribution")


def as_device(name: str, value: Any) -> torch.device | None:
    """The device of that name; None for None. Raises ValueError for anything else."""
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}={shown(value)}: a device is needed, such as 'cpu'") from error


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it has values."""
    check_is(name, value, Tensor, "a Tensor")
    if value.is_meta:
        raise ValueError(f"{name}: {shown(value)} is on the meta device, which has no values")


def check_iterable(name: str, value: Any, needed: str) -> None:
    """Raise TypeError unless `value` has items; strings and mappings have not."""
    is_other = isinstance(value, (str, bytes, numbers.Number, Mapping, type, nn.Module))
    is_scalar = isinstance(value, Tensor) and not value.dim()
    has_items = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if is_other or is_scalar or not has_items:
        raise TypeError(f"{name}: {needed} is needed, got {_described(value)}")
    if isinstance(value, Tensor):
        check_tensor(name, value)


def check_loader(name: str, value: Any) -> None:
    """Raise TypeError unless `value` has batches, ValueError for one batch in place of them."""
    check_iterable(name, value, "a DataLoader, or a list of batches,")
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        raise ValueError(f"{name}: batches in a list or a DataLoader are needed, [(x, y)]")


def check_state_dict(value: Any, owner: str) -> None:
    """Raise TypeError unless `value` is a mapping with names as keys, as state dicts are."""
    check_is("state_dict", value, Mapping, f"the state of {owner}, a mapping,")
    if unnamed := [key for key in value if not isinstance(key, str)]:
        raise TypeError(f"state_dict: the state of {owner} has names as keys, got {unnamed[:3]}")
    if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(dict(value))):
        raise ValueError(f"state_dict: the state of {owner} is on the meta device, without values")


def check_inputs(name: str, value: Any) -> None:
    """Raise TypeError for a value that no network takes, ValueError for a meta tensor."""
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        raise TypeError(f"{name}: inputs of the network are needed, got {shown(value)}")
    if isinstance(value, Tensor):
        check_tensor(name, value)


def check_values(values: Iterable[Any], owner: str) -> None:
    """Raise ValueError for a meta tensor among the arguments of a model."""
    for number, value in enumerate(values):
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"argument {number} of {owner}: {shown(value)} is on the meta device, which has "
                "no values"
            )


def _described(value: Any) -> str:
    """What a value is: its type, and more of it where that is short."""
    kinds = (Tensor, type, str, bool, int, float)
    return shown(value) if value is None or isinstance(value, kinds) else type(value).__name__


# ---- errors -------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the host is exhausted.

    Falling back to a slower computation is no remedy then: it fails too, or takes far too long.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_MESSAGES)


@contextmanager
def reading_state(owner: str) -> Iterator[None]:
    """Raise ValueError in place of the errors that come of a state with wrong values in it."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(OPTIMIZER_ERROR):
            raise
        raise ValueError(f"the state of {owner} is damaged: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error) or str(error).startswith((MODULE_ERROR, "state_dict: ")):
            raise
        kind = type(error).__name__
        raise ValueError(f"the state of {owner} is damaged ({kind}: {error!s:.200})") from error
