"""A bayesianized network at values of its weights, as the module of torch that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.handlers import given_tensors
from pyrocurv.handlers.modules import named_modules, unwrap_model
from pyrocurv.nn import forward_hooks
from pyrocurv.nn.weight_priors import prior_buffers

HOOKS = (*forward_hooks.HOOKS, *given_tensors.HOOKS)
HOOK_DICTS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)
ATTRIBUTES = (
    "_pyro_name", "_pyro_context", "_pyro_params", "_pyro_samples", "_tied", "_given_tensors",
    "_replaced",
)  # of Pyro's modules and of these hooks
NETWORK = "net"


def find_network(model: Any, path: str | None = None) -> tuple[str, nn.Module]:
    """The prefix of the sites of the network in a model, and the network.

    Without `path` it is the module called "net", as in `Classifier`; otherwise the model itself, or
    the only network that a function refers to. Raises ValueError if that is not a module that
    `bayesianize` has converted, or if there are several.
    """
    named = named_modules(model)
    if path is not None:
        if not isinstance(path, str) or path not in named:
            raise ValueError(f"module={path!r}: {', '.join(filter(None, named))} exist")
        return _prefix(path, named[path]), named[path]
    if NETWORK in named:
        return _prefix(NETWORK, named[NETWORK]), named[NETWORK]
    root = unwrap_model(model)[0]
    if named and (not isinstance(root, nn.Module) or _is_converted(root)):
        return _prefix("", named[""]), named[""]
    children = [name for name in named if name and "." not in name]
    raise ValueError(
        "which module of the model is the network? Name it, as in module="
        f"{(children or ['net'])[0]!r}; {', '.join(children) or 'none'} exist"
    )


def _prefix(path: str, net: nn.Module) -> str:
    """That of a module's sites: Pyro names them by the outermost module around it."""
    name = net._pyro_name if isinstance(net, PyroModule) else path
    return f"{name}." if name else ""


@torch.no_grad()
def plain_module(net: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network in eval mode, in which torch's classes have taken the place of Pyro's.

    Args:
        net: a network after `bayesianize`; it stays as it is.
        values: of all of its latents, by their names in it.

    Its parameters are the values and the network's own. A weight that modules share is one
    parameter.

    Raises ValueError for a latent without a value, TypeError for a module whose own class is a
    `PyroModule`, because its code may have statements of Pyro.
    """
    copied = copy.deepcopy(net)
    constrained = {  # before the classes change
        (module, name): getattr(module, name) for module in copied.modules()
        for name in module.__dict__.get("_pyro_params", ())
    }
    tied = {
        (module, name): owner for module in copied.modules()
        for name, owner in module.__dict__.get("_tied", {}).items()
    }
    for path, module in copied.named_modules():
        prefix = f"{path}." if path else ""
        latents = [*module.__dict__.get("_pyro_samples", ())]
        if missing := [prefix + name for name in latents if prefix + name not in values]:
            raise ValueError(f"the guide has no latent {', '.join(missing)} of the network")
        padding = module._buffers.get("_padding") if _is_padded(module) else None
        _to_plain_class(path, module, latents)
        own = {name: module._parameters.pop(name) for name in [*module._parameters]}
        for name in latents:
            value = values[prefix + name].detach().clone()
            if padding is not None:
                value[module.padding_idx] = padding
            setattr(module, name, nn.Parameter(value, value.is_floating_point()))
        for name, parameter in own.items():
            module.register_parameter(name, parameter)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    for (module, name), value in constrained.items():
        module._parameters.pop(f"{name}_unconstrained")
        setattr(module, name, nn.Parameter(value.detach().clone()))
    for (module, name), (owner, owner_name) in tied.items():
        setattr(module, name, getattr(owner, owner_name))
    return copied.eval()


def _to_plain_class(path: str, module: nn.Module, latents: list[str]) -> None:
    """Give a module torch's class, and remove all that has been added to it."""
    kind = type(module)
    if isinstance(module, PyroModule):
        plain = _plain_class(kind)
        if not _is_converted(module):
            raise TypeError(
                f"module {path!r} is a {kind.__name__}, whose class is a PyroModule by itself and "
                "may have statements of Pyro: make it a torch.nn.Module, and bayesianize that"
            )
        module.__class__ = plain
    buffers = [buffer for name in latents for buffer in prior_buffers(name)]
    for buffer in [*buffers, *(["_padding"] if _is_padded(module) else [])]:
        module._buffers.pop(buffer, None)
        module._non_persistent_buffers_set.discard(buffer)
    for name in ATTRIBUTES:
        module.__dict__.pop(name, None)
    hooks = [
        key for name in ("_forward_pre_hooks", "_forward_hooks")
        for key, hook in module.__dict__[name].items() if any(hook is one for one in HOOKS)
    ]
    for name in HOOK_DICTS:
        for key in hooks:
            module.__dict__[name].pop(key, None)


def _is_padded(module: nn.Module) -> bool:
    hooks = module._forward_hooks.values()
    return any(hook is forward_hooks.replace_padding for hook in hooks)


def _plain_class(kind: type) -> type:
    return next(base for base in kind.__mro__ if not issubclass(base, PyroModule))


def _is_converted(module: nn.Module) -> bool:
    """Whether a module is of torch's class, but for Pyro's mixin."""
    kind = type(module)
    return not isinstance(module, PyroModule) or kind is PyroModule[_plain_class(kind)]
