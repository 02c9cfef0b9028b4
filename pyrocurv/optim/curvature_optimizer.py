"""The base of both optimizers: records a network's forward passes and keeps its layers' curvature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.likelihood import Likelihood
from pyrocurv.curvature.particle import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.module_types import has_layer_norm
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, check_structure
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryOptimizer
from pyrocurv.optim.checks import check_hyperparameters, check_names, check_params
from pyrocurv.optim.forward_recorder import ForwardRecorder
from pyrocurv.optim.loss_targets import LossLikelihood
from pyrocurv.optim.mean_updates import UpdateChoice, as_mean_update, check_update
from pyrocurv.optim.parameter_blocks import ParameterBlocks, parameter_table
from pyrocurv.optim.parameter_store import Group, ParameterStore, Params
from pyrocurv.optim.recorded_pass import RecordedPass, group_compatible, num_examples
from pyrocurv.optim.sampling import EvaluationSum
from pyrocurv.optim.saved_state import posterior_state, read_posterior
from pyrocurv.optim.sharded_network import ShardedNetwork, ShardedRecorder
from pyrocurv.optim.traced_network import TracedNetwork
from pyrocurv.posterior.hyperparameters import Hyperparameters, set_base_lr
from pyrocurv.posterior.precision import init_block, is_any_due, refresh, update_curvature
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.state import BlockState, Posterior, checksums
from pyrocurv.posterior.step import Evaluation, commit, step
from pyrocurv.posterior.summary import (
    UpdateCount,
    prior_errors,
    update_counts,
    work_assignment,
)
from pyrocurv.runtime.choices import Auto, CurvatureKind
from pyrocurv.runtime.inference_mode import check_differentiable
from pyrocurv.runtime.representation import counted, described, name_of, word_or
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.sharding import check_unsharded, is_fully_sharded, reshard
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import (
    check_integer,
    check_is,
    check_module,
    check_positive,
    reading_state,
)
from pyrocurv.runtime.workers import AUTO, CHECK_EVERY, Workers

PICKLED = (
    "defaults", "state", "param_groups", "curvature", "likelihood", "structure", "_likelihood",
    "_network", "_stream", "_auxiliary", "_posterior", "_fallback_lr", "_mean_update",
    "_is_synchronized",
)


class CurvatureOptimizer(torch.optim.Optimizer):
    """Records a network and keeps the curvature of its layers; subclasses define the step."""

    has_untraced_blocks = False  # whether parameters that no supported op consumes have a block
    has_samples = False  # whether the gradients of a sample may be unscaled after its curvature
    fallback_description = ""  # what such a parameter gets instead
    settings: tuple[str, ...] = ()  # further attributes of a subclass, which copies have too

    def __init__(
        self, net: nn.Module, params: Params | None, likelihood: Likelihood,
        class_dim: int | None, curvature: CurvatureKind | Curvature, structure: StructureChoice,
        update: UpdateChoice, nesterov: bool | Auto, fallback_lr: float, defaults: Group,
    ) -> None:
        check_module("net", net)
        check_differentiable(net.modules())
        check_positive("fallback_lr", fallback_lr)
        self.curvature = as_curvature(curvature)
        self.likelihood, self.structure = likelihood, structure
        self._likelihood = LossLikelihood(likelihood, self.curvature.kind, class_dim)
        check_structure(structure, LEFT_OUT)
        usual = not self.has_samples or has_layer_norm(net.modules())
        self._mean_update = as_mean_update(update, nesterov=nesterov, usual=usual)
        self._auxiliary, self._fallback_lr = AuxiliaryOptimizer(), fallback_lr
        network, recorder = self._kinds(net)
        super().__init__(check_params(params, net), defaults)
        self._network = network(
            recorder(net), structure, type(self).__name__, self.fallback_description,
            self.has_untraced_blocks,
        )
        self._stream, self._is_synchronized = RandomStream(), False
        self._posterior = Posterior(0, ())
        self._schedule_recording()

    def _kinds(self, net: nn.Module) -> tuple[type[TracedNetwork], type[ForwardRecorder]]:
        """What follows a network; ValueError for one that is sharded in a way that none does."""
        if not any(map(is_fully_sharded, net.modules())):
            check_unsharded("net", net.modules())
            return TracedNetwork, ForwardRecorder
        if self.curvature.kind == "hessian":
            raise ValueError(
                "curvature='hessian' of a network that fully_shard has sharded: use 'fisher', "
                "'ggn' or 'empirical', or DistributedDataParallel"
            )
        reshard(net.modules())
        return ShardedNetwork, ShardedRecorder

    def __repr__(self) -> str:
        """What it is in one line, and then the groups of its parameters."""
        size = sum(p.numel() for group in self.param_groups for p in group["params"])
        line = described(
            self, f"{counted(size, 'weight')} of {name_of(self.net)}",
            f"likelihood={word_or(self.likelihood, 'a function')}",
            f"curvature={self.curvature.kind!r}",
            f"structure={word_or(self.structure, 'by layer')}",
            f"update={self._mean_update.name!r}", counted(self._posterior.step, "step"),
        )
        return f"{line}\n{super().__repr__()}"

    @property
    def net(self) -> nn.Module:
        """The network that was passed in."""
        return self._recorder.net

    @property
    def _recorder(self) -> ForwardRecorder:
        return self._network.recorder

    @property
    def layout(self) -> ParameterBlocks:
        """The layers that forward passes have shown so far, and their blocks."""
        return self._network.layout

    # ---- parameters -----------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, see `torch.optim.Optimizer.add_param_group`.

        Raises ValueError for parameters that do not belong to the network, and for an argument that
        is one for all groups.
        """
        check_is("param_group", param_group, dict, 'a dict with "params"')
        check_names(param_group, self.defaults, type(self))
        param_group["params"] = check_params(param_group.get("params"))
        check_hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        set_base_lr(param_group)
        if "_network" in vars(self):
            self._schedule_recording()

    @property
    def _mutable(self) -> tuple[Any, ...]:
        """The objects whose attributes a step may change."""
        return self, self._network, self._recorder, self._likelihood, self._auxiliary, self._stream

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; passes that they came from do not count in the next step."""
        super().zero_grad(set_to_none)
        self._recorder.pop_passes()

    def _store(self) -> ParameterStore:
        """The parameters; ValueError for a setting that has been changed to an invalid one."""
        for group in self.param_groups:
            check_hyperparameters(group)
        return self._network.store(self.param_groups)

    def _prior(self, block: Block, store: ParameterStore) -> BlockPrior:
        raise TypeError(f"{type(self).__name__} defines no prior")

    def _hyperparameters(self, group: Group, layout: ParameterBlocks) -> Hyperparameters:
        raise TypeError(f"{type(self).__name__} defines no hyperparameters")

    def _number_of(self, group: Group) -> int:
        return next(n for n, other in enumerate(self.param_groups) if other is group)

    def _in_context(
        self, posterior: Posterior, layout: ParameterBlocks, store: ParameterStore
    ) -> Posterior:
        """The posterior with the priors and hyperparameters of the groups as they are now."""
        return posterior.map_blocks(lambda state: replace(
            state, prior=self._prior(state.block, store),
            hyperparameters=self._hyperparameters(store.first(state.block)[1], layout),
        ))

    def _check_batch(self, passes: Sequence[RecordedPass]) -> None:
        """Raise ValueError if no process has an example."""
        if passes and self._recorder.workers.is_alone and num_examples(passes) == 0:
            raise ValueError("the batch has no examples")

    # ---- curvature ------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the next step takes an estimate."""
        if not self.layout.blocks:
            return True
        is_due = is_any_due(self.curvature, self._posterior)
        return self._network.owners.any(is_due, self._posterior.blocks[0].momentum)

    def _schedule_recording(self) -> None:
        """Have the recorder keep the examples that the next step needs."""
        self._recorder.batch_size = self.curvature.batch if self._is_due() else 0
        self._recorder.parameters = [p for group in self.param_groups for p in group["params"]]

    def _with_new_blocks(
        self, posterior: Posterior, layout: ParameterBlocks, store: ParameterStore,
        batch_fraction: float = 0.0,
    ) -> Posterior:
        """The posterior with the blocks of the layout that it does not have yet."""
        states = [
            init_block(
                self.curvature, block, self._prior(block, store),
                self._hyperparameters(store.first(block)[1], layout), store.read(block),
                batch_fraction,
            )
            for block in self._network.own(layout)[len(posterior.blocks):]
        ]
        return replace(posterior, blocks=(*posterior.blocks, *states))

    def _update_curvature(
        self, layout: ParameterBlocks, posterior: Posterior, passes: Sequence[RecordedPass],
        store: ParameterStore, batch_fraction: float, particle: Particle = SINGLE_PARTICLE,
    ) -> tuple[ParameterBlocks, Posterior]:
        """The posterior with one more estimate of the blocks that are due and were used.

        Passes that do not fit together, as of two lengths, are parts of it by their examples. Of
        several workers, who may have other parts, each takes its first.
        """
        groups = group_compatible(passes)
        if not self._recorder.workers.is_alone:
            groups = [replace(groups[0], share=1.0)]
        for group in groups:
            part = replace(particle, before=group.before, share=group.share)
            with self._stream(store.device), self._network.forward_pass(
                layout, group, self._likelihood, store, self.has_samples
            ) as (layout, forward):
                posterior = self._with_new_blocks(posterior, layout, store, batch_fraction)
                posterior = self._in_context(posterior, layout, store)
                used = _used_blocks(posterior, forward.calls)
                with self._network.owners.together(store.like):
                    updated = update_curvature(
                        self.curvature, used, forward, batch_fraction, part,
                        self._network.average(layout, store),
                    )
            new = {state.block.name: state for state in updated.blocks}
            posterior = posterior.map_blocks(partial(_replaced, new))
        return layout, posterior

    def _decayed(self, store: ParameterStore, batch_fraction: float) -> Posterior:
        """On a step without an estimate: with the initial curvature as it is now."""
        posterior = self._in_context(self._posterior, self.layout, store)
        if not self.curvature.decays_at(posterior.step):
            return posterior
        return refresh(self.curvature, posterior, batch_fraction)

    # ---- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(
        self, layout: ParameterBlocks, posterior: Posterior, store: ParameterStore, undo: Undo,
        samples: EvaluationSum | None = None,
    ) -> None:
        """Step from the parameters' gradients, which are sums over the samples if there are some.

        `undo` keeps what else the step has changed.
        """
        if self._posterior.step == 0:
            self._warn_of_other_processes()
        num_samples = 1 if samples is None else samples.count
        store = self._network.covering(store, layout)
        posterior = store.load(self._in_context(posterior, layout, store))
        gradients = {n: p.grad for n, (p, _) in store.named.items() if p.grad is not None}
        blocked = {name for block in layout.blocks for name in block.tensors}
        rest = {n: g for n, g in gradients.items() if n not in blocked and n not in layout.frozen}
        auxiliary = store.auxiliary(
            {**dict.fromkeys(self._auxiliary.names), **rest}, self._fallback_lr
        )
        means = store.gathered({n: g for n, g in gradients.items() if n in blocked})
        if num_samples > 1:
            means = {name: gradient / num_samples for name, gradient in means.items()}
        loss = torch.zeros((), device=store.device)
        workers, owners = self._network.replicas, self._network.owners
        nll = None if samples is None else samples.mean_loss
        evaluation = Evaluation(posterior, loss, means, [*rest.values()], nll, workers, owners)
        self._mean_update.keep(undo)
        update = step(self._posterior, evaluation, mean_update=self._mean_update)
        after = update.posterior if samples is None else samples.after(update)
        not_seen = {name: name for name in rest if name not in layout.names}
        self._network.warn_once(
            not_seen, "not used yet in a pass that gave a curvature",
            "Adam trains them until the next estimate",
        )
        self._auxiliary.keep(undo, auxiliary)
        with owners.together(loss):
            self._auxiliary.step(auxiliary, 1 / num_samples)

        def assign() -> None:
            self._network.layout, self._posterior = layout, after
            self._schedule_recording()

        commit(update, store, undo, assign)
        if update.posterior.step % CHECK_EVERY == 1:
            others = {parameter.name: parameter.tensor for parameter in auxiliary}
            sums = checksums(store.load(update.posterior), others)
            workers.check_equal(sums, posterior.step)

    def _warn_of_other_processes(self) -> None:
        """Where nothing averages the gradients of several processes."""
        others = Workers.of(AUTO)
        if self._network.replicas.is_alone and self._network.owners.is_alone and others.size > 1:
            warn_user(
                f"{type(self).__name__}: torch.distributed has {others.size} processes, but the "
                "network has not run in DistributedDataParallel, so each of them trains alone"
            )

    def _synchronize(self) -> None:
        """Before the first step or sample of several workers: the random numbers of rank 0."""
        if not (self._is_synchronized or self._recorder.workers.is_alone):
            state = self._recorder.workers.broadcast(self._stream.state_dict())
            self._stream.load_state_dict(state)
            self._is_synchronized = True

    # ---- watching and saving --------------------------------------------------------------------

    def update_counts(self) -> dict[str, UpdateCount]:
        """How often each block's curvature was estimated, and its present interval in steps.

        By the names of the layers, "0 ... 4" where a block has several; empty before the first
        step.
        """
        return update_counts(self.curvature, self._posterior)

    def work_assignment(self, num_ranks: int | None = None) -> dict[str, dict[str, int]]:
        """As that of `pyrocurv.infer.NGVI`, for the ranks of `DistributedDataParallel`."""
        size = self._recorder.workers.size if num_ranks is None else num_ranks
        check_integer("num_ranks", size, 1)
        return work_assignment(self._mean_update, self._posterior, size)

    def prior_errors(self) -> dict[str, float]:
        """As `pyrocurv.infer.NGVI.prior_errors`, for `VIOptimizer(prior=...)`."""
        return prior_errors(self.curvature, self._posterior)

    def summary(self) -> str:
        """A table of every parameter: name, shape, structure, size.

        "adam" are parameters without a block; before the first step, which finds the layers, all
        are. The last line says how many parameters have a curvature.
        """
        return parameter_table(self.layout, self._store().named)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters, in plain values and tensors.

        Of a network that `fully_shard` has sharded, what this rank has; it continues on the same
        rank of as many. See `full_state_dict`.
        """
        return {
            **super().state_dict(),
            **posterior_state(type(self).__name__, self.layout, self._posterior),
            **self._network.sharding(self.layout),
            "update": self._mean_update.name,
            "update_state": self._mean_update.state_dict(),
            "auxiliary": self._auxiliary.state_dict(),
            "stream": self._stream.state_dict(),
            **self._likelihood.state_dict(),
        }

    def full_state_dict(self) -> dict[str, Any]:
        """The state of all ranks of a network that `fully_shard` has sharded, which all ask for.

        On rank 0; {} on the others. It continues on any number of ranks, or in one process. Of any
        other network it is `state_dict()`.
        """
        return self._network.full_state(self.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, given the network as it was then.

        Raises ValueError, before anything is changed, for the state of another class, of a network
        with other parameters, of other structures, or of a newer version.
        """
        with reading_state(type(self).__name__):
            self._load(state_dict)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        with Undo() as undo:
            undo.keep_attributes(*self._mutable)
            layout, posterior = read_posterior(state_dict, self._network, self._store())
            check_update(state_dict["update"], self._mean_update.name, type(self).__name__)
            self._mean_update.keep(undo)
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
            self._network.layout, self._posterior = layout, posterior
            self._mean_update.load_state_dict(state_dict["update_state"])
            saved = self._network.placed(state_dict["auxiliary"], self._store())
            self._auxiliary.load_state_dict(saved)
            self._network.warned = {*state_dict["auxiliary"]}
            self._stream.load_state_dict(state_dict["stream"])
            self._likelihood.load_state_dict(state_dict)
            self._recorder.pop_passes()
            self._schedule_recording()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in (*PICKLED, *self.settings)}


def _replaced(new: Mapping[str, BlockState], state: BlockState) -> BlockState:
    return new.get(state.block.name, state)


def _used_blocks(posterior: Posterior, calls: Sequence[LayerCall]) -> Posterior:
    """The blocks all of whose layers were called, and those that no op consumes."""
    called = {call.layer for call in calls}
    return replace(posterior, blocks=tuple(
        state for state in posterior.blocks
        if state.block.is_untraced or called >= set(state.block.layers)
    ))
