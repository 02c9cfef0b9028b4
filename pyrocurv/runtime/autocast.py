"""Autocast is for running a network; its curvature is computed in the precision of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Autocast = Callable[[], AbstractContextManager]


@contextmanager
def disable_autocast(device: torch.device) -> Iterator[Autocast]:
    """Disable the user's autocast, and provide a context that enables it again with its dtype."""
    if not torch.is_autocast_enabled(device.type):
        yield nullcontext
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype, enabled=False):
        yield lambda: torch.autocast(device.type, dtype)
