"""Networks whose parameters are sharded over the processes, as by `fully_shard` of PyTorch.

Their parameters are `DTensor`s, of which each process has some rows. A program that has not
imported the modules of PyTorch for it has none: nothing is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

FSDP = "torch.distributed.fsdp"
REMEDY = (
    "give each rank a copy of the network, as DistributedDataParallel has it; of sharded networks "
    "SecondOrderOptimizer and VIOptimizer train those of fully_shard, with structure='diag', "
    "'kfac' or 'ekfac'"
)


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is distributed."""
    return isinstance(value, _known("torch.distributed.tensor", "DTensor"))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module, which may be gathered for now."""
    return isinstance(module, _known(FSDP, "FSDPModule"))


def local(x: Any) -> Any:
    """The rows of a distributed tensor that are here, in its memory; any other tensor itself."""
    return x.to_local() if is_dtensor(x) else x


def check_unsharded(what: str, modules: Iterable[nn.Module], remedy: str = REMEDY) -> None:
    """Raise ValueError for sharded modules."""
    flat = _known(FSDP, "FullyShardedDataParallel")
    for module in modules:
        kind = type(module).__name__
        if isinstance(module, flat):
            raise ValueError(f"{what}: {kind} has flattened parameters, without layers: {remedy}")
        if is_fully_sharded(module):
            raise ValueError(f"{what}: {kind} is sharded by fully_shard: {remedy}")
        tensors = {**module._parameters, **module._buffers}
        if (name := next((n for n, x in tensors.items() if is_dtensor(x)), None)) is not None:
            placements = getattr(tensors[name], "placements", ())
            raise ValueError(
                f"{what}: {name} of a {kind} is a DTensor, with placements {placements}: {remedy}"
            )


def _known(module: str, name: str) -> Any:
    """A class of a module that has been imported, or no class."""
    return getattr(sys.modules.get(module), name, ())
