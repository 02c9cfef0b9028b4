"""A network that `fully_shard` has sharded, as an ordinary one that knows the ranks it was on.

Where all weights are sampled, each rank has a sample of them, and nothing is left to be sharded but
what belongs to their distribution: the ranks share out its blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyrocurv.runtime.sharding import (
    FSDP,
    check_shards,
    check_unsharded,
    is_fully_sharded,
    reshard,
    whole,
)
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.workers import ALONE, Workers

ATTRIBUTE = "_pyrocurv_shards"  # of a network
COMPOSABLE = "__composable_api_state_key"  # how names of attributes start, of PyTorch's own


class Shards:
    """The ranks that a network was sharded over; its copies have the same, its pickles none."""

    def __init__(self, group: Any) -> None:
        self.group = group

    @property
    def workers(self) -> Workers:
        """These processes; this one alone once `torch.distributed` has been left."""
        has_left = not (dist.is_available() and dist.is_initialized())
        return ALONE if has_left else Workers.of(self.group)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers in the default group."""
        return tuple(dist.get_process_group_ranks(self.group)) if self.group is not None else ()

    def __deepcopy__(self, memo: Any) -> Shards:
        return self

    def __reduce__(self) -> Any:
        return Shards, (None,)


def shards_of(modules: Iterable[nn.Module]) -> Shards | None:
    """The ranks that networks among some modules were sharded over; None for one process.

    Raises ValueError for networks on different ranks.
    """
    found = [s for module in modules if (s := vars(module).get(ATTRIBUTE)) is not None
             and not s.workers.is_alone]
    if len({shards.ranks for shards in found}) > 1:
        places = ", ".join(str([*shards.ranks]) for shards in found)
        raise ValueError(
            f"model: fully_shard has sharded its networks over different ranks, {places}: shard "
            "all of them over one mesh"
        )
    return found[0] if found else None


@contextmanager
def made_whole(net: nn.Module) -> Iterator[None]:
    """Give a network that `fully_shard` has sharded ordinary parameters, without its hooks.

    All ranks enter. The network stays so, unless the block raises. Raises ValueError for one that
    is sharded in another way.
    """
    if not any(map(is_fully_sharded, net.modules())):
        check_unsharded("net", net.modules())
        yield
        return
    modules = [*net.modules()]
    reshard(modules)
    group = check_shards(net)
    with Undo() as undo:
        for module in modules:
            undo.keep(partial(setattr, module, "__class__", type(module)))
        undo.keep_attributes(*modules)
        gathered: dict[int, nn.Parameter] = {}
        for module in modules:
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if id(p) not in gathered:  # a weight may belong to two modules
                    gathered[id(p)] = _whole(p)
                module._parameters[name] = gathered[id(p)]
        for module in modules:
            _leave_sharding(module)
        vars(net)[ATTRIBUTE] = Shards(group)
        yield
    states = getattr(sys.modules.get("torch.distributed._composable_state"),
                     "_module_state_mapping", {})
    for module in modules:
        states.pop(module, None)


@torch.no_grad()
def _whole(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(whole(parameter.detach()).clone(), parameter.requires_grad)


def _leave_sharding(module: nn.Module) -> None:
    """Remove what `fully_shard` has added to a module."""
    if is_fully_sharded(module):
        _, kind = type(module).__bases__
        module.__class__ = kind
    attributes = vars(module)
    for name, hooks in [*attributes.items()]:
        if not (name.endswith("_hooks") and isinstance(hooks, dict)):
            continue
        for key in [key for key, hook in hooks.items() if _is_of_sharding(hook)]:
            del hooks[key]
            for flags in ("_with_kwargs", "_always_called"):
                attributes.get(f"{name}{flags}", {}).pop(key, None)
    for name in [name for name in attributes if name.startswith(COMPOSABLE)]:
        rest = {k: v for k, v in attributes[name].items()
                if getattr(k, "__name__", k) != "fully_shard"}
        attributes[name] = type(attributes[name])(rest)
        if not rest:
            del attributes[name]
    for name in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        attributes.pop(name, None)


def _is_of_sharding(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith(FSDP)
