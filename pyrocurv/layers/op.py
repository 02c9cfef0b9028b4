"""The description of an operation that consumes weights: how its calls are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Settings = Mapping[str, Any]  # those arguments of a call that its input rows depend on


@dataclass(frozen=True)
class OpArguments:
    """The arguments of one call."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class OpSpec:
    """The description of one function.

    Args:
        read: the `OpArguments` of a call, from its arguments.
        refusal: the reason why a call is not supported, or "".
        input_rows: (input, settings, bias, count) -> the inputs of the first `count` examples
            [*lead, count, S, I], with a column of ones if there is a bias.
        output_gradient_rows: (gradient of the output, settings) -> [*lead, B, S, O].
        orientation: that of `Layer`.
        commutes: the weight may also be the first argument.
        outputs_last: the outputs are the last axis, so that a vector added to them is a bias.
    """

    name: str
    read: Callable[..., OpArguments]
    refusal: Callable[[OpArguments], str]
    input_rows: Callable[[Tensor, Settings, bool, int], Tensor]
    output_gradient_rows: Callable[[Tensor, Settings], Tensor]
    orientation: str = "out_in"
    commutes: bool = False
    outputs_last: bool = False


def append_ones(rows: Tensor, bias: bool) -> Tensor:
    """Rows [..., I], with a column of ones if there is a bias."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if bias else rows


def rows_of_last_axis(tensor: Tensor) -> Tensor:
    """[B, *, n] -> [B, S, n]."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
