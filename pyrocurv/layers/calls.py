"""What a capture has seen of the ops, and what it comes to: layers, and the calls of each.

A use is one op on a weight, a bias or both; a call is the part that a use has in a layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional as F

from pyrocurv.layers import Layer, OpSpec


@dataclass(frozen=True, eq=False)
class UntracedWeight:
    """A tensor that no supported op consumes, as a layer of one input: J is its gradient [P].

    It takes a backward pass for each example.
    """

    layer: Layer
    tensor: Tensor
    batch: int
    transposed: bool = False

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensor, by name."""
        return {self.layer.weight: self.tensor}

    def rows(self, count: int) -> Tensor:
        """Ones [count, 1, 1]."""
        return self.tensor.new_ones(count, 1, 1)

    def gradients(self, gradient: Tensor | None, count: int) -> Tensor:
        """Those of `count` examples [count, P] as [count, 1, P]; None is zero."""
        if gradient is None:
            gradient = self.tensor.new_zeros(count, self.tensor.numel())
        return gradient.reshape(count, 1, -1)


@dataclass(frozen=True, eq=False)
class TrackedTensor:
    """A watched tensor, or a view of it: turned around, or some of its rows."""

    name: str
    tracked: Tensor
    tensor: Tensor  # itself or the view; kept alive, so that its identity stays its own
    transposed: bool = False
    row_slice: tuple[int, int] | None = None  # the rows from, to

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the watched tensor."""
        return tuple(self.tracked.shape)


@dataclass(frozen=True, eq=False)
class OpRecord:
    """One op that consumed a weight, a bias or both; `edge` is that of its output."""

    op: OpSpec | None  # None for an addition of a bias alone
    weight: TrackedTensor | None
    bias: TrackedTensor | None
    form: str
    input: Tensor
    settings: Any
    edge: GradientEdge
    output_shape: torch.Size
    version: int
    # B, inside attention: tensors are [L, B, E] or [L·B, E]
    sequence_first_batch: int | None = None
    product: OpRecord | None = None  # what a bias was added to

    @property
    def names(self) -> tuple[str | None, str | None]:
        weight, bias = self.weight, self.bias
        return None if weight is None else weight.name, None if bias is None else bias.name

    @property
    def groups(self) -> int:
        return self.settings.get("groups", 1) if self.settings else 1


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The part that one op had in a layer: inputs and output gradients as rows.

    They are of the weight's dtype, whatever autocast has made of the op's.

    `transposed` calls see the layer's matrix turned around, as an embedding that is tied to a head.
    """

    layer: Layer
    transposed: bool
    use: OpRecord
    part: str  # of the op that is the layer's: "both", "weight" or "bias"

    @property
    def edge(self) -> GradientEdge:
        """Of the output."""
        return self.use.edge

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The watched tensors of the layer, by name."""
        known = (self.use.weight, self.use.bias)
        return {k.name: k.tracked for k in known if k is not None and k.name in self.layer.tensors}

    @property
    def batch(self) -> int:
        """B."""
        use = self.use
        return use.sequence_first_batch or (
            use.output_shape if use.op is None else use.input.shape
        )[0]

    def rows(self, count: int) -> Tensor:
        """The inputs of the first `count` examples, [*lead, count, S, I]; 1 for the bias."""
        use = self.use
        if self.part == "bias":
            assert use.bias is not None
            start, stop = use.bias.row_slice or (0, self.layer.size)
            positions = math.prod(use.output_shape) // (self.batch * (stop - start))
            return use.input.new_ones(count, positions, 1, dtype=self._dtype)
        assert use.op is not None
        if use.input._version != use.version:
            raise RuntimeError(
                f"the input of {self.layer.weight!r} was changed in place after the layer read it"
            )
        input = self._batch_first(use.input.detach())
        if input.is_floating_point():  # else indices, or what a scale is for
            input = input.to(self._dtype)
        return use.op.rows(input, use.settings, self.part == "both", count).to(self._dtype)

    def gradients(self, gradient: Tensor | None, count: int) -> Tensor:
        """A gradient onto the output as [*lead, count, S, O]; None (no path) is zero."""
        use = self.use
        if gradient is None:
            gradient = use.input.new_zeros(use.output_shape, dtype=self._dtype)
        gradient = self._batch_first(gradient)[:count].to(self._dtype)
        if use.op is None:
            rows = gradient.reshape(count, -1, self.layer.size)
        else:
            rows = use.op.gradients(gradient, use.settings)
        known = use.weight or use.bias
        if known is not None and known.row_slice is not None:
            start, stop = known.row_slice
            rows = F.pad(rows, (start, known.shape[0] - stop))
        if self.part == "bias" and rows.dim() == 4:  # [Γ, B, S, O] -> [B, S, Γ·O]
            rows = rows.movedim(0, -2).flatten(-2)
        return rows.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        known = self.use.weight or self.use.bias
        assert known is not None
        return known.tensor.dtype

    def _batch_first(self, tensor: Tensor) -> Tensor:
        batch = self.use.sequence_first_batch
        if batch is None:
            return tensor
        return tensor.reshape(-1, batch, tensor.shape[-1]).transpose(0, 1)


def split_weight_and_bias(call: LayerCall) -> tuple[LayerCall, LayerCall]:
    """A call of weight and bias as one of the weight and one of the bias, layers of their own."""
    layer, use = call.layer, call.use
    assert layer.bias is not None
    weight = replace(layer, bias=None)
    bias = Layer(layer.bias, None, layer.bias_shape, "vector")
    return LayerCall(weight, call.transposed, use, "weight"), LayerCall(bias, False, use, "bias")
