"""A scale (and shift) for each unit: the affine parameters of norm layers, and x * w + b.

Each unit is a group of its own with the matrix [scale | shift], O = 1; its input is the normalised
activation, computed anew here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import Arguments, Op, no_refusal, with_ones

Settings = Mapping[str, Any]


def _last(tensor: Tensor, settings: Settings) -> Tensor:
    """[B, *, *unit axes] -> [C, B, S, 1]."""
    units = settings["units"]
    return tensor.reshape(len(tensor), -1, units).permute(2, 0, 1).unsqueeze(-1)


def _channel(tensor: Tensor, settings: Settings | None = None) -> Tensor:
    """[B, C, *] -> [C, B, S, 1]."""
    return tensor.flatten(2).permute(1, 0, 2).unsqueeze(-1) if tensor.dim() > 2 else (
        tensor.mT[..., None, None])


def _read_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Arguments:
    shape = tuple(normalized_shape)
    return Arguments(input, weight, bias, {"shape": shape, "units": math.prod(shape), "eps": eps})


def _layer_norm(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    normal = F.layer_norm(input[:count], settings["shape"], eps=settings["eps"])
    return with_ones(_last(normal, settings), bias)


def _read_rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Arguments:
    shape = tuple(normalized_shape)
    return Arguments(input, weight, None, {"shape": shape, "units": math.prod(shape), "eps": eps})


def _rms_norm(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    normal = F.rms_norm(input[:count], settings["shape"], eps=settings["eps"])
    return with_ones(_last(normal, settings), bias)


def _read_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Arguments:
    return Arguments(input, weight, bias, {"norm_groups": num_groups, "eps": eps})


def _group_norm(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    normal = F.group_norm(input[:count], settings["norm_groups"], eps=settings["eps"])
    return with_ones(_channel(normal), bias)


def _read_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Arguments:
    statistics = None if training else (running_mean, running_var)
    return Arguments(input, weight, bias, {"statistics": statistics, "eps": eps})


def _batch_norm(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    mean, var = settings["statistics"] or (None, None)
    training = settings["statistics"] is None  # the statistics of the whole batch
    normal = F.batch_norm(input, mean, var, training=training, eps=settings["eps"])
    return with_ones(_channel(normal[:count]), bias)


def _read_scale(input: Any, other: Any) -> Arguments:
    units = other.numel() if isinstance(other, Tensor) else 1
    return Arguments(input, other, None, {"units": units})


def _refuse_scale(call: Arguments) -> str:
    input, scale = call.input, call.weight
    if isinstance(input, Tensor) and isinstance(scale, Tensor) and scale.dim() == 1:
        if input.dim() >= 2 and input.shape[-1] == len(scale):
            return ""
    return "a product that is no scale for each unit of the last axis"


def _scaled(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    return with_ones(_last(input[:count], settings), bias)


SCALE = Op("mul", _read_scale, _refuse_scale, _scaled, _last, "units", commutes=True)

SCALES: dict[Any, Op] = {
    F.layer_norm: Op("layer_norm", _read_layer_norm, no_refusal, _layer_norm, _last, "units"),
    F.rms_norm: Op("rms_norm", _read_rms_norm, no_refusal, _rms_norm, _last, "units"),
    F.group_norm: Op("group_norm", _read_group_norm, no_refusal, _group_norm, _channel, "units"),
    F.batch_norm: Op("batch_norm", _read_batch_norm, no_refusal, _batch_norm, _channel, "units"),
    torch.mul: SCALE,
    torch.Tensor.mul: SCALE,
    torch.Tensor.__mul__: SCALE,
    torch.Tensor.__rmul__: SCALE,
}
