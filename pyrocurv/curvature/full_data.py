"""The curvature of a whole data set as one sum, batch after batch, at one set of weights.

All batches have equal weight: Kronecker factors are G = sum g gᵀ and A = E[a aᵀ] over the data, so
G ⊗ A is the same as from one batch of all data. The eigenvalues of EK-FAC are summed in the
eigenbasis of the complete factors, which takes a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature.collect import BlockStatistics, ForwardPass, assemble, collect
from pyrocurv.curvature.pooled_statistics import no_statistics
from pyrocurv.curvature.running_average import eigenbasis
from pyrocurv.curvature.running_curvature import average
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.runtime.workers import Workers
from pyrocurv.structures import Dense, Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import map_tensors

NO_EXAMPLE = "the mask leaves no example to compute the curvature from"


@dataclass(frozen=True, eq=False)
class CurvatureSum:
    """A block's curvature over the data so far: `count` times `mean`.

    With a `basis`, of a second pass, the mean is of the eigenvalues in it, scaled by the prior.
    """

    block: Block
    scaling: KroneckerScaling | None = None
    count: int = 0
    mean: Structure | None = None
    basis: KroneckerEigen | None = None

    @property
    def needs_second_pass(self) -> bool:
        """Whether eigenvalues have to be summed in a basis that is known after the first pass."""
        return self.block.structure.corrects_eigenvalues and self.basis is None

    def add(self, statistics: BlockStatistics, count: int, weight: float) -> CurvatureSum:
        """The sum with `count` more examples, each of which stands for `weight` data points."""
        if self.basis is None:
            value = assemble(self.block.structure, statistics)
        else:
            value = statistics.eigenvalues(self.basis, self.scaling)
        if not bool(torch.isfinite(value.trace())):
            raise FloatingPointError(f"the curvature of {self.block.name} is not finite")
        total = self.count + count
        mean = average(self.mean, value.scale(weight / count), count / total)
        return replace(self, count=total, mean=mean)

    @property
    def known(self) -> Structure | Tensor | None:
        """What is averaged: the mean, or the eigenvalues in the basis."""
        return self.mean.spectrum if isinstance(self.mean, KroneckerEigen) else self.mean

    def zeros(self, like: Tensor) -> Structure | Tensor:
        """What `known` would be for data without curvature."""
        if self.basis is not None:
            return torch.zeros_like(self.basis.spectrum)
        (statistics,) = no_statistics([self.block], like)
        return map_tensors(assemble(self.block.structure, statistics), torch.zeros_like)

    def with_known(self, value: Any, count: int) -> CurvatureSum:
        """With another average, over `count` examples."""
        mean = value if self.basis is None else replace(self.basis, spectrum=value)
        return replace(self, mean=mean, count=count)

    def second_pass(self) -> CurvatureSum:
        """An empty sum in the eigenbasis of this one."""
        if not isinstance(self.mean, Kronecker):
            raise ValueError(NO_EXAMPLE)
        basis = eigenbasis(self.block, self.mean, self.scaling)
        return CurvatureSum(self.block, self.scaling, basis=basis)

    def total(self, kind: str) -> Structure:
        """The sum over the data, positive semi-definite; Kronecker factors are scaled by the prior.

        The negative part of a Hessian is left out. Other kinds are sums of squares: a dense matrix
        has no negative part.
        """
        if self.mean is None:
            raise ValueError(NO_EXAMPLE)
        mean = self.mean
        if isinstance(mean, Kronecker):
            mean = eigenbasis(self.block, mean, self.scaling)
        total = mean.scale(self.count)
        return total if kind != "hessian" and isinstance(total, Dense) else total.psd()


def accumulate(
    spec: Curvature, sums: Sequence[CurvatureSum], forward: ForwardPass, num_data: float
) -> list[CurvatureSum]:
    """The sums with all examples of one more batch, which stands for `num_data` data points.

    Of `spec`, only `kind` and `num_samples` are used. Raises ValueError for Kronecker factors of
    the Hessian of a layer whose rows are not the examples.
    """
    count, statistics = collect(spec, [total.block for total in sums], forward, forward.rows)
    if count == 0:
        return list(sums)
    with torch.no_grad():
        return [
            total.add(block_statistics, count, num_data / forward.rows)
            for total, block_statistics in zip(sums, statistics, strict=True)
        ]


@torch.no_grad()
def pool(sums: Sequence[CurvatureSum], like: Tensor, workers: Workers) -> list[CurvatureSum]:
    """The sums over the data of all workers, from those over the data of each."""
    if workers.is_alone:
        return [*sums]
    (count,) = workers.sums([torch.tensor(sums[0].count, device=like.device)])
    total = int(count)
    if not total:
        return [*sums]
    tensors: list[Tensor] = []

    def collected(x: Tensor) -> Tensor:
        tensors.append(x)
        return x

    averages = [one.zeros(like) if one.known is None else one.known for one in sums]
    for value in averages:
        map_tensors(value, collected)
    pooled = iter(workers.sums(torch._foreach_mul(tensors, sums[0].count / total)))
    return [
        one.with_known(map_tensors(value, lambda _: next(pooled)), total)
        for one, value in zip(sums, averages, strict=True)
    ]
