"""Mixed precision is for running a network; its curvature is reckoned in that of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Autocast = Callable[[], AbstractContextManager]


@contextmanager
def disable_autocast(device: torch.device) -> Iterator[Autocast]:
    """Turns the user's autocast off, if it is on, and gives what turns it on again as it was."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield nullcontext
        return
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype, enabled=False):
        yield lambda: torch.autocast(kind, dtype)
