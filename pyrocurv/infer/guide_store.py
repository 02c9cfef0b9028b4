"""A guide as the store of a posterior: where the means are read, and a step is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch

from pyrocurv.curvature import Curvature
from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.guides.mixture import PREDICTION_ONLY
from pyrocurv.handlers.sites import prior_power
from pyrocurv.infer.model_run import ModelRun
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.joint_update import init_joint
from pyrocurv.posterior.precision import init_block
from pyrocurv.posterior.prior import BlockPrior, PriorCache, PriorSite
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import Update, apply, average_weight
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
        """The guide's blocks; none before its first call."""
        return [family.block for family in self.guide.blocks]

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
        for family in self.guide.blocks:
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
        pairs = zip(posterior.blocks, self.guide.blocks, strict=True)
        return replace(posterior, blocks=tuple(
            state if state.averaged_precision is not None
            else state.with_mean(*family.mean_and_views())
            for state, family in pairs
        ))

    def current(self, posterior: Posterior) -> Posterior:
        """The posterior as the guide has it, average or not, without mirrored perturbations."""
        pairs = zip(posterior.blocks, self.guide.blocks, strict=True)
        return replace(posterior, blocks=tuple(
            replace(state, mean=family.raw_loc.detach(), precision=family.precision(), mirror=None)
            for state, family in pairs
        ))

    # ---- a step ---------------------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, update: Update) -> Callable[[], None]:
        """A function that writes means and precisions into the guide, in place."""
        families = [*self.guide.blocks]
        pairs = zip(update.before.blocks, update.posterior.blocks, strict=True)
        encoded = [
            family.encode(new.averaged_precision or new.precision)
            if new.averaged_precision is not None or new.precision is not old.precision else {}
            for family, (old, new) in zip(families, pairs, strict=True)
        ]
        weight = average_weight(update.before.step)
        versions = [family.raw_loc._version for family in families]

        @torch.no_grad()
        def write() -> None:
            pairs = zip(families, update.moves, versions, strict=True)
            still = [(f.raw_loc, move) for f, move, v in pairs if f.raw_loc._version == v]
            for mean, move in still:
                if move.state.averaged_precision is not None:
                    mean.lerp_(move.state.mean, weight)
            apply([(mean, m) for mean, m in still if m.state.averaged_precision is None])
            for family, values in zip(families, encoded, strict=True):
                if values:
                    family.write(values)

        return write


def check_guide(guide: Any) -> None:
    """Raise TypeError unless it is a guide that can be trained."""
    if isinstance(guide, MixtureGuide):
        raise TypeError(PREDICTION_ONLY)
    check_is("guide", guide, StructuredGuide, "one of pyrocurv.guides (KFACGuide, ...)")
