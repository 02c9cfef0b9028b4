"""Networks whose parameters `fully_shard` has sharded: each rank has the curvature of its blocks.

A rank keeps the structures, momenta and moments of the blocks that it owns, by their cost. Of a
block the owner is sent the gradient and the mean, rows of all ranks; it computes the step and sends
each rank its rows back. All parameters are gathered only while a curvature is estimated. What has
no block is Adam's, whose state is sharded as the parameters are.

Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054; Osawa et al. 2020, arXiv:2002.06015.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pyrocurv.curvature.owned_statistics import Owners
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.block_owners import (
    check_count,
    check_supported,
    one_layer_each,
    owners_of,
)
from pyrocurv.layers.capture import Capture
from pyrocurv.optim.forward_recorder import ForwardRecorder
from pyrocurv.optim.parameter_blocks import ParameterBlocks
from pyrocurv.optim.parameter_store import Group, ParameterStore, name_parameters
from pyrocurv.optim.recorded_pass import ForwardInputs
from pyrocurv.optim.traced_network import TracedNetwork
from pyrocurv.posterior.precision import Average
from pyrocurv.posterior.sampling import normals_of_all
from pyrocurv.posterior.shared_state import state_of_all
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import Update, apply
from pyrocurv.runtime.sharding import (
    REMEDY,
    check_shards,
    local,
    placed_like,
    reshard,
    sums_gradients,
    whole,
    without_gathering,
)
from pyrocurv.runtime.undo import complete
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures.serialization import from_state, to_state


class ShardedRecorder(ForwardRecorder):
    """Runs the network again with all of its parameters gathered."""

    def __post_init__(self) -> None:
        self._workers = Workers.of(check_shards(self.net))
        super().__post_init__()

    @property
    def workers(self) -> Workers:
        """The processes that have the shards."""
        return self._workers

    @property
    def is_synchronized(self) -> bool:
        """Whether the next backward pass gives the gradients of all ranks."""
        return sums_gradients(self.inner.modules())

    def versions(self) -> list[Any]:
        """As for any network; of a pass that leaves no gradient in the shards yet, a new value."""
        return super().versions() if self.is_synchronized else [object()]

    @contextmanager
    def rerun(
        self, inputs: ForwardInputs, tracked: dict[str, Tensor]
    ) -> Iterator[tuple[Any, Capture]]:
        with torch.no_grad():
            gathered = {n: whole(p).requires_grad_(p.requires_grad)
                        for n, p in self.inner.named_parameters()}

        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.inner, gathered, args, kwargs)

        with without_gathering(self.inner.modules()):
            self._runnable = run
            try:
                with super().rerun(inputs, {name: gathered[name] for name in tracked}) as found:
                    yield found
            finally:
                self._runnable = None


@dataclass(frozen=True, eq=False)
class ShardedStore(ParameterStore):
    """The shards of the parameters; states are of the blocks that this rank owns.

    All ranks call the same methods.
    """

    owners: Owners | None = None
    modules: tuple[Any, ...] = ()

    @property
    def _all(self) -> Owners:
        if self.owners is None:
            raise TypeError("the store of a sharded network needs the owners of the blocks")
        return self.owners

    @property
    def like(self) -> Tensor:
        return local(super().like).detach()

    def blocks_of(self, states: Sequence[BlockState]) -> Sequence[Block]:
        """The blocks of all ranks."""
        return self._all.blocks

    def read(self, block: Block) -> Tensor:
        """Zeros [P]: of a new block the mean is not needed."""
        return self.like.new_zeros(block.size)

    @torch.no_grad()
    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of {name: distributed tensor} in blocks, those of this rank's blocks, whole."""
        found: dict[str, Tensor] = {}
        for block, rank in self._owned():
            names = [name for name in block.tensors if name in values]
            if not names:
                continue
            shapes = [self._padded(name) for name in names]
            flat = torch.cat([
                _padded(local(values[n]), shape) for n, shape in zip(names, shapes, strict=True)
            ])
            rows = self._all.workers.gather(flat, rank)
            if rows is not None:
                parts = rows.split([math.prod(shape) for shape in shapes], 1)
                for name, part, shape in zip(names, parts, shapes, strict=True):
                    full = part.reshape(-1, *shape[1:])[: len(self.named[name][0])]
                    found[name] = full.contiguous()
        return found

    @torch.no_grad()
    def scattered(self, values: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
        """The rows on this rank of {name: tensor} in blocks, which their owners have whole."""
        found: dict[str, Tensor] = {}
        workers = self._all.workers
        for block, rank in self._owned():
            chosen = [name for name in block.tensors if name in names]
            if not chosen:
                continue
            shapes = [self._padded(name) for name in chosen]
            parts = None
            if rank == workers.rank:
                parts = torch.cat([
                    _padded(values[name], (shape[0] * workers.size, *shape[1:])).view(
                        workers.size, -1
                    ) for name, shape in zip(chosen, shapes, strict=True)
                ], 1)
            sizes = [math.prod(shape) for shape in shapes]
            flat = self.like.new_empty(sum(sizes))
            workers.scatter_(flat, parts, rank)
            for name, part, shape in zip(chosen, flat.split(sizes), shapes, strict=True):
                found[name] = part.view(shape)[: len(local(self.named[name][0]))]
        return found

    def _owned(self) -> list[tuple[Block, int]]:
        return [(block, self._all.ranks[block.name]) for block in self._all.blocks]

    def _padded(self, name: str) -> tuple[int, ...]:
        """The shape of the largest shard."""
        rows, *rest = self.named[name][0].shape
        return (math.ceil(rows / self._all.workers.size), *rest)

    def with_means(self, states: Sequence[BlockState]) -> list[BlockState]:
        names = [name for block in self._all.blocks for name in block.tensors]
        means = self.gathered({name: self.named[name][0] for name in names})
        return self.with_values(states, means)

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Write {name: value}, all tensors of this rank's blocks, and of those of the others."""
        self._assign(self.scattered(values, {n for b in self._all.blocks for n in b.tensors}))

    @torch.no_grad()
    def _assign(self, shards: Mapping[str, Tensor]) -> None:
        for name, rows in shards.items():
            here = local(self.named[name][0])
            padding = self.padding.get(name, -1) - self._all.workers.rank * self._padded(name)[0]
            if 0 <= padding < len(here):
                rows[padding] = here[padding]
            here.copy_(rows)
        reshard(self.modules)

    @torch.no_grad()
    def prepare(self, update: Update) -> Callable[[], None]:
        apply([(move.state.mean, move) for move in update.moves])
        values = {n: v for move in update.moves for n, v in move.state.mean_views.items()}
        moving = {n for n, (p, _) in self.named.items() if p.grad is not None}
        shards = self.scattered(values, moving)
        return lambda: self._assign(shards)

    @contextmanager
    def restoring(self, states: Any) -> Iterator[None]:
        saved = {
            n: local(self.named[n][0]).detach().clone()
            for block in self._all.blocks for n in block.tensors
        }
        try:
            yield
        finally:
            complete(lambda: self._assign(saved))
            torch.clear_autocast_cache()

    def noise(self, states: Sequence[BlockState]) -> list[Tensor]:
        """z [P] of each block of this rank, which draws the noise of all blocks."""
        return normals_of_all(states, self._all.blocks, self.like)


@dataclass(eq=False)
class ShardedNetwork(TracedNetwork):
    """A sharded network; `ranks` are the owners {block name: rank}."""

    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def replicas(self) -> Workers:
        return ALONE

    @property
    def owners(self) -> Workers:
        return self.recorder.workers

    def store(self, groups: Sequence[Group]) -> ParameterStore:
        net = self.recorder.inner
        reshard(net.modules())
        store = ShardedStore(
            name_parameters(net, groups), self._padding, modules=(*net.modules(),)
        )
        return self.covering(store, self.layout)

    def covering(self, store: ParameterStore, layout: ParameterBlocks) -> ParameterStore:
        if not isinstance(store, ShardedStore):
            raise TypeError(f"a {type(store).__name__} is not of a sharded network")
        return replace(store, owners=self._owners(layout, store))

    def _owners(self, layout: ParameterBlocks, store: ParameterStore) -> Owners:
        return Owners(self.owners, layout.blocks, self.ranks, store.like)

    def average(self, layout: ParameterBlocks, store: ParameterStore) -> Average:
        return self._owners(layout, store).update_curvature

    def own(self, layout: ParameterBlocks) -> Sequence[Block]:
        rank = self.owners.rank
        return [block for block in layout.blocks if self.ranks[block.name] == rank]

    def _assign(self, known: Sequence[Block], new: Sequence[Block]) -> None:
        """Give owners to new blocks."""
        self.ranks.update(owners_of(new, self.owners.size, known, self.ranks))

    def sharding(self, layout: ParameterBlocks) -> dict[str, Any]:
        return {"sharding": {
            "rank": self.owners.rank, "size": self.owners.size,
            "blocks": [to_state(block) for block in layout.blocks],
            "owners": [self.ranks[block.name] for block in layout.blocks],
        }}

    def full_state(self, state: dict[str, Any]) -> dict[str, Any]:
        state = {key: value for key, value in state.items() if key != "sharding"}
        state["auxiliary"] = tree_map(whole, state["auxiliary"])
        return state_of_all(state, self.layout.blocks, self.owners)

    def placed(self, auxiliary: Mapping[str, Any], store: ParameterStore) -> Mapping[str, Any]:
        return {
            name: tree_map(partial(placed_like, store.named[name][0]), saved)
            for name, saved in auxiliary.items()
        }

    def restored(
        self, layout: ParameterBlocks, posterior: Posterior, state: Mapping[str, Any]
    ) -> tuple[ParameterBlocks, Posterior]:
        """Those of this rank's state, or its part of a state of all ranks."""
        sharding, workers = state.get("sharding"), self.owners
        if sharding is not None:
            here = (workers.rank, workers.size)
            if here != (sharding["rank"], sharding["size"]):
                raise ValueError(
                    f"the state is of rank {sharding['rank']} of {sharding['size']}, this is rank "
                    f"{here[0]} of {here[1]}: use full_state_dict() for another number of ranks"
                )
            blocks = tuple(from_state(block) for block in sharding["blocks"])
            layers = {x: block.structure for block in blocks for x in block.layers}
            layout = ParameterBlocks({**layers, **layout.layers}, blocks)
            self.ranks = {b.name: r for b, r in zip(blocks, sharding["owners"], strict=True)}
            return layout, posterior
        for block in layout.blocks:
            check_supported(block, REMEDY)
            if len(block.layers) > 1:
                raise ValueError(
                    f"the state is of a network that was not sharded, where {block.name} is one "
                    "block: the blocks of a sharded one are layers"
                )
        self.ranks = {}
        self._assign((), layout.blocks)
        own = {*self.own(layout)}
        return layout, replace(
            posterior, blocks=tuple(s for s in posterior.blocks if s.block in own)
        )

    def extended(
        self, layout: ParameterBlocks, layers: Sequence[Layer], store: ParameterStore
    ) -> ParameterBlocks:
        """The layout with blocks for new layers, each of one layer, and their owners.

        Raises ValueError for structures that are not supported, or fewer blocks than ranks.
        """
        known = len(layout.blocks)
        layout = super().extended(layout, layers, store)
        blocks = one_layer_each(layout.blocks[known:])
        for block in blocks:
            check_supported(block, REMEDY)
        self._assign(layout.blocks[:known], blocks)
        layout = replace(layout, blocks=(*layout.blocks[:known], *blocks))
        check_count(
            layout.blocks, self.owners.size, "use fewer ranks, or DistributedDataParallel"
        )
        return layout


def _padded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x with rows of zeros up to a shape, flattened."""
    padded = x.new_zeros(shape)
    padded[: len(x)] = x
    return padded.view(-1)
