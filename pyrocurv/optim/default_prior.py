"""Normal priors of a network without a model: one precision, one by the fan-in, or a posterior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyrocurv.layers.block import Block
from pyrocurv.layers.module_types import NORMS, fan_in
from pyrocurv.layers.weight_gaussian import WeightGaussian, match_names, read_posterior
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.posterior.prior import BlockPrior, PriorCache, PriorSite
from pyrocurv.posterior.state import Posterior
from pyrocurv.runtime.validation import shown


class DefaultPriors:
    """The priors of a network's blocks: a posterior, or the `prior_precision` of their groups.

    Raises TypeError for a `prior` that is neither a posterior nor None, ValueError for the
    posterior of another network.
    """

    def __init__(self, prior: Any, net: nn.Module) -> None:
        parts = [] if prior is None else read_posterior(prior)
        if parts is None:
            raise TypeError(
                f"prior={shown(prior)}: a trained guide, its posterior or a VIOptimizer is needed; "
                "the precision of independent normals is prior_precision="
            )
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        names = match_names(parts, shapes) if parts else {}
        own = [part.renamed(names) for part in parts if part.shapes.keys() & names.keys()]
        self._parts = {name: part for part in own for name in part.shapes}
        self._cache = PriorCache()
        self._sites: dict[str, tuple[Any, dict[str, PriorSite]]] = {}

    def of(self, block: Block, net: nn.Module, store: ParameterStore) -> BlockPrior:
        """The prior of a block; read again if the precision, dtype or device has changed."""
        like, group = store.first(block)
        key = group["prior_precision"], like.dtype, like.device
        known, sites = self._sites.get(block.name, (None, {}))
        if known != key:
            owners = dict(net.named_modules())
            sites = {}
            for name in block.tensors:
                owner, param = owners[name.rpartition(".")[0]], store.named[name][0]
                sites[name] = self._site(owner, name, param, key[0])
            self._sites[block.name] = key, sites
        return self._cache.read(block, sites)

    def _site(
        self, module: nn.Module, name: str, like: Tensor, precision: float | str
    ) -> PriorSite:
        part = self._parts.get(name)
        normal = _normal(module, name, like, precision) if part is None else part.normal(name, like)
        return PriorSite(Independent(normal, like.dim()))


def _normal(module: nn.Module, name: str, like: Tensor, precision: float | str) -> Normal:
    """Independent normals over one parameter; scales of norm layers have mean 1, others 0."""
    value = fan_in(module) + 1 if isinstance(precision, str) else precision
    loc = float(isinstance(module, NORMS) and name.rpartition(".")[2] == "weight")
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    normal = Normal(zero + loc, zero + 1 / math.sqrt(value))
    return normal.expand(like.shape)


def posterior_parts(posterior: Posterior, store: ParameterStore) -> list[WeightGaussian]:
    """A posterior as the prior of another task; RuntimeError before its first step."""
    if not posterior.step:
        raise RuntimeError("prior: the VIOptimizer has not taken a step")
    return [
        WeightGaussian.of_block(state.block, store.read(state.block), state.precision)
        for state in posterior.blocks
    ]
