"""Forward hooks of bayesianized modules: tied weights, and the padding of embeddings.

A weight that several modules share is one latent. The first module samples it, the others borrow
its value during their forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def find_tied(
    net: nn.Module, chosen: Mapping[nn.Module, Sequence[str]]
) -> dict[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """{(module, name): (first module, its name)} of parameters that an earlier module has too.

    Only parameters in `chosen` {module: names} are considered. Raises ValueError where `chosen` has
    only one of two modules that share a parameter.
    """
    owners: dict[int, tuple[str, nn.Module, str]] = {}
    tied = {}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            first, owner, owner_name = owners.setdefault(id(parameter), (path, module, name))
            if owner is module and owner_name == name:
                continue
            is_chosen = name in chosen.get(module, ())
            if is_chosen != (owner_name in chosen.get(owner, ())):
                names = (f"{first}.{owner_name}".lstrip("."), f"{path}.{name}".lstrip("."))
                raise ValueError(
                    f"{' and '.join(names)} are one tensor, a tied weight: choose both layers or "
                    f"neither; layers=[*pyrocurv.nn.LAYERS, {first!r}, {path!r}] has both"
                )
            if is_chosen:
                tied[module, name] = owner, owner_name
    return tied


def tie(module: nn.Module, name: str, owner: tuple[nn.Module, str]) -> None:
    """Make a module use the weight that another one samples, during its forward pass."""
    delattr(module, name)
    if "_tied" not in module.__dict__:
        # a plain attribute: the owner is no submodule; deepcopy and pickle keep it
        module.__dict__["_tied"] = {}
        module.register_forward_pre_hook(_borrow)
        module.register_forward_hook(_give_back, always_call=True)
    module.__dict__["_tied"][name] = owner


def _borrow(module: nn.Module, args: Any) -> None:
    for name, (owner, owner_name) in module.__dict__["_tied"].items():
        module.__dict__[name] = getattr(owner, owner_name)


def _give_back(module: nn.Module, args: Any, output: Any) -> None:
    for name in module.__dict__["_tied"]:
        module.__dict__.pop(name, None)


def keep_padding_output(module: nn.Embedding, weight: Tensor) -> None:
    """Make an embedding output the original row of its padding index.

    The row of the latent gets no gradient, so its posterior is the prior: samples would be noise.
    """
    if module.padding_idx is not None:
        row = weight.detach()[module.padding_idx].clone()
        module.register_buffer("_padding", row, persistent=False)
        module.register_forward_hook(replace_padding, with_kwargs=True)


def replace_padding(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """The output of an embedding with its original row at the padding index."""
    index = args[0] if args else kwargs["input"]
    return torch.where((index == module.padding_idx).unsqueeze(-1), module._padding, output)


HOOKS = (_borrow, _give_back, replace_padding)  # all that are registered here
