"""What both optimizers here are: a network's layers in blocks, with their curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.likelihood import Likelihood, LikelihoodTerm
from pyrocurv.curvature.running_average import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.layers import Layer
from pyrocurv.layers.calls import LayerCall
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice
from pyrocurv.layers.structure_spec import parse_structure
from pyrocurv.layers.trace import Trace
from pyrocurv.optim.forward_recorder import (
    ForwardPass,
    ForwardRecorder,
    merge_compatible,
    num_examples,
)
from pyrocurv.optim.loss_targets import (
    DATA_KINDS,
    check_likelihood,
    check_loss,
    observation,
    unwrap_independent,
)
from pyrocurv.optim.parameter_blocks import (
    Group,
    NamedParameters,
    ParameterBlocks,
    Params,
    add_layers,
    check_batch_axis,
    name_parameters,
    new_layers,
    read_block,
    split_by_group,
    untraced_layers,
    write_blocks,
)
from pyrocurv.optim.rest import AuxiliaryOptimizer
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.sampling import Weights
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import compute_update, is_due, refresh_precision, update_curvature
from pyrocurv.posterior.summary import UpdateCount, format_table, update_counts
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures.serialization import FORMAT_VERSION, check_version, from_state, to_state

COPIED = (
    "defaults", "state", "param_groups", "curvature", "likelihood", "structure", "layout",
    "has_finite_support",
    "_watch", "_stream", "_rest", "_state", "_told",
)


class CurvatureOptimizer(torch.optim.Optimizer):
    """Watches a network and keeps the curvature of its layers; subclasses say what a step is."""

    opaque_blocks = False  # whether what no supported op consumes has a block too

    def __init__(
        self, net: nn.Module, params: Params | None, likelihood: Likelihood,
        curvature: str | Curvature, structure: StructureChoice, fallback_lr: float, defaults: Group,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: a torch.nn.Module is needed, got {type(net).__name__}")
        self.curvature = as_curvature(curvature)
        self._likelihood_fn = check_likelihood(likelihood, self.curvature.kind)
        self.likelihood, self.structure = likelihood, structure
        if isinstance(structure, str) and structure not in LEFT_OUT:
            parse_structure(structure)
        self._rest = AuxiliaryOptimizer(fallback_lr)
        self._warned: set[str] = set()  # names that a warning said have no curvature
        super().__init__(net.parameters() if params is None else params, defaults)
        self._watch = ForwardRecorder(net)
        self._stream = RandomStream()
        self.has_finite_support = likelihood in ("categorical", "bernoulli")  # or as was seen
        self.layout = ParameterBlocks({})
        self._state = Posterior(0, ())
        self._schedule_recording()

    @property
    def net(self) -> nn.Module:
        """The network, as it was given."""
        return self._watch.net

    # ---- parameters -----------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """As torch has it. Raises ValueError for parameters that are none of the network's."""
        self._check(param_group)
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        """Raise ValueError for a number out of its range."""
        numbers = {**self.defaults, **group}
        momentum, damping, clip = (numbers[name] for name in ("momentum", "damping", "kl_clip"))
        if not numbers["lr"] >= 0:
            raise ValueError(f"lr={numbers['lr']!r}: a number from 0 is needed")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r}: a number in [0, 1) is needed")
        if not damping >= 0:
            raise ValueError(f"damping={damping!r}: a number from 0 is needed")
        if clip is not None and not clip > 0:
            raise ValueError(f"kl_clip={clip!r}: a positive number or None is needed")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch has it; passes whose gradients are cleared have no part in the next step."""
        super().zero_grad(set_to_none)
        self._watch.pop_passes()

    def _places(self) -> NamedParameters:
        return name_parameters(self._watch.inner, self.param_groups)

    # ---- curvature ------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the step to come takes an estimate."""
        step, blocks = self._state.step, self.layout.blocks
        return not blocks or any(
            is_due(self.curvature, step, block, one)
            for block, one in zip(blocks, self._state.blocks, strict=True)
        )

    def _schedule_recording(self) -> None:
        """Have the watch keep what the step to come will want."""
        self._watch.count = self.curvature.batch if self._is_due() else 0

    @contextmanager
    def _likelihood_pass(
        self, passes: Sequence[ForwardPass], places: NamedParameters
    ) -> Iterator[tuple[list[LikelihoodTerm], ParameterBlocks, list[LayerCall], int]]:
        """The likelihood, the layout and the layers' ops of a run on the passes' first examples."""
        device = next(iter(places.values()))[0].device
        inputs, gradients = merge_compatible(passes)
        tracked: dict[str, Tensor] = {n: p for n, (p, _) in places.items() if p.requires_grad}
        twice = self.curvature.kind == "hessian"
        with (
            self._stream(device), disable_autocast(device),
            twice_differentiable() if twice else nullcontext(),
            self._watch.rerun(inputs, tracked) as (output, capture),
        ):
            gradient = torch.cat(gradients)[: inputs.batch] if gradients else None
            if gradient is not None and not self.layout.blocks:
                check_loss(self.likelihood, gradient)
            term = observation(
                self.likelihood, self._likelihood_fn, output, gradient, num_examples(passes),
                inputs.batch,
                self.curvature.kind in DATA_KINDS,
            )
            self.has_finite_support = unwrap_independent(term.likelihood).has_enumerate_support
            trace = check_batch_axis(self.layout, capture.trace(), output, inputs.batch)
            layout, calls = self._add_met_layers(trace, places)
            yield [term], layout, calls, inputs.batch

    def _add_met_layers(
        self, trace: Trace, places: NamedParameters
    ) -> tuple[ParameterBlocks, list[LayerCall]]:
        """The layout with the layers of this pass, and their calls."""
        known, calls = self.layout.names, split_by_group(trace.calls, places)
        unsupported = {name: why for name, why in trace.unsupported.items() if name not in known}
        fresh = new_layers(self.layout, calls)
        if self.opaque_blocks:
            fresh += untraced_layers(unsupported, places)
        self._warn_once(
            {n: f"{n} ({why})" for n, why in unsupported.items()}, "consumed by no supported op"
        )
        layout = self._extended(fresh, places)
        held = {layer for block in layout.blocks for layer in block.layers}
        return layout, [call for call in calls if call.layer in held]

    def _extended(self, fresh: Sequence[Layer], places: NamedParameters) -> ParameterBlocks:
        modules = dict(self._watch.inner.named_modules())
        return add_layers(self.layout, fresh, self.structure, modules, places)

    def _update_curvature(
        self, carried: Sequence[BlockState], passes: Sequence[ForwardPass],
        places: NamedParameters, batch_fraction: float, part: Particle = SINGLE_PARTICLE,
    ) -> tuple[ParameterBlocks, list[BlockState]]:
        """The carried states with one more estimate of the blocks that are due and took part."""
        with self._likelihood_pass(passes, places) as (terms, layout, calls, rows):
            met = {call.layer for call in calls}
            every = [*carried, *(BlockState() for _ in layout.blocks[len(carried):])]
            here = [
                n for n, block in enumerate(layout.blocks)
                if block.is_untraced or met >= set(block.layers)
            ]
            priors, numbers = self._priors(layout, places), self._numbers(layout, places)
            new = update_curvature(
                self.curvature, self._state.step, [layout.blocks[n] for n in here],
                [every[n] for n in here], terms, calls, rows, batch_fraction, [
                    priors[n] for n in here
                ],
                [numbers[n] for n in here], part,
            )
        for n, one in zip(here, new, strict=True):
            every[n] = one
        return layout, every

    def _decayed(
        self, layout: ParameterBlocks, places: NamedParameters, batch_fraction: float
    ) -> list[BlockState]:
        """On a step that takes no estimate: with the initial curvature as faint as it is now."""
        carried = list(self._state.blocks)
        if not self.curvature.decays_at(self._state.step):
            return carried
        priors, numbers = self._priors(layout, places), self._numbers(layout, places)
        return refresh_precision(
            self.curvature, self._state.step, carried, batch_fraction, priors, numbers
        )

    def _priors(self, layout: ParameterBlocks, places: NamedParameters) -> list[BlockPrior]:
        raise NotImplementedError

    def _numbers(self, layout: ParameterBlocks, places: NamedParameters) -> list[Hyperparameters]:
        raise NotImplementedError

    def _warn_once(self, names: Mapping[str, str], what: str) -> None:
        """Warn, once for each name, that it has no curvature."""
        if news := [said for name, said in names.items() if name not in self._warned]:
            warn_user(f"{type(self).__name__}: {', '.join(news)} {what}: {self.without}")
            self._warned |= {*names}

    without = ""  # what a parameter that no supported op consumes gets instead

    # ---- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(
        self, layout: ParameterBlocks, carried: Sequence[BlockState],
        places: NamedParameters, samples: int = 1,
    ) -> None:
        """Step from the parameters' gradients, the sum over so many samples."""
        priors, numbers = self._priors(layout, places), self._numbers(layout, places)
        grads = {name: p.grad for name, (p, _) in places.items() if p.grad is not None}
        here = [n for n, block in enumerate(layout.blocks) if grads.keys() & block.tensors.keys()]
        blocks = [layout.blocks[n] for n in here]
        blocked = {name for block in layout.blocks for name in block.tensors}
        rest = [name for name in grads if name not in blocked and name not in layout.frozen]
        locs = [read_block(block, places) for block in blocks]
        gradients: list[Weights] = [
            {name: _mean(grads.get(name), samples, places[name][0]) for name in block.tensors}
            for block in blocks
        ]
        if blocks:
            proposal = compute_update(
                Posterior(
                    self._state.step, tuple(carried[n] for n in here)
                ), blocks, locs, gradients,
                [priors[n] for n in here], locs[0].new_zeros(()), [grads[name] for name in rest],
                [numbers[n] for n in here], False,
            )
            proposal.move(locs)
            moved = dict(zip(here, proposal.state.blocks, strict=True))
            carried = [moved.get(n, one) for n, one in enumerate(carried)]
        elif not all(bool(torch.isfinite(grads[name]).all()) for name in rest):
            raise FloatingPointError(f"step {self._state.step}: a gradient is not finite")
        new_layers = {name: name for name in rest if name not in layout.names}
        self._warn_once(new_layers, "had no part yet in a run that gave a curvature")
        self._rest.step(rest, places, 1 / samples)
        # what has no gradient stays, as torch's optimizers do
        write_blocks(blocks, locs, places, grads)
        self.layout, self._state = layout, Posterior(self._state.step + 1, tuple(carried))
        self._schedule_recording()

    # ---- watching and saving --------------------------------------------------------------------

    def update_counts(self) -> dict[str, UpdateCount]:
        """How often each block's curvature was estimated, and its present interval in steps.

        By the names of the layers, "0 ... 4" where a block has several; empty before the first
        step.
        """
        return update_counts(self.curvature, self.layout.blocks, self._state)

    def summary(self) -> str:
        """A table of every parameter: name, shape, structure, how many numbers.

        "adam" is what no block has: before the first step, which finds the layers, that is all.
        The last line says how many numbers have a curvature.
        """
        kinds = {n: kind for layer, kind in self.layout.layers.items() if kind in LEFT_OUT
                 for n in layer.tensors}
        kinds |= {name: block.label for block in self.layout.blocks for name in block.tensors}
        rows = [
            (name, p, kinds.get(name, "adam" if p.requires_grad else "frozen"))
            for name, (p, _) in self._places().items()
        ]
        here = sum(block.size for block in self.layout.blocks)
        return format_table(rows, here, "parameter", "a curvature")

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters, in plain values and tensors."""
        left_out = [
            {"as": kind, "layer": to_state(layer)}
            for layer, kind in self.layout.layers.items() if kind in LEFT_OUT
        ]
        return {
            **super().state_dict(),
            "version": FORMAT_VERSION,
            "step": self._state.step,
            "left_out": left_out,
            "blocks": to_state(self.layout.blocks),
            "carried": to_state(self._state.blocks),
            "rest": self._rest.state_dict(),
            "stream": self._stream.state_dict(),
            "has_finite_support": self.has_finite_support,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, given the network as it was then.

        Raises ValueError when the state is of a network with other parameters.
        """
        check_version(state_dict, type(self).__name__)
        blocks = from_state(state_dict["blocks"])
        have = {name: tuple(p.shape) for name, (p, _) in self._places().items()}
        want = {n: tuple(s) for block in blocks for n, s in block.tensors.items()}
        if strange := {n: s for n, s in want.items() if have.get(n) != s}:
            raise ValueError(f"the state is of parameters {strange}, the network has {have}")
        carried = from_state(state_dict["carried"])
        groups = {key: state_dict[key] for key in ("state", "param_groups")}
        super().load_state_dict(groups)
        layers = {layer: block.structure for block in blocks for layer in block.layers}
        for one in state_dict["left_out"]:
            layers[from_state(one["layer"])] = one["as"]
        self.layout = ParameterBlocks(layers, blocks)
        like = next(iter(self._places().values()))[0]
        self._state = Posterior(state_dict["step"], carried).to(like)
        self._rest.load_state_dict(state_dict["rest"])
        self._warned = {*state_dict["rest"]["names"]}
        self._stream.load_state_dict(state_dict["stream"])
        self.has_finite_support = state_dict["has_finite_support"]
        self._watch.pop_passes()
        self._schedule_recording()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._likelihood_fn = check_likelihood(self.likelihood, self.curvature.kind)


def _mean(gradient: Tensor | None, samples: int, like: Tensor) -> Tensor:
    """Over the samples that it is the sum of."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient if samples == 1 else gradient / samples
