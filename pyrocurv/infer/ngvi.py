"""Natural-gradient variational inference for a Pyro model and a structured guide.

A step draws weights from the guide, runs the model once, takes one backward pass for the gradient
and, every so often, one more onto the layers' outputs for the curvature; then it moves mean and
precision as `pyrocurv.natural` has it. All is computed before anything is changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.guides.mixture import TRAINED
from pyrocurv.handlers.modules import modules
from pyrocurv.infer import joint_step as whole
from pyrocurv.infer import layerwise_step as layered
from pyrocurv.infer.defaults import Loss, NaturalGradient, chosen
from pyrocurv.infer.elbo import negative_elbo
from pyrocurv.infer.heat import TemperatureRule
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.model_run import BatchModel
from pyrocurv.infer.rest import AuxiliaryOptimizer
from pyrocurv.infer.resume_checks import (
    DatasetSizeCheck,
    Layout,
    Place,
    check_average,
    check_layout,
    check_place,
    layout,
    place,
)
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import AUTO
from pyrocurv.posterior.joint_update import Whole
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.summary import UpdateCount, update_counts
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.module_state import save_buffers
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.validation import check_integer, check_positive
from pyrocurv.structures.serialization import FORMAT_VERSION, check_version, from_state, to_state


class NGVI:
    """Natural-gradient variational inference.

    Args:
        model: a Pyro model. The number of data N is the full size of the plate around its observed
            site; a `poutine.scale` on top of it tempers the likelihood.
        guide: one of `pyrocurv.guides`, made for the model.
        lr: of the mean. 0.02 suits batches of 128 and a thousand steps or more; smaller batches
            want a smaller one, shorter runs a larger one.
        momentum: β of the gradient's running average.
        curvature: a kind or a `Curvature`.
        temperature: T multiplies the KL term alone. 1 is the ELBO, which under-fits networks
            that have few data, and may leave one with many weights for each datum at chance. "auto"
            is a rule of thumb, chosen after a handful of measured cases: min(0.1, N/P) for
            likelihoods of finite support, with P the number of weights here, and 0.3 for others.
        damping: added to the curvature in the mean's step, never to the posterior.
        kl_clip: trust region κ of a step; None for no clipping. The momentum keeps of a gradient no
            more than ten times its radius, so that an outlier does not rule the steps to come.
        num_particles: samples S of the posterior a step, in antithetic pairs; gradients and
            curvature are means over them. 0: none, all is taken at the mean, which so goes to a
            mode of the log joint (at T = 1); the posterior there is a Laplace approximation, for
            `Laplace(model, guide).predict(x)`, not for sampling.
        antithetic: use each noise a second time with its sign turned, also from step to step.
        average: keep a running average of mean and precision, of weight 4/(t+4), and let the guide
            be that average; training goes on from the iterate.
        optim: trains all that is no natural-gradient latent, the model's parameters and the
            fallback guide: a callable from parameters to a `torch.optim.Optimizer`, or a
            `PyroOptim`. By default Adam with β₂ = 0.99, 0.002 for the model, 0.01 for the guide.
            The learning rates of a torch optimizer follow the schedule on `.optimizer` in
            proportion.
        on_nonfinite: when a loss or a gradient is not finite, "raise" a FloatingPointError, or
            "skip" the step and count it in `.skipped`; posterior, momentum and random numbers stay
            as they were either way.

    "auto" is, for networks (of convolutions, and MLPs): lr 0.02, momentum 0.9, damping 0.003,
    kl_clip 0.001, one sample, no average; the first step is taken at the mean. For a `FullGuide`
    with curvature="hessian", and for a `DiagonalGuide` of a model without a network, Gaussian and
    Hessian are of the whole log joint in unconstrained space, in steps of their own: lr 0.3, the
    precision moves by 0.3 of the way, kl_clip 1, 8 samples, averaged; 0.1 and 32 samples where a
    latent has bounds, as scales have. `Curvature("hessian", decay=...)` sets that rate, 1 - decay
    (0.95, its default, is as good as not given); momentum and damping play no part there. Other
    numbers of a `Curvature`, `every` or `batch` say, are of running estimates: given for a network
    they ask for the steps above, without a network they play no part. Random numbers come from a
    stream of its own, seeded from torch's generator when it is made.

    `.optimizer` is a `torch.optim.Optimizer` for schedulers, whose step each `step` is. Where
    samples are so unlike the mean that training goes nowhere (learned log scales, priors much wider
    than 1/fan_in), several of them (`num_particles=4`) or a lower temperature help.

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
        self._wants_whole = whole.uses_joint_update(
            self.curvature, model
        ) and guide.may_be_whole_of(model)
        numbers = chosen({
            "lr": lr, "momentum": momentum, "damping": damping, "kl_clip": kl_clip,
            "num_particles": num_particles, "average": average,
        }, self._wants_whole)
        self.num_particles: Any = numbers.pop("num_particles")
        if self.num_particles != AUTO:
            check_integer("num_particles", self.num_particles, 0)
        self.average: bool = numbers.pop("average")
        self.temperature, self.antithetic = temperature, antithetic
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        self.optimizer = NaturalGradient(**numbers)
        if self._wants_whole:
            guide.is_whole = guide.is_whole or not guide.sites
        self._rest = AuxiliaryOptimizer(optim)
        self._stream = RandomStream()
        self._state: Posterior | Whole | None = None
        self._at_once = True  # whether samples of a whole model may go together
        self._known = KnownPriors(guide)
        self._loaded: Layout | None = None  # of a state that no step has gone on from yet,
        self._loaded_place: Place | None = None  # and where its guide was
        self._sizes = DatasetSizeCheck()

    # ---- a step ---------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step on a mini-batch; takes the model's arguments.

        Returns the loss before the step: -ELBO at full-data scale, N E[nll] + T KL, at the weights
        sampled (what `SVI.step` returns), or N nll + T KL at the mean. NaN for a step that was
        skipped.
        """
        first = self._state is None
        if self.guide.prototype_trace is None:
            with RandomStream(self._stream.seed)(torch.device("cpu")):  # no part of the run
                poutine.block(self.guide)(*args, **kwargs)
        if not self.guide.blocks:
            raise ValueError(f"{self.guide.no_gaussian_reason}: use pyro.infer.SVI")
        state = self._state or self._first()
        if isinstance(state, Posterior):
            layered.check_samples(self.curvature, self._blocks, self.num_particles)
        if self._loaded is not None:
            check_layout(self._loaded, layout(self._blocks))
            check_place(self._loaded_place, place(self.guide.blocks))
            self._loaded = None
        like = self.guide.blocks[0].raw_loc
        state, restore = state.to(like), save_buffers(modules(self.model))
        try:
            validation = nullcontext() if first else pyro.validation_enabled(False)
            with (self._stream(like.device), validation, torch.enable_grad(),
                  disable_autocast(like.device) as network):
                runner = BatchModel(self.model, self.guide, network, args, kwargs)
                step = self._propose(state, runner, restore)
                if isinstance(step, layered.Step):
                    self._sizes.note(step.num_data)
                self.optimizer.step(self._commit(step))
                self.guide.is_laplace = self.num_particles == 0
        except BaseException as error:
            restore()
            if not isinstance(error, FloatingPointError) or self.on_nonfinite == "raise":
                raise
            self.skipped += 1
            return math.nan
        self._state = step.state
        return step.loss

    def _first(self) -> Posterior | Whole:
        """The state before the first step."""
        guide = self.guide
        if guide.is_whole and self.curvature.kind != "hessian":
            raise ValueError(
                f"curvature={self.curvature.kind!r} is of layers, this guide has all latents "
                "together, as of a model without a network: use 'hessian', or a Gaussian for the "
                f"layers alone, structure={{'*': {guide.structure!r}}}"
            )
        if (self._wants_whole or guide.is_whole) and guide.is_one_block:
            (family,) = guide.blocks
            return whole.start(
                family.raw_loc.detach().clone(), family.precision(), guide.has_initial_scale,
                family.block.kind,
            )
        return Posterior(0, tuple(BlockState() for _ in guide.blocks))

    def _propose(
        self, state: Posterior | Whole, runner: BatchModel, restore: Callable[[], None]
    ) -> layered.Step | whole.Step:
        if isinstance(state, Posterior):
            return layered.propose(state, self._settings(), runner, self._known)
        numbers = self._whole_numbers()
        at_once = self._at_once and self._state is not None  # the first step validates
        try:
            return whole.propose(state, numbers, runner, at_once)
        except (RuntimeError, ValueError):
            if not at_once:
                raise
            self._at_once = False  # not every model has a vectorized form; a true fault comes again
            restore()
            return whole.propose(state, numbers, runner, False)

    def _settings(self) -> layered.Settings:
        return layered.Settings(
            self.curvature, self.optimizer.param_groups[0], TemperatureRule(
                self.temperature, self._blocks
            ),
            self.num_particles, self.antithetic, self.average,
        )

    def _whole_numbers(self) -> whole.Numbers:
        return whole.Numbers.of(
            self.optimizer.param_groups[0], self.curvature.decay, self.num_particles,
            TemperatureRule(self.temperature, self._blocks), self.antithetic, self.average,
            self.guide.has_constrained,
        )

    def _commit(self, step: layered.Step | whole.Step) -> Callable[[], None]:
        """What writes a step into parameters; all that may fail is done before."""
        group, write = self.optimizer.param_groups[0], step.writer(self.guide.blocks)
        factor = group["lr"] / group.get("initial_lr", group["lr"])

        @torch.no_grad()
        def commit() -> None:
            self._rest.step(step.others, factor)
            write()

        return commit

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
        is_whole = isinstance(self._state or self._first(), Whole)
        numbers = self._whole_numbers() if is_whole else self._settings()
        with disable_autocast(self.guide.blocks[0].raw_loc.device) as network:
            runner = BatchModel(self.model, self.guide, network, args, kwargs)
            return negative_elbo(runner, numbers, self._known)

    def update_counts(self) -> dict[str, UpdateCount]:
        """How often each block's curvature was estimated, and its present interval in steps.

        A block goes by its layer's module, "net.0", or its weight where that is no module's; one of
        several layers by the first and the last, "net.0 ... net.4". Weights that no supported op
        consumes have an estimate from every step. Empty before the first step.
        """
        if not isinstance(self._state, Posterior):
            return {}
        return update_counts(self.curvature, self._blocks, self._state)

    def state_dict(self) -> dict[str, Any]:
        """All but the parameters of guide and model, which have states of their own."""
        return {
            "version": FORMAT_VERSION,
            "optimizer": self.optimizer.state_dict(),
            "rest": self._rest.state_dict(),
            "stream": self._stream.state_dict(),
            "skipped": self.skipped,
            "average": self.average,
            "temperature": self.temperature,
            "layout": self._loaded or layout(self._blocks),
            "place": self._loaded_place if self._loaded else place(self.guide.blocks),
            "state": to_state(self._state),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, given guide and model as they were then.

        Learning rate, momentum, damping, clip and temperature are those of the state.

        Raises ValueError when the state is none of an `NGVI`, or `average` is another, or the guide
        has other blocks or structures; that is seen at the first step if it has no blocks yet.
        """
        if missing := {"optimizer", "layout", "state"} - state.keys():
            raise ValueError(
                f"the state is of no NGVI: it lacks {', '.join(sorted(missing))}, and has "
                f"{', '.join(list(state)[:5])}"
            )
        check_version(state, "NGVI")
        held: Posterior | Whole | None = None
        if state["state"] is not None:
            held = from_state(state["state"])
        if held is not None:
            check_average(state["average"], self.average)
            if self.guide.blocks:
                check_layout(state["layout"], layout(self._blocks))
        self.optimizer.load_state_dict(state["optimizer"])
        self._rest.load_state_dict(state["rest"])
        self._stream.load_state_dict(state["stream"])
        self.skipped, self._state = state["skipped"], held
        self.temperature = state["temperature"]
        self._loaded = None if held is None else state["layout"]
        self._loaded_place = state["place"]

    @property
    def _blocks(self) -> list[Block]:
        return [family.block for family in self.guide.blocks]
