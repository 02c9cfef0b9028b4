"""Whether values are in the support of a site: observed data, and initial values of latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import validation_enabled
from pyro.infer import util as infer
from torch import Tensor
from torch.distributions import Distribution, Independent, biject_to, constraints

from pyrocurv.handlers.sites import TraceSite, is_real

BOUNDS = "lower_bound", "upper_bound"


@contextmanager
def only_data_validated() -> Iterator[None]:
    """Validate no arguments of distributions inside, but the data if Pyro's validation is on."""
    validates = infer.is_validation_enabled()
    with validation_enabled(False), infer.validation_enabled(validates):
        yield


def check_support(site: TraceSite) -> None:
    """Raise ValueError for an observed site with data outside of its support.

    Not checked are masked data, NaN where any real number is possible, and supports that may depend
    on latents, as that of a uniform does. `pyro.enable_validation(False)` turns the check off.
    """
    if not infer.is_validation_enabled() or is_real(site):
        return
    fn, masks = _unmasked(site["fn"], site["mask"])
    support, value = _support(fn), site["value"]
    if support is None or _varies(support) or value.requires_grad:
        return
    if any(mask is False for mask in masks) or _is_between(support, value):
        return
    with torch.no_grad():
        outside = ~support.check(value)
        for mask in masks:
            outside = outside & mask
    if torch._C._functorch.is_batchedtensor(outside) or not bool(outside.any()):
        return
    examples = value.expand(outside.shape + support_event(value, outside))[outside].flatten()
    raise ValueError(
        f"site {site['name']!r} is {type(fn).__name__}, with data in {support}, but "
        f"{int(outside.sum())} of its data are not: {_first(examples)}"
    )


def _is_between(support: Any, value: Tensor) -> bool:
    """Whether integers are known to be between constant bounds, from their extremes."""
    bounds = [getattr(support, name, None) for name in BOUNDS]
    is_number = all(isinstance(bound, (int, float)) for bound in bounds)
    is_integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not (is_number and is_integer and value.numel()):
        return False
    if torch._C._functorch.is_batchedtensor(value):
        return False
    low, high = torch.stack(value.aminmax()).tolist()
    return bool(bounds[0] <= low and high <= bounds[1])


def support_event(value: Tensor, checked: Tensor) -> torch.Size:
    """The axes of a value that its constraint checks together."""
    return value.shape[checked.dim() :] if value.dim() > checked.dim() else torch.Size()


def _unmasked(fn: Any, mask: Any) -> tuple[Distribution, list[Any]]:
    """The distribution of single entries, and masks that broadcast to its batch shape."""
    masks = [] if mask is None else [mask]
    while True:
        if isinstance(fn, Independent):
            index = (..., *[None] * fn.reinterpreted_batch_ndims)
            masks = [mask[index] if isinstance(mask, Tensor) else mask for mask in masks]
        elif hasattr(fn, "_mask"):
            masks.append(fn._mask)
        else:
            return fn, masks
        fn = fn.base_dist


def _support(fn: Distribution) -> Any:
    try:
        return fn.support
    except NotImplementedError:
        return None


def _varies(support: Any) -> bool:
    """Whether the bounds of a support may depend on latents, as those of a uniform do."""
    bounds = [getattr(support, name, None) for name in BOUNDS]
    tensors = [bound for bound in bounds if isinstance(bound, Tensor)]
    return bool(tensors) and not support.is_discrete or any(t.requires_grad for t in tensors)


def _first(values: Tensor) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:3].tolist())
    return shown + (", ..." if len(values) > 3 else "")


def outside_support(site: TraceSite, value: Tensor) -> Tensor | None:
    """Where a value of a latent is outside of its support, or on the edge; None if nowhere.

    The shape is that of the value where its entries are constrained one by one, else ().
    """
    if is_real(site):
        return None
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    try:
        u = biject_to(support).inv(value)
    except NotImplementedError:  # raised again where the transform is needed
        return None
    if u.shape == value.shape:
        outside = ~u.isfinite() | ~support.check(value)
    else:
        outside = ~u.isfinite().all()
    return outside if bool(outside.any()) else None
