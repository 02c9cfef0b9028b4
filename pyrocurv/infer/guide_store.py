"""A guide as the store of a posterior: where the means are read, and a step is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.owned_statistics import Owners
from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.guides.families import Family
from pyrocurv.guides.mixture import PREDICTION_ONLY
from pyrocurv.guides.store_entries import forget_dead_guides, owned_names
from pyrocurv.handlers.sites import prior_power
from pyrocurv.infer.block_sharing import REPLICATED, OwnedBlocks, ReplicatedBlocks
from pyrocurv.infer.model_run import ModelRun
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.joint_update import init_joint
from pyrocurv.posterior.precision import init_block
from pyrocurv.posterior.prior import BlockPrior, PriorCache, PriorSite
from pyrocurv.posterior.state import Posterior, checksums
from pyrocurv.posterior.step import Move, Update, apply, average_weight
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_is
from pyrocurv.structures import Dense, Diagonal


class GuideStore:
    """The families of a guide, and the priors of their weights as the model last gave them."""

    def __init__(self, guide: StructuredGuide) -> None:
        self.guide = guide
        self._cache = PriorCache()
        self._times_restored = guide.times_restored

    @property
    def blocks(self) -> list[Block]:
        """The blocks of the guide that are here; none before its first call."""
        return [family.block for family in self.guide.own_families]

    @property
    def sharing(self) -> ReplicatedBlocks:
        """How processes share the blocks."""
        ownership = self.guide.ownership
        if ownership is None:
            return REPLICATED
        blocks = [family.block for family in self.guide.blocks]
        like = self.guide.blocks[0].raw_loc.detach()
        return OwnedBlocks(Owners(self.guide.owners(), blocks, ownership.owners, like))

    def own(self, posterior: Posterior) -> Posterior:
        """The part of a complete posterior that is here."""
        blocks = {*self.blocks}
        if self.guide.ownership is None or len(posterior.blocks) != len(self.guide.blocks):
            return posterior
        return replace(posterior, blocks=tuple(s for s in posterior.blocks if s.block in blocks))

    def sync(self) -> bool:
        """Let the guide take over what Pyro's store has; whether that was another posterior."""
        self.guide.sync_with_store()
        before, self._times_restored = self._times_restored, self.guide.times_restored
        return before != self._times_restored

    def setup(
        self, undo: Undo, stream: RandomStream, args: Any, kwargs: Any, prefers_joint: bool
    ) -> None:
        """Initialize the guide, if it is not; ValueError if it has no Gaussian then."""
        if self.guide.prototype_trace is None:
            undo.keep_attributes(self.guide.blocks)
            with RandomStream(stream.seed)(torch.device("cpu")):  # not a part of the run
                self.guide.setup(args, kwargs, prefers_joint)
        if not self.guide.blocks:
            raise ValueError(self.guide.no_gaussian_reason)

    def keep(self, undo: Undo) -> None:
        """Have `undo` keep what a run of the model may change before a step is written."""
        undo.keep_attributes(self, self._cache, self.guide, pyro.get_param_store())

    # ---- priors ---------------------------------------------------------------------------------

    def priors(self, run: ModelRun) -> list[BlockPrior]:
        """The priors of all blocks in a run; weights that it does not use keep their last one."""
        sites = {**self._prototype_sites(), **self._cache.sites, **run.prior_sites}
        priors = [self._cache.read(block, sites) for block in self.blocks]
        self.guide.observe_priors([prior.gaussian.base for prior in priors])
        return priors

    def _prototype_sites(self) -> dict[str, PriorSite]:
        """The priors at the guide's first call."""
        nodes = {name: self.guide.prototype_trace.nodes[name] for name in self.guide.sites}
        return {
            name: PriorSite(node["fn"], prior_power(name, node["scale"]))
            for name, node in nodes.items()
        }

    # ---- the posterior --------------------------------------------------------------------------

    @torch.no_grad()
    def init(self, spec: Curvature, group: Mapping[str, Any]) -> Posterior:
        """The posterior of the guide before the first step, whose run gives N and T."""
        sites = {} if self.guide.is_joint else self._prototype_sites()
        numbers = Hyperparameters.of(group, 1, 1)
        blocks = []
        for family in self.guide.own_families:
            prior = self._cache.read(family.block, sites)
            state = init_block(spec, family.block, prior, numbers, family.raw_loc.detach())
            blocks.append(replace(state, precision=family.precision()))
        return Posterior(0, tuple(blocks))

    @torch.no_grad()
    def init_joint(self, group: Mapping[str, Any]) -> Posterior:
        """The same for one Gaussian over all latents, of unit precision if it is untrained."""
        (family,) = self.guide.blocks
        mean, precision = family.raw_loc.detach(), family.precision()
        if self.guide.has_initial_scale:
            ones = torch.ones_like(mean)
            is_diagonal = isinstance(precision, Diagonal)
            precision = Diagonal(ones) if is_diagonal else Dense(torch.diag(ones))
        numbers = Hyperparameters.of(group, 1, 1)
        return Posterior(0, (init_joint(family.block, numbers, mean, precision),))

    def load(self, posterior: Posterior) -> Posterior:
        """The posterior with the means that the guide has; an averaging one has its own."""
        pairs = zip(posterior.blocks, self.guide.own_families, strict=True)
        return replace(posterior, blocks=tuple(
            state if state.averaged_precision is not None
            else state.with_mean(*family.mean_and_views())
            for state, family in pairs
        ))

    def current(self, posterior: Posterior) -> Posterior:
        """The posterior as the guide has it, average or not, without mirrored perturbations."""
        pairs = zip(posterior.blocks, self.guide.own_families, strict=True)
        return replace(posterior, blocks=tuple(
            replace(state, mean=family.raw_loc.detach(), precision=family.precision(), mirror=None)
            for state, family in pairs
        ))

    def tensors_of_owners(self) -> set[int]:
        """Parameters and buffers that one rank may have alone, in guides of sharded networks: ids.
        """
        if self.guide.workers.is_alone:
            return set()
        forget_dead_guides()
        stored = pyro.get_param_store()._params
        others = {id(stored[name]) for name in owned_names(but_for=self.guide)}
        if self.guide.ownership is None:
            return others
        families = self.guide.own_families
        tensors = {id(x) for f in families for x in (*f.parameters(), *f.buffers())}
        return others | tensors - {id(family.raw_loc) for family in families}

    def checksums(
        self, posterior: Posterior, others: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Numbers that differ where what all processes have differs."""
        if self.guide.ownership is None:
            return checksums(self.load(posterior), others)
        means = {family.block.name: family.raw_loc for family in self.guide.blocks}
        return checksums(Posterior(posterior.step, ()), {**others, **means})

    # ---- a step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, update: Update) -> Callable[[], None]:
        """A function that writes means and precisions into the guide, in place."""
        families, sharing = self.guide.own_families, self.sharing
        with sharing.owners.together(families[0].raw_loc):
            encoded = self._encoded(update)
        weight = average_weight(update.before.step)
        if not sharing.owners.is_alone:
            return self._prepare_shared(update, sharing, encoded, weight)
        versions = [family.raw_loc._version for family in families]

        @torch.no_grad()
        def write() -> None:
            pairs = zip(families, update.moves, versions, strict=True)
            _move([(f.raw_loc, move) for f, move, v in pairs if f.raw_loc._version == v], weight)
            _write(families, encoded)

        return write

    def _encoded(self, update: Update) -> list[Mapping[str, Tensor]]:
        """The precisions that have changed, as parameters of the families."""
        pairs = zip(update.before.blocks, update.posterior.blocks, strict=True)
        return [
            family.encode(new.averaged_precision or new.precision)
            if new.averaged_precision is not None or new.precision is not old.precision else {}
            for family, (old, new) in zip(self.guide.own_families, pairs, strict=True)
        ]

    def _prepare_shared(
        self, update: Update, sharing: ReplicatedBlocks, encoded: Sequence[Mapping[str, Tensor]],
        weight: float,
    ) -> Callable[[], None]:
        """The same where others have some of the blocks: all are sent the new means first."""
        own, families = self.guide.own_families, [*self.guide.blocks]
        means = [family.raw_loc.detach().clone() for family in families]
        mine = {family: mean for family, mean in zip(families, means, strict=True)}
        _move([(mine[f], move) for f, move in zip(own, update.moves, strict=True)], weight)
        sharing.send(means)

        @torch.no_grad()
        def write() -> None:
            torch._foreach_copy_([family.raw_loc for family in families], means)
            _write(own, encoded)

        return write


def _move(moves: Sequence[tuple[Tensor, Move]], weight: float) -> None:
    """Move means [P] in place, or, with a running average, towards the new ones."""
    for mean, move in moves:
        if move.state.averaged_precision is not None:
            mean.lerp_(move.state.mean, weight)
    apply([(mean, m) for mean, m in moves if m.state.averaged_precision is None])


def _write(families: Sequence[Family], encoded: Sequence[Mapping[str, Tensor]]) -> None:
    for family, values in zip(families, encoded, strict=True):
        if values:
            family.write(values)


def check_guide(guide: Any) -> None:
    """Raise TypeError unless it is a guide that can be trained."""
    if isinstance(guide, MixtureGuide):
        raise TypeError(PREDICTION_ONLY)
    check_is("guide", guide, StructuredGuide, "one of pyrocurv.guides (KFACGuide, ...)")
