"""The running average of a block's curvature over a training run.

A block's state is a frozen value; `update` gives the next one and leaves the old as it was, so a
step that fails has changed nothing. All structures here are per datum: a mean over examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.capture import Call
from pyrocurv.curvature import reduce
from pyrocurv.curvature.pullback import Observation, pullback
from pyrocurv.curvature.reduce import Pairs, check_batch, gather
from pyrocurv.curvature.spec import Curvature
from pyrocurv.priors import Units
from pyrocurv.specs import EKFAC
from pyrocurv.structures import Kronecker, KroneckerEigen, Structure

EARLY = (1, 2, 4, 8, 16)  # estimates that have an eigendecomposition whatever the interval


@dataclass(frozen=True, eq=False)
class Running:
    """After `count` estimates: the curvature, and for Kronecker structures the averaged factors.

    `curvature` is in the units of the prior that held at the last estimate, `units`, if any.
    """

    count: int
    curvature: Structure
    factors: Kronecker | None = None
    units: tuple[Tensor, Tensor] | None = None  # the roots p [O] and r [I]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        factors = None if self.factors is None else self.factors.state()
        return {
            "count": self.count, "curvature": self.curvature.state(), "factors": factors,
            "units": self.units,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Running:
        """The way back from `state`."""
        factors = None if state["factors"] is None else Structure.from_state(state["factors"])
        curvature = Structure.from_state(state["curvature"])
        return Running(state["count"], curvature, factors, state["units"])  # type: ignore[arg-type]


def observe(
    spec: Curvature, step: int, blocks: Sequence[Block], running: Sequence[Running | None],
    terms: Sequence[Observation], calls: Sequence[Call], rows: int,
    units: Sequence[Units | None],
) -> list[Running]:
    """The running curvature of all blocks with one more estimate averaged in.

    Args:
        terms, calls: the likelihood and the layers' ops of one forward pass over `rows` examples.
        units: of the blocks' priors. The eigenbasis of a block that has any is reckoned in them;
            when they change, the eigenvalues of EK-FAC are carried over as they were.
    """
    check_batch(calls, rows)
    count = rows if spec.batch is None else min(spec.batch, rows)
    gradients = pullback(spec.kind, terms, calls, count, spec.num_samples)
    kept = _kept(terms, count)
    fresh: list[Running] = []
    if kept is not None and len(kept) == 0:
        return _without(running)
    with torch.no_grad():
        for block, old, unit in zip(blocks, running, units, strict=True):
            pairs = gather(block, calls, gradients, count)
            if kept is not None:
                pairs = [[pair[kept] for pair in uses] for uses in pairs]
            number = 1 if old is None else old.count + 1
            turn = number in EARLY or spec.turns(step)
            roots = None if unit is None else unit.roots
            fresh.append(update(old, block, pairs, count, spec.decay, turn, roots))
    return fresh


def _kept(terms: Sequence[Observation], count: int) -> Tensor | None:
    """The rows that no mask drops from all terms; None where all are kept."""
    masks = [torch.as_tensor(term.mask) for term in terms if term.mask is not None]
    if len(masks) < len(terms) or not all(mask.dim() for mask in masks):
        return None
    rows = [mask.expand(term.likelihood.batch_shape)[:count].flatten(1).any(1) if mask.dim() > 1
            else mask[:count] for mask, term in zip(masks, terms, strict=True)]
    return torch.stack([row.expand(count) for row in rows]).any(0).nonzero().squeeze(1)


def _without(running: Sequence[Running | None]) -> list[Running]:
    """All rows were masked: what was there stays."""
    if any(one is None for one in running):
        raise ValueError("the mask leaves no example to take the first curvature from")
    return list(running)  # type: ignore[arg-type]


def update(
    running: Running | None, block: Block, pairs: Pairs, rows: int, decay: float, refresh: bool,
    units: tuple[Tensor, Tensor] | None = None,
) -> Running:
    """Average one more estimate in, from `rows` data, with weight max(1 - decay, 1/count).

    `refresh` asks for new eigenvectors of Kronecker factors. An estimate that is not finite is left
    out, with a warning.
    """
    count = 1 if running is None else running.count + 1
    weight = max(1 - decay, 1 / count)
    new = reduce.plain(block, pairs).scale(1 / rows)
    if not bool(torch.isfinite(new.trace())):
        if running is None:
            raise FloatingPointError("the first curvature estimate is not finite")
        warnings.warn("a curvature estimate is not finite: the last one stays", stacklevel=2)
        return running
    if not isinstance(new, Kronecker):
        return Running(count, new if running is None else running.curvature.lerp(new, weight))
    factors = new if running is None else running.factors.lerp(new, weight)  # type: ignore[union-attr]
    if running is None or refresh or not _same(units, running.units):
        curvature = _eigen(block, factors, units, running)
    else:
        curvature = running.curvature  # type: ignore[assignment]
    if isinstance(block.structure, EKFAC):
        moment = reduce.kronecker_eigen(reduce.in_units(pairs, units), curvature)
        moment = moment.scale(1 / rows)
        curvature = moment if running is None else running.curvature.lerp(moment, weight)  # type: ignore[assignment]
    return Running(count, curvature, factors, units)


def _eigen(
    block: Block, factors: Kronecker, units: tuple[Tensor, Tensor] | None, running: Running | None
) -> KroneckerEigen:
    try:
        factors = factors if units is None else factors.rescaled(*units)
        return factors.eigen(block.ranks, block.structure.cuts)  # type: ignore[union-attr]
    except torch.linalg.LinAlgError as error:
        if running is None or not _same(units, running.units):
            raise
        warnings.warn(f"the eigenvectors stay as they are: {error}", stacklevel=3)
        return running.curvature  # type: ignore[return-value]


def _same(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
