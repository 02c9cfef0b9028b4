"""A network's parameters as the store of a posterior: by name, each in its parameter group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.layers import packing
from pyrocurv.layers.block import Block
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.hyperparameters import lr_factor
from pyrocurv.posterior.sampling import standard_normals
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import Update, apply
from pyrocurv.runtime.undo import complete

Group = dict[str, Any]
Params = Iterable[Tensor] | Iterable[Group]
NamedParameters = Mapping[str, tuple[nn.Parameter, Group]]  # {name: (parameter, its group)}


def name_parameters(net: nn.Module, groups: Sequence[Group]) -> NamedParameters:
    """The parameters of the groups by their names in the network.

    Raises ValueError for a parameter that does not belong to the network.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    grouped = [(p, group) for group in groups for p in group["params"]]
    unknown = [tuple(p.shape) for p, _ in grouped if id(p) not in names]
    if unknown:
        raise ValueError(
            f"params: parameters of shapes {unknown} do not belong to the network, which has "
            f"{', '.join(names.values())}"
        )
    return {names[id(p)]: (p, group) for p, group in grouped}


def padding_rows(net: nn.Module) -> dict[str, int]:
    """{name: padding index} of embeddings whose weights nothing else uses."""
    names: dict[int, list[str]] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        names[id(module.weight)][0]: module.padding_idx for module in net.modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None
        and len(names.get(id(module.weight), ())) == 1
    }


@dataclass(frozen=True, eq=False)
class ParameterStore:
    """The parameters that hold the means of the blocks.

    `padding` are rows that keep their values, {name: index}, as they get no gradient.
    """

    named: NamedParameters
    padding: Mapping[str, int] = field(default_factory=dict)
    _views: dict[str, Tensor] = field(default_factory=dict)

    @property
    def like(self) -> Tensor:
        """The first parameter, or what of it is here."""
        return next(iter(self.named.values()))[0]

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.like.device

    def first(self, block: Block) -> tuple[nn.Parameter, Group]:
        """A block's first parameter, and the group of all its parameters."""
        return self.named[next(iter(block.tensors))]

    def read(self, block: Block) -> Tensor:
        """A copy [P] of a block's parameters."""
        packed = block.pack({name: self.named[name][0].detach() for name in block.tensors})
        return packed.clone() if len(block.tensors) == 1 else packed

    def load(self, posterior: Posterior) -> Posterior:
        """The posterior with copies of the parameters as its means."""
        return replace(posterior, blocks=tuple(self.with_means(posterior.blocks)))

    @torch.no_grad()
    def with_means(self, states: Sequence[BlockState]) -> list[BlockState]:
        """The blocks with copies of the parameters as their means."""
        blocks = [state.block for state in states]
        names = [name for block in blocks for name in block.tensors]
        return self.with_values(states, {name: self.named[name][0] for name in names})

    @torch.no_grad()
    def with_values(
        self, states: Sequence[BlockState], values: Mapping[str, Tensor]
    ) -> list[BlockState]:
        """The blocks with copies of {name: [*shape]} as their means."""
        means, views = packing.pack([state.block for state in states], values)
        self._views.update(views)
        return [
            state.with_mean(mean, self._views_of(state))
            for state, mean in zip(states, means, strict=True)
        ]

    def blocks_of(self, states: Sequence[BlockState]) -> Sequence[Block]:
        """The blocks of states, here or on other ranks."""
        return [state.block for state in states]

    def gathered(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: [*shape]} of parameters in blocks: those that this process computes with."""
        return values

    def noise(self, states: Sequence[BlockState]) -> list[Tensor]:
        """z ~ N(0, 1) [P] of each block."""
        return standard_normals(states)

    def _views_of(self, state: BlockState) -> dict[str, Tensor] | None:
        """Those of the mean that was copied last, if it has some."""
        names = state.block.tensors
        return {n: self._views[n] for n in names} if names.keys() <= self._views.keys() else None

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Copy {name: value} into the parameters; in the values, padding rows become theirs."""
        if values:
            for name, row in self.padding.items():
                if name in values:
                    values[name][row] = self.named[name][0][row]
            torch._foreach_copy_([self.named[name][0] for name in values], [*values.values()])

    @torch.no_grad()
    def prepare(self, update: Update) -> Callable[[], None]:
        """A function that moves the parameters that have a gradient, in place."""
        values: dict[str, Tensor] = {}
        apply([(move.state.mean, move) for move in update.moves])
        for move in update.moves:
            values.update(self._views_of(move.state) or move.state.mean_views)
        values = {n: v for n, v in values.items() if self.named[n][0].grad is not None}
        return lambda: self.write(values)

    def auxiliary(
        self, gradients: Mapping[str, Tensor | None], lr: float
    ) -> list[AuxiliaryParameter]:
        """Parameters without a block, on the schedule and weight decay of their groups."""
        parameters = []
        for name in (name for name in gradients if name in self.named):
            param, group = self.named[name]
            parameters.append(AuxiliaryParameter(
                name, param, gradients[name], id(group), {"lr": lr},
                lr_factor(group), group.get("weight_decay", 0.0),
            ))
        return parameters

    @contextmanager
    def restoring(self, states: Iterable[BlockState]) -> Iterator[None]:
        """Write the means of the blocks into their parameters at the end, bit for bit."""
        views = {n: view for state in states for n, view in state.mean_views.items()}
        try:
            yield
        finally:
            complete(lambda: self.write(views))
            torch.clear_autocast_cache()
