"""Bayesian deep learning in Pyro with posteriors that know which weights move together."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyrocurv import (
        checkpoint,
        curvature,
        guides,
        infer,
        metrics,
        nn,
        optim,
        plots,
        structures,
    )

__version__ = "0.1.0"
__all__ = [
    "checkpoint", "curvature", "guides", "infer", "metrics", "nn", "optim", "plots", "structures",
]


def __getattr__(name: str) -> ModuleType:
    """The public modules when they are asked for: `optim` without Pyro, say."""
    if name in __all__:
        return importlib.import_module(f"pyrocurv.{name}")
    raise AttributeError(f"pyrocurv has {', '.join(__all__)}, no {name!r}")


def __dir__() -> list[str]:
    """With the modules that nothing has asked for yet."""
    return sorted({*globals(), *__all__})
