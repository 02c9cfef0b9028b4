"""The distribution inside of wrappers, and the number behind an expanded tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Distribution, Independent, Normal


def unwrap(distribution: Distribution, masks: bool = False) -> Distribution:
    """The distribution inside of `Independent` and, with `masks`, of Pyro's `MaskedDistribution`.

    Its densities are those of single entries. Wrappers that change the density (transforms) stay.
    """
    inner: Any = distribution
    while isinstance(inner, Independent) or masks and hasattr(inner, "_mask"):
        inner = inner.base_dist
    return inner


def as_normal(prior: Distribution) -> Normal | None:
    """The normal inside of `Independent`; None for other priors, as a masked one, flat in part."""
    inner = unwrap(prior)
    return inner if isinstance(inner, Normal) else None


def compact(value: Tensor) -> Tensor:
    """A tensor that was expanded from a single number, as that scalar; any other as it is."""
    axes = zip(value.stride(), value.shape, strict=True)
    is_single = all(stride == 0 or size == 1 for stride, size in axes)
    return value[(0,) * value.dim()] if is_single else value
