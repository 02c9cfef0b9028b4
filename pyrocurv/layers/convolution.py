"""Convolutions and their transposes as products of patches with the kernel.

A transposed convolution is the convolution of its input, spread out with zeros between, with the
kernel turned around.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec

Size = int | tuple[int, ...]


def _spread(value: Size, axes: int) -> tuple[int, ...]:
    """One number for each axis; torch takes one number, or a tuple of one, for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _read(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: str | Size = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> OpArguments:
    kernel = tuple(weight.shape[2:])
    dilations = _spread(dilation, len(kernel))
    settings = dict(
        kernel=kernel,
        stride=_spread(stride, len(kernel)),
        dilation=dilations,
        pads=_pads(padding, kernel, dilations),
        groups=groups,
    )
    return OpArguments(input, weight, bias, settings)


def _pads(
    padding: str | Size, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """As `F.pad` wants them, last axis first. "same" puts the odd one at the end."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    sides = _spread(0 if isinstance(padding, str) else padding, len(kernel))
    return [side for size in reversed(sides) for side in (size, size)]


def _refuse(call: OpArguments) -> str:
    axes = len(call.settings["kernel"])
    batch = call.input.dim() == axes + 2
    return "" if batch else f"a {axes}d convolution of an input without a batch axis"


def _rows(input: Tensor, settings: Mapping[str, Any], bias: bool, count: int) -> Tensor:
    windows, axes = F.pad(input[:count], settings["pads"]), len(settings["kernel"])
    sides = zip(settings["kernel"], settings["stride"], settings["dilation"], strict=True)
    for axis, (size, stride, dilation) in enumerate(sides, 2):
        span = dilation * (size - 1) + 1
        windows = windows.unfold(axis, span, stride)[..., ::dilation]
    places = range(2, axes + 2)  # [B, C, *places, *kernel] -> [C, *kernel, B, *places]
    patches = windows.permute(1, *(axis + axes for axis in places), 0, *places)
    return _flat(patches, axes, settings["groups"], bias)


def _flat(patches: Tensor, axes: int, groups: int, bias: bool) -> Tensor:
    """[C, *kernel, B, *places] -> [*lead, B, S, I]: one copy, far faster than F.unfold."""
    sides = patches.shape
    inputs = math.prod(sides[: axes + 1]) // groups
    batch, positions = sides[axes + 1], math.prod(sides[axes + 2 :])
    rows = patches.new_ones(groups, inputs + bias, batch, positions)
    grouped = patches.unflatten(0, (groups, -1))
    rows[:, :inputs].view(grouped.shape).copy_(grouped)
    rows = rows.permute(0, 2, 3, 1)
    return rows if groups > 1 else rows[0]


def _gradients(gradient: Tensor, settings: Mapping[str, Any]) -> Tensor:
    flat, groups = gradient.flatten(2).mT, settings["groups"]  # [B, O, *places] -> [B, S, O]
    return flat if groups == 1 else flat.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _read_transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> OpArguments:
    kernel = tuple(weight.shape[2:])
    names = dict(stride=stride, dilation=dilation, padding=padding, more=output_padding)
    sides = {name: _spread(size, len(kernel)) for name, size in names.items()}
    spans = [d * (k - 1) for d, k in zip(sides["dilation"], kernel, strict=True)]
    each = zip(spans, sides["padding"], sides["more"], strict=True)
    pads = [side for s, p, m in reversed([*each]) for side in (s - p, s - p + m)]
    settings = dict(
        kernel=kernel,
        stride=(1,) * len(kernel),
        dilation=sides["dilation"],
        pads=pads,
        groups=groups,
        spread=sides["stride"],
    )
    return OpArguments(input, weight, bias, settings)


def _transposed_rows(input: Tensor, settings: Mapping[str, Any], bias: bool, count: int) -> Tensor:
    rows = _rows(_spread_out(input[:count], settings["spread"]), settings, bias, count)
    inputs, kernel = rows.shape[-1] - bias, settings["kernel"]
    apart = rows[..., :inputs].unflatten(-1, (-1, *kernel))
    transposed = apart.flip([*range(-len(kernel), 0)]).flatten(-1 - len(kernel))
    return torch.cat([transposed, rows[..., inputs:]], -1)


def _spread_out(input: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Zeros between the entries of the spatial axes, `step - 1` of them."""
    sides = [step * (size - 1) + 1 for size, step in zip(input.shape[2:], steps, strict=True)]
    wide = input.new_zeros(*input.shape[:2], *sides)
    view = wide
    for axis, step in enumerate(steps, 2):
        view = view.unfold(axis, 1, step).squeeze(-1)
    view.copy_(input)
    return wide


def _convolution(name: str) -> OpSpec:
    return OpSpec(name, _read, _refuse, _rows, _gradients)


def _transposed(name: str) -> OpSpec:
    return OpSpec(name, _read_transposed, _refuse, _transposed_rows, _gradients, "columns")


CONVOLUTIONS: dict[Any, OpSpec] = {
    F.conv1d: _convolution("conv1d"),
    F.conv2d: _convolution("conv2d"),
    F.conv3d: _convolution("conv3d"),
    F.conv_transpose1d: _transposed("conv_transpose1d"),
    F.conv_transpose2d: _transposed("conv_transpose2d"),
    F.conv_transpose3d: _transposed("conv_transpose3d"),
}
