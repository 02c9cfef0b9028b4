"""Natural-gradient variational inference for a Pyro model and a structured guide.

A step draws weights from the guide, runs the model once, takes one backward pass for the gradient
and, every so often, one more onto the layers' outputs for the curvature; then it moves mean and
precision as `pyrocurv.natural` has it. All is computed before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor

from pyrocurv import engine
from pyrocurv.buffers import snapshot
from pyrocurv.curvature import Curvature
from pyrocurv.curvature.estimator import Part
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.engine import Numbers, Proposal
from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.guides.mixture import TRAINED
from pyrocurv.infer import whole
from pyrocurv.infer.numbers import (
    AUTO,
    Loss,
    NaturalGradient,
    check_positive,
    check_samples,
    chosen,
)
from pyrocurv.infer.rest import Rest
from pyrocurv.infer.run import Run, leaves, run_model
from pyrocurv.infer.saved import Layout, check_average, check_layout, layout
from pyrocurv.infer.whole import Whole
from pyrocurv.precision import Autocast, full_precision
from pyrocurv.priors import BlockPrior, Source
from pyrocurv.prototype import frozen_buffers, modules
from pyrocurv.state import Carried, Noise, State
from pyrocurv.stream import Stream


class Updates(NamedTuple):
    """Of a block's curvature."""

    updates: int
    interval: int


@dataclass(frozen=True, eq=False)
class _Found:
    """What the runs of the model in a step gave."""

    loss: Tensor
    gradients: list[Tensor]  # of the energy per datum in the sampled weights, packed
    rest: list[Tensor | None]  # and in all other parameters
    model_params: Mapping[str, Tensor]
    guide_params: Mapping[str, Tensor]
    own_params: Collection[str]  # those of the model that are its modules' own
    numbers: list[Numbers]  # the same for all blocks
    priors: list[BlockPrior]
    state: State  # with the new curvature and the next noise


class NGVI:
    """Natural-gradient variational inference.

    Args:
        model: a Pyro model. The number of data N is the full size of the plate around its observed
            site; a `poutine.scale` on top of it tempers the likelihood.
        guide: one of `pyrocurv.guides`, made for the model.
        lr: of the mean. 0.02 suits batches of 128; smaller batches want a smaller one.
        momentum: β of the gradient's running average.
        curvature: a kind or a `Curvature`.
        temperature: T multiplies the KL term alone. 1 is the ELBO, which tends to under-fit
            networks that have few data. "auto" is a rule of thumb, chosen after a handful of
            measured cases: min(0.1, N/P) for likelihoods of finite support, with P the number of
            weights here, and 0.3 for others.
        damping: added to the curvature in the mean's step, never to the posterior.
        kl_clip: trust region κ of a step; None for no clipping.
        num_particles: samples S of the posterior a step, in antithetic pairs; gradients and
            curvature are means over them. 0: none, all is taken at the mean, which so goes to a
            mode of the log joint (at T = 1); the posterior there is a Laplace approximation, for
            `Laplace(model, guide).predict(x)`, not for sampling.
        antithetic: use each noise a second time with its sign turned, also from step to step.
        average: keep a running average of mean and precision, of weight 4/(t+4), and let the guide
            be that average; training goes on from the iterate.
        optim: trains all that is no natural-gradient latent, the model's parameters and the
            fallback guide: a callable from parameters to a `torch.optim.Optimizer`, or a
            `PyroOptim`. By default Adam, 0.002 for the model, 0.01 for the guide. The learning
            rates of a torch optimizer follow the schedule on `.optimizer` in proportion.
        on_nonfinite: when a loss or a gradient is not finite, "raise" a FloatingPointError, or
            "skip" the step and count it in `.skipped`; posterior, momentum and random numbers stay
            as they were either way.

    "auto" is, for networks (of convolutions, and MLPs): lr 0.02, momentum 0.9, damping 0.003,
    kl_clip 0.001, one sample, no average; the first step is taken at the mean. For a `FullGuide`
    with curvature="hessian", and for a `DiagonalGuide` of a model without a network, Gaussian and
    Hessian are of the whole log joint in unconstrained space, in steps of their own: lr 0.3, the
    precision moves by 0.3 of the way, kl_clip 1, 8 samples, averaged; 0.1 and 32 samples where a
    latent has bounds, as scales have. A `Curvature` sets that rate, 1 - decay, and
    leaves the other numbers as they are for networks; momentum and damping play no part there.
    Random numbers come from a stream of its own, seeded from torch's generator when it is made.

    Raises:
        TypeError: the guide is none of `pyrocurv.guides`.
        ValueError: an unknown name or a number out of its range; at a step, before any state is
            changed, what the guide raises at its first call, a plate smaller than the batch in it,
            a latent that the guide does not know.

    Reference: Zhang et al. 2018, "Noisy natural gradient as variational inference",
    arXiv:1712.02390; Khan & Rue 2023, "The Bayesian learning rule", arXiv:2107.04562.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=64)
        >>> ngvi = NGVI(model, KFACGuide(model), temperature=0.1)
        >>> losses = [ngvi.step(x, y) for _ in range(50)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: StructuredGuide,
        *,
        lr: float | str = AUTO,
        momentum: float | str = AUTO,
        curvature: str | Curvature = "fisher",
        temperature: float | str = 1.0,
        damping: float | str = AUTO,
        kl_clip: float | str | None = AUTO,
        num_particles: int | str = AUTO,
        antithetic: bool = True,
        average: bool | str = AUTO,
        optim: Callable[..., torch.optim.Optimizer] | PyroOptim | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        if isinstance(guide, MixtureGuide):
            raise TypeError(TRAINED)
        if not isinstance(guide, StructuredGuide):
            raise TypeError(
                "guide: one of pyrocurv.guides is needed (KFACGuide, ...), got "
                f"{type(guide).__name__}"
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: choose 'raise' or 'skip'")
        check_positive("temperature", temperature, "auto")
        self.model, self.guide = model, guide
        self.curvature = as_curvature(curvature)
        self._wants_whole = curvature == "hessian" and guide.may_be_whole_of(model)
        numbers = chosen({
            "lr": lr, "momentum": momentum, "damping": damping, "kl_clip": kl_clip,
            "num_particles": num_particles, "average": average,
        }, self._wants_whole)
        self.num_particles: Any = check_samples(numbers.pop("num_particles"))
        self.average: bool = numbers.pop("average")
        self.temperature, self.antithetic = temperature, antithetic
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        self.optimizer = NaturalGradient(**numbers)
        if self._wants_whole:
            guide.is_whole = guide.is_whole or not guide.sites
        self._rest = Rest(optim)
        self._stream = Stream()
        self._state: State | Whole | None = None
        self._at_once = True  # whether samples of a whole model may go together
        self._priors: list[BlockPrior] = []
        self._loaded: Layout | None = None  # of a state that no step has gone on from yet

    # ---- a step ---------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step on a mini-batch; takes the model's arguments.

        Returns the loss before the step: -ELBO at full-data scale, N E[nll] + T KL, at the weights
        sampled (what `SVI.step` returns), or N nll + T KL at the mean. NaN for a step that was
        skipped.
        """
        first = self._state is None
        if self.guide.prototype_trace is None:
            with Stream(self._stream.seed)(torch.device("cpu")):  # no part of the run
                poutine.block(self.guide)(*args, **kwargs)
        if not self.guide.blocks:
            raise ValueError(f"{self.guide.emptiness}: use pyro.infer.SVI")
        self._check_samples()
        state = self._state or self._first()
        if self._loaded is not None:
            check_layout(self._loaded, self._layout())
            self._loaded = None
        like = self.guide.blocks[0].raw_loc
        state, restore = state.to(like), snapshot(modules(self.model))
        try:
            validation = nullcontext() if first else pyro.validation_enabled(False)
            with (self._stream(like.device), validation, torch.enable_grad(),
                  full_precision(like.device) as network):
                proposal, commit = self._propose(state, network, args, kwargs)
                self.optimizer.step(commit)
                self.guide.at_mode = self.num_particles == 0
        except BaseException as error:
            restore()
            if not isinstance(error, FloatingPointError):
                raise
            if self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            return math.nan
        self._state = proposal.state
        return proposal.loss

    def _first(self) -> State | Whole:
        """The state before the first step."""
        guide = self.guide
        if guide.is_whole and self.curvature.kind != "hessian":
            raise ValueError(
                f"curvature={self.curvature.kind!r} is of layers, this guide has all latents of a "
                "model without a network: use 'hessian'"
            )
        if (self._wants_whole or guide.is_whole) and guide.is_one_block:
            (family,) = guide.blocks
            return whole.start(
                family.raw_loc.detach().clone(), family.precision(), guide.is_untouched,
                family.block.kind,
            )
        return State(0, tuple(Carried() for _ in guide.blocks))

    def _propose_whole(
        self, state: Whole, network: Autocast, args: Any, kwargs: Any
    ) -> tuple[whole.Step, Callable[[], None]]:
        """The step of a model without a network, and what it then writes."""
        (family,) = self.guide.blocks
        number = self._whole_numbers()

        def run_at(real: Tensor) -> Run:
            with network():
                return run_model(self.model, self.guide, family.block.unpack(real), args, kwargs)

        def propose(at_once: bool) -> whole.Step:
            return whole.propose(state, family.block.kind == "diag", number, run_at, at_once)

        at_once = self._at_once and self._state is not None  # the first step validates
        try:
            step = propose(at_once)
        except (RuntimeError, ValueError) as error:
            if not at_once or isinstance(error, FloatingPointError):
                raise
            self._at_once = False  # not every model has a vectorized form; a true fault comes again
            step = propose(False)
        new = step.state
        encoded = family.encode(new.mean_precision or new.precision)

        @torch.no_grad()
        def commit() -> None:
            run = step.run
            self._rest.step(
                run.model_params, run.guide_params, step.rest, number.lr / number.base_lr,
                run.own_params.keys(),
            )
            family.write(new.loc if new.mean_loc is None else new.mean_loc, encoded)

        return step, commit

    def _whole_numbers(self) -> whole.Numbers:
        group = self.optimizer.param_groups[0]
        rate, samples = (0.1, 32) if self.guide.has_scales else (0.3, 8)
        if not self._wants_whole:
            rate = 1 - self.curvature.decay
        if isinstance(self.num_particles, int):
            samples = self.num_particles
        return whole.Numbers(
            group["lr"], group.get("initial_lr", group["lr"]), rate, group["kl_clip"], self._heat,
            samples, self.antithetic, self.average,
        )

    def _propose(
        self, state: State | Whole, network: Autocast, args: Any, kwargs: Any
    ) -> tuple[Proposal | whole.Step, Callable[[], None]]:
        """The step, and what it then writes into parameters."""
        if isinstance(state, Whole):
            return self._propose_whole(state, network, args, kwargs)
        families = self.guide.blocks
        due = any(
            engine.is_due(self.curvature, state.step, family.block, one)
            for family, one in zip(families, state.blocks, strict=True)
        )
        locs = [
            family.raw_loc.detach() if one.iterate is None else one.iterate
            for family, one in zip(families, state.blocks, strict=True)
        ]
        found = self._backward(state, locs, due, network, args, kwargs)
        proposal = engine.propose(
            found.state, locs, found.gradients, found.priors, found.loss, found.rest,
            found.numbers, self.average,
        )
        encoded = [
            family.encode(new.average or new.metric.precision)  # type: ignore[union-attr]  # set at the first step
            if self.average or new.metric is not old.metric else None
            for family, old, new in zip(families, state.blocks, proposal.state.blocks, strict=True)
        ]

        @torch.no_grad()
        def commit() -> None:
            (number, *_) = found.numbers
            self._rest.step(
                found.model_params, found.guide_params, found.rest, number.lr / number.base_lr,
                found.own_params,
            )
            if not self.average:
                proposal.move([family.raw_loc for family in families])
            moves = zip(families, proposal.state.blocks, encoded, strict=True)
            for family, one, precision in moves:
                loc = family.raw_loc
                if one.iterate is not None:
                    loc = loc.lerp(one.iterate, engine.average_weight(state.step))
                if one.iterate is not None or precision is not None:
                    family.write(loc, precision)

        return proposal, commit

    def _backward(
        self, state: State, locs: Sequence[Tensor], due: bool, network: Autocast, args: Any,
        kwargs: Any,
    ) -> _Found:
        """Run the model at sampled weights, and take from the graph all that is wanted of it."""
        carried, families = list(state.blocks), self.guide.blocks
        blocks = [family.block for family in families]
        precisions = [one.metric.precision if one.metric else None for one in carried]
        held = [q or family.precision() for q, family in zip(precisions, families, strict=True)]
        noises = [one.noise for one in carried]
        loss = locs[0].new_zeros(())
        gradients: list[Tensor] = []
        estimates: list[Tensor | None] = [None] * len(families)  # of opaque blocks' curvature
        rest: list[Tensor | None] = []
        runs = max(1, self.num_particles)
        for particle in range(runs):
            noise = None
            if self.num_particles:
                noise, noises = engine.draw(precisions, noises, locs[0], self.antithetic)
            sample = engine.around(blocks, locs, noise)
            twice = due and self.curvature.kind == "hessian"
            with network(), twice_differentiable() if twice else nullcontext():
                run = run_model(self.model, self.guide, leaves(sample), args, kwargs, due)
            heat = self._heat(run)
            priors, energy = self._read_priors(run), run.energy(heat)
            if due:
                if not bool(torch.isfinite(energy)):
                    raise FloatingPointError(f"step {state.step}: the loss is {energy.item()}")
                carried = engine.observe(
                    self.curvature, state.step, blocks, carried,
                    run.observations, run.capture.calls, run.main.rows, run.batch / run.num_data,  # type: ignore[union-attr]  # watched: there is a capture
                    priors, self._numbers(run), Part(particle, runs),
                )
            params = [*run.model_params.values(), *run.guide_params.values()]
            found = torch.autograd.grad(
                energy / (run.num_data * runs),
                [*run.weights.values(), *params], allow_unused=True,
            )
            slopes = zip(run.weights.items(), found, strict=False)
            weights = {n: torch.zeros_like(w) if g is None else g for (n, w), g in slopes}
            packed = [block.pack(weights) for block in blocks]
            gradients = _add(gradients, packed)
            if noise is not None:
                estimates = [
                    _sum(sum_, precision.diag() * one.epsilon * g)
                    if engine.is_sensed(self.curvature, block) else None
                    for block, sum_, precision, one, g
                    in zip(blocks, estimates, held, noise, packed, strict=True)
                ]
            rest = [*map(_sum, rest or [None] * len(params), found[len(weights):])]
            divergence = engine.divergence(blocks, sample, noise, held, priors)
            loss = loss + energy.detach() + heat * divergence
        if not due and self.curvature.fades(state.step):
            carried = engine.faded(
                self.curvature, state.step, carried, run.batch / run.num_data, priors,
                self._numbers(run),
            )
        carried = engine.sense(
            self.curvature, state.step, carried, estimates, run.batch / run.num_data, priors,
            self._numbers(run),
        )
        carried = [replace(one, noise=n) for one, n in zip(carried, noises, strict=True)]
        loss, seen = loss / runs, replace(state, blocks=tuple(carried))
        return _Found(
            loss, gradients, rest, run.model_params, run.guide_params, run.own_params.keys(),
            self._numbers(run), priors, seen,
        )

    # ---- its parts ------------------------------------------------------------------------------

    def _check_samples(self) -> None:
        blocks = [family.block for family in self.guide.blocks]
        blind = [block.name for block in blocks if engine.is_sensed(self.curvature, block)]
        if blind and not self.num_particles:
            raise ValueError(
                f"num_particles=0, but the curvature of {', '.join(blind)} is known from samples "
                'alone: leave them out (structure={...: "point"}) or take another curvature'
            )

    def _heat(self, run: Run) -> float:
        """T, by the rule of "auto" if so asked."""
        if isinstance(self.temperature, float | int):
            return self.temperature
        weights = sum(family.block.size for family in self.guide.blocks)
        return min(0.1, run.num_data / weights) if run.has_finite_support else 0.3

    def _numbers(self, run: Run) -> list[Numbers]:
        group = self.optimizer.param_groups[0]
        numbers = Numbers.of(group, run.num_data, self._heat(run))
        return [numbers] * len(self.guide.blocks)

    def _read_priors(self, run: Run) -> list[BlockPrior]:
        """The priors as the model gives them in this run; what cannot have changed is kept.

        So are those of weights that the run has no part for.
        """
        blocks = [family.block for family in self.guide.blocks]
        kept: Sequence[BlockPrior | None] = self._priors or [None] * len(blocks)
        now, known = run.sources, self._known_sources()
        sources = [{n: now.get(n, known[n]) for n in block.tensors} for block in blocks]
        priors = [
            old if old and old.still_holds(its) else BlockPrior.read(block, its)
            for block, its, old in zip(blocks, sources, kept, strict=True)
        ]
        if any(new is not old for new, old in zip(priors, kept, strict=True)):
            self._priors = priors
            self.guide.observe_priors([prior.packed.base for prior in priors])
        return priors

    def _known_sources(self) -> dict[str, Source]:
        """The priors as they were in the run before, or at the guide's first call."""
        if self._priors:
            return {n: source for prior in self._priors for n, source in prior.sources.items()}
        nodes = self.guide.prototype_trace.nodes
        return {n: Source(nodes[n]["fn"], float(nodes[n]["scale"])) for n in self.guide.sites}

    # ---- watching and saving --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Loss:
        """-ELBO on these data, N nll + T (log q - log p) at `num_particles` samples of the guide.

        A difference of log densities at the same weights, hence without noise where q is the
        posterior. The number that it returns has the T that it was reckoned with, also of "auto",
        as `.temperature`; at 1 it is -ELBO. Draws from torch's global generator, changes nothing.
        """
        if self.guide.prototype_trace is None:
            poutine.block(self.guide)(*args, **kwargs)
        families = self.guide.blocks
        blocks = [family.block for family in families]
        locs = [family.raw_loc.detach() for family in families]
        is_whole = isinstance(self._state or self._first(), Whole)
        samples = self._whole_numbers().samples if is_whole else self.num_particles
        used: list[Noise | None] = [None] * len(locs)
        losses = []
        with full_precision(locs[0].device) as network:
            precisions = [family.precision() for family in families]
            for _ in range(max(1, samples)):
                noise = None
                if samples:
                    noise, used = engine.draw(precisions, used, locs[0], self.antithetic)
                sample = engine.around(blocks, locs, noise)
                asked = torch.set_grad_enabled(self.temperature == "auto")
                with network(), frozen_buffers(self.model), asked:
                    run = run_model(self.model, self.guide, leaves(sample), args, kwargs)
                    heat = self._heat(run)  # by a rule that asks the graph what the data are
                if is_whole:
                    square = noise[0].square if noise else locs[0].new_zeros(())
                    losses.append(run.joint(heat) + heat * whole.log_q(precisions[0], square))
                    continue
                priors = self._read_priors(run)
                divergence = engine.divergence(blocks, sample, noise, precisions, priors)
                losses.append(run.energy(heat) + heat * divergence)
        return Loss.at(float(torch.stack(losses).mean()), heat)

    def update_counts(self) -> dict[str, Updates]:
        """How often each block's curvature was estimated, and its present interval in steps.

        A block goes by its layer's module, "net.0", or its weight where that is no module's; one of
        several layers by the first and the last, "net.0 ... net.4". Weights that no supported op
        consumes have an estimate from every step. Empty before the first step.
        """
        if not isinstance(self._state, State):
            return {}
        step, counts = self._state.step, {}
        for family, one in zip(self.guide.blocks, self._state.blocks, strict=True):
            block, updates = family.block, 0 if one.running is None else one.running.count
            interval = self.curvature.interval(step, one.clock)
            if engine.is_sensed(self.curvature, block):
                interval = 1
            counts[block.name] = Updates(updates, interval)
        return counts

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters of guide and model, which have states of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "rest": self._rest.state_dict(),
            "stream": self._stream.state_dict(),
            "skipped": self.skipped,
            "average": self.average,
            "layout": self._loaded or self._layout(),
            "state": None if self._state is None else self._state.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, given guide and model as they were then.

        Raises ValueError when the state is of a guide with other blocks or structures, here or, if
        the guide has not seen its model yet, at the first step; and when `average` is another.
        """
        held: State | Whole | None = None
        if state["state"] is not None:
            kind = State if "blocks" in state["state"] else Whole
            held = kind.from_state(state["state"])
        if held is not None:
            check_average(state["average"], self.average)
            if self.guide.blocks:
                check_layout(state["layout"], self._layout())
        self.optimizer.load_state_dict(state["optimizer"])
        self._rest.load_state_dict(state["rest"])
        self._stream.load_state_dict(state["stream"])
        self.skipped, self._state = state["skipped"], held
        self._loaded = None if held is None else state["layout"]

    def _layout(self) -> Layout:
        return layout([family.block for family in self.guide.blocks])


def _add(base: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """The sums, block by block; an empty base is zero."""
    return [a + b for a, b in zip(base, more, strict=True)] if base else [*more]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
