"""A scale (and shift) for each unit: the affine parameters of norm layers, and x * w + b.

Each unit is a group with the matrix [scale | shift], O = 1. Its input is the normalized activation,
which is computed anew here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec, append_ones, no_refusal

Settings = Mapping[str, Any]
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
        input = input if settings.get("batch_coupling") else input[:count]
        normalized = settings["normalize"](input)[:count]
        return append_ones(to_rows(normalized, settings), bias)

    return input_rows


def _read_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> OpArguments:
    shape = tuple(normalized_shape)
    normalize = partial(F.layer_norm, normalized_shape=shape, eps=eps)
    return OpArguments(input, weight, bias, {"units": math.prod(shape), "normalize": normalize})


def _read_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> OpArguments:
    shape = tuple(normalized_shape)
    normalize = partial(F.rms_norm, normalized_shape=shape, eps=eps)
    return OpArguments(input, weight, None, {"units": math.prod(shape), "normalize": normalize})


def _read_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> OpArguments:
    normalize = partial(F.group_norm, num_groups=num_groups, eps=eps)
    return OpArguments(input, weight, bias, {"normalize": normalize})


def _read_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> OpArguments:
    mean, var = (None, None) if training else (running_mean, running_var)
    normalize = partial(
        F.batch_norm, running_mean=mean, running_var=var, training=training, eps=eps
    )
    return OpArguments(input, weight, bias, {"normalize": normalize, "batch_coupling": training})


def _identity(input: Tensor) -> Tensor:
    return input


def _read_scale(input: Any, other: Any) -> OpArguments:
    units = other.numel() if isinstance(other, Tensor) else 1
    return OpArguments(input, other, None, {"units": units, "normalize": _identity})


def _refuse_scale(arguments: OpArguments) -> str:
    input, scale = arguments.input, arguments.weight
    if isinstance(input, Tensor) and isinstance(scale, Tensor) and scale.dim() == 1:
        if input.dim() >= 2 and input.shape[-1] == len(scale):
            return ""
    return "a product that is not a scale for each unit of the last axis"


def _norm(
    name: str, read: Callable[..., OpArguments], to_rows: ToRows, outputs_last: bool = False
) -> OpSpec:
    return OpSpec(
        name, read, no_refusal, _input_rows(to_rows), to_rows, "per_unit",
        outputs_last=outputs_last,
    )


SCALE = OpSpec(
    "mul", _read_scale, _refuse_scale, _input_rows(_units_last), _units_last, "per_unit",
    commutes=True, outputs_last=True,
)

SCALES: dict[Any, OpSpec] = {
    F.layer_norm: _norm("layer_norm", _read_layer_norm, _units_last),
    F.rms_norm: _norm("rms_norm", _read_rms_norm, _units_last, outputs_last=True),
    F.group_norm: _norm("group_norm", _read_group_norm, _channels_first),
    F.batch_norm: _norm("batch_norm", _read_batch_norm, _channels_first),
    torch.mul: SCALE,
    torch.Tensor.mul: SCALE,
    torch.Tensor.__mul__: SCALE,
    torch.Tensor.__rmul__: SCALE,
}
