"""What is kept of forward passes: the inputs of their first examples, and the loss's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


@dataclass(eq=False)
class Inputs:
    """The arguments of a forward pass, as leaves; where `rows`, of the first examples alone."""

    leaves: list[Any]
    shape: TreeSpec
    rows: list[bool]
    limit: int | None
    autocast: torch.dtype | None

    @staticmethod
    def of(args: Any, kwargs: Any, limit: int | None) -> Inputs:
        """Copies: a network may overwrite what it is given."""
        leaves, shape = tree_flatten((args, kwargs))
        sizes = [len(x) for x in leaves if isinstance(x, Tensor) and x.dim()]
        rows = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == sizes[0] for x in leaves]
        kept = [x[:limit].detach().clone() if r else x for x, r in zip(leaves, rows, strict=True)]
        device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return Inputs(kept, shape, rows, limit, autocast)

    @property
    def batch(self) -> int:
        """How many examples there are."""
        return len(self.leaves[self.rows.index(True)])

    def fits(self, other: Inputs) -> bool:
        """Whether the examples of both can go through the network together."""
        return (
            (self.shape, self.rows, self.autocast) == (other.shape, other.rows, other.autocast)
            and all(
                a.shape[1:] == b.shape[1:] if row else a is b or not torch.is_tensor(a) and a == b
                for a, b, row in zip(self.leaves, other.leaves, self.rows, strict=True)
            )
        )

    @staticmethod
    def joined(several: Sequence[Inputs]) -> Inputs:
        """The first examples of them all, which fit each other."""
        first = several[0]
        columns = zip(*(one.leaves for one in several), strict=True)
        leaves = [
            torch.cat(column)[: first.limit] if row else column[0]
            for column, row in zip(columns, first.rows, strict=True)
        ]
        return Inputs(leaves, first.shape, first.rows, first.limit, first.autocast)

    def call(self, net: nn.Module) -> Any:
        """The network's output."""
        args, kwargs = tree_unflatten(self.leaves, self.shape)
        device = next((x.device.type for x in self.leaves if isinstance(x, Tensor)), "cpu")
        cast: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(device, self.autocast, cache_enabled=False)
        with cast:
            return net(*args, **kwargs)


@dataclass(eq=False)
class Pass:
    """A forward pass whose output had a gradient: its inputs, if kept, and that gradient."""

    inputs: Inputs | None
    batch: int
    gradient: Tensor | None = None  # of the examples kept, as far as the loss has come


def total(passes: Iterable[Pass]) -> int:
    """Examples of all."""
    return sum(one.batch for one in passes)


def alike(passes: Sequence[Pass]) -> tuple[Inputs, list[Tensor]]:
    """The inputs of the passes that go with the first one's, joined, and the gradients of these."""
    first = passes[0].inputs
    assert first is not None
    found = [one for one in passes if one.inputs and first.fits(one.inputs)]
    inputs = Inputs.joined([one.inputs for one in found if one.inputs])
    return inputs, [one.gradient for one in found if one.gradient is not None]
