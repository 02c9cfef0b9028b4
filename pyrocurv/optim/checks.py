"""Checks of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raise ValueError for one that is out of its range."""
    momentum, damping, kl_clip = (values[name] for name in ("momentum", "damping", "kl_clip"))
    if not values["lr"] >= 0:
        raise ValueError(f"lr={values['lr']!r}: a number from 0 is needed")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: a number in [0, 1) is needed")
    if not damping >= 0:
        raise ValueError(f"damping={damping!r}: a number from 0 is needed")
    if kl_clip is not None and not kl_clip > 0:
        raise ValueError(f"kl_clip={kl_clip!r}: a positive number or None is needed")


def check_posterior_settings(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a prior precision or temperature that is out of its range."""
    for name, word in (("prior_precision", "fan_in"), ("temperature", "auto")):
        value = values[name]
        if value != word and (isinstance(value, str) or not value > 0):
            raise ValueError(f"{name}={value!r}: a positive number or {word!r} is needed")
