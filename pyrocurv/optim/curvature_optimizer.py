"""The base of both optimizers: records a network's forward passes and keeps its layers' curvature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.likelihood import Likelihood, LikelihoodTerm
from pyrocurv.curvature.running_average import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice
from pyrocurv.layers.structure_spec import parse_structure
from pyrocurv.layers.trace import Trace
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryOptimizer
from pyrocurv.optim.checks import check_hyperparameters, check_layers, check_state
from pyrocurv.optim.forward_recorder import (
    ForwardRecorder,
    RecordedPass,
    merge_compatible,
    num_examples,
)
from pyrocurv.optim.loss_targets import (
    DATA_KINDS,
    check_likelihood,
    check_loss,
    observation,
)
from pyrocurv.optim.parameter_blocks import (
    ParameterBlocks,
    add_layers,
    check_batch_axis,
    new_layers,
    split_by_group,
    untraced_layers,
)
from pyrocurv.optim.parameter_store import Group, ParameterStore, Params, name_parameters
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.precision import init_block, is_any_due, refresh, update_curvature
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import Evaluation, commit, step
from pyrocurv.posterior.summary import UpdateCount, format_table, update_counts
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures.serialization import FORMAT_VERSION, from_state, to_state

PICKLED = (
    "defaults", "state", "param_groups", "curvature", "likelihood", "structure", "layout",
    "has_finite_support", "_recorder", "_stream", "_auxiliary", "_posterior", "_warned",
    "_fallback_lr",
)


class CurvatureOptimizer(torch.optim.Optimizer):
    """Records a network and keeps the curvature of its layers; subclasses define the step."""

    has_untraced_blocks = False  # whether parameters that no supported op consumes have a block
    fallback_description = ""  # what such a parameter gets instead

    def __init__(
        self, net: nn.Module, params: Params | None, likelihood: Likelihood,
        curvature: str | Curvature, structure: StructureChoice, fallback_lr: float,
        defaults: Group,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: a torch.nn.Module is needed, got {type(net).__name__}")
        if not fallback_lr > 0:
            raise ValueError(f"fallback_lr={fallback_lr!r}: a positive number is needed")
        self.curvature = as_curvature(curvature)
        self._likelihood_fn = check_likelihood(likelihood, self.curvature.kind)
        self.likelihood, self.structure = likelihood, structure
        if isinstance(structure, str) and structure not in LEFT_OUT:
            parse_structure(structure)
        self._auxiliary, self._fallback_lr = AuxiliaryOptimizer(), fallback_lr
        self._warned: set[str] = set()  # names that a warning has mentioned
        super().__init__(net.parameters() if params is None else params, defaults)
        self._recorder = ForwardRecorder(net)
        self._stream = RandomStream()
        self.has_finite_support = likelihood in ("categorical", "bernoulli")  # or as observed
        self.layout = ParameterBlocks({})
        self._posterior = Posterior(0, ())
        self._schedule_recording()

    @property
    def net(self) -> nn.Module:
        """The network that was passed in."""
        return self._recorder.net

    # ---- parameters -----------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, see `torch.optim.Optimizer.add_param_group`.

        Raises ValueError for parameters that do not belong to the network.
        """
        self._check(param_group)
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        """Raise ValueError for a hyperparameter out of its range."""
        check_hyperparameters({**self.defaults, **group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; passes that they came from do not count in the next step."""
        super().zero_grad(set_to_none)
        self._recorder.pop_passes()

    def _store(self) -> ParameterStore:
        return ParameterStore(name_parameters(self._recorder.inner, self.param_groups))

    def _prior(self, block: Block, store: ParameterStore) -> BlockPrior:
        raise TypeError(f"{type(self).__name__} defines no prior")

    def _hyperparameters(self, group: Group, layout: ParameterBlocks) -> Hyperparameters:
        raise TypeError(f"{type(self).__name__} defines no hyperparameters")

    def _in_context(
        self, posterior: Posterior, layout: ParameterBlocks, store: ParameterStore
    ) -> Posterior:
        """The posterior with the priors and hyperparameters of the groups as they are now."""
        return posterior.map_blocks(lambda state: replace(
            state, prior=self._prior(state.block, store),
            hyperparameters=self._hyperparameters(store.first(state.block)[1], layout),
        ))

    # ---- curvature ------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the next step takes an estimate."""
        return not self.layout.blocks or is_any_due(self.curvature, self._posterior)

    def _schedule_recording(self) -> None:
        """Have the recorder keep the examples that the next step needs."""
        self._recorder.batch_size = self.curvature.batch if self._is_due() else 0

    @contextmanager
    def _likelihood_pass(
        self, passes: Sequence[RecordedPass], store: ParameterStore
    ) -> Iterator[tuple[LikelihoodTerm, ParameterBlocks, list[LayerCall], int]]:
        """Another pass over recorded examples: the likelihood, the layout, calls, batch size."""
        device = next(iter(store.named.values()))[0].device
        inputs, gradients = merge_compatible(passes)
        tracked: dict[str, Tensor] = {n: p for n, (p, _) in store.named.items() if p.requires_grad}
        twice = self.curvature.kind == "hessian"
        with (
            self._stream(device), disable_autocast(device),
            twice_differentiable() if twice else nullcontext(),
            self._recorder.rerun(inputs, tracked) as (output, capture),
        ):
            gradient = torch.cat(gradients)[: inputs.batch] if gradients else None
            if gradient is not None and not self.layout.blocks:
                check_loss(self.likelihood, gradient)
            term = observation(
                self.likelihood, self._likelihood_fn, output, gradient, num_examples(passes),
                inputs.batch, self.curvature.kind in DATA_KINDS,
            )
            self.has_finite_support = unwrap(term.likelihood).has_enumerate_support
            trace = check_batch_axis(self.layout, capture.trace(), output, inputs.batch)
            layout, calls = self._add_new_layers(trace, store)
            yield term, layout, calls, inputs.batch

    def _add_new_layers(
        self, trace: Trace, store: ParameterStore
    ) -> tuple[ParameterBlocks, list[LayerCall]]:
        """The layout with the layers of this pass, and the calls of all layers in blocks."""
        known, calls = self.layout.names, split_by_group(trace.calls, store.named)
        unsupported = {name: why for name, why in trace.unsupported.items() if name not in known}
        layers = new_layers(self.layout, calls)
        if self.has_untraced_blocks:
            layers += untraced_layers(unsupported, store.named)
        self._warn_once(
            {n: f"{n} ({why})" for n, why in unsupported.items()}, "consumed by no supported op"
        )
        layout = self._extended(layers, store)
        in_blocks = {layer for block in layout.blocks for layer in block.layers}
        return layout, [call for call in calls if call.layer in in_blocks]

    def _extended(self, layers: Sequence[Layer], store: ParameterStore) -> ParameterBlocks:
        modules = dict(self._recorder.inner.named_modules())
        return add_layers(self.layout, layers, self.structure, modules, store.named)

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
            for block in layout.blocks[len(posterior.blocks):]
        ]
        return replace(posterior, blocks=(*posterior.blocks, *states))

    def _update_curvature(
        self, posterior: Posterior, passes: Sequence[RecordedPass], store: ParameterStore,
        batch_fraction: float, particle: Particle = SINGLE_PARTICLE,
    ) -> tuple[ParameterBlocks, Posterior]:
        """The posterior with one more estimate of the blocks that are due and were used."""
        with self._likelihood_pass(passes, store) as (term, layout, calls, batch_size):
            called = {call.layer for call in calls}
            posterior = self._with_new_blocks(posterior, layout, store, batch_fraction)
            posterior = self._in_context(posterior, layout, store)
            used = [
                state for state in posterior.blocks
                if state.block.is_untraced or called >= set(state.block.layers)
            ]
            updated = update_curvature(
                self.curvature, replace(posterior, blocks=tuple(used)),
                ForwardPass([term], calls, batch_size), batch_fraction, particle,
            )
        new = {state.block.name: state for state in updated.blocks}
        return layout, posterior.map_blocks(lambda state: new.get(state.block.name, state))

    def _decayed(self, store: ParameterStore, batch_fraction: float) -> Posterior:
        """On a step without an estimate: with the initial curvature as it is now."""
        posterior = self._in_context(self._posterior, self.layout, store)
        if not self.curvature.decays_at(posterior.step):
            return posterior
        return refresh(self.curvature, posterior, batch_fraction)

    def _warn_once(self, descriptions: Mapping[str, str], what: str) -> None:
        """Warn, once for each name, that it has no curvature."""
        new = [text for name, text in descriptions.items() if name not in self._warned]
        if new:
            warn_user(f"{type(self).__name__}: {', '.join(new)} {what}: "
                      f"{self.fallback_description}")
            self._warned |= {*descriptions}

    # ---- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(
        self, layout: ParameterBlocks, posterior: Posterior, store: ParameterStore, undo: Undo,
        num_samples: int = 1,
    ) -> None:
        """Step from the parameters' gradients, which are sums over `num_samples` samples.

        `undo` keeps what else the step has changed.
        """
        posterior = store.load(self._in_context(posterior, layout, store))
        gradients = {n: p.grad for n, (p, _) in store.named.items() if p.grad is not None}
        blocked = {name for block in layout.blocks for name in block.tensors}
        rest = {n: g for n, g in gradients.items() if n not in blocked and n not in layout.frozen}
        auxiliary = store.auxiliary(
            {**dict.fromkeys(self._auxiliary.names), **rest}, self._fallback_lr
        )
        means = {
            name: gradient if num_samples == 1 else gradient / num_samples
            for name, gradient in gradients.items() if name in blocked
        }
        loss = torch.zeros((), device=next(iter(store.named.values()))[0].device)
        evaluation = Evaluation(posterior, loss, means, [*rest.values()])
        update = step(self._posterior, evaluation)
        not_seen = {name: name for name in rest if name not in layout.names}
        self._warn_once(not_seen, "not used yet in a pass that gave a curvature")
        self._auxiliary.keep(undo, auxiliary)
        self._auxiliary.step(auxiliary, 1 / num_samples)

        def assign() -> None:
            self.layout, self._posterior = layout, update.posterior
            self._schedule_recording()

        commit(update, store, undo, assign)

    # ---- watching and saving --------------------------------------------------------------------

    def update_counts(self) -> dict[str, UpdateCount]:
        """How often each block's curvature was estimated, and its present interval in steps.

        By the names of the layers, "0 ... 4" where a block has several; empty before the first
        step.
        """
        return update_counts(self.curvature, self._posterior)

    def summary(self) -> str:
        """A table of every parameter: name, shape, structure, size.

        "adam" are parameters without a block; before the first step, which finds the layers, all
        are. The last line says how many parameters have a curvature.
        """
        kinds = {n: kind for layer, kind in self.layout.layers.items() if kind in LEFT_OUT
                 for n in layer.tensors}
        kinds |= {name: block.label for block in self.layout.blocks for name in block.tensors}
        rows = [
            (name, p, kinds.get(name, "adam" if p.requires_grad else "frozen"))
            for name, (p, _) in self._store().named.items()
        ]
        size = sum(block.size for block in self.layout.blocks)
        return format_table(rows, size, "parameter", "a curvature")

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters, in plain values and tensors."""
        left_out = [
            {"as": kind, "layer": to_state(layer)}
            for layer, kind in self.layout.layers.items() if kind in LEFT_OUT
        ]
        return {
            **super().state_dict(),
            "version": FORMAT_VERSION,
            "optimizer": type(self).__name__,
            "step": self._posterior.step,
            "posterior": to_state(self._posterior.without_means()),
            "left_out": left_out,
            "auxiliary": self._auxiliary.state_dict(),
            "stream": self._stream.state_dict(),
            "has_finite_support": self.has_finite_support,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, given the network as it was then.

        Raises ValueError, before anything is changed, for the state of another class, of a network
        with other parameters, of other structures, or of a newer version.
        """
        check_state(state_dict, type(self).__name__)
        posterior = from_state(state_dict["posterior"])
        layers = {
            layer: state.block.structure for state in posterior.blocks
            for layer in state.block.layers
        }
        layers |= {from_state(item["layer"]): item["as"] for item in state_dict["left_out"]}
        modules = dict(self._recorder.inner.named_modules())
        check_layers(layers, self.structure, modules, self._store(), type(self).__name__)
        groups = {key: state_dict[key] for key in ("state", "param_groups")}
        with Undo() as undo:
            undo.keep_attributes(self, self._auxiliary, self._stream, self._recorder)
            super().load_state_dict(groups)
            self.layout = ParameterBlocks(layers, tuple(s.block for s in posterior.blocks))
            like = next(iter(self._store().named.values()))[0]
            self._posterior = posterior.to(like)
            self._auxiliary.load_state_dict(state_dict["auxiliary"])
            self._warned = {*state_dict["auxiliary"]}
            self._stream.load_state_dict(state_dict["stream"])
            self.has_finite_support = state_dict["has_finite_support"]
            self._recorder.pop_passes()
            self._schedule_recording()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in PICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._likelihood_fn = check_likelihood(self.likelihood, self.curvature.kind)
