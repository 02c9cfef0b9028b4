"""The priors of a guide's weights, as a model gives them run by run."""

from __future__ import annotations

from collections.abc import Sequence

from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.model_run import ModelRun
from pyrocurv.posterior.prior import BlockPrior, PriorSite


class KnownPriors:
    """Keeps what cannot have changed since the last run, and tells the guide what has."""

    def __init__(self, guide: StructuredGuide) -> None:
        self._guide = guide
        self._held: list[BlockPrior] = []

    def read(self, run: ModelRun) -> list[BlockPrior]:
        """The priors of all blocks in this run; those that it has no part for stay as they were."""
        blocks = [family.block for family in self._guide.blocks]
        held: Sequence[BlockPrior | None] = self._held or [None] * len(blocks)
        now, known = run.prior_sites, self._sources()
        prior_sites = [{n: now.get(n, known[n]) for n in block.tensors} for block in blocks]
        priors = [
            old if old and old.still_holds(its) else BlockPrior.read(block, its)
            for block, its, old in zip(blocks, prior_sites, held, strict=True)
        ]
        if any(new is not old for new, old in zip(priors, held, strict=True)):
            self._held = priors
            self._guide.observe_priors([prior.packed.base for prior in priors])
        return priors

    def _sources(self) -> dict[str, PriorSite]:
        """As they were in the run before, or at the guide's first call."""
        if self._held:
            return {n: source for prior in self._held for n, source in prior.prior_sites.items()}
        nodes = self._guide.prototype_trace.nodes
        return {n: PriorSite(nodes[n]["fn"], float(nodes[n]["scale"])) for n in self._guide.sites}
