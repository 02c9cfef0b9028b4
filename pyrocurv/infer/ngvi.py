"""Natural-gradient variational inference for a Pyro model and a structured guide.

A step draws weights from the guide, runs the model once, takes one backward pass for the gradient
and, every so often, one more onto the layers' outputs for the curvature; then it moves mean and
precision as `pyrocurv.natural` has it. All is computed before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor

from pyrocurv.curvature import Curvature, estimator
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.rest import Rest
from pyrocurv.infer.run import Run, run_model
from pyrocurv.infer.state import Block, Noise, State
from pyrocurv.infer.stream import Stream
from pyrocurv.natural import metric, push, slope, surplus, trust
from pyrocurv.priors import BlockPrior
from pyrocurv.prototype import frozen_buffers, modules, snapshot
from pyrocurv.structures import Structure


class NaturalGradient(torch.optim.Optimizer):
    """Holds the numbers that a scheduler may turn; the step is `NGVI`'s to make."""

    def __init__(self, **numbers: Any) -> None:
        super().__init__([torch.zeros(())], numbers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Carry out the step that `NGVI` has prepared."""
        if closure is None:
            raise RuntimeError("call ngvi.step(...): this optimizer is there for schedulers")
        return closure()


@dataclass(frozen=True, eq=False)
class _Found:
    """What the backward passes of a step gave."""

    loss: Tensor
    gradients: list[Tensor]  # of the energy per datum in the sampled weights, packed
    rest: list[Tensor | None]  # and in all other parameters
    run: Run
    priors: list[BlockPrior]
    blocks: list[Block]  # with the new curvature and the next noise


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
            networks that have few data; 0.1 suits classifiers of images.
        damping: added to the curvature in the mean's step, never to the posterior.
        kl_clip: trust region κ of a step; None for no clipping.
        num_particles: samples of the posterior a step, in antithetic pairs.
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

    The defaults are for networks of convolutions and for MLPs. The first step is taken at the mean.
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
        lr: float = 0.02,
        momentum: float = 0.9,
        curvature: str | Curvature = "fisher",
        temperature: float = 1.0,
        damping: float = 3e-3,
        kl_clip: float | None = 1e-3,
        num_particles: int = 1,
        antithetic: bool = True,
        average: bool = False,
        optim: Callable[..., torch.optim.Optimizer] | PyroOptim | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        if not isinstance(guide, StructuredGuide):
            raise TypeError(
                "guide: one of pyrocurv.guides is needed (KFACGuide, ...), got "
                f"{type(guide).__name__}"
            )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: choose 'raise' or 'skip'")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles={num_particles!r}: a whole number from 1 is needed")
        if not (_is_number(momentum) and 0 <= momentum < 1):
            raise ValueError(f"momentum={momentum!r}: a number in [0, 1) is needed")
        if not (_is_number(damping) and damping >= 0):
            raise ValueError(f"damping={damping!r}: a number from 0 is needed")
        for name, value in (("lr", lr), ("temperature", temperature), ("kl_clip", kl_clip)):
            optional = name == "kl_clip" and value is None
            if not optional and not (_is_number(value) and value > 0):  # type: ignore[operator]
                raise ValueError(f"{name}={value!r}: a positive number is needed")
        self.model, self.guide = model, guide
        self.curvature = as_curvature(curvature)
        self.temperature, self.num_particles = temperature, num_particles
        self.antithetic, self.average = antithetic, average
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        self.optimizer = NaturalGradient(
            lr=lr, momentum=momentum, damping=damping, kl_clip=kl_clip
        )
        self._rest = Rest(optim)
        self._stream = Stream()
        self._state: State | None = None
        self._priors: list[BlockPrior] = []

    # ---- a step ---------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step on a mini-batch; takes the model's arguments.

        Returns the loss before the step: -ELBO at full-data scale, N E[nll] + T KL, at the weights
        sampled (what `SVI.step` returns). NaN for a step that was skipped.
        """
        first = self._state is None
        with Stream(self._stream.seed)(torch.device("cpu")):  # a first call is no part of the run
            self._meet(*args, **kwargs)
        state = self._state or State(0, tuple(Block() for _ in self.guide.blocks))
        if not state.blocks:
            raise ValueError("no latent of this guide has a supported op: use pyro.infer.SVI")
        like = self.guide.blocks[0].raw_loc
        state, restore = state.to(like), snapshot(modules(self.model))
        try:
            validation = nullcontext() if first else pyro.validation_enabled(False)
            with self._stream(like.device), validation:
                loss, state, commit = self._propose(state, args, kwargs)
        except BaseException as error:
            restore()
            if not isinstance(error, FloatingPointError):
                raise
            if self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            return math.nan
        self.optimizer.step(commit)
        self._state = state
        return loss

    def _meet(self, *args: Any, **kwargs: Any) -> None:
        if self.guide.prototype_trace is None:
            poutine.block(self.guide)(*args, **kwargs)

    def _propose(
        self, state: State, args: Any, kwargs: Any
    ) -> tuple[float, State, Callable[[], None]]:
        """The loss, the next state, and what is then to be written into parameters."""
        group = self.optimizer.param_groups[0]
        locs = [
            family.raw_loc.detach() if block.iterate is None else block.iterate
            for family, block in zip(self.guide.blocks, state.blocks, strict=True)
        ]
        due = state.step % self.curvature.every == 0
        found = self._backward(state, locs, due, args, kwargs)
        ratio, beta = found.run.num_data / self.temperature, group["momentum"]
        blocks = [
            replace(block, momentum=push(block.momentum, gradient, beta))
            for block, gradient in zip(found.blocks, found.gradients, strict=True)
        ]
        slopes = [
            slope(block.momentum, state.step + 1, beta, loc - prior.packed.loc, prior.packed, ratio)  # type: ignore[arg-type]
            for block, loc, prior in zip(blocks, locs, found.priors, strict=True)
        ]
        directions = [
            block.metric.preconditioner.solve(h)  # type: ignore[union-attr]
            for block, h in zip(blocks, slopes, strict=True)
        ]
        inner = torch.stack([torch.dot(d, h) for d, h in zip(directions, slopes, strict=True)])
        loss, power = _finite([found.loss, inner.sum()], found.rest, state.step)

        base = group.get("initial_lr", group["lr"])
        rate = group["lr"] * trust(power, base, group["kl_clip"])
        if self.average:
            blocks = [
                self._averaged(block, loc - rate * d, state.step)
                for block, loc, d in zip(blocks, locs, directions, strict=True)
            ]
        encoded: list[Any] = [None] * len(blocks)
        if due or self.average:
            encoded = [
                family.encode(block.average or block.metric.precision)  # type: ignore[union-attr]
                for family, block in zip(self.guide.blocks, blocks, strict=True)
            ]

        @torch.no_grad()
        def commit() -> None:
            run = found.run
            self._rest.step(run.model_params, run.guide_params(), found.rest, group["lr"] / base)
            moves = zip(self.guide.blocks, blocks, directions, encoded, strict=True)
            for family, block, direction, precision in moves:
                if block.iterate is None:
                    loc = family.raw_loc.sub_(direction, alpha=rate)
                else:
                    loc = family.raw_loc.lerp(block.iterate, 4 / (state.step + 4))
                if block.iterate is not None or precision is not None:
                    family.write(loc, precision)

        return loss, State(state.step + 1, tuple(blocks)), commit

    def _backward(
        self, state: State, locs: Sequence[Tensor], due: bool, args: Any, kwargs: Any
    ) -> _Found:
        """Run the model at sampled weights, and take from the graph all that is wanted of it."""
        blocks, families = list(state.blocks), self.guide.blocks
        precisions = [block.metric.precision if block.metric else None for block in blocks]
        noises = [block.noise for block in blocks]
        loss = locs[0].new_zeros(())
        gradients: list[Tensor] = []
        rest: list[Tensor | None] = []
        for particle in range(self.num_particles):
            noise, noises = self._noise(precisions, noises)
            sample, watch = _add(locs, noise), due and particle == 0
            run = run_model(self.model, self.guide, sample, args, kwargs, watch)
            priors, energy = self._read_priors(run), run.energy(self.temperature)
            if watch:
                if not bool(torch.isfinite(energy)):
                    raise FloatingPointError(f"step {state.step}: the loss is {energy.item()}")
                blocks = self._estimate(state.step, blocks, run, priors)
            params = [*run.model_params, *run.guide_params()]
            found = torch.autograd.grad(
                energy / (run.num_data * self.num_particles),
                [*run.weights.values(), *params], allow_unused=True,
            )
            self._kept = found  # lest malloc give the heap's top back and fault it in every step
            leaves = zip(run.weights.items(), found, strict=False)
            weights = {n: torch.zeros_like(w) if g is None else g for (n, w), g in leaves}
            gradients = _add(gradients, [family.block.pack(weights) for family in families])
            rest = [*map(_sum, rest or [None] * len(params), found[len(weights):])]
            loss = loss + energy.detach() + self._kl(sample, noise, precisions, priors)
        blocks = [replace(block, noise=n) for block, n in zip(blocks, noises, strict=True)]
        return _Found(loss / self.num_particles, gradients, rest, run, priors, blocks)

    # ---- its parts ------------------------------------------------------------------------------

    def _noise(
        self, precisions: Sequence[Structure | None], used: Sequence[Noise | None]
    ) -> tuple[list[Noise] | None, list[Noise | None]]:
        """This sample's deviation from the mean (None: none yet), and what to mirror next."""
        if used[0] is not None:
            return [noise.mirrored() for noise in used], [None] * len(used)  # type: ignore[union-attr]
        if precisions[0] is None:
            return None, [None] * len(used)
        like = self.guide.blocks[0].raw_loc
        fresh = []
        for precision in precisions:
            z = torch.randn(precision.size, dtype=like.dtype, device=like.device)  # type: ignore[union-attr]
            fresh.append(Noise(precision.rsqrt(z), torch.dot(z, z)))  # type: ignore[union-attr]
        return fresh, [*fresh] if self.antithetic else [None] * len(used)

    def _read_priors(self, run: Run) -> list[BlockPrior]:
        """The priors as the model gives them in this run; what cannot have changed is kept."""
        fns = {name: site.fn for name, site in run.replay.latents.items()}
        blocks = [family.block for family in self.guide.blocks]
        kept: Sequence[BlockPrior | None] = self._priors or [None] * len(blocks)
        priors = [
            old if old and old.still_holds([fns[name] for name in block.tensors])
            else BlockPrior.read(block, fns)
            for block, old in zip(blocks, kept, strict=True)
        ]
        if any(new is not old for new, old in zip(priors, kept, strict=True)):
            self._priors = priors
            self.guide.observe_priors([prior.packed for prior in priors])
        return priors

    def _estimate(
        self, step: int, blocks: Sequence[Block], run: Run, priors: Sequence[BlockPrior]
    ) -> list[Block]:
        """The blocks with this run's curvature averaged in, and the metrics that follow from it."""
        spec, sites = self.curvature, run.data
        running = estimator.observe(
            spec, step, [family.block for family in self.guide.blocks],
            [block.running for block in blocks],
            [site.observation(run.num_data) for site in sites],
            run.capture.calls, sites[0].rows, [prior.units for prior in priors],  # type: ignore[union-attr]
        )
        faint = spec.initial * (1 - min(0.05, run.batch / run.num_data)) ** step
        damping, ratio = self.optimizer.param_groups[0]["damping"], run.num_data / self.temperature
        return [
            replace(block, running=new, metric=metric(new.curvature, faint, prior, ratio, damping))
            for block, new, prior in zip(blocks, running, priors, strict=True)
        ]

    @torch.no_grad()
    def _kl(
        self, sample: Sequence[Tensor], noise: Sequence[Noise] | None,
        precisions: Sequence[Structure | None], priors: Sequence[BlockPrior],
    ) -> Tensor:
        """T (log q - log p) of the sampled weights; T KL at the first step, which samples none."""
        total = sample[0].new_zeros(())
        for number, (weights, prior) in enumerate(zip(sample, priors, strict=True)):
            precision = precisions[number] or self.guide.blocks[number].precision()
            square = None if noise is None else noise[number].square
            total = total + surplus(weights, square, precision, prior.packed)
        return self.temperature * total

    def _averaged(self, block: Block, loc: Tensor, step: int) -> Block:
        precision = block.metric.precision  # type: ignore[union-attr]
        if block.average is not None:
            precision = block.average.lerp(precision, 4 / (step + 4))
        return replace(block, iterate=loc, average=precision)

    # ---- watching and saving --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """-ELBO on these data, N nll + T (log q - log p) at `num_particles` samples of the guide.

        A difference of log densities at the same weights, hence without noise where q is the
        posterior. Draws from torch's global generator and changes nothing.
        """
        self._meet(*args, **kwargs)
        locs = [family.raw_loc.detach() for family in self.guide.blocks]
        precisions = [family.precision() for family in self.guide.blocks]
        used: list[Noise | None] = [None] * len(locs)
        losses = []
        for _ in range(self.num_particles):
            noise, used = self._noise(precisions, used)
            with frozen_buffers(self.model):
                sample = _add(locs, noise)
                run = run_model(self.model, self.guide, sample, args, kwargs)
            priors = self._read_priors(run)
            energy = run.energy(self.temperature)
            losses.append(energy + self._kl(sample, noise, precisions, priors))
        return float(torch.stack(losses).mean())

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters of guide and model, which have states of their own."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "rest": self._rest.state_dict(),
            "stream": self._stream.state_dict(),
            "skipped": self.skipped,
            "state": None if self._state is None else self._state.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, given guide and model as they were then.

        Raises ValueError when the state is of a guide with other blocks.
        """
        held = None if state["state"] is None else State.from_state(state["state"])
        have = [family.block.size for family in self.guide.blocks]
        want = [] if held is None else [len(b.momentum) for b in held.blocks]  # type: ignore[arg-type]
        if have and want and have != want:
            raise ValueError(f"the state is of blocks of {want} weights, the guide has {have}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._rest.load_state_dict(state["rest"])
        self._stream.load_state_dict(state["stream"])
        self.skipped, self._state = state["skipped"], held


def _finite(
    numbers: Sequence[Tensor], gradients: Sequence[Tensor | None], step: int
) -> list[float]:
    """The numbers as floats: the one synchronisation of a step.

    Raises FloatingPointError when one of them or a gradient is not finite.
    """
    sums = [g.sum().to(numbers[0]) for g in gradients if g is not None]
    values = torch.stack([*numbers, *sums]).tolist()
    if not all(map(math.isfinite, values)):
        raise FloatingPointError(f"step {step}: the loss is {values[0]} or a gradient not finite")
    return values[: len(numbers)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _add(base: Sequence[Tensor], more: Sequence[Tensor] | Sequence[Noise] | None) -> list[Tensor]:
    """New tensors with the sums, block by block; an empty base or no more is zero."""
    if more is None:
        return [part.clone() for part in base]
    parts = [part.epsilon if isinstance(part, Noise) else part for part in more]
    return [a + b for a, b in zip(base, parts, strict=True)] if base else parts


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
