"""Checks of the operands of structures: types and shapes alone, so that no step waits for a device.

`check_operands` wraps the operations of a class of structures, also of one that a user writes. An
operand of another dtype or device is found out only where an operation fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import Tensor

from pyrocurv.structures.serialization import map_tensors


def check_operands(cls: type) -> None:
    """Wrap the operations that a class of structures defines."""
    for name, check in CHECKS.items():
        method = cls.__dict__.get(name)
        if method is not None and not getattr(method, "__isabstractmethod__", False):
            setattr(cls, name, _checked(method, check))


def _checked(method: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def operation(self: Any, operand: Any, *args: Any, **kwargs: Any) -> Any:
        check(self, operand, *args, **kwargs)
        try:
            return method(self, operand, *args, **kwargs)
        except RuntimeError as error:
            _explain(self, operand, error)
            raise

    return operation


def _vector(self: Any, x: Any) -> None:
    """x [..., P]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: a tensor [..., {self.size}] is needed, got {type(x).__name__}")
    if x.shape[-1:] != (self.size,):
        raise ValueError(
            f"x: the last axis must have the {self.size} entries of a row of the "
            f"{type(self).__name__}, got shape {tuple(x.shape)}"
        )


def _single_vector(self: Any, x: Any) -> None:
    """x [P]."""
    _vector(self, x)
    if x.dim() != 1:
        raise ValueError(f"x: one vector [{self.size}] is needed, got shape {tuple(x.shape)}")


def _scale(self: Any, factor: Any) -> None:
    check_scalar("factor", factor)


def check_scalar(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless `value` is a number or a tensor of one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: a scalar is needed, got shape {tuple(value.shape)}")
    elif isinstance(value, (bool, Fraction)) or not isinstance(value, Real):
        raise TypeError(f"{name}: a number or a scalar tensor is needed, got {value!r}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: an integer of at most 64 bits is needed, got a larger one")


def _shift(self: Any, delta: Any) -> None:
    if not isinstance(delta, Tensor) or delta.numel() == 1:
        check_scalar("delta", delta)
    elif delta.shape != (self.size,):
        raise ValueError(
            f"delta: a scalar or a vector [{self.size}] is needed, got shape {tuple(delta.shape)}"
        )


def check_other(self: Any, other: Any) -> None:
    """Raise unless `other` is a structure of the same kind and size."""
    if not isinstance(other, type(self)):
        raise TypeError(f"other: a {type(self).__name__} is needed, got {type(other).__name__}")
    old, new = (getattr(matrix, "shape", (matrix.size,)) for matrix in (self, other))
    if old != new:
        raise ValueError(
            f"other: a {type(self).__name__} over weights {list(old)} is needed, got one over "
            f"{list(new)}"
        )


def check_sizes(matrix: Any, other: Any) -> None:
    """Raise unless `other` is a structure of any kind, of the same size."""
    if not hasattr(other, "inverse_diag"):
        raise TypeError(f"other: a Structure is needed, got {type(other).__name__}")
    if matrix.size != other.size:
        raise ValueError(f"other: a matrix of {matrix.size} rows is needed, got {other.size}")


def _lerp(self: Any, other: Any, weight: Any) -> None:
    check_other(self, other)
    check_scalar("weight", weight)


CHECKS: dict[str, Callable[..., None]] = {
    "__matmul__": _vector, "solve": _vector, "rsqrt": _vector, "solution": _single_vector,
    "rsqrt_": _single_vector, "scale": _scale, "shift": _shift, "lerp": _lerp,
}


def _explain(self: Any, operand: Any, error: RuntimeError) -> None:
    """Raise ValueError for an operand of another dtype or device than a structure."""
    one, other = _tensor(self), _tensor(operand)
    for what in ("dtype", "device"):
        if one is not None and other is not None and getattr(one, what) != getattr(other, what):
            raise ValueError(
                f"{type(self).__name__}: an operand of {what} {getattr(one, what)} is needed, got "
                f"{getattr(other, what)}"
            ) from error


def _tensor(value: Any) -> Tensor | None:
    """The first tensor in a value."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, keep)
    return found[0] if found else None


def check_fields(structure: Any) -> None:
    """Raise TypeError for a field that is declared as a tensor or a structure and is none."""
    for name, kind in type(structure).__annotations__.items():
        value = getattr(structure, name)
        if kind in ("Tensor", Tensor) and not isinstance(value, Tensor):
            raise TypeError(f"{name}: a tensor is needed, got {type(value).__name__}")
        if kind == "Structure" and (isinstance(value, type) or not hasattr(value, "inverse_diag")):
            raise TypeError(f"{name}: a Structure is needed, got {type(value).__name__}")


def check_square(name: str, matrix: Any) -> None:
    """Raise TypeError or ValueError unless `matrix` is a tensor of square matrices [..., n, n]."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: a tensor is needed, got {type(matrix).__name__}")
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name}: a square matrix is needed, got shape {tuple(matrix.shape)}")


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_count(name: str, value: Any, *allowed: str) -> None:
    """Raise ValueError unless `value` is a positive integer or one of `allowed`."""
    if not is_count(value) and not (isinstance(value, str) and value in allowed):
        options = " or ".join(["a positive integer", *map(repr, allowed)])
        raise ValueError(f"{name}={value!r}: {options} is needed")
