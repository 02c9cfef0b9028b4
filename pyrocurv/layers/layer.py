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
    """Names of the sample sites or parameters of a layer, and how the weight [*shape] becomes W.

    The bias, if any, is the last column of W. The orientations of a weight, for Γ groups:

        out_in    [Γ·O, ...]         linear and convolutions: W is the weight with its other axes
                                     flattened
        in_out    [Γ·I, O, *kernel]  x @ w, embeddings, transposed convolutions: W is transposed
        per_unit  [...]              scales of norm layers: each unit is a group with O = I = 1
        bias      [...]              a bias alone: I = 1
        untraced  [...]              no supported op consumes it, or not example by example: I = 1
    """

    weight: str
    bias: str | None
    shape: tuple[int, ...]
    orientation: str = "out_in"
    groups: int = 1

    @cached_property
    def matrix_shape(self) -> tuple[int, ...]:
        """[*lead, O, I] with the bias; lead is (Γ,) or, for layers of one group, ()."""
        size, bias = math.prod(self.shape), self.bias is not None
        if self.orientation == "per_unit":
            return size, 1, 1 + bias
        if self.orientation in ("bias", "untraced"):
            return size, 1
        lead = (self.groups,) if self.groups > 1 else ()
        outputs = self.shape[1] if self.orientation == "in_out" else self.shape[0] // self.groups
        return *lead, outputs, size // (self.groups * outputs) + bias

    @property
    def name(self) -> str:
        """The name of the module, or of the weight if no module owns it."""
        return self.weight.removesuffix(".weight")

    @property
    def is_untraced(self) -> bool:
        """Whether no supported op consumes the weight."""
        return self.orientation == "untraced"

    @property
    def lead(self) -> tuple[int, ...]:
        """(Γ,) or ()."""
        return self.matrix_shape[:-2]

    @property
    def out_features(self) -> int:
        """O of each group."""
        return self.matrix_shape[-2]

    @property
    def in_features(self) -> int:
        """I of each group, the bias included."""
        return self.matrix_shape[-1]

    @cached_property
    def size(self) -> int:
        """P = Γ·O·I."""
        return math.prod(self.matrix_shape)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The shape that a bias of this layer has."""
        return self.shape if self.orientation == "per_unit" else (self.size // self.in_features,)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the packed tensors, in order."""
        shapes = {self.weight: self.shape}
        return shapes if self.bias is None else {**shapes, self.bias: self.bias_shape}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P], W row-major, one group after the other."""
        matrix, has_bias = values[self.weight], self.bias is not None
        if self.orientation == "in_out":  # [Γ·I, O, *kernel] -> [Γ, O, I, k]
            kernel = math.prod(self.shape[2:])
            matrix = matrix.reshape(self.groups, -1, self.out_features, kernel).transpose(1, 2)
        matrix = matrix.reshape(*self.matrix_shape[:-1], self.in_features - has_bias)
        if self.bias is not None:
            bias = values[self.bias].reshape(*self.matrix_shape[:-1], 1)
            matrix = torch.cat([matrix, bias], -1)
        return matrix.reshape(-1)

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, views of `packed` where the orientation allows it."""
        batch = packed.shape[:-1]
        matrix = packed.reshape(*batch, *self.matrix_shape)
        weight = matrix if self.bias is None else matrix.narrow(-1, 0, self.in_features - 1)
        if self.orientation == "in_out":  # [..., *lead, O, I] -> [..., Γ, I, O, k]
            kernel = math.prod(self.shape[2:])
            weight = weight.reshape(*batch, self.groups, self.out_features, -1, kernel)
            weight = weight.transpose(-3, -2)
        values = {self.weight: weight.reshape((*batch, *self.shape))}  # a tuple: it may be empty
        if self.bias is not None:
            values[self.bias] = matrix.select(-1, -1).reshape(*batch, *self.bias_shape)
        return values
