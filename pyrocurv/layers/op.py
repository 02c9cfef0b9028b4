"""What has to be known of an operation, and how a call of it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class OpArguments:
    """One call of an op, taken apart. `settings` are what `rows` needs besides the input."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """How to read the calls of one function.

    `read` takes the call's arguments apart; `refusal` says why a call is not supported, or "".
    `rows(input, settings, bias, count)` are the inputs of the first `count` examples as
    [*lead, count, S, I], with a column of ones if there is a bias; `gradients` does the same with a
    gradient of the output, [*lead, count, S, O]. `form` is that of `Layer`.
    """

    name: str
    read: Callable[..., OpArguments]
    refusal: Callable[[OpArguments], str]
    rows: Callable[[Tensor, Mapping[str, Any], bool, int], Tensor]
    gradients: Callable[[Tensor, Mapping[str, Any]], Tensor]
    form: str = "rows"
    commutes: bool = False  # the weight may be the first argument as well
    last: bool = False  # the outputs are the last axis: a vector added to it later is a bias


def with_ones(rows: Tensor, bias: bool) -> Tensor:
    """Rows [..., I] with a column of ones for the bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if bias else rows


def last_axis(tensor: Tensor) -> Tensor:
    """[B, *, n] -> [B, S, n]."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def no_refusal(call: OpArguments) -> str:
    """Every call is supported."""
    return ""
