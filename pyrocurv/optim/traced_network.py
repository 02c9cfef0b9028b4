"""The network of an optimizer: its recorded passes, and the layers that they have shown so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.running_average import update_curvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice
from pyrocurv.layers.trace import Trace
from pyrocurv.optim.forward_recorder import ForwardRecorder
from pyrocurv.optim.loss_scale import LossSize
from pyrocurv.optim.loss_targets import LossLikelihood
from pyrocurv.optim.parameter_blocks import (
    ParameterBlocks,
    add_layers,
    calls_by_example,
    check_batch_axis,
    new_layers,
    split_by_group,
    untraced_layers,
)
from pyrocurv.optim.parameter_store import (
    Group,
    ParameterStore,
    name_parameters,
    padding_rows,
)
from pyrocurv.optim.recorded_pass import PassGroup
from pyrocurv.posterior.precision import Average
from pyrocurv.posterior.state import Posterior
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.workers import ALONE, Workers


@dataclass(eq=False)
class TracedNetwork:
    """A network under observation, with the structure of its layers.

    `fallback` says what a parameter gets that no supported op consumes; it has a block of its own
    only if `has_untraced_blocks`.
    """

    recorder: ForwardRecorder
    structure: StructureChoice
    owner: str  # the optimizer's name, for warnings
    fallback: str
    has_untraced_blocks: bool
    layout: ParameterBlocks = field(default_factory=lambda: ParameterBlocks({}))
    warned: set[str] = field(default_factory=set)  # names that a warning has mentioned

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules by name, under what compiles or distributes the network."""
        return dict(self.recorder.inner.named_modules())

    @property
    def replicas(self) -> Workers:
        """The processes that have the same blocks."""
        return self.recorder.workers

    @property
    def owners(self) -> Workers:
        """The processes each of which has blocks of its own."""
        return ALONE

    def own(self, layout: ParameterBlocks) -> Sequence[Block]:
        """The blocks whose state this process has."""
        return layout.blocks

    def covering(self, store: ParameterStore, layout: ParameterBlocks) -> ParameterStore:
        """The store, for the blocks of a layout."""
        return store

    def sharding(self, layout: ParameterBlocks) -> dict[str, Any]:
        """For a state: who has which blocks, if not everyone has all."""
        return {}

    def full_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state with the blocks of all processes, on rank 0."""
        return state

    def placed(self, auxiliary: Mapping[str, Any], store: ParameterStore) -> Mapping[str, Any]:
        """The saved moments of the parameters without a block, placed as these are."""
        return auxiliary

    def restored(
        self, layout: ParameterBlocks, posterior: Posterior, state: Mapping[str, Any]
    ) -> tuple[ParameterBlocks, Posterior]:
        """The layout, and the part of a saved posterior that this process has.

        Raises ValueError for one that others have parts of.
        """
        if (sharding := state.get("sharding")) is not None:
            raise ValueError(
                f"the state is of rank {sharding['rank']} of the {sharding['size']} of a sharded "
                f"network, this {self.owner} has a network that is not: use full_state_dict()"
            )
        return layout, posterior

    def average(self, layout: ParameterBlocks, store: ParameterStore) -> Average:
        """What averages one more estimate into the blocks that are due."""
        return update_curvature

    def store(self, groups: Sequence[Group]) -> ParameterStore:
        """The parameters of the groups; ValueError for one that is not the network's."""
        return ParameterStore(name_parameters(self.recorder.inner, groups), self._padding)

    @cached_property
    def _padding(self) -> dict[str, int]:
        return padding_rows(self.recorder.inner)

    @contextmanager
    def forward_pass(
        self, layout: ParameterBlocks, group: PassGroup, likelihood: LossLikelihood,
        store: ParameterStore, is_scaled: bool,
    ) -> Iterator[tuple[ParameterBlocks, ForwardPass]]:
        """Another pass over the examples of a group of recorded ones, and the layout after it.

        With `is_scaled` a GradScaler may not have unscaled the gradients yet.
        """
        inputs, recorded = group.merged()
        workers = self.recorder.workers
        tracked: dict[str, Tensor] = {n: p for n, (p, _) in store.named.items() if p.requires_grad}
        with (
            disable_autocast(store.device),
            twice_differentiable() if likelihood.kind == "hessian" else nullcontext(),
            workers.local_noise(store.device),
            self.recorder.rerun(inputs, tracked) as (output, capture),
        ):
            size = LossSize(group.total, inputs.batch, self.recorder.shrinkage(), is_scaled)
            terms = likelihood.terms(output, recorded, size)
            trace = capture.trace()
            if inputs.examples is None:
                trace = check_batch_axis(layout, trace, output, inputs.batch)
            layout, calls = self.layout_with(layout, trace, store)
            if inputs.examples is not None:
                calls = calls_by_example(calls, output, inputs.batch)
            yield layout, ForwardPass(terms, calls, inputs.batch, workers)

    def layout_with(
        self, layout: ParameterBlocks, trace: Trace, store: ParameterStore
    ) -> tuple[ParameterBlocks, list[LayerCall]]:
        """The layout with the layers of a pass, and the calls of all layers in blocks."""
        known, calls = layout.names, split_by_group(trace.calls, store.named)
        unsupported = {name: why for name, why in trace.unsupported.items() if name not in known}
        layers = new_layers(layout, calls)
        if self.has_untraced_blocks:
            layers += untraced_layers(unsupported, store.named)
        self.warn_once(
            {n: f"{n} ({why})" for n, why in unsupported.items()}, "consumed by no supported op"
        )
        layout = self.extended(layout, layers, store)
        in_blocks = {layer for block in layout.blocks for layer in block.layers}
        return layout, [call for call in calls if call.layer in in_blocks]

    def extended(
        self, layout: ParameterBlocks, layers: Sequence[Layer], store: ParameterStore
    ) -> ParameterBlocks:
        """The layout with blocks for new layers."""
        return add_layers(layout, layers, self.structure, self.modules, store.named)

    def diagonal_layout(self, store: ParameterStore) -> ParameterBlocks:
        """The layout of all trainable parameters, before any forward pass.

        Raises ValueError for another structure than "diag".
        """
        names = [name for name, (p, _) in store.named.items() if p.requires_grad]
        layout = self.extended(self.layout, untraced_layers(names, store.named), store)
        kinds = set(layout.layers.values()).difference(LEFT_OUT)
        if unsupported := {spec.label for spec in kinds} - {"diag"}:
            raise ValueError(
                f"curvature='noise' wants structure='diag', got {', '.join(unsupported)}"
            )
        return layout

    def warn_once(
        self, descriptions: Mapping[str, str], what: str, fallback: str | None = None
    ) -> None:
        """Warn, once for each name, that it has no curvature, and what it gets instead."""
        new = [text for name, text in descriptions.items() if name not in self.warned]
        if new:
            warn_user(f"{self.owner}: {', '.join(new)} {what}: {fallback or self.fallback}")
            self.warned |= {*descriptions}
