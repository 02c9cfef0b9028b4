"""How processes share the blocks of a posterior: all have all of them, or each its own.

Where each has its own, a step is

    the owner    draws the weights of its blocks, and sends them to all
    every rank   runs the model on its batch
    the owner    has the sums of the gradients and of the curvature's statistics, and computes the
                 step; it sends the new means to all
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyrocurv.curvature import Curvature, running_average
from pyrocurv.curvature.owned_statistics import Owners
from pyrocurv.guides import StructuredGuide
from pyrocurv.guides.owned_blocks import REMEDY
from pyrocurv.posterior.precision import Average
from pyrocurv.posterior.sampling import Sampler, normals_of_all, perturbed_weights
from pyrocurv.posterior.state import BlockState, Perturbation
from pyrocurv.runtime.whole_module import Shards
from pyrocurv.runtime.workers import ALONE, Workers


class ReplicatedBlocks:
    """All processes have all blocks."""

    @property
    def owners(self) -> Workers:
        """The processes that have blocks of their own."""
        return ALONE

    @property
    def average(self) -> Average:
        """How an estimate of the curvature is averaged in."""
        return running_average.update_curvature

    def helpers(self, workers: Workers) -> Workers:
        """The processes that share out the work on matrices."""
        return workers

    def sampler(
        self, blocks: Sequence[BlockState], antithetic: bool,
        mirrors: list[Perturbation] | None = None,
    ) -> Sampler:
        """What draws the perturbations of this process's blocks."""
        return Sampler(blocks, antithetic, mirrors)

    def weights(
        self, blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None
    ) -> dict[str, Tensor]:
        """{name: sampled weights [*shape]} of the blocks of all processes."""
        return perturbed_weights(blocks, perturbations)

    def total(self, value: Tensor) -> Tensor:
        """A sum over this process's blocks as that over all blocks."""
        return value

    def gradients(self, gradients: dict[str, Tensor], batch_fraction: float) -> dict[str, Tensor]:
        """Those of this process's blocks, from {name: gradient on its B/N of the data}."""
        return gradients

    def unpooled(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Those of `gradients` that do not belong to the batches of all processes yet."""
        return gradients

    def send(self, means: Sequence[Tensor]) -> None:
        """Fill the means [P] of all blocks, in order, by those that their owners have."""


@dataclass(frozen=True, eq=False)
class OwnedBlocks(ReplicatedBlocks):
    """Each process has the blocks that it owns; all call the same methods."""

    shared: Owners

    @property
    def owners(self) -> Workers:
        return self.shared.workers

    @property
    def average(self) -> Average:
        return self.shared.update_curvature

    def helpers(self, workers: Workers) -> Workers:
        return ALONE

    def sampler(
        self, blocks: Sequence[BlockState], antithetic: bool,
        mirrors: list[Perturbation] | None = None,
    ) -> Sampler:
        noise = partial(normals_of_all, blocks=self.shared.blocks, like=self.shared.like)
        return Sampler(blocks, antithetic, mirrors, noise)

    @torch.no_grad()
    def weights(
        self, blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None
    ) -> dict[str, Tensor]:
        own, like = perturbed_weights(blocks, perturbations), self.shared.like
        found = {
            name: own[name] if name in own else like.new_empty(shape)
            for block in self.shared.blocks for name, shape in block.tensors.items()
        }
        self.owners.broadcast_from_({
            rank: [found[name] for name in names] for rank, names in self._names().items()
        })
        return found

    def total(self, value: Tensor) -> Tensor:
        return self.owners.sums([value])[0]

    @torch.no_grad()
    def gradients(self, gradients: dict[str, Tensor], batch_fraction: float) -> dict[str, Tensor]:
        (total,) = self.owners.sums([self.shared.like.new_tensor(batch_fraction)])
        found: dict[str, Tensor] = {}
        for rank, names in self._names().items():
            weighted = torch._foreach_mul([gradients.pop(name) for name in names], batch_fraction)
            sums = self.owners.sums_at(weighted, rank)
            if rank == self.owners.rank:
                found = dict(zip(names, torch._foreach_div(sums, total), strict=True))
        return found

    def unpooled(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {}

    def send(self, means: Sequence[Tensor]) -> None:
        shares: dict[int, list[Tensor]] = {rank: [] for rank in range(self.owners.size)}
        for block, mean in zip(self.shared.blocks, means, strict=True):
            shares[self.shared.ranks[block.name]].append(mean)
        self.owners.broadcast_from_(shares)

    def _names(self) -> dict[int, list[str]]:
        """The tensors of each rank's blocks."""
        names: dict[int, list[str]] = {rank: [] for rank in range(self.owners.size)}
        for block in self.shared.blocks:
            names[self.shared.ranks[block.name]] += block.tensors
        return names


REPLICATED = ReplicatedBlocks()


def check_sharing(
    shards: Shards | None, guide: StructuredGuide, process_group: Any, sample_parallel: bool,
    spec: Curvature,
) -> None:
    """Raise ValueError for settings of `NGVI` that ranks with blocks of their own cannot have."""
    workers = Workers.of(process_group)  # raises for what is none
    if shards is None:
        return
    is_group = not workers.is_alone and (*dist.get_process_group_ranks(workers.group),) == (
        shards.ranks
    )
    if not (is_group or isinstance(process_group, str)):
        raise ValueError(
            f"process_group: fully_shard has sharded the network over the ranks {[*shards.ranks]}, "
            "which train it together: leave process_group out"
        )
    if not guide.is_shared_out:
        return
    what = "of a network sharded by fully_shard"
    if sample_parallel:
        raise ValueError(
            f"sample_parallel=True {what}: its ranks have parts of one sample; {REMEDY}"
        )
    if spec.kind == "hessian":
        raise ValueError(
            f"curvature='hessian' {what}: use 'fisher', 'ggn' or 'empirical', or {REMEDY}"
        )
