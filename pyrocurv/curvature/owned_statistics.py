"""Estimates of blocks each of which one process has: the sums over all processes go to its owner.

    every rank: the statistics of its examples, of one block after the other
    the owner:  G and A (or the diagonal), summed; their eigenbases, sent to all
    every rank: the mean of its examples over the eigenspaces
    the owner:  their sum

All ranks take the blocks in the same order. What an owner raises comes after the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics, ForwardPass, collect
from pyrocurv.curvature.particle import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.pooled_statistics import PARTS, PooledStatistics, no_statistics
from pyrocurv.curvature.running_average import (
    NO_EXAMPLE,
    begin_update,
    finish_updates,
    is_basis_due,
    zero_curvature,
)
from pyrocurv.curvature.running_curvature import DueBlock, RunningCurvature
from pyrocurv.curvature.spec import FIRST, Curvature
from pyrocurv.layers.block import Block
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling


class OwnedStatistics(PooledStatistics):
    """`BlockStatistics` over all processes for the owner; the others ask for the same as it."""

    def __init__(self, local: BlockStatistics, workers: Workers, owner: int) -> None:
        super().__init__(local, workers)
        self.owner, self.has_eigenvalues = owner, False

    def _sums(self, what: str, sharing: str = "") -> Sequence[Tensor]:
        if (what, sharing) not in self.sums:
            self.sums[what, sharing] = self.workers.sums_at(
                PARTS[what](self.local, sharing), self.owner
            )
        return self.sums[what, sharing]

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        """In the basis and the scaling of the owner; of others their shapes matter."""
        self.has_eigenvalues = True
        sides = [basis.output_basis, basis.input_basis]
        roots = None if scaling is None else scaling.roots
        sent = [x.clone(memory_format=torch.contiguous_format) for x in (
            *sides, *(roots or [x.new_ones(x.shape[:-1]) for x in sides])
        )]
        self.workers.broadcast_(sent, self.owner)
        output, input, *found = sent
        scaling = KroneckerScaling(output.new_ones(()), (found[0], found[1]))
        here = KroneckerEigen(output, input, basis.spectrum)
        spectrum = self.local.eigenvalues(here, scaling).spectrum
        (spectrum,) = self.workers.sums_at([spectrum], self.owner)
        return KroneckerEigen(basis.output_basis, basis.input_basis, spectrum)


@dataclass(frozen=True, eq=False)
class Owners:
    """The blocks of all processes, and the rank that has each; `like` is a tensor of theirs."""

    workers: Workers
    blocks: Sequence[Block]
    ranks: Mapping[str, int]  # by the names of the blocks
    like: Tensor

    def update_curvature(
        self, spec: Curvature, step: int, due: Sequence[DueBlock], forward: ForwardPass,
        particle: Particle = SINGLE_PARTICLE,
    ) -> list[RunningCurvature]:
        """As `running_average.update_curvature`, for the blocks of this process that are due."""
        own = {one.block: one for one in due}
        flags = self.like.new_tensor([float(block in own) for block in self.blocks])
        (flags,) = self.workers.sums([flags])
        wanted = [b for b, is_due in zip(self.blocks, flags.tolist(), strict=True) if is_due]
        if not wanted:
            return []
        limit = forward.rows if spec.batch is None else math.ceil(spec.batch / self.workers.size)
        rows = min(limit, forward.rows)
        with self.workers.local_noise(self.like.device):
            count, found = collect(spec, wanted, forward, rows)
            numbers = self.workers.sums([*self.like.new_tensor([count, rows])])
            total, total_rows = float(numbers[0]), float(numbers[1])
            if not total:
                if any(one.average.count == 0 for one in due):
                    raise ValueError(NO_EXAMPLE)
                return [one.average for one in due]
            new: dict[Block, RunningCurvature] = {}
            errors: list[Exception] = []
            local = found if count else no_statistics(wanted, self.like)
            with torch.no_grad():
                for block, statistics in zip(wanted, local, strict=True):
                    summed = OwnedStatistics(statistics, self.workers, self.ranks[block.name])
                    self._sum(block, summed)
                    try:
                        if block in own:
                            new[block] = _updated(
                                spec, step, total_rows, particle, own[block], summed
                            )
                    except Exception as error:
                        errors.append(error)
                    self._finish(spec, step, block, particle, summed, new)
        if errors:
            raise errors[0]
        return [new[one.block] for one in due]

    def _sum(self, block: Block, statistics: OwnedStatistics) -> None:
        if block.structure.is_kronecker:
            statistics.kronecker(block.kronecker.sharing)
        else:
            statistics.diagonal()

    def _finish(
        self, spec: Curvature, step: int, block: Block, particle: Particle,
        statistics: OwnedStatistics, new: dict[Block, RunningCurvature],
    ) -> None:
        """What all ranks take part in, also where the owner has left an estimate out."""
        if block.structure.corrects_eigenvalues and not statistics.has_eigenvalues:
            basis = zero_curvature(block, self.like, None).curvature
            statistics.eigenvalues(cast(KroneckerEigen, basis))
        if spec.every == "auto" and particle.is_last:
            old = new[block].interval if block in new else FIRST
            interval = old.after_estimate(step, statistics.layers, self.workers)
            if block in new:
                new[block] = replace(new[block], interval=interval)


def _updated(
    spec: Curvature, step: int, rows: float, particle: Particle, due: DueBlock,
    statistics: OwnedStatistics,
) -> RunningCurvature:
    refresh = is_basis_due(spec, step, due.average, particle)
    begun = begin_update(due, statistics, rows, spec.decay, refresh, particle)
    return finish_updates([begun], rows, ALONE)[0]
