"""Warnings that point at the user's own line, from any depth inside of the libraries."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

LIBRARIES = {"pyrocurv", "pyro", "torch", "contextlib"}


def warn_user(message: str) -> None:
    """Warn at the nearest caller outside of the libraries.

    From Python 3.12 on `warnings.warn(skip_file_prefixes=...)` does the same.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
