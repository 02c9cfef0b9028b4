"""Guides of networks sharded by `fully_shard`: each rank has the Gaussians of its blocks.

All ranks have the means of all blocks, and the owner of a block alone has its precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.guides.families import Family
from pyrocurv.layers.block import Block
from pyrocurv.layers.block_owners import check_count, check_supported, owners_of
from pyrocurv.runtime.workers import Workers
from pyrocurv.structures import Structure

REMEDY = "leave fully_shard away, so that each rank of NGVI has the whole posterior"


@dataclass(frozen=True)
class Ownership:
    """The rank that has each block of a guide, by name; this one is `rank` of `size`."""

    rank: int
    size: int
    owners: Mapping[str, int]

    @staticmethod
    def of(blocks: Sequence[Block], workers: Workers) -> Ownership | None:
        """By the costs of the blocks; None for a process alone.

        Raises ValueError for structures that are not supported, or fewer blocks than ranks.
        """
        if workers.is_alone or not blocks:
            return None
        for block in blocks:
            check_supported(block, REMEDY)
            if len(block.layers) > 1:
                raise ValueError(
                    f"the state is of a network that was not sharded, where {block.name} is one "
                    "block: the blocks of a sharded one are layers"
                )
        check_count(blocks, workers.size, f"use fewer ranks, or {REMEDY}")
        return Ownership(workers.rank, workers.size, owners_of(blocks, workers.size))

    def has(self, block: Block) -> bool:
        """Whether a block is this rank's."""
        return self.owners[block.name] == self.rank

    def state(self) -> dict[str, Any]:
        """In plain values."""
        return asdict(self)


def check_part(
    saved: Mapping[str, Any] | None, here: Ownership | None, remedy: str
) -> None:
    """Raise ValueError for a part of a state that is not that of this rank of as many."""
    if saved is None or here is not None and dict(saved) == here.state():
        return
    place = "one process" if here is None else f"rank {here.rank} of {here.size}"
    raise ValueError(
        f"the state is of rank {saved['rank']} of {saved['size']}, this is {place}: use {remedy} "
        "for another number of ranks"
    )


class MeanOnly(Family):
    """The mean of a block whose precision another rank has."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float, owner: int) -> None:
        super().__init__(block, loc, init_scale)
        self.owner = owner

    def distribution(self) -> Distribution:
        return self._refuse()

    def precision(self) -> Structure:
        return self._refuse()

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        return self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(elsewhere(f"{self.block.name} is on rank {self.owner}"))


def elsewhere(what: str) -> str:
    """What to do where a posterior is not complete."""
    return (
        f"the ranks of a network sharded by fully_shard have a part of its posterior each: "
        f"{what}. guide.gathered(), called on all ranks, is a guide with all of it"
    )
