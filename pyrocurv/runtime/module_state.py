"""Putting a network's buffers back: what a forward pass moves besides its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def save_buffers(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """How to put the modules' persistent buffers (batch-norm statistics) back as they are now."""
    saved = [
        (buffer, buffer.clone())
        for module in modules for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]

    @torch.no_grad()
    def restore() -> None:
        for buffer, value in saved:
            buffer.copy_(value)

    return restore


@contextmanager
def still_frozen(modules: Iterable[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Gives the modules' trainable parameters, and keeps the others from being made trainable.

    Pyro's parameter store does that to whatever it meets (`requires_grad_(True)` in place).
    """
    found = [p for part in modules for p in part._parameters.values() if p is not None]
    frozen = [p for p in found if not p.requires_grad]
    try:
        yield [p for p in found if p.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
