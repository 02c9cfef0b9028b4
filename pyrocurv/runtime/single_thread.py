"""One thread at a time: what runs a model belongs to the whole process.

Pyro's handlers and parameter store, and torch's global random generators, are the process's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_lock = threading.RLock()


def one_thread_at_a_time(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator that raises RuntimeError, before anything else, while another thread is in one."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _lock.acquire(blocking=False):
            raise RuntimeError(
                f"{function.__qualname__}: another thread of this process trains or predicts right "
                "now, and Pyro's handlers and param store are shared by all threads: train one "
                "model in each process, or let the threads take turns with a lock"
            )
        try:
            return function(*args, **kwargs)
        finally:
            _lock.release()

    return wrapped
