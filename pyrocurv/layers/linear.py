"""Matrix products and look-ups: x Wᵀ, x @ w, embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyrocurv.layers.op import OpArguments, OpSpec, last_axis, with_ones

MAX_VOCABULARY = 8192  # of an embedding: its inputs are as many columns


def _read_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> OpArguments:
    return OpArguments(input, weight, bias)


def _read_product(
    input: Tensor, other: Tensor | None = None, mat2: Tensor | None = None
) -> OpArguments:
    return OpArguments(input, other if mat2 is None else mat2)


def _read_addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> OpArguments:
    return OpArguments(mat1, mat2, input, {"factors": (beta, alpha)})


def _refuse(call: OpArguments) -> str:
    if call.input.dim() < 2:
        return "a linear op on an input without a batch axis"
    if call.weight is not None and call.weight.dim() != 2:
        return "a product with a weight that is no matrix"
    factors = call.settings.get("factors")
    if factors not in (None, (1, 1)):
        return "addmm with factors"
    if call.bias is not None and call.weight is not None:
        outputs = call.weight.shape[0 if factors is None else 1]
        if call.bias.numel() != outputs:
            return "a bias that is shared by outputs"
    return ""


def _rows(input: Tensor, settings: Mapping[str, Any], bias: bool, count: int) -> Tensor:
    return with_ones(last_axis(input[:count]), bias)


def _gradients(gradient: Tensor, settings: Mapping[str, Any]) -> Tensor:
    return last_axis(gradient)


LINEAR = OpSpec("linear", _read_linear, _refuse, _rows, _gradients, last=True)
PRODUCT = OpSpec("matmul", _read_product, _refuse, _rows, _gradients, "columns", last=True)
ADDMM = OpSpec("addmm", _read_addmm, _refuse, _rows, _gradients, "columns")


def _read_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> OpArguments:
    if padding_idx is not None:
        padding_idx %= len(weight)
    unusual = {"max_norm": max_norm, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    settings = {"size": len(weight), "padding": padding_idx, "dtype": weight.dtype}
    used = [name for name, value in unusual.items() if value]
    return OpArguments(input, weight, None, {**settings, "unusual": used})


def _refuse_embedding(call: OpArguments) -> str:
    if call.settings["unusual"]:
        return f"embedding with {', '.join(call.settings['unusual'])}"
    if call.settings["size"] > MAX_VOCABULARY:
        return f"embedding of more than {MAX_VOCABULARY} rows"
    return "" if call.input.dim() else "embedding of a single index"


def _one_hot(input: Tensor, settings: Mapping[str, Any], bias: bool, count: int) -> Tensor:
    index = input[:count].reshape(len(input[:count]), -1)  # [B, S]
    rows = F.one_hot(index, settings["size"]).to(settings["dtype"])
    if settings["padding"] is not None:
        rows[..., settings["padding"]] = 0  # that row gets no gradient
    return with_ones(rows, bias)


EMBEDDING = OpSpec("embedding", _read_embedding, _refuse_embedding, _one_hot, _gradients, "columns")

PRODUCTS: dict[Any, OpSpec] = {
    F.linear: LINEAR,
    torch.matmul: PRODUCT,
    torch.mm: PRODUCT,
    torch.Tensor.matmul: PRODUCT,
    torch.Tensor.mm: PRODUCT,
    torch.Tensor.__matmul__: PRODUCT,
    torch.addmm: ADDMM,
    F.embedding: EMBEDDING,
}
