"""Normal priors of a network without a model: one precision for all, or one by the fan-in."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyrocurv.layers.block import Block
from pyrocurv.layers.module_types import NORMS, fan_in
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.posterior.prior import BlockPrior, PriorCache, PriorSite


class DefaultPriors:
    """The priors of a network's blocks by the `prior_precision` of their groups."""

    def __init__(self) -> None:
        self._cache = PriorCache()
        self._sites: dict[str, tuple[Any, dict[str, PriorSite]]] = {}

    def of(self, block: Block, net: nn.Module, store: ParameterStore) -> BlockPrior:
        """The prior of a block; read again if the precision, dtype or device has changed."""
        like, group = store.first(block)
        key = group["prior_precision"], like.dtype, like.device
        known, sites = self._sites.get(block.name, (None, {}))
        if known != key:
            owners = dict(net.named_modules())
            sites = {
                name: _site(owners[name.rpartition(".")[0]], name, store.named[name][0], key[0])
                for name in block.tensors
            }
            self._sites[block.name] = key, sites
        return self._cache.read(block, sites)


def _site(module: nn.Module, name: str, like: Tensor, precision: float | str) -> PriorSite:
    """Independent normals over one parameter; scales of norm layers have mean 1, others 0."""
    value = fan_in(module) + 1 if isinstance(precision, str) else precision
    loc = float(isinstance(module, NORMS) and name.rpartition(".")[2] == "weight")
    normal = Normal(like.new_full((), loc), like.new_full((), 1 / math.sqrt(value)))
    return PriorSite(Independent(normal.expand(like.shape), like.dim()))
