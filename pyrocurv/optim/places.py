"""Where a network's parameters are, by name, each in its group; and a block of them, packed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.blocks import Block

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[Group]
Places = Mapping[str, tuple[nn.Parameter, Group]]  # {name in the network: (parameter, its group)}


def placed(net: nn.Module, groups: Sequence[Group]) -> Places:
    """The places of the groups' parameters.

    Raises ValueError for a parameter that is none of the network's.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    grouped = [(p, group) for group in groups for p in group["params"]]
    strange = [tuple(p.shape) for p, _ in grouped if id(p) not in names]
    if strange:
        raise ValueError(
            f"parameters of shapes {strange} are none of the network's, which has "
            f"{', '.join(names.values())}"
        )
    return {names[id(p)]: (p, group) for p, group in grouped}


def first(block: Block, places: Places) -> tuple[nn.Parameter, Group]:
    """A block's first parameter, and the group of them all."""
    return places[next(iter(block.tensors))]


def read(block: Block, places: Places) -> Tensor:
    """A copy [P] of what the parameters are."""
    packed = block.pack({name: places[name][0].detach() for name in block.tensors})
    return packed.clone() if len(block.tensors) == 1 else packed


@torch.no_grad()
def write(
    blocks: Sequence[Block], packed: Sequence[Tensor], places: Places,
    names: Container[str] | None = None,
) -> None:
    """Have the parameters be these, [P] each; of some `names` alone, if they are given."""
    for block, values in zip(blocks, packed, strict=True):
        for name, value in block.parts(values).items():
            if names is None or name in names:
                places[name][0].copy_(value)
