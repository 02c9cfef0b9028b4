"""Tied weights: a tensor that several modules have is one latent, which the first of them samples.

The others borrow its value for the time of their forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def find_tied(
    net: nn.Module, chosen: Mapping[nn.Module, Sequence[str]]
) -> dict[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """{(module, parameter): the first module and name that have the same tensor}.

    Of the parameters `chosen`. Raises ValueError where one of a pair alone is.
    """
    owners: dict[int, tuple[nn.Module, str, str]] = {}
    ties = {}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            owner, attribute, other = owners.setdefault(id(parameter), (module, name, full))
            if owner is module and attribute == name:
                continue
            is_mine, is_theirs = name in chosen.get(module, ()), attribute in chosen.get(owner, ())
            if is_mine != is_theirs:
                first, second = (tensor.rpartition(".")[0] for tensor in (other, full))
                raise ValueError(
                    f"{other} and {full} are one tensor, a tied weight: choose both layers or "
                    f"none; layers=[*pyrocurv.nn.LAYERS, {first!r}, {second!r}] has both"
                )
            if is_mine:
                ties[module, name] = owner, attribute
    return ties


def tie(module: nn.Module, name: str, owner: tuple[nn.Module, str]) -> None:
    """Let a module use, during its forward pass, the weight that another one samples."""
    delattr(module, name)
    if "_tied" not in module.__dict__:
        module.__dict__["_tied"] = {}  # beside the submodules; deepcopy and pickle keep it
        module.register_forward_pre_hook(_borrow)
        module.register_forward_hook(_give_back, always_call=True)
    module.__dict__["_tied"][name] = owner


def _borrow(module: nn.Module, args: Any) -> None:
    for name, (owner, attribute) in module.__dict__["_tied"].items():
        module.__dict__[name] = getattr(owner, attribute)


def _give_back(module: nn.Module, args: Any, output: Any) -> None:
    for name in module.__dict__["_tied"]:
        module.__dict__.pop(name, None)
