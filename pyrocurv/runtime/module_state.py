"""State of modules that is borrowed and given back: buffers, training mode, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pyrocurv.runtime.foreach import copies
from pyrocurv.runtime.undo import complete


def save_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Save the persistent buffers of the modules (batch-norm statistics); return their restorer."""
    buffers = [
        buffer for module in modules for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]
    saved = [*zip(buffers, copies(buffers), strict=True)]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in saved:
            buffer.copy_(value)

    return restore


def float_buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    """The persistent buffers of the modules that hold real numbers."""
    return [
        buffer for module in modules for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
        and buffer.is_floating_point()
    ]


@contextmanager
def still_frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the frozen parameters of the modules frozen.

    Pyro's parameter store calls `requires_grad_(True)` on every parameter that it registers.
    """
    frozen = [
        parameter for module in modules for parameter in module._parameters.values()
        if parameter is not None and not parameter.requires_grad
    ]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def preserve_module_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the persistent buffers of the modules, and keep frozen parameters frozen."""
    modules = list(modules)
    restore = save_buffers(modules)
    try:
        with still_frozen(modules):
            yield
    finally:
        complete(restore)


@contextmanager
def train_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the modules into train mode, and each back into its own mode afterwards."""
    evaluating = [module for module in modules if not module.training]
    for module in evaluating:
        module.training = True
    try:
        yield
    finally:
        for module in evaluating:
            module.training = False


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the modules into eval mode, in which batch-norm statistics do not change."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
