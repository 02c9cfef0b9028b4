"""Telling an exhausted memory from other errors, for every fallback to a slower computation.

A fallback is for programs that the fast computation does not support. Where memory is exhausted the
slow one fails too, or hides the remedy (a smaller batch, fewer samples) behind a long run.
"""

from __future__ import annotations

import torch

# of allocators that raise a plain RuntimeError: torch's on the CPU, the drivers of accelerators
MESSAGES = ("DefaultCPUAllocator", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device or of the host is exhausted.

    Example:
        >>> from pyrocurv.runtime.out_of_memory import is_out_of_memory
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("no batching rule"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)
