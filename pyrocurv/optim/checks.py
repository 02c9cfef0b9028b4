"""Checks of hyperparameters, also of those that a scheduler or the user has changed since."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import (
    as_number,
    check_flag,
    check_fraction,
    check_integer,
    check_is,
    check_iterable,
    check_nonnegative,
    check_positive,
    shown,
)


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raise ValueError for one of a group that is not finite or out of its range."""
    for name in ("lr", "initial_lr", "damping", "weight_decay", "decoupled_weight_decay"):
        if name in values:
            check_nonnegative(name, as_number(values[name]))
    check_fraction("momentum", values["momentum"])
    check_positive("kl_clip", values["kl_clip"], None)
    for name, word in (("prior_precision", "fan_in"), ("temperature", "auto")):
        if name in values:
            check_positive(name, values[name], word)


def check_names(group: Mapping[str, Any], defaults: Mapping[str, Any], owner: type) -> None:
    """Raise ValueError if a group has an argument of its optimizer that is one for all groups.

    Warns of a weight decay where weights have a prior.
    """
    arguments = {*inspect.signature(owner).parameters} - {"params"}
    if wrong := [name for name in group if name in arguments and name not in defaults]:
        raise ValueError(
            f"a group of {owner.__name__} has no {wrong[0]} of its own, it may have "
            f"{', '.join(defaults)}"
        )
    if "weight_decay" not in defaults and group.get("weight_decay"):
        warn_user(
            f"weight_decay={shown(group['weight_decay'])} in a group of {owner.__name__} is for "
            "parameters without a posterior alone: the others have a prior, of prior_precision"
        )


def check_params(params: Any, net: nn.Module | None = None) -> list[Any]:
    """Parameters, or groups of them, as a list; for None all those of a network.

    Raises TypeError for what is neither, ValueError if there is none.
    """
    if params is None and net is not None:
        if not (found := [*net.parameters()]):
            raise ValueError(f"net: a {type(net).__name__} has no parameters to train")
        return found
    if isinstance(params, Tensor):
        return [params]
    check_iterable("params", params, "a list of parameters or groups")
    found = [*params]
    for item in found:
        check_is("params", item, (Tensor, dict, tuple), "a list of parameters or groups")
    if not found:
        raise ValueError("params: at least one parameter is needed, the list is empty")
    return found


def check_run_settings(
    num_data: Any, num_samples: Any, kl_warmup: Any, augmentation: Any, antithetic: Any
) -> None:
    """Raise ValueError for one that is out of its range."""
    check_integer("num_data", num_data, 1)
    check_integer("num_samples", num_samples, 1)
    check_integer("kl_warmup", kl_warmup, 0)
    check_positive("augmentation", augmentation)
    check_flag("antithetic", antithetic)


def check_batch_size(batch_size: int, num_data: int, augmentation: float) -> None:
    """Raise ValueError for a batch of more examples than there are."""
    if batch_size > num_data * augmentation:
        raise ValueError(f"num_data={num_data}, but there are {batch_size} in one batch")
