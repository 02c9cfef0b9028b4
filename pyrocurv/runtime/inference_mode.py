"""Computing gradients where a caller has switched on `torch.inference_mode`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator for a function that takes gradients: it works under `torch.inference_mode` too.

    Its arguments' inference tensors, which autograd does not take, are copied.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*without_inference_tensors(args), **without_inference_tensors(kwargs))
        with torch.inference_mode(False):
            return function(*without_inference_tensors(args), **without_inference_tensors(kwargs))

    return wrapped


def without_inference_tensors(values: Any) -> Any:
    """Nested lists, tuples and dicts with copies of inference tensors, if there are any."""
    return values if not _has_inference_tensor(values) else tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf,
        values,
    )


def _has_inference_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return any(map(_has_inference_tensor, items))
    return isinstance(value, Tensor) and value.is_inference()


def check_differentiable(modules: Iterable[nn.Module]) -> None:
    """Raise ValueError for parameters or buffers that were made under `torch.inference_mode`."""
    for module in modules:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_inference():
                raise ValueError(
                    f"{name} of a {type(module).__name__} was made under torch.inference_mode, and "
                    "has no gradients: make the network outside of it"
                )
