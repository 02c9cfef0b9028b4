"""The calls of layers: input and output gradient of one op as rows of examples and positions.

The Jacobian of a call for an example is the sum of g aᵀ over the positions S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from pyrocurv.layers import Layer, OpSpec

Layout = tuple[str, int, tuple[int, ...]]  # of a weight as a matrix: orientation, groups, shape


@dataclass(frozen=True, eq=False)
class TrackedTensor:
    """A tracked tensor `base`, or a view of it: its transpose, or some of its rows."""

    name: str
    base: Tensor
    tensor: Tensor  # the base or the view, kept alive because it is recognized by its id
    transposed: bool = False
    row_slice: tuple[int, int] | None = None  # (start, stop)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the base."""
        return tuple(self.base.shape)


@dataclass(frozen=True, eq=False)
class OpRecord:
    """One op that consumed a weight, a bias or both; `edge` is the gradient edge of its output."""

    op: OpSpec
    weight: TrackedTensor | None
    bias: TrackedTensor | None
    orientation: str  # of the weight in this op
    input: Tensor
    settings: Mapping[str, Any]
    edge: GradientEdge
    output_shape: torch.Size
    input_version: int
    sequence_first_batch: int | None = None  # B inside attention, with tensors [L, B, E], [L·B, E]
    product: OpRecord | None = None  # the op whose output the bias was added to

    @property
    def names(self) -> tuple[str | None, str | None]:
        """The names of weight and bias."""
        weight, bias = self.weight, self.bias
        return weight.name if weight else None, bias.name if bias else None

    @property
    def layout(self) -> Layout:
        """The use of the weight as a matrix."""
        shape = self.weight.shape if self.weight else ()
        return self.orientation, self.settings.get("groups", 1), shape

    @property
    def batch_size(self) -> int:
        """B."""
        return self.sequence_first_batch or self.input.shape[0]

    def batch_first(self, tensor: Tensor) -> Tensor:
        """The input, or a tensor like the output, with the examples as its first axis."""
        if self.sequence_first_batch is None:
            return tensor
        return tensor.reshape(-1, self.sequence_first_batch, tensor.shape[-1]).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class OpCall:
    """The part of an op that belongs to one layer. Rows have the weight's dtype under autocast."""

    layer: Layer
    record: OpRecord
    transposed: bool = False  # the op uses the transpose of W, as a tied embedding does

    @cached_property
    def _tensors(self) -> list[TrackedTensor]:
        """The tensors of the layer that the op consumed: its weight, its bias or both."""
        sources = self.record.weight, self.record.bias
        return [source for source in sources if source and source.name in self.layer.tensors]

    @property
    def edge(self) -> GradientEdge:
        return self.record.edge

    @property
    def batch_size(self) -> int:
        return self.record.batch_size

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors of the layer, by name."""
        return {tensor.name: tensor.base for tensor in self._tensors}

    @property
    def dtype(self) -> torch.dtype:
        return self._tensors[0].tensor.dtype

    def input_rows(self, count: int) -> Tensor:
        """The inputs a of the first `count` examples [*lead, count, S, I]; 1 for the bias."""
        record, layer = self.record, self.layer
        if layer.orientation == "bias":
            start, stop = self._tensors[0].row_slice or (0, layer.size)
            positions = math.prod(record.output_shape) // (self.batch_size * (stop - start))
            return record.input.new_ones(count, positions, 1, dtype=self.dtype)
        if record.input._version != record.input_version:
            raise RuntimeError(
                f"the input of {layer.weight!r} was changed in place after the layer read it"
            )
        input = record.batch_first(record.input.detach())
        if input.is_floating_point():  # otherwise indices, or numbers that a scale multiplies
            input = input.to(self.dtype)
        rows = record.op.input_rows(input, record.settings, layer.bias is not None, count)
        return rows.to(self.dtype)

    def output_gradient_rows(self, gradient: Tensor | None, count: int) -> Tensor:
        """A gradient g as rows of `count` examples [*lead, count, S, O]; None (no path) is zero."""
        record, tensor = self.record, self._tensors[0]
        if gradient is None:
            gradient = record.input.new_zeros(record.output_shape, dtype=self.dtype)
        gradient = record.batch_first(gradient)[:count].to(self.dtype)
        rows = record.op.output_gradient_rows(gradient, record.settings)
        if tensor.row_slice is not None:
            start, stop = tensor.row_slice
            rows = F.pad(rows, (start, tensor.shape[0] - stop))
        if self.layer.orientation == "bias" and rows.dim() == 4:  # [Γ, B, S, O] -> [B, S, Γ·O]
            rows = rows.movedim(0, -2).flatten(-2)
        return rows.to(self.dtype)


@dataclass(frozen=True, eq=False)
class UntracedWeight:
    """A tensor that no supported op consumes, as a call with one input, which is 1.

    Its gradient rows are its own gradients, one backward pass for each example.
    """

    layer: Layer
    tensor: Tensor
    batch_size: int
    transposed: bool = False

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {self.layer.weight: self.tensor}

    def zeros(self) -> Tensor:
        """The gradient of an example that does not depend on the tensor."""
        return torch.zeros_like(self.tensor)

    def input_rows(self, count: int) -> Tensor:
        return self.tensor.new_ones(count, 1, 1)

    def output_gradient_rows(self, gradient: Tensor | None, count: int) -> Tensor:
        if gradient is None:
            gradient = self.tensor.new_zeros(count, self.tensor.numel())
        return gradient.reshape(count, 1, -1)  # [count, 1, P]


@dataclass(frozen=True, eq=False)
class MixedRowsCall:
    """A call whose R rows are not the examples, such as the nodes of several graphs.

    Every example has all rows, as S = R positions, and its own gradient in each of them, from one
    backward pass for each example. J is exact. The rows are scaled so that Kronecker factors sum
    over the positions of the B examples as where these are rows: A = Σ a aᵀ / B, S = R / B.
    """

    inner: OpCall
    batch_size: int  # B

    @property
    def layer(self) -> Layer:
        return self.inner.layer

    @property
    def transposed(self) -> bool:
        return self.inner.transposed

    @property
    def edge(self) -> GradientEdge:
        return self.inner.edge

    @property
    def leaves(self) -> dict[str, Tensor]:
        return self.inner.leaves

    def zeros(self) -> Tensor:
        """The gradient of an example that does not depend on the layer."""
        record = self.inner.record
        return record.input.new_zeros(record.output_shape, dtype=self.inner.dtype)

    def input_rows(self, count: int) -> Tensor:
        """The inputs [*lead, count, R, I], the same for each example."""
        rows = self.inner.input_rows(self.inner.batch_size).flatten(-3, -2)
        rows = (rows / self.batch_size**0.5).unsqueeze(-3)
        return rows.expand(*rows.shape[:-3], count, -1, -1)

    def output_gradient_rows(self, gradient: Tensor | None, count: int) -> Tensor:
        """The gradients of each example [count, *output shape] as rows [*lead, count, R, O]."""
        rows = self.inner.batch_size
        if gradient is None:
            one = self.inner.output_gradient_rows(None, rows).flatten(-3, -2)
            return one.unsqueeze(-3).expand(*one.shape[:-2], count, -1, -1)
        each = [self.inner.output_gradient_rows(g, rows).flatten(-3, -2) for g in gradient]
        return torch.stack(each, -3) * self.batch_size**0.5


LayerCall = OpCall | UntracedWeight | MixedRowsCall


def split_weight_and_bias(call: OpCall) -> list[OpCall]:
    """A call of a weight and a bias as two calls of separate layers."""
    layer = call.layer
    if layer.bias is None:
        return [call]
    bias = Layer(layer.bias, None, layer.bias_shape, "bias")
    return [replace(call, layer=replace(layer, bias=None)), OpCall(bias, call.record)]
