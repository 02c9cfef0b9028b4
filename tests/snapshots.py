"""Everything that a call may change, as values that are equal only if every bit is."""

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import Distribution


def contents(value: Any) -> Any:
    """A copy that equals that of another value only if both are the same in every bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: contents(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [contents(item) for item in value]
    return repr(value)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two contents differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [x for key in a for x in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [x for i, (p, q) in pairs for x in differences(p, q, f"{path}[{i}]")]
    return [] if a == b else [path]


def modules_state(*modules: nn.Module) -> dict[str, Any]:
    return {
        "states": [module.state_dict() for module in modules],
        "gradients": [p.grad for module in modules for p in module.parameters()],
        "trainable": [p.requires_grad for module in modules for p in module.parameters()],
        "training": [part.training for module in modules for part in module.modules()],
        "random": torch.get_rng_state(),
        "modes": [torch.is_grad_enabled(), Distribution._validate_args],
    }


def store_state(guide: Any) -> dict[str, Any]:
    """Pyro's store, by names that do not depend on how many guides there were before."""
    return {
        name.replace(guide._pyro_name, "guide"): value
        for name, value in pyro.get_param_store().named_parameters()
    }
