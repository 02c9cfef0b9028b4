"""Distributions taken apart."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution, Independent, Normal


def as_normal(prior: Distribution) -> Normal | None:
    """The normal under `Independent`, or None where the prior is no normal."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    return prior if isinstance(prior, Normal) else None


def compact(value: Tensor) -> Tensor:
    """A tensor expanded from one number, as that number."""
    axes = zip(value.stride(), value.shape, strict=True)
    if all(stride == 0 or size == 1 for stride, size in axes):
        return value[(0,) * value.dim()]
    return value
