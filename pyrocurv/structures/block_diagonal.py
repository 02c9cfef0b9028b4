"""A block-diagonal matrix whose blocks are structures, on any rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.structures.base import Structure


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Structure):
    """A block-diagonal matrix.

    Args:
        blocks: structures of sizes P_b.
        index: the rows of each block, int64 tensors [P_b] that partition 0 ... P-1; () for blocks
            that follow each other in order.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import BlockDiagonal, Dense, Diagonal
        >>> BlockDiagonal((Dense(2 * torch.eye(2)), Diagonal(torch.ones(1)))).diag()
        tensor([2., 2., 1.])
    """

    blocks: tuple[Structure, ...]
    index: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, (tuple, list)):
            raise TypeError(f"blocks: a tuple of Structures is needed, got {self.blocks!r:.60}")
        for block in self.blocks:
            if not isinstance(block, Structure):
                raise TypeError(f"blocks: Structures are needed, got {type(block).__name__}")

    @property
    def size(self) -> int:
        return sum(block.size for block in self.blocks)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x [..., P] as one tensor [..., P_b] for each block."""
        if self.index:
            return [x[..., rows] for rows in self.index]
        return x.split([block.size for block in self.blocks], -1)

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`: one tensor [..., P_b] for each block, as one [..., P]."""
        joined = torch.cat([*pieces], -1)
        return joined[..., torch.cat([*self.index]).argsort()] if self.index else joined

    def _blockwise(self, operation: Callable[[Structure, Tensor], Tensor], x: Tensor) -> Tensor:
        pairs = zip(self.blocks, self.split(x), strict=True)
        return self.join([operation(block, piece) for block, piece in pairs])

    def __matmul__(self, x: Tensor) -> Tensor:
        return self._blockwise(lambda block, piece: block @ piece, x)

    def solve(self, x: Tensor) -> Tensor:
        return self._blockwise(lambda block, piece: block.solve(piece), x)

    def rsqrt(self, z: Tensor) -> Tensor:
        return self._blockwise(lambda block, piece: block.rsqrt(piece), z)

    def logdet(self) -> Tensor:
        return torch.stack([block.logdet() for block in self.blocks]).sum()

    def diag(self) -> Tensor:
        return self.join([block.diag() for block in self.blocks])

    def inverse_diag(self) -> Tensor:
        return self.join([block.inverse_diag() for block in self.blocks])

    def eigenvalues(self) -> Tensor:
        return torch.cat([block.eigenvalues() for block in self.blocks]).sort().values

    def scale(self, factor: float | Tensor) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.scale(factor) for block in self.blocks), self.index)

    def shift(self, delta: float | Tensor) -> BlockDiagonal:
        deltas: Sequence[float | Tensor] = [delta] * len(self.blocks)
        if isinstance(delta, Tensor) and delta.numel() > 1:
            deltas = self.split(delta)
        pairs = zip(self.blocks, deltas, strict=True)
        return BlockDiagonal(tuple(block.shift(piece) for block, piece in pairs), self.index)

    def lerp(self, other: BlockDiagonal, weight: float) -> BlockDiagonal:
        self._check_blocks(other)
        pairs = zip(self.blocks, other.blocks, strict=True)
        return BlockDiagonal(tuple(a.lerp(b, weight) for a, b in pairs), self.index)

    def _check_blocks(self, other: BlockDiagonal) -> None:
        sizes, others = ([block.size for block in m.blocks] for m in (self, other))
        rows = self.index is other.index or len(self.index) == len(other.index) and all(
            torch.equal(a, b) for a, b in zip(self.index, other.index, strict=True)
        )
        if sizes != others or not rows:
            raise ValueError(
                f"other: blocks of sizes {sizes} on the same rows are needed, got sizes {others}"
            )

    def psd(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.psd() for block in self.blocks), self.index)
