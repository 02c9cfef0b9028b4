"""Warnings that point at the user's own line, from any depth inside of the libraries."""

from __future__ import annotations

import sys
import warnings

LIBRARIES = {"pyrocurv", "pyro", "torch", "contextlib"}


def warn_user(message: str) -> None:
    """Warn at the nearest caller outside of the libraries; Python 3.12 has `skip_file_prefixes`."""
    level, frame = 1, sys._getframe()
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
