"""Facts about the operations that consume weights: how each is "out = W in" at S positions.

Legend, here and everywhere:  B batch (examples)   S positions that share the weights
I inputs of a layer, bias included   O outputs   K output vectors pulled back   P weights

An op is known by the function that torch dispatches on. Its row of the table says how to read its
call, how to see its input as rows [B, S, I] and a gradient of its output as [..., B, S, O].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Arguments:
    """One call of an op, taken apart. `settings` are what `rows` needs besides the input."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """How to read the calls of one function; `refusal` says why a call is not supported, or ""."""

    name: str
    read: Callable[..., Arguments]
    refusal: Callable[[Arguments], str]
    rows: Callable[[Tensor, Mapping[str, Any], bool], Tensor]  # bias: with a column of ones
    gradients: Callable[[Tensor], Tensor]


def _read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    return Arguments(input, weight, bias, {})


def _refuse_linear(call: Arguments) -> str:
    return "" if call.input.dim() >= 2 else "linear on an input without a batch axis"


def _linear_rows(input: Tensor, settings: Mapping[str, Any], bias: bool) -> Tensor:
    rows = input.reshape(input.shape[0], -1, input.shape[-1])  # [B, *, I] -> [B, S, I]
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if bias else rows


def _linear_gradients(gradient: Tensor) -> Tensor:  # [B, *, O] -> [B, S, O]
    return gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _read_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Arguments:
    kernel, dilation = tuple(weight.shape[2:]), _pair(dilation)
    settings = dict(
        kernel=kernel,
        stride=_pair(stride),
        dilation=dilation,
        pads=_pads(padding, kernel, dilation),
        groups=groups,
    )
    return Arguments(input, weight, bias, settings)


def _pads(
    padding: str | int | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """As `F.pad` wants them, last axis first. "same" puts the odd one at the end."""
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    height, width = _pair(padding)
    return [width, width, height, height]


def _refuse_conv2d(call: Arguments) -> str:
    if call.input.dim() != 4:
        return "conv2d on an input without a batch axis"
    groups = call.settings["groups"]
    return "" if groups == 1 else f"conv2d with groups={groups}"


def _conv2d_rows(input: Tensor, settings: Mapping[str, Any], bias: bool) -> Tensor:
    windows = F.pad(input, settings["pads"])
    sides = zip(settings["kernel"], settings["stride"], settings["dilation"], strict=True)
    for axis, (size, stride, dilation) in enumerate(sides, 2):
        span = dilation * (size - 1) + 1
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    patches = windows.permute(1, 4, 5, 0, 2, 3)  # [C, h, w, B, H, W], of [B, C, H, W, h, w]
    inputs, positions = math.prod(patches.shape[:3]), math.prod(patches.shape[4:])
    rows = patches.new_ones(inputs + bias, len(input), positions)  # far faster than F.unfold
    rows[:inputs].view(patches.shape).copy_(patches)
    return rows.permute(1, 2, 0)


def _conv2d_gradients(gradient: Tensor) -> Tensor:  # [B, O, H, W] -> [B, S, O]
    return gradient.flatten(2).mT


OPS: dict[Callable[..., Tensor], Op] = {
    F.linear: Op("linear", _read_linear, _refuse_linear, _linear_rows, _linear_gradients),
    F.conv2d: Op("conv2d", _read_conv2d, _refuse_conv2d, _conv2d_rows, _conv2d_gradients),
}


@dataclass(frozen=True)
class Layer:
    """The weights of one layer as one matrix W [O, I]: the bias, if any, is the last column.

    `weight` and `bias` are the names of sample sites or parameters; `shape` is the weight's.
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """O."""
        return self.shape[0]

    @cached_property
    def columns(self) -> int:
        """I, the bias included."""
        return math.prod(self.shape[1:]) + (self.bias is not None)

    @property
    def size(self) -> int:
        """P = O·I."""
        return self.rows * self.columns

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is packed."""
        shapes = {self.weight: self.shape}
        return shapes if self.bias is None else {**shapes, self.bias: (self.rows,)}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P], W row-major."""
        weight = values[self.weight].reshape(self.rows, -1)
        if self.bias is None:
            return weight.reshape(-1)
        return torch.cat([weight, values[self.bias].unsqueeze(-1)], -1).reshape(-1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, contiguous."""
        lead = packed.shape[:-1]
        if self.bias is None:
            return {self.weight: packed.reshape(*lead, *self.shape)}
        matrix = packed.reshape(*lead, self.rows, self.columns)
        weight = matrix.narrow(-1, 0, self.columns - 1).contiguous().view(*lead, *self.shape)
        return {self.weight: weight, self.bias: matrix.select(-1, -1).contiguous()}
