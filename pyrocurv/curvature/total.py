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

from pyrocurv.blocks import Block
from pyrocurv.curvature import hessian
from pyrocurv.curvature.estimator import unmasked, what_is_seen
from pyrocurv.curvature.hessian import Seen
from pyrocurv.curvature.pullback import Observation, Opaque
from pyrocurv.curvature.reduce import check_batch
from pyrocurv.curvature.spec import Curvature
from pyrocurv.priors import Units
from pyrocurv.specs import EKFAC
from pyrocurv.structures import Kronecker, KroneckerEigen, Structure
from pyrocurv.uses import Call


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass: terms of the likelihood as a mean over `rows` examples, and the ops."""

    terms: Sequence[Observation]
    calls: Sequence[Call | Opaque]
    rows: int
    data: float  # how many data it stands for, in a sum


@dataclass(frozen=True, eq=False)
class Total:
    """A block's curvature over the data so far: `count` times `mean`, in the units of the prior.

    With a `basis` they are the eigenvalues in it, of a second pass.
    """

    block: Block
    units: Units | None = None
    count: int = 0
    mean: Any = None
    basis: KroneckerEigen | None = None

    @property
    def wants_another_pass(self) -> bool:
        """Whether the eigenvalues are to be taken in a basis that is known only now."""
        return isinstance(self.block.structure, EKFAC) and self.basis is None

    def plus(self, seen: Seen, count: int, worth: float) -> Total:
        """With what `count` more examples gave, each of which stands for `worth` data."""
        if self.basis is None:
            value = hessian.plain(self.block, seen)
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

    def second(self) -> Total:
        """For the second pass, nothing summed yet."""
        return Total(self.block, self.units, basis=self._in_eigenbasis(self.mean))

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


def accumulate(spec: Curvature, totals: Sequence[Total], batch: Batch) -> list[Total]:
    """The totals with all examples of one more batch; of `spec`, kind and samples count.

    Raises ValueError for a layer that does not see the batch as its first axis.
    """
    check_batch(batch.calls, batch.rows)
    kept = unmasked(batch.terms, batch.rows)
    count = batch.rows if kept is None else len(kept)
    if count == 0:
        return list(totals)
    found = what_is_seen(
        spec, [total.block for total in totals], batch.terms, batch.calls, batch.rows, kept
    )
    with torch.no_grad():
        return [
            total.plus(seen, count, batch.data / batch.rows)
            for total, seen in zip(totals, found, strict=True)
        ]
