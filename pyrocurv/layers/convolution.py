"""Convolutions and transposed convolutions as products of input patches with the kernel.

A transposed convolution is a convolution of the dilated input, with zeros between its entries, by
the flipped kernel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec, Settings

Size = int | tuple[int, ...]


def _per_axis(value: Size, axes: int) -> tuple[int, ...]:
    """One number for each axis, from one for all of them as torch accepts it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _read(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1,
    padding: str | Size = 0, dilation: Size = 1, groups: int = 1,
) -> OpArguments:
    kernel = tuple(weight.shape[2:])
    stride, dilation = _per_axis(stride, len(kernel)), _per_axis(dilation, len(kernel))
    pads = _pads(padding, kernel, dilation)
    settings = dict(kernel=kernel, stride=stride, dilation=dilation, pads=pads, groups=groups)
    return OpArguments(input, weight, bias, settings)


def _pads(padding: str | Size, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """The arguments of `F.pad`, last axis first. "same" puts the odd one at the end."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sides = _per_axis(0 if isinstance(padding, str) else padding, len(kernel))
    return [side for size in reversed(sides) for side in (size, size)]


def _refuse(arguments: OpArguments) -> str:
    axes = len(arguments.settings["kernel"])
    has_batch = arguments.input.dim() == axes + 2
    return "" if has_batch else f"a {axes}d convolution of an input without a batch axis"


def _input_rows(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    windows, axes = F.pad(input[:count], settings["pads"]), len(settings["kernel"])
    sides = zip(settings["kernel"], settings["stride"], settings["dilation"], strict=True)
    for axis, (size, stride, dilation) in enumerate(sides, 2):
        span = dilation * (size - 1) + 1
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    positions = range(2, axes + 2)  # [B, C, *positions, *kernel] -> [C, *kernel, B, *positions]
    patches = windows.permute(1, *(axis + axes for axis in positions), 0, *positions)
    patches = patches.unflatten(0, (settings["groups"], -1))  # [Γ, C/Γ, *kernel, B, *positions]
    groups, *window, batch = patches.shape[: axes + 3]
    inputs, count = math.prod(window), math.prod(patches.shape[axes + 3 :])
    rows = patches.new_ones(groups, inputs + bias, batch, count)
    rows[:, :inputs].view(patches.shape).copy_(patches)  # one copy: far faster than F.unfold
    rows = rows.permute(0, 2, 3, 1)  # [Γ, B, S, I]
    return rows if groups > 1 else rows[0]


def _output_gradient_rows(gradient: Tensor, settings: Settings) -> Tensor:
    rows, groups = gradient.flatten(2).mT, settings["groups"]  # [B, O, *positions] -> [B, S, O]
    return rows if groups == 1 else rows.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _read_transposed(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size = 0,
    output_padding: Size = 0, groups: int = 1, dilation: Size = 1,
) -> OpArguments:
    kernel = tuple(weight.shape[2:])
    sides = [_per_axis(value, len(kernel)) for value in (dilation, padding, output_padding)]
    pads: list[int] = []
    for size, step, pad, more in reversed([*zip(kernel, *sides, strict=True)]):
        before = step * (size - 1) - pad
        pads += before, before + more
    settings = dict(
        kernel=kernel, stride=(1,) * len(kernel), dilation=sides[0], pads=pads, groups=groups,
        input_dilation=_per_axis(stride, len(kernel)),
    )
    return OpArguments(input, weight, bias, settings)


def _transposed_rows(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    dilated = _dilate(input[:count], settings["input_dilation"])
    rows, kernel = _input_rows(dilated, settings, bias, count), settings["kernel"]
    inputs = rows.shape[-1] - bias
    patches = rows[..., :inputs].unflatten(-1, (-1, *kernel))
    flipped = patches.flip([*range(-len(kernel), 0)]).flatten(-1 - len(kernel))
    return torch.cat([flipped, rows[..., inputs:]], -1)


def _dilate(input: Tensor, steps: tuple[int, ...]) -> Tensor:
    """The input with `step - 1` zeros between the entries of each spatial axis."""
    sides = [step * (size - 1) + 1 for size, step in zip(input.shape[2:], steps, strict=True)]
    dilated = input.new_zeros(*input.shape[:2], *sides)
    dilated[(slice(None),) * 2 + tuple(slice(None, None, step) for step in steps)] = input
    return dilated


CONVOLUTIONS: dict[Any, OpSpec] = {
    function: OpSpec(function.__name__, _read, _refuse, _input_rows, _output_gradient_rows)
    for function in (F.conv1d, F.conv2d, F.conv3d)
} | {
    function: OpSpec(function.__name__, _read_transposed, _refuse, _transposed_rows,
                     _output_gradient_rows, "in_out")
    for function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
}
