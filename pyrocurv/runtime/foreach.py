"""Elementwise work on many tensors by one operation, `torch._foreach_*`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrocurv.runtime.sharding import dtensor_type

USUAL = torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors; those of a usual dtype at once."""
    other = dtensor_type()
    usual = [
        x.dtype in USUAL and x.layout == torch.strided and not isinstance(x, other)
        for x in tensors
    ]
    chosen = [x for x, is_usual in zip(tensors, usual, strict=True) if is_usual]
    copied = iter(torch._foreach_mul(chosen, 1) if chosen else ())
    return [next(copied) if is_usual else x.clone()
            for x, is_usual in zip(tensors, usual, strict=True)]


def lerp(
    starts: Sequence[Tensor], ends: Sequence[Tensor], weights: Sequence[float]
) -> list[Tensor]:
    """start + weight · (end - start) of each pair; those of equal weight at once."""
    groups: dict[float, list[int]] = {}
    for index, weight in enumerate(weights):
        groups.setdefault(weight, []).append(index)
    found = dict[int, Tensor]()
    for weight, members in groups.items():
        pairs = [starts[index] for index in members], [ends[index] for index in members]
        found.update(zip(members, torch._foreach_lerp(*pairs, weight), strict=True))
    return [found[index] for index in range(len(starts))]


@torch.no_grad()
def magnitudes(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """The largest magnitude, or NaN, in each tensor, in the dtype and on the device of `like`.

    Of distributed tensors, in the rows that are here.
    """
    if (other := dtensor_type()) != ():
        tensors = [x.to_local() if isinstance(x, other) else x for x in tensors]
    filled = [x if x.layout == torch.strided else x.sum() for x in tensors if x.numel()]
    return [value.to(like) for value in largest(filled)]


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers of some tensors are finite, in one synchronization."""
    found = magnitudes(tensors, tensors[0]) if tensors else []
    return not found or bool(torch.isfinite(torch.stack(found)).all())


def largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitude, or NaN, in each tensor; on CPUs far faster than ∞-norms."""
    if not tensors:
        return []
    return [*torch._foreach_max(torch._foreach_abs([*tensors]))]
