"""Warnings that point at the user's own line, however deep in the libraries they arise."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

LIBRARIES = {"pyrocurv", "pyro", "torch", "contextlib"}


def warn_user(message: str) -> None:
    """Warn, at the nearest caller outside the libraries; `skip_file_prefixes` for Python 3.10."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _package(frame) in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
