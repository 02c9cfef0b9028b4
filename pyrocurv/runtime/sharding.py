"""Networks whose parameters are sharded over the processes, as by `fully_shard` of PyTorch.

Their parameters are `DTensor`s, of which each process has some rows. A program that has not
imported the modules of PyTorch for it has none: nothing is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

FSDP = "torch.distributed.fsdp"
REMEDY = (
    "give each rank a copy of the network, as DistributedDataParallel has it; of sharded networks "
    "SecondOrderOptimizer and VIOptimizer train those of fully_shard, and NGVI those that "
    "bayesianize gets from it, with structure='diag', 'kfac' or 'ekfac'"
)


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is distributed."""
    return isinstance(value, dtensor_type())


def dtensor_type() -> Any:
    """The class of distributed tensors, or no class where none can be."""
    return _known("torch.distributed.tensor", "DTensor")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module, which may be gathered for now."""
    return isinstance(module, _known(FSDP, "FSDPModule"))


def local(x: Any) -> Any:
    """The rows of a distributed tensor that are here, in its memory; any other tensor itself."""
    return x.to_local() if is_dtensor(x) else x


def whole(x: Any) -> Any:
    """A distributed tensor gathered, which all processes have to ask for; any other itself."""
    return x.full_tensor() if is_dtensor(x) else x


def placed_like(like: Any, value: Any) -> Any:
    """A whole tensor in the shards of a distributed one of its shape; other values themselves."""
    is_whole = isinstance(value, Tensor) and value.dim() and not is_dtensor(value)
    if not (is_whole and is_dtensor(like)):
        return value
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(value.to(like.device), like.device_mesh, like.placements)


def reshard(modules: Iterable[nn.Module]) -> None:
    """Let go of parameters that `fully_shard` has gathered: those of a root stay until a backward
    pass, whatever is written into the shards.
    """
    for module in modules:
        if isinstance(module, _known(FSDP, "FSDPModule")):
            module.reshard()


def sums_gradients(modules: Iterable[nn.Module]) -> bool:
    """Whether a backward pass gives the gradients of all processes: `set_requires_gradient_sync`.
    """
    for module in modules:
        if isinstance(module, _known(FSDP, "FSDPModule")):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            if any(group is not None and not group.reduce_grads for group in groups):
                return False
    return True


@contextmanager
def without_gathering(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Without the hooks of `fully_shard`, for a pass with other parameters."""
    replaced = [
        (hooks, key, hook) for module in modules if is_fully_sharded(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if getattr(hook, "__module__", "").startswith(FSDP)
    ]
    try:
        for hooks, key, _ in replaced:
            hooks[key] = _nothing
        yield
    finally:
        for hooks, key, hook in replaced:
            hooks[key] = hook


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a hook."""


def check_shards(net: nn.Module) -> Any:
    """The process group whose processes have the rows of all parameters.

    Raises ValueError for parameters that are sharded in another way than by one `fully_shard`.
    """
    meshes: dict[Any, None] = {}
    for name, p in net.named_parameters():
        mesh: Any = getattr(p, "device_mesh", None)
        placements: Any = getattr(p, "placements", None)
        if mesh is None or mesh.ndim != 1 or not placements[0].is_shard(0):
            found = f"placements {placements} on {mesh}" if mesh else "not sharded"
            raise ValueError(
                f"net: {name} is {found}; fully_shard(net) shards the rows of all parameters over "
                f"the ranks of one mesh of one dimension. Otherwise, {REMEDY}"
            )
        meshes[mesh] = None
    if len(meshes) != 1:
        raise ValueError(f"net: the parameters are on {len(meshes)} meshes, and not on one")
    return next(iter(meshes)).get_group()


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
