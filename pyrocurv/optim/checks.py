"""Checks of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyrocurv.runtime.validation import (
    as_number,
    check_fraction,
    check_is,
    check_iterable,
    check_nonnegative,
    check_positive,
)


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raise ValueError for one that is out of its range."""
    check_nonnegative("lr", as_number(values["lr"]))
    check_fraction("momentum", values["momentum"])
    check_nonnegative("damping", values["damping"])
    check_positive("kl_clip", values["kl_clip"], None)


def check_params(params: Any) -> list[Any]:
    """Parameters, or groups of them, as a list.

    Raises TypeError for what is neither, ValueError if there is none.
    """
    if isinstance(params, Tensor):
        return [params]
    check_iterable("params", params, "a list of parameters or groups")
    found = [*params]
    for item in found:
        check_is("params", item, (Tensor, dict, tuple), "a list of parameters or groups")
    if not found:
        raise ValueError("params: at least one parameter is needed, the list is empty")
    return found


def check_posterior_settings(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a prior precision or temperature that is out of its range."""
    for name, word in (("prior_precision", "fan_in"), ("temperature", "auto")):
        check_positive(name, values[name], word)
