"""Layers whose weights share a block of the curvature, and how they are packed as one vector.

The structure decides which layers share a block. Inside a block the layers follow each other, each
as its matrix [*lead, O, I] row-major.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyrocurv.layers import Layer
from pyrocurv.layers.structure_spec import Diagonal, KroneckerSpec, StructureSpec, parse_structure
from pyrocurv.structures import automatic_ranks
from pyrocurv.structures.serialization import serializable


@serializable
@dataclass(frozen=True)
class Block:
    """Layers whose weights are one vector [P], and the structure of the matrix over it."""

    layers: tuple[Layer, ...]
    structure: StructureSpec

    @property
    def kind(self) -> str:
        return self.structure.kind

    @property
    def kronecker(self) -> KroneckerSpec:
        """The structure, for a block with Kronecker factors."""
        if not isinstance(self.structure, KroneckerSpec):
            raise TypeError(f"{self.name} has no Kronecker factors, its structure is {self.label}")
        return self.structure

    @property
    def label(self) -> str:
        return self.structure.label

    @property
    def is_untraced(self) -> bool:
        return self.layers[0].is_untraced

    @property
    def name(self) -> str:
        """The names of the first and the last layer's module, or of a weight without a module."""
        names = [layer.name for layer in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"

    @property
    def size(self) -> int:
        """P."""
        return sum(layer.size for layer in self.layers)

    @property
    def ranks(self) -> tuple[int, int]:
        """The numbers of eigenvectors of G and of A that a Kronecker structure keeps."""
        rank, layer = self.kronecker.rank, self.layers[0]
        outputs, inputs = layer.out_features, layer.in_features
        return (outputs, inputs) if rank is None else automatic_ranks(outputs, inputs, rank)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the packed tensors, in order."""
        return {name: shape for layer in self.layers for name, shape in layer.tensors.items()}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P]."""
        packed = [layer.pack(values) for layer in self.layers]
        return packed[0] if len(packed) == 1 else torch.cat(packed)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, contiguous."""
        return {name: view.contiguous() for name, view in self.views(packed).items()}

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}, views of `packed` where orientations allow it."""
        vectors = packed.split([layer.size for layer in self.layers], -1)
        pairs = zip(self.layers, vectors, strict=True)
        return {name: v for layer, vector in pairs for name, v in layer.views(vector).items()}

    def strided_views(self, packed: Tensor) -> dict[str, Tensor]:
        """`views` of one vector [P], without gradients, in as few operations as possible."""
        if self._strides is None or not packed.is_contiguous():
            return self.views(packed)
        start = packed.storage_offset()
        return {
            name: packed.as_strided(shape, stride, start + offset)
            for name, (shape, stride, offset) in self._strides.items()
        }

    @property
    def has_views(self) -> bool:
        """Whether all tensors are views of a contiguous vector [P]."""
        return self._strides is not None

    @cached_property
    def is_flat(self) -> bool:
        """Whether the block is one tensor, of which a vector [P] is the memory."""
        views = [*(self._strides or {}).values()]
        return len(views) == 1 and all(
            stride == torch.empty(shape, device="meta").stride() for shape, stride, _ in views
        )

    @cached_property
    def _strides(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] | None:
        """{name: (shape, stride, offset)} in a vector; None if a tensor is in another order."""
        if any(layer.is_transposed for layer in self.layers):
            return None
        views = self.views(torch.empty(self.size, device="meta"))
        return {n: (tuple(v.shape), v.stride(), int(v.storage_offset())) for n, v in views.items()}


def make_blocks(
    layers: Sequence[Layer], structure: str | StructureSpec | Callable[[Layer], Any],
    dense_untraced: bool = False,
) -> list[Block]:
    """The blocks of the layers, in the order of their first layers.

    A layer that no supported op consumes is diagonal. With `dense_untraced` it may be dense where
    "full" or "block" is asked for.
    """
    groups: dict[tuple[StructureSpec, Hashable], list[Layer]] = {}
    for layer in layers:
        spec = parse_structure(structure(layer) if callable(structure) else structure)
        if layer.is_untraced and (spec.is_kronecker or not dense_untraced):
            spec = Diagonal()
        groups.setdefault((spec, spec.group(layer)), []).append(layer)
    return [Block(tuple(group), spec) for (spec, _), group in groups.items()]


@dataclass(frozen=True, eq=False)
class BlockIndices(Sequence[Tensor]):
    """For each block, the positions [P_b] of its entries in the flat vector of `order`.

    They are computed on first use, which never happens while a matrix is read block by block.
    """

    blocks: Sequence[Block]
    order: Mapping[str, Sequence[int]]  # {name: shape}
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: Any) -> Any:
        return self._indices[number]

    @cached_property
    @torch.inference_mode(False)
    def _indices(self) -> tuple[Tensor, ...]:
        sizes = [math.prod(shape) for shape in self.order.values()]
        pieces = torch.arange(sum(sizes), device=self.device).split(sizes)
        pairs = zip(self.order.items(), pieces, strict=True)
        positions = {name: piece.reshape(tuple(shape)) for (name, shape), piece in pairs}
        return tuple(block.pack(positions) for block in self.blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as a tuple of tensors, which can be loaded to another device."""
        return tuple, (self._indices,)
