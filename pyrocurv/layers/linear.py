"""Matrix products, embeddings and added biases: x Wᵀ, x @ w, W[index], x + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec, Settings, append_ones, rows_of_last_axis

MAX_VOCABULARY = 8192  # rows of an embedding, since its one-hot inputs have as many columns


def _read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> OpArguments:
    return OpArguments(input, weight, bias)


def _read_matmul(
    input: Tensor, other: Tensor | None = None, mat2: Tensor | None = None
) -> OpArguments:
    return OpArguments(input, other if mat2 is None else mat2)


def _read_addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> OpArguments:
    return OpArguments(mat1, mat2, input, {"factors": (beta, alpha)})


def _refuse(arguments: OpArguments) -> str:
    weight, bias = arguments.weight, arguments.bias
    if arguments.input.dim() < 2:
        return "a linear op on an input without a batch axis"
    if weight is not None and weight.dim() != 2:
        return "a product with a weight that is not a matrix"
    factors = arguments.settings.get("factors")
    if factors not in (None, (1, 1)):
        return "addmm with factors"
    if bias is not None and weight is not None:
        if bias.numel() != weight.shape[0 if factors is None else 1]:
            return "a bias that is shared by outputs"
    return ""


def _input_rows(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    return append_ones(rows_of_last_axis(input[:count]), bias)


def _output_gradient_rows(gradient: Tensor, settings: Settings) -> Tensor:
    return rows_of_last_axis(gradient)


LINEAR = OpSpec(
    "linear", _read_linear, _refuse, _input_rows, _output_gradient_rows, outputs_last=True
)
MATMUL = OpSpec(
    "matmul", _read_matmul, _refuse, _input_rows, _output_gradient_rows, "in_out",
    outputs_last=True,
)
ADDMM = OpSpec("addmm", _read_addmm, _refuse, _input_rows, _output_gradient_rows, "in_out")


def _read_embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> OpArguments:
    options = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    settings = {
        "size": len(weight), "dtype": weight.dtype, "padding": padding_idx,
        "unsupported": [name for name, value in options.items() if value],
    }
    return OpArguments(input, weight, None, settings)


def _refuse_embedding(arguments: OpArguments) -> str:
    settings = arguments.settings
    if settings["unsupported"]:
        return f"embedding with {', '.join(settings['unsupported'])}"
    if settings["size"] > MAX_VOCABULARY:
        return f"embedding of more than {MAX_VOCABULARY} rows"
    return "" if arguments.input.dim() else "embedding of a single index"


def _one_hot_rows(input: Tensor, settings: Settings, bias: bool, count: int) -> Tensor:
    index = input[:count].reshape(len(input[:count]), -1)  # [B, S]
    rows = F.one_hot(index, settings["size"]).to(settings["dtype"])
    if settings["padding"] is not None:
        rows[..., settings["padding"]] = 0  # the padding row has no gradient
    return append_ones(rows, bias)


EMBEDDING = OpSpec(
    "embedding", _read_embedding, _refuse_embedding, _one_hot_rows, _output_gradient_rows, "in_out"
)

PRODUCTS: dict[Any, OpSpec] = {
    F.linear: LINEAR, torch.addmm: ADDMM, F.embedding: EMBEDDING,
    torch.matmul: MATMUL, Tensor.matmul: MATMUL, Tensor.__matmul__: MATMUL,
    torch.mm: MATMUL, Tensor.mm: MATMUL,
}
