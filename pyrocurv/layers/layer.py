"""The weights of one layer as one matrix W [O, I], or one for each of its groups [Γ, O, I]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyrocurv.structures.serialization import serializable


@serializable
@dataclass(frozen=True)
class Layer:
    """Names of sample sites or parameters, and how the weight [*shape] is seen as W.

    The bias, if any, is the last column of W. The forms of a weight, for Γ groups:

        rows     [Γ·O, ...]         Linear and convolutions: W = weight flattened behind its rows
        columns  [Γ·I, O, *kernel]  x @ w, embeddings, transposed convolutions: turned around
        units    [...]              the scales of norm layers: a group for each, O = I = 1
        vector   [...]              a bias alone: I = 1
        opaque   [...]              what no supported op consumes, or not by examples: I = 1
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    form: str = "rows"
    groups: int = 1

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """[*lead, O, I] with the bias: lead is (Γ,) or, for layers of one group, ()."""
        size, bias = math.prod(self.shape), self.bias is not None
        if self.form == "units":
            return size, 1, 1 + bias
        if self.form in ("vector", "opaque"):
            return size, 1
        lead = (self.groups,) if self.groups > 1 else ()
        outputs = self.shape[1] if self.form == "columns" else self.shape[0] // self.groups
        return *lead, outputs, size // (self.groups * outputs) + bias

    @property
    def is_untraced(self) -> bool:
        """Whether no supported op consumes the weight."""
        return self.form == "opaque"

    @property
    def lead(self) -> tuple[int, ...]:
        """(Γ,) or ()."""
        return self.matrix_shape[:-2]

    @property
    def rows(self) -> int:
        """O, of each group."""
        return self.matrix_shape[-2]

    @property
    def columns(self) -> int:
        """I, of each group, the bias included."""
        return self.matrix_shape[-1]

    @cached_property
    def size(self) -> int:
        """P = Γ·O·I."""
        return math.prod(self.matrix_shape)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Of the bias, if any."""
        return self.shape if self.form == "units" else (math.prod(self.matrix_shape[:-1]),)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is packed."""
        shapes = {self.weight: self.shape}
        return shapes if self.bias is None else {**shapes, self.bias: self.bias_shape}

    def _matrix(self, weight: Tensor) -> Tensor:
        """[*shape] -> [*lead, O, I], the bias not included."""
        shape = (*self.matrix_shape[:-1], self.columns - (self.bias is not None))
        if self.form != "columns":
            return weight.reshape(shape)
        apart = weight.reshape(self.groups, -1, self.rows, math.prod(self.shape[2:]))
        return apart.transpose(1, 2).reshape(shape)  # [Γ, I, O, k] -> [Γ, O, I·k]

    def _weight(self, matrix: Tensor) -> Tensor:
        """[..., *lead, O, I] -> [..., *shape], the bias not included."""
        more = matrix.shape[: matrix.dim() - len(self.matrix_shape)]
        if self.form == "columns":
            kernel = math.prod(self.shape[2:])
            apart = matrix.reshape(*more, self.groups, self.rows, -1, kernel)
            matrix = apart.transpose(-3, -2)
        return matrix.reshape((*more, *self.shape))  # also of no axis

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P], W row-major, one group after the other."""
        matrix = self._matrix(values[self.weight])
        if self.bias is not None:
            bias = values[self.bias].reshape(*self.matrix_shape[:-1], 1)
            matrix = torch.cat([matrix, bias], -1)
        return matrix.reshape(-1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, contiguous."""
        return {name: part.contiguous() for name, part in self.views(packed).items()}

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, in the memory of `packed` where the form allows it."""
        more = packed.shape[:-1]
        if self.bias is None:
            return {self.weight: self._weight(packed.reshape(*more, *self.matrix_shape))}
        matrix = packed.reshape(*more, *self.matrix_shape)
        bias = matrix.select(-1, -1).reshape(*more, *self.bias_shape)
        weight = self._weight(matrix.narrow(-1, 0, self.columns - 1))
        return {self.weight: weight, self.bias: bias}
