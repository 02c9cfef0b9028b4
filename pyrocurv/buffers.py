"""Putting a network's buffers back: what a forward pass moves besides its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def snapshot(modules: Iterable[nn.Module]) -> Callable[[], None]:
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
