"""What is kept of a forward pass: inputs of its first examples, outputs, and gradients in these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten


@dataclass(eq=False)
class ForwardInputs:
    """The arguments of a forward pass, as leaves; where `rows`, of the first examples alone.

    With `examples` their rows are not the examples, such as the nodes of several graphs: all of the
    arguments are kept.
    """

    leaves: list[Any]
    shape: TreeSpec
    rows: list[bool]
    limit: int | None
    autocast: torch.dtype | None
    examples: int | None = None

    @staticmethod
    def of(
        args: Any, kwargs: Any, limit: int | None, examples: int | None = None
    ) -> ForwardInputs:
        """Copies: a network may overwrite what it is given."""
        leaves, shape = tree_flatten((args, kwargs))
        size = num_rows(args, kwargs)
        rows = [isinstance(x, Tensor) and x.dim() > 0 and len(x) == size for x in leaves]
        kept = [x[:limit].detach().clone() if r else x for x, r in zip(leaves, rows, strict=True)]
        device = next((x.device.type for x in leaves if isinstance(x, Tensor)), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return ForwardInputs(kept, shape, rows, limit, autocast, examples)

    @property
    def batch(self) -> int:
        """How many examples there are."""
        return self.examples or len(self.leaves[self.rows.index(True)])

    def fits(self, other: ForwardInputs) -> bool:
        """Whether the examples of both can go through the network together."""
        return self.examples is other.examples is None and (
            (self.shape, self.rows, self.autocast) == (other.shape, other.rows, other.autocast)
            and all(
                a.shape[1:] == b.shape[1:] if row else a is b or not torch.is_tensor(a) and a == b
                for a, b, row in zip(self.leaves, other.leaves, self.rows, strict=True)
            )
        )

    @staticmethod
    def joined(several: Sequence[ForwardInputs], share: float) -> ForwardInputs:
        """The first examples of them all, which fit each other; a share of as many as are kept."""
        first = several[0]
        if first.examples is not None:
            return first
        columns = zip(*(one.leaves for one in several), strict=True)
        limit = first.limit and max(1, round(share * first.limit))
        leaves = [
            torch.cat(column)[:limit] if row else column[0]
            for column, row in zip(columns, first.rows, strict=True)
        ]
        return ForwardInputs(leaves, first.shape, first.rows, first.limit, first.autocast)

    def call(self, net: Callable[..., Any]) -> Any:
        """The network's output."""
        args, kwargs = tree_unflatten(self.leaves, self.shape)
        device = next((x.device.type for x in self.leaves if isinstance(x, Tensor)), "cpu")
        cast: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            cast = torch.autocast(device, self.autocast, cache_enabled=False)
        with cast:
            return net(*args, **kwargs)


def num_rows(args: Any, kwargs: Any) -> int | None:
    """The length of the first tensor among arguments; None without one."""
    leaves = tree_leaves((args, kwargs))
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), None)


class MeanLoss(NamedTuple):
    """The mean negative log likelihood [] of some entries (examples, tokens, numbers), in nats."""

    value: Tensor
    entries: int


def mean_loss(losses: Sequence[MeanLoss]) -> MeanLoss:
    """The mean over all entries of one or more."""
    if len(losses) == 1:
        return losses[0]
    entries = sum(loss.entries for loss in losses)
    values = [loss.value * (loss.entries / entries) for loss in losses]
    return MeanLoss(torch.stack(values).sum(), entries)


@dataclass(eq=False)
class RecordedPass:
    """A forward pass that counts: its inputs if kept, and its outputs and gradients in them."""

    inputs: ForwardInputs | None
    batch: int
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # of the examples that are kept
    gradients: dict[str, Tensor] = field(default_factory=dict)  # as far as the loss has come
    loss: MeanLoss | None = None  # if it is watched


def num_examples(passes: Iterable[RecordedPass]) -> int:
    """The number of examples of all passes."""
    return sum(recorded.batch for recorded in passes)


class OutputGradients(NamedTuple):
    """The outputs of a network and the loss's gradients in them, {path: [B, ...]}."""

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class PassGroup:
    """Passes that go through the network together: the `share` that comes after `before`.

    They are shares of all passes with inputs; the loss is of `total` examples.
    """

    passes: Sequence[RecordedPass]
    before: float
    share: float
    total: int

    def merged(self) -> tuple[ForwardInputs, OutputGradients]:
        """The joined examples; of all groups as many as are kept of one."""
        inputs = [recorded.inputs for recorded in self.passes if recorded.inputs]
        joined = ForwardInputs.joined(inputs, self.share)
        outputs = [recorded.outputs for recorded in self.passes]
        names = {name for recorded in self.passes for name in recorded.gradients}
        gradients = {
            name: torch.cat([
                recorded.gradients.get(name, torch.zeros_like(recorded.outputs[name]))
                for recorded in self.passes
            ])[: joined.batch] for name in outputs[0] if name in names
        }
        rows = {name: torch.cat([x[name] for x in outputs])[: joined.batch] for name in outputs[0]}
        return joined, OutputGradients(rows, gradients)


def group_compatible(passes: Sequence[RecordedPass]) -> list[PassGroup]:
    """The passes with inputs, by whether these fit each other."""
    groups: list[list[RecordedPass]] = []
    for recorded in passes:
        if recorded.inputs is None:
            continue
        fitting = (g for g in groups if g[0].inputs and g[0].inputs.fits(recorded.inputs))
        if (group := next(fitting, None)) is None:
            groups.append([recorded])
        else:
            group.append(recorded)
    sizes, total = [num_examples(group) for group in groups], num_examples(passes)
    shares = [size / sum(sizes) for size in sizes]
    return [
        PassGroup(group, sum(shares[:number]), shares[number], total)
        for number, group in enumerate(groups)
    ]
