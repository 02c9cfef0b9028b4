"""A scale (and shift) for each unit: the affine parameters of norm layers, and x * w + b.

Each unit is a group with the matrix [scale | shift], O = 1. Its input is the normalized activation,
which is computed anew here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec, Settings, append_ones

ToRows = Callable[[Tensor, Settings], Tensor]


def _units_last(tensor: Tensor, settings: Settings) -> Tensor:
    """[B, *, *unit axes] -> [C, B, S, 1]."""
    return tensor.reshape(len(tensor), -1, settings["units"]).permute(2, 0, 1).unsqueeze(-1)


def _channels_first(tensor: Tensor, settings: Settings) -> Tensor:
    """[B, C, *] -> [C, B, S, 1]."""
    return tensor.reshape(*tensor.shape[:2], -1).permute(1, 0, 2).unsqueeze(-1)


def _input_rows(to_rows: ToRows) -> Callable[[Tensor, Settings, bool, int], Tensor]:
    """The normalized inputs of the first examples, from all where examples share statistics."""

    def input_rows(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
        input = input if settings["batch_coupling"] else input[:count]
        normalized = settings["normalize"](input)[:count]
        return append_ones(to_rows(normalized, settings), bias)

    return input_rows


def _norm(function: Callable[..., Tensor], to_rows: ToRows, outputs_last: bool = False) -> OpSpec:
    parameters = signature(function)

    def read(*args: Any, **kwargs: Any) -> OpArguments:
        options = parameters.bind(*args, **kwargs).arguments
        input, weight, bias = (options.pop(name, None) for name in ("input", "weight", "bias"))
        is_training = options.get("training", False)
        if is_training:  # without the running statistics, which it would update
            options.update(running_mean=None, running_var=None)
        settings = {
            "normalize": partial(function, **options), "batch_coupling": is_training,
            "units": math.prod(options.get("normalized_shape", ())),
        }
        return OpArguments(input, weight, bias, settings)

    return OpSpec(
        function.__name__, read, lambda arguments: "", _input_rows(to_rows), to_rows, "per_unit",
        outputs_last=outputs_last,
    )


def _read_scale(input: Any, other: Any) -> OpArguments:
    units = other.numel() if isinstance(other, Tensor) else 1
    settings = {"units": units, "batch_coupling": False, "normalize": lambda input: input}
    return OpArguments(input, other, None, settings)


def _refuse_scale(arguments: OpArguments) -> str:
    input, scale = arguments.input, arguments.weight
    if isinstance(input, Tensor) and isinstance(scale, Tensor) and scale.dim() == 1:
        if input.dim() >= 2 and input.shape[-1] == len(scale):
            return ""
    return "a product that is not a scale for each unit of the last axis"


SCALE = OpSpec(
    "mul", _read_scale, _refuse_scale, _input_rows(_units_last), _units_last, "per_unit",
    commutes=True, outputs_last=True,
)

SCALES: dict[Any, OpSpec] = {
    F.layer_norm: _norm(F.layer_norm, _units_last),
    F.rms_norm: _norm(F.rms_norm, _units_last, outputs_last=True),
    F.group_norm: _norm(F.group_norm, _channels_first),
    F.batch_norm: _norm(F.batch_norm, _channels_first),
    torch.mul: SCALE, Tensor.mul: SCALE, Tensor.__mul__: SCALE, Tensor.__rmul__: SCALE,
}
