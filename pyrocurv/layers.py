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


Size = int | tuple[int, ...]


def _read_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Arguments:
    kernel = tuple(weight.shape[2:])
    dilations = _spread(dilation, len(kernel))
    settings = dict(
        kernel=kernel,
        stride=_spread(stride, len(kernel)),
        dilation=dilations,
        pads=_pads(padding, kernel, dilations),
        groups=groups,
    )
    return Arguments(input, weight, bias, settings)


def _spread(value: Size, axes: int) -> tuple[int, ...]:
    """One number for each axis; torch takes one number, or a tuple of one, for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _pads(
    padding: str | Size, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """As `F.pad` wants them, last axis first. "same" puts the odd one at the end."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sides = _spread(0 if isinstance(padding, str) else padding, len(kernel))
    return [side for size in reversed(sides) for side in (size, size)]


def _refuse_convolution(call: Arguments) -> str:
    axes, groups = len(call.settings["kernel"]), call.settings["groups"]
    if call.input.dim() != axes + 2:
        return f"conv{axes}d on an input without a batch axis"
    return "" if groups == 1 else f"conv{axes}d with groups={groups}"


def _convolution_rows(input: Tensor, settings: Mapping[str, Any], bias: bool) -> Tensor:
    windows, axes = F.pad(input, settings["pads"]), len(settings["kernel"])
    sides = zip(settings["kernel"], settings["stride"], settings["dilation"], strict=True)
    for axis, (size, stride, dilation) in enumerate(sides, 2):
        span = dilation * (size - 1) + 1
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    places = range(2, axes + 2)  # [B, C, *places, *kernel] -> [C, *kernel, B, *places]
    patches = windows.permute(1, *(axis + axes for axis in places), 0, *places)
    inputs, positions = math.prod(patches.shape[: axes + 1]), math.prod(patches.shape[axes + 2 :])
    rows = patches.new_ones(inputs + bias, len(input), positions)  # far faster than F.unfold
    rows[:inputs].view(patches.shape).copy_(patches)
    return rows.permute(1, 2, 0)


def _convolution_gradients(gradient: Tensor) -> Tensor:  # [B, O, *places] -> [B, S, O]
    return gradient.flatten(2).mT


def _convolution(name: str) -> Op:
    return Op(
        name, _read_convolution, _refuse_convolution, _convolution_rows, _convolution_gradients
    )


OPS: dict[Callable[..., Tensor], Op] = {
    F.linear: Op("linear", _read_linear, _refuse_linear, _linear_rows, _linear_gradients),
    F.conv1d: _convolution("conv1d"),
    F.conv2d: _convolution("conv2d"),
    F.conv3d: _convolution("conv3d"),
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
