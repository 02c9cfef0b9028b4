"""What both optimizers here are: a network's layers in blocks, with their curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv import engine
from pyrocurv.blocks import Block
from pyrocurv.capture import Capture
from pyrocurv.choice import LEFT_OUT, Choice, choose
from pyrocurv.counts import Updates, counts
from pyrocurv.curvature import Curvature
from pyrocurv.curvature.estimate import Likelihood
from pyrocurv.curvature.estimator import ALONE, Part
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.pullback import Observation
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.engine import Numbers, Weights
from pyrocurv.layers import Layer
from pyrocurv.notice import notice
from pyrocurv.optim.layout import Layout, extended, grouped, opaque, refuse_misread, unmet
from pyrocurv.optim.likelihoods import DATA_KINDS, check_likelihood, check_loss, observation, single
from pyrocurv.optim.passes import Pass, alike, total
from pyrocurv.optim.places import Group, Params, Places, placed, read, write
from pyrocurv.optim.rest import Rest
from pyrocurv.optim.watching import Watch
from pyrocurv.precision import full_precision
from pyrocurv.priors import BlockPrior
from pyrocurv.state import Carried, State
from pyrocurv.stream import Stream
from pyrocurv.table import table
from pyrocurv.uses import Call

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
        curvature: str | Curvature, structure: Choice, fallback_lr: float, defaults: Group,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net: a torch.nn.Module is needed, got {type(net).__name__}")
        self.curvature = as_curvature(curvature)
        self._density = check_likelihood(likelihood, self.curvature.kind)
        self.likelihood, self.structure = likelihood, structure
        if structure is None or isinstance(structure, str):
            choose(structure, "kfac", [Layer("any", None, (1, 1))], {}, LEFT_OUT)
        self._rest = Rest(fallback_lr)
        self._told: set[str] = set()  # names that a warning said have no curvature
        super().__init__(net.parameters() if params is None else params, defaults)
        self._watch = Watch(net)
        self._stream = Stream()
        self.has_finite_support = likelihood in ("categorical", "bernoulli")  # or as was seen
        self.layout = Layout({})
        self._state = State(0, ())
        self._expect()

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
        self._watch.take()

    def _places(self) -> Places:
        return placed(self._watch.inner, self.param_groups)

    # ---- curvature ------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        """Whether the step to come takes an estimate."""
        step, blocks = self._state.step, self.layout.blocks
        return not blocks or any(
            engine.is_due(self.curvature, step, block, one)
            for block, one in zip(blocks, self._state.blocks, strict=True)
        )

    def _expect(self) -> None:
        """Have the watch keep what the step to come will want."""
        self._watch.count = self.curvature.batch if self._is_due() else 0

    @contextmanager
    def _seen(
        self, passes: Sequence[Pass], places: Places
    ) -> Iterator[tuple[list[Observation], Layout, list[Call], int]]:
        """The likelihood, the layout and the layers' ops of a run on the passes' first examples."""
        device = next(iter(places.values()))[0].device
        inputs, gradients = alike(passes)
        watched: dict[str, Tensor] = {n: p for n, (p, _) in places.items() if p.requires_grad}
        twice = self.curvature.kind == "hessian"
        with (
            self._stream(device), full_precision(device),
            twice_differentiable() if twice else nullcontext(),
            self._watch.again(inputs, watched) as (output, capture),
        ):
            gradient = torch.cat(gradients)[: inputs.batch] if gradients else None
            if gradient is not None and not self.layout.blocks:
                check_loss(self.likelihood, gradient)
            term = observation(
                self.likelihood, self._density, output, gradient, total(passes), inputs.batch,
                self.curvature.kind in DATA_KINDS,
            )
            self.has_finite_support = single(term.likelihood).has_enumerate_support
            refuse_misread(self.layout, capture, output, inputs.batch)
            layout, calls = self._met(capture, places)
            yield [term], layout, calls, inputs.batch

    def _met(self, capture: Capture, places: Places) -> tuple[Layout, list[Call]]:
        """The layout with the layers of this pass, and their calls."""
        known, calls = self.layout.names, grouped(capture.calls, places)
        missed = {name: why for name, why in capture.missed.items() if name not in known}
        fresh = unmet(self.layout, calls)
        if self.opaque_blocks:
            fresh += opaque(missed, places)
        self._tell({n: f"{n} ({why})" for n, why in missed.items()}, "consumed by no supported op")
        layout = self._extended(fresh, places)
        held = {layer for block in layout.blocks for layer in block.layers}
        return layout, [call for call in calls if call.layer in held]

    def _extended(self, fresh: Sequence[Layer], places: Places) -> Layout:
        modules = dict(self._watch.inner.named_modules())
        return extended(self.layout, fresh, self.structure, modules, places)

    def _estimated(
        self, carried: Sequence[Carried], passes: Sequence[Pass],
        places: Places, share: float, part: Part = ALONE,
    ) -> tuple[Layout, list[Carried]]:
        """The carried states with one more estimate of the blocks that are due and took part."""
        with self._seen(passes, places) as (terms, layout, calls, rows):
            met = {call.layer for call in calls}
            every = [*carried, *(Carried() for _ in layout.blocks[len(carried):])]
            here = [
                n for n, block in enumerate(layout.blocks)
                if block.is_opaque or met >= set(block.layers)
            ]
            priors, numbers = self._priors(layout, places), self._numbers(layout, places)
            new = engine.observe(
                self.curvature, self._state.step, [layout.blocks[n] for n in here],
                [every[n] for n in here], terms, calls, rows, share, [priors[n] for n in here],
                [numbers[n] for n in here], part,
            )
        for n, one in zip(here, new, strict=True):
            every[n] = one
        return layout, every

    def _aged(self, layout: Layout, places: Places, share: float) -> list[Carried]:
        """On a step that takes no estimate: with the initial curvature as faint as it is now."""
        carried = list(self._state.blocks)
        if not self.curvature.fades(self._state.step):
            return carried
        priors, numbers = self._priors(layout, places), self._numbers(layout, places)
        return engine.faded(self.curvature, self._state.step, carried, share, priors, numbers)

    def _priors(self, layout: Layout, places: Places) -> list[BlockPrior]:
        raise NotImplementedError

    def _numbers(self, layout: Layout, places: Places) -> list[Numbers]:
        raise NotImplementedError

    def _tell(self, names: Mapping[str, str], what: str) -> None:
        """Warn, once for each name, that it has no curvature."""
        if news := [said for name, said in names.items() if name not in self._told]:
            notice(f"{type(self).__name__}: {', '.join(news)} {what}: {self.without}")
            self._told |= {*names}

    without = ""  # what a parameter that no supported op consumes gets instead

    # ---- the step -------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(
        self, layout: Layout, carried: Sequence[Carried],
        places: Places, samples: int = 1,
    ) -> None:
        """Step from the parameters' gradients, the sum over so many samples."""
        priors, numbers = self._priors(layout, places), self._numbers(layout, places)
        grads = {name: p.grad for name, (p, _) in places.items() if p.grad is not None}
        here = [n for n, block in enumerate(layout.blocks) if grads.keys() & block.tensors.keys()]
        blocks = [layout.blocks[n] for n in here]
        blocked = {name for block in layout.blocks for name in block.tensors}
        rest = [name for name in grads if name not in blocked and name not in layout.frozen]
        locs = [read(block, places) for block in blocks]
        gradients: list[Weights] = [
            {name: _mean(grads.get(name), samples, places[name][0]) for name in block.tensors}
            for block in blocks
        ]
        if blocks:
            proposal = engine.propose(
                State(self._state.step, tuple(carried[n] for n in here)), blocks, locs, gradients,
                [priors[n] for n in here], locs[0].new_zeros(()), [grads[name] for name in rest],
                [numbers[n] for n in here], False,
            )
            proposal.move(locs)
            moved = dict(zip(here, proposal.state.blocks, strict=True))
            carried = [moved.get(n, one) for n, one in enumerate(carried)]
        elif not all(bool(torch.isfinite(grads[name]).all()) for name in rest):
            raise FloatingPointError(f"step {self._state.step}: a gradient is not finite")
        unmet = {name: name for name in rest if name not in layout.names}
        self._tell(unmet, "had no part yet in a run that gave a curvature")
        self._rest.step(rest, places, 1 / samples)
        write(blocks, locs, places, grads)  # what has no gradient stays, as torch's optimizers do
        self.layout, self._state = layout, State(self._state.step + 1, tuple(carried))
        self._expect()

    # ---- watching and saving --------------------------------------------------------------------

    def update_counts(self) -> dict[str, Updates]:
        """How often each block's curvature was estimated, and its present interval in steps.

        By the names of the layers, "0 ... 4" where a block has several; empty before the first
        step.
        """
        return counts(self.curvature, self.layout.blocks, self._state)

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
        return table(rows, here, "parameter", "a curvature")

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters, in plain values and tensors."""
        left_out = [
            {"as": kind, "layer": Block((layer,), "diag").state()}
            for layer, kind in self.layout.layers.items() if kind in LEFT_OUT
        ]
        return {
            **super().state_dict(),
            "step": self._state.step,
            "left_out": left_out,
            "blocks": [block.state() for block in self.layout.blocks],
            "carried": [one.state() for one in self._state.blocks],
            "rest": self._rest.state_dict(),
            "stream": self._stream.state_dict(),
            "has_finite_support": self.has_finite_support,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, given the network as it was then.

        Raises ValueError when the state is of a network with other parameters.
        """
        blocks = tuple(Block.from_state(one) for one in state_dict["blocks"])
        have = {name: tuple(p.shape) for name, (p, _) in self._places().items()}
        want = {n: tuple(s) for block in blocks for n, s in block.tensors.items()}
        if strange := {n: s for n, s in want.items() if have.get(n) != s}:
            raise ValueError(f"the state is of parameters {strange}, the network has {have}")
        carried = tuple(Carried.from_state(one) for one in state_dict["carried"])
        groups = {key: state_dict[key] for key in ("state", "param_groups")}
        super().load_state_dict(groups)
        layers = {layer: block.structure for block in blocks for layer in block.layers}
        for one in state_dict["left_out"]:
            layers[Block.from_state(one["layer"]).layers[0]] = one["as"]
        self.layout = Layout(layers, blocks)
        like = next(iter(self._places().values()))[0]
        self._state = State(state_dict["step"], carried).to(like)
        self._rest.load_state_dict(state_dict["rest"])
        self._told = {*state_dict["rest"]["names"]}
        self._stream.load_state_dict(state_dict["stream"])
        self.has_finite_support = state_dict["has_finite_support"]
        self._watch.take()
        self._expect()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._density = check_likelihood(self.likelihood, self.curvature.kind)


def _mean(gradient: Tensor | None, samples: int, like: Tensor) -> Tensor:
    """Over the samples that it is the sum of."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient if samples == 1 else gradient / samples
