"""A block-diagonal matrix of structures, in any order of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Structure):
    """blocks[b] on the rows index[b] (int64 tensors that partition 0..P-1); () means in order."""

    blocks: tuple[Structure, ...]
    index: Sequence[Tensor] = ()

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x [..., P] -> one [..., P_b] for each block."""
        if self.index:
            return [x[..., rows] for rows in self.index]
        return x.split([block.size for block in self.blocks], -1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """One [..., P_b] for each block -> [..., P]."""
        joined = torch.cat(list(parts), -1)
        if self.index:
            return joined[..., torch.cat(list(self.index)).argsort()]
        return joined

    def _each(self, verb: Callable[[Structure, Tensor], Tensor], x: Tensor) -> Tensor:
        parts = zip(self.blocks, self.split(x), strict=True)
        return self.join([verb(block, part) for block, part in parts])

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._each(lambda block, part: block @ part, x)

    def solve(self, x: Tensor) -> Tensor:
        return self._each(lambda block, part: block.solve(part), x)

    def rsqrt(self, z: Tensor) -> Tensor:
        return self._each(lambda block, part: block.rsqrt(part), z)

    def logdet(self) -> Tensor:
        return torch.stack([block.logdet() for block in self.blocks]).sum()

    def trace(self) -> Tensor:
        return torch.stack([block.trace() for block in self.blocks]).sum()

    def diag(self) -> Tensor:
        return self.join([block.diag() for block in self.blocks])

    def inverse_diag(self) -> Tensor:
        return self.join([block.inverse_diag() for block in self.blocks])

    def eigenvalues(self) -> Tensor:
        return torch.cat([block.eigenvalues() for block in self.blocks]).sort().values

    def scale(self, factor: float | Tensor) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.scale(factor) for block in self.blocks), self.index)

    def shift(self, delta: float | Tensor) -> BlockDiagonal:
        shared = not isinstance(delta, Tensor) or delta.numel() == 1
        deltas = [delta] * len(self.blocks) if shared else self.split(delta)  # type: ignore[arg-type]
        parts = zip(self.blocks, deltas, strict=True)
        return BlockDiagonal(tuple(block.shift(part) for block, part in parts), self.index)

    def lerp(self, other: BlockDiagonal, weight: float) -> BlockDiagonal:
        """Block by block, each as its own structure lerps."""
        parts = zip(self.blocks, other.blocks, strict=True)
        return BlockDiagonal(tuple(a.lerp(b, weight) for a, b in parts), self.index)

    def psd(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.psd() for block in self.blocks), self.index)
