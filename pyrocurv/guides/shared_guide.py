"""What a guide has of a posterior that ranks have a part of each, and how it gets all of it."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from pyrocurv.guides.families import Family, family_of
from pyrocurv.guides.owned_blocks import MeanOnly, Ownership, elsewhere
from pyrocurv.guides.param_store import ParamStoreGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.runtime.whole_module import shards_of
from pyrocurv.runtime.workers import ALONE, Workers

Guide = TypeVar("Guide", bound="SharedGuide")


class SharedGuide(ParamStoreGuide):
    """A guide whose blocks are shared out, if `fully_shard` sharded the network of its model."""

    ownership: Ownership | None = None  # of the blocks, where ranks have some each

    @property
    def workers(self) -> Workers:
        """The processes that share the blocks out."""
        shards = shards_of(modules(self._base_model[0])) if self._base_model else None
        return ALONE if shards is None else shards.workers

    @property
    def is_shared_out(self) -> bool:
        """Whether each rank has, or will have, the Gaussians of some blocks alone."""
        return self.ownership is not None if self.sites else not self.workers.is_alone

    @property
    def own_families(self) -> list[Family]:
        """The Gaussians that are here."""
        return [family for family in self.blocks if not isinstance(family, MeanOnly)]

    def check_complete(self) -> None:
        """Raise RuntimeError where other ranks have Gaussians of the posterior."""
        if self.ownership is not None:
            place = f"this is rank {self.ownership.rank} of {self.ownership.size}"
            raise RuntimeError(elsewhere(place))

    def owners(self) -> Workers:
        """The processes that have the blocks of this guide.

        Raises RuntimeError where they are not those of its network, as after unpickling.
        """
        ownership, workers = self.ownership, self.workers
        here = (workers.rank, workers.size)
        if ownership is not None and here != (ownership.rank, ownership.size):
            raise RuntimeError(
                f"this guide has the part of rank {ownership.rank} of {ownership.size}, and its "
                "model is not on those ranks now, as after unpickling: gather it before that, "
                "guide.gathered() or guide.full_state_dict()"
            )
        return workers

    def gathered(self: Guide) -> Guide:
        """The guide with the complete posterior; all ranks call it, and each has a copy then.

        For a network sharded by `fully_shard`, whose ranks have some Gaussians each: for
        `Predictive`, samples and quantiles. Of any other network it is a copy.

        Raises RuntimeError before the guide's first call, and where the processes are not those
        that have its parts, as after unpickling.
        """
        return self._gathered(keeps=True)

    def full_state_dict(self) -> dict[str, Any]:
        """The state of all ranks of a network sharded by `fully_shard`, which all ask for.

        On rank 0; {} on the others. It continues on any number of ranks, or in one process. Of any
        other network it is `state_dict()`. Raises RuntimeError as `gathered` does.
        """
        if self.ownership is None:
            return self.state_dict()
        keeps = self.ownership.rank == 0
        guide = self._gathered(keeps)
        return guide.state_dict() if keeps else {}

    @torch.no_grad()
    def _gathered(self: Guide, keeps: bool) -> Guide:
        """A copy with the blocks of all ranks, for those that keep it."""
        self._ready()
        ownership, workers, copied = self.ownership, self.owners(), copy.deepcopy(self)
        if ownership is None:
            return copied
        copied.ownership = None
        for index, family in enumerate(self.blocks):
            block, complete = family.block, copied.blocks[index]
            if not ownership.has(block):
                make = family_of(type(block.structure))
                complete = make(block, family.raw_loc.detach(), self._init_scale)
            tensors = [x.detach() for x in (*complete.parameters(), *complete.buffers())]
            workers.broadcast_(tensors, ownership.owners[block.name])
            if keeps:
                copied.blocks[index] = complete
        copied._set_unique_name()
        if keeps and self.prototype_trace is not None:
            copied._observe_prototype(self.prototype_trace)
        return copied

    def _leave_to_owners(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take this rank's part of a complete state, whose keys of blocks have a prefix."""
        for index, family in enumerate(self.blocks):
            if isinstance(family, MeanOnly):
                start = f"{prefix}{index}."
                own = {f"{start}{name}" for name in family.state_dict()}
                for key in [k for k in state_dict if k.startswith(start) and k not in own]:
                    del state_dict[key]
