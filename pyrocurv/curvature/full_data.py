"""The curvature of all data as one sum, batch after batch, at one set of weights.

Nothing fades here: Kronecker factors are G = sum g gᵀ and A = E[a aᵀ] over all data, so that
G ⊗ A is what one batch of all of them would give. The eigenvalues of EK-FAC are taken in the
eigenbasis of the whole factors, which is a second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import hessian
from pyrocurv.curvature.collect import check_batch, collect_statistics, unmasked_examples
from pyrocurv.curvature.hessian import BlockStatistics
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.curvature.spec import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_spec import EKFAC
from pyrocurv.structures import Kronecker, KroneckerEigen, Structure
from pyrocurv.structures.rescaled import KroneckerScaling


@dataclass(frozen=True, eq=False)
class BatchTerms:
    """One forward pass: terms of the likelihood as a mean over `rows` examples, and the ops."""

    terms: Sequence[LikelihoodTerm]
    calls: Sequence[LayerCall]
    rows: int
    data: float  # how many data it stands for, in a sum


@dataclass(frozen=True, eq=False)
class CurvatureSum:
    """A block's curvature over the data so far: `count` times `mean`, in the units of the prior.

    With a `basis` they are the eigenvalues in it, of a second pass.
    """

    block: Block
    units: KroneckerScaling | None = None
    count: int = 0
    mean: Any = None
    basis: KroneckerEigen | None = None

    @property
    def wants_another_pass(self) -> bool:
        """Whether the eigenvalues are to be taken in a basis that is known only now."""
        return isinstance(self.block.structure, EKFAC) and self.basis is None

    def plus(self, seen: BlockStatistics, count: int, worth: float) -> CurvatureSum:
        """With what `count` more examples gave, each of which stands for `worth` data."""
        if self.basis is None:
            value = hessian.assemble(self.block, seen)
        else:
            value = hessian.eigen(seen, self.basis, self._roots)
        if not bool(torch.isfinite(value.trace())):
            raise FloatingPointError(f"the curvature of {self.block.name} is not finite")
        total = self.count + count
        value = value.scale(worth / count)
        mean = value if self.mean is None else self.mean.lerp(value, count / total)
        return replace(self, count=total, mean=mean)

    @property
    def _roots(self) -> tuple[Tensor, Tensor] | None:
        return None if self.units is None else self.units.roots

    def second(self) -> CurvatureSum:
        """For the second pass, nothing summed yet."""
        return CurvatureSum(self.block, self.units, basis=self._in_eigenbasis(self.mean))

    def _in_eigenbasis(self, factors: Kronecker) -> KroneckerEigen:
        factors = factors if self._roots is None else factors.rescaled(*self._roots)
        return factors.eigen(self.block.ranks, self.block.kronecker.cuts)

    def sum(self) -> Structure:
        """The sum over the data, in the units of the prior if it has any, positive semi-definite.

        What a Hessian has below zero is left out.
        """
        mean = self.mean
        if isinstance(mean, Kronecker):
            mean = self._in_eigenbasis(mean)
        return mean.scale(self.count).psd()


def accumulate(
    spec: Curvature, totals: Sequence[CurvatureSum], batch: BatchTerms
) -> list[CurvatureSum]:
    """The totals with all examples of one more batch; of `spec`, kind and samples count.

    Raises ValueError for a layer that does not see the batch as its first axis.
    """
    check_batch(batch.calls, batch.rows)
    kept = unmasked_examples(batch.terms, batch.rows)
    count = batch.rows if kept is None else len(kept)
    if count == 0:
        return list(totals)
    found = collect_statistics(
        spec, [total.block for total in totals], batch.terms, batch.calls, batch.rows, kept
    )
    with torch.no_grad():
        return [
            total.plus(seen, count, batch.data / batch.rows)
            for total, seen in zip(totals, found, strict=True)
        ]
