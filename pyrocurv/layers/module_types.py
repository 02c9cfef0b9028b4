"""Facts about the types of torch modules, which priors and defaults depend on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)


def fan_in(module: nn.Module) -> int:
    """The number of inputs that are summed in one output."""
    if isinstance(module, TRANSPOSED):
        weight = module.weight
        return weight.numel() // (weight.shape[1] * module.groups)
    if isinstance(module, (nn.Embedding, *NORMS)):
        return 1
    matrices = [p.shape[1:].numel() for p in module.parameters(recurse=False) if p.dim() > 1]
    return max(matrices, default=1)


def has_synchronized_norm(modules: Iterable[nn.Module]) -> bool:
    """Whether a batch norm in training mode takes its statistics over several processes."""
    return any(isinstance(module, nn.SyncBatchNorm) and module.training for module in modules)


def has_layer_norm(modules: Iterable[nn.Module]) -> bool:
    """Whether there are layers as of a transformer, by their type or the name of their class."""
    return any(
        isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
        for module in modules
    )
