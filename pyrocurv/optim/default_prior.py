"""Normal priors of a network that comes without a model: one precision, or one by the fan-in."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.distributions import Independent, Normal

from pyrocurv.layers.block import Block
from pyrocurv.layers.module_types import NORMS, fan_in
from pyrocurv.optim.parameter_blocks import NamedParameters, first_parameter
from pyrocurv.posterior.prior import BlockPrior, PriorSite


class Priors:
    """Of the blocks of one network, each read again only where its number, dtype or device moved.

    The number is the group's `prior_precision`.
    """

    def __init__(self) -> None:
        self._read: dict[Block, tuple[Any, BlockPrior]] = {}

    def of(self, block: Block, net: nn.Module, places: NamedParameters) -> BlockPrior:
        """The prior of a block."""
        like, group = first_parameter(block, places)
        key = group["prior_precision"], like.dtype, like.device
        found = self._read.get(block)
        if found is None or found[0] != key:
            owners = dict(net.named_modules())
            prior_sites = {
                name: _source(owners[name.rpartition(".")[0]], name, places[name][0], key[0])
                for name in block.tensors
            }
            found = self._read[block] = key, BlockPrior.read(block, prior_sites)
        return found[1]


def _source(module: nn.Module, name: str, like: Tensor, precision: float | str) -> PriorSite:
    """Independent normals over one parameter."""
    number = fan_in(module) + 1 if isinstance(precision, str) else precision
    loc = float(isinstance(module, NORMS) and name.rpartition(".")[2] == "weight")
    normal = Normal(like.new_full((), loc), like.new_full((), 1 / math.sqrt(number)))
    return PriorSite(Independent(normal.expand(like.shape), like.dim()))
