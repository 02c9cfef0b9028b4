"""Natural-gradient variational inference for any PyTorch training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.likelihood import Likelihood
from pyrocurv.curvature.running_average import Particle
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice
from pyrocurv.optim import sampling
from pyrocurv.optim.curvature_optimizer import CurvatureOptimizer
from pyrocurv.optim.default_prior import Priors
from pyrocurv.optim.forward_recorder import ForwardPass, num_examples
from pyrocurv.optim.parameter_blocks import (
    Group,
    NamedParameters,
    ParameterBlocks,
    Params,
    first_parameter,
    read_block,
    untraced_layers,
    write_blocks,
)
from pyrocurv.optim.sampling import Samples
from pyrocurv.posterior.hyperparameters import Hyperparameters, automatic_temperature
from pyrocurv.posterior.prior import BlockPrior, kl
from pyrocurv.posterior.sampling import Perturbation, sample_perturbations
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import init_curvature, refresh_precision, update_from_sample_gradients


class VIOptimizer(CurvatureOptimizer):
    """A Gaussian posterior over a network's weights, N(M, Λ⁻¹), trained by natural gradients.

    Between steps the network's parameters are the mean M. The loss, N times its mean over the
    batch, is that of a sample:

        with optimizer.sampled_params():
            loss = F.cross_entropy(net(x), y)
            loss.backward()
        optimizer.step()

    Several such blocks before a step are several samples, of which the first gives the curvature;
    of the samples of `step(closure)` it is the mean. Their mean is taken here: do not divide the
    losses of several blocks by their number. Inside of one block, parts of a batch accumulate as
    anywhere else, each loss divided by how many there are. The equations are those of
    `pyrocurv.infer.NGVI`, which needs a Pyro model and gives the same steps on it.

    Args:
        net, params, likelihood, curvature, structure, momentum, damping, kl_clip, fallback_lr: as
            for `SecondOrderOptimizer`; "point" leaves a layer without a posterior.
        num_data: N, how many numbers the loss would be the mean of on all data: examples, or
            tokens, or examples times outputs.
        lr: learning rate of the mean.
        prior_precision: of independent normal priors: a number, or "fan_in" (fan_in + 1 for each
            layer, as `pyrocurv.nn.bayesianize` has it). Means are 0, those of norm scales 1.
        temperature: T multiplies the KL term; 1 is the ELBO. "auto": min(0.1, N/P) for likelihoods
            of finite support, 0.3 for others, a rule of thumb. A group may have its own.
        kl_warmup: steps over which T rises linearly to its value.
        augmentation: N counts so many times, for data that random transformations multiply.
        num_samples: how often `step(closure)` calls the closure, and what `predict` draws.
        antithetic: use each noise a second time with its sign turned.

    How wide the posterior is at the start is `Curvature(initial=...)`. What no supported op
    consumes gets independent Gaussians, from gradients. `summary()` and `update_counts()` are those
    of `SecondOrderOptimizer`.

    Raises:
        ValueError, FloatingPointError: as `SecondOrderOptimizer`.
        RuntimeError: a step without a sample; one `sampled_params()` inside another.

    Reference: Zhang et al. 2018, arXiv:1712.02390; Khan & Rue 2023, arXiv:2107.04562.

    Example:
        >>> import torch
        >>> from pyrocurv.optim import VIOptimizer
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = VIOptimizer(net, num_data=16)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     with optimizer.sampled_params():
        ...         torch.nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.predict(x, num_samples=8).softmax(-1).mean(0).shape
        torch.Size([16, 3])
    """

    opaque_blocks = True
    without = "independent Gaussians, from gradients"

    def __init__(
        self,
        net: nn.Module,
        num_data: int,
        lr: float = 0.02,
        *,
        params: Params | None = None,
        likelihood: Likelihood = "categorical",
        curvature: str | Curvature = "fisher",
        structure: StructureChoice = "kfac",
        prior_precision: float | str = "fan_in",
        temperature: float | str = 1.0,
        kl_warmup: int = 0,
        augmentation: float = 1.0,
        momentum: float = 0.9,
        damping: float = 3e-3,
        kl_clip: float | None = 1e-3,
        num_samples: int = 1,
        antithetic: bool = True,
        fallback_lr: float = 2e-3,
    ) -> None:
        for name, value, least in (
            ("num_data", num_data, 1), ("num_samples", num_samples, 1), ("kl_warmup", kl_warmup, 0)
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number from {least} is needed")
        if not augmentation > 0:
            raise ValueError(f"augmentation={augmentation!r}: a positive number is needed")
        self.num_data, self.num_samples, self.antithetic = num_data, num_samples, antithetic
        self.augmentation, self.kl_warmup = augmentation, kl_warmup
        super().__init__(net, params, likelihood, curvature, structure, fallback_lr, {
            "lr": lr, "momentum": momentum, "damping": damping, "kl_clip": kl_clip,
            "prior_precision": prior_precision, "temperature": temperature,
        })
        self._normals = Priors()
        self._samples: Samples | None = None
        self._num_parts = 1  # how many samples of a step give its curvature
        self._is_sampling = self._is_closure = False
        self._before: dict[str, Tensor] = {}  # gradients that were there before a sample
        self._means: tuple[Sequence[Block], Sequence[Tensor]] = ((), ())  # while they are away
        if self.curvature.uses_sample_gradients:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Lay out and draw from the first step on: no forward pass has to be seen for that."""
        places = self._places()
        names = [name for name, (p, _) in places.items() if p.requires_grad]
        layout = self._extended(untraced_layers(names, places), places)
        kinds = set(layout.layers.values()).difference(LEFT_OUT)
        if strange := {spec.label for spec in kinds} - {"diag"}:
            raise ValueError(f"curvature='noise' wants structure='diag', got {', '.join(strange)}")
        priors, numbers = self._priors(layout, places), self._numbers(layout, places)
        carried = [
            init_curvature(self.curvature, block, BlockState(), prior)
            for block, prior in zip(layout.blocks, priors, strict=True)
        ]
        self.layout = layout
        carried = refresh_precision(self.curvature, 0, carried, 0.0, priors, numbers)
        self._state = Posterior(0, tuple(carried))
        self._schedule_recording()

    def _check(self, group: Group) -> None:
        super()._check(group)
        numbers = {**self.defaults, **group}
        for name, word in (("prior_precision", "fan_in"), ("temperature", "auto")):
            value = numbers[name]
            if value != word and (isinstance(value, str) or not value > 0):
                raise ValueError(f"{name}={value!r}: a positive number or {word!r} is needed")

    # ---- samples --------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch has it; samples whose gradients are cleared have no part in the next step."""
        super().zero_grad(set_to_none)
        self._before = {}
        if not self._is_closure:  # which may clear them for each of its samples
            self._samples = None

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """The parameters are a sample inside, and the mean again afterwards, whatever is raised.

        A forward and a backward pass inside make it one of the samples of the next step.
        """
        if self._is_sampling:
            raise RuntimeError("sampled_params() inside another one")
        places, stream = self._places(), self._stream.state_dict()
        noise, mirror = self._drawn(places)
        self._watch.pop_passes()
        self._is_sampling = True
        try:
            with sampling.at_sample(self.layout.blocks, noise, places) as self._means:
                self._before = sampling.gradients(self.curvature, self.layout.blocks, places)
                yield
                if passes := self._watch.pop_passes():
                    self._samples = self._with(passes, noise, mirror, places)
        except BaseException:
            self._stream.load_state_dict(stream)
            raise
        finally:
            self._is_sampling, self._means, self._before = False, ((), ()), {}

    def _drawn(self, places: NamedParameters) -> tuple[
        list[Perturbation] | None, list[Perturbation | None]
    ]:
        """A sample's noise, and what the next one mirrors; of the posterior at the last step."""
        if not self.layout.blocks:
            return None, []
        precisions = [one.metric.precision if one.metric else None for one in self._state.blocks]
        used = sampling.mirrored(self._samples, self._state.blocks)
        like, _ = first_parameter(self.layout.blocks[0], places)
        with self._stream(like.device), torch.no_grad():
            return sample_perturbations(precisions, used, like, self.antithetic)

    @torch.no_grad()
    def _with(
        self, passes: Sequence[ForwardPass], noise: Sequence[Perturbation] | None,
        mirror: Sequence[Perturbation | None], places: NamedParameters,
    ) -> Samples:
        """One more sample, after its backward pass and with the parameters still at it."""
        old, blocks = self._samples, self.layout.blocks
        if old is None:
            rows = num_examples(passes)
            if rows > self._size:
                raise ValueError(f"num_data={self.num_data}, but there are {rows} in one batch")
            carried = self._decayed(self.layout, places, rows / self._size)
            old = Samples(0, rows, self.layout, tuple(carried), (None,) * len(blocks))
        if old.count < self._num_parts and self._is_due() and any(one.inputs for one in passes):
            layout, carried = self._update_curvature(
                old.carried, passes, places, old.rows / self._size, Particle(
                    old.count, self._num_parts
                )
            )
            old = replace(old, layout=layout, carried=tuple(carried))
        return old.add(mirror, sampling.price_estimates(
            self.curvature, blocks, self._state.blocks, noise, self._before, places
        ), sampling.size(self.curvature, blocks, places))

    # ---- the step -------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the samples since the last; returns the mean of the closure's losses.

        A closure is called `num_samples` times at samples of its own, and may clear gradients.
        """
        if self._is_sampling:
            raise RuntimeError("step() inside sampled_params(): leave it first")
        loss = None if closure is None else self._sampled(closure)
        samples, self._samples = self._samples, None
        if samples is None:
            raise RuntimeError(
                "step() without a sample: run forward and backward inside `with "
                "optimizer.sampled_params():`, calling the network itself"
            )
        places, layout = self._places(), samples.layout
        with torch.no_grad():
            sampling.check_grad_scale(
                samples.size, sampling.size(self.curvature, layout.blocks, places)
            )
            carried = update_from_sample_gradients(
                self.curvature, self._state.step, samples.carried, samples.means,
                samples.rows / self._size, self._priors(layout, places),
                self._numbers(layout, places),
            )
        self._move(layout, carried, places, samples.count)
        return loss

    def _sampled(self, closure: Callable[[], Any]) -> Any:
        def run() -> Any:
            with self.sampled_params(), torch.enable_grad():
                return closure()

        self._samples, self._num_parts, self._is_closure = None, self.num_samples, True
        try:
            return sampling.sum_gradients(run, self.num_samples, self.zero_grad, self._places())
        finally:
            self._num_parts, self._is_closure = 1, False

    @property
    def _size(self) -> float:
        """N, augmentation counted."""
        return self.num_data * self.augmentation

    def _numbers(self, layout: ParameterBlocks, places: NamedParameters) -> list[Hyperparameters]:
        groups = [first_parameter(block, places)[1] for block in layout.blocks]
        size = sum(block.size for block in layout.blocks)
        rise = min(1.0, (self._state.step + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        rule = automatic_temperature(self._size, size, self.has_finite_support)
        heats = [rule if g["temperature"] == "auto" else g["temperature"] for g in groups]
        return [
            Hyperparameters.of(group, self._size, heat * rise)
            for group, heat in zip(groups, heats, strict=True)
        ]

    def _priors(self, layout: ParameterBlocks, places: NamedParameters) -> list[BlockPrior]:
        net = self._watch.inner
        return [self._normals.of(block, net, places) for block in layout.blocks]

    # ---- using it -------------------------------------------------------------------------------

    @contextmanager
    def use_mean(self) -> Iterator[None]:
        """The parameters are the mean inside, also within `sampled_params()`."""
        places, (blocks, means) = self._places(), self._means
        with sampling.restoring(blocks, places):
            write_blocks(blocks, means, places)
            torch.clear_autocast_cache()
            yield

    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(q ‖ prior) in nats, of all weights that have a posterior; 0 before the first step."""
        places, blocks = self._places(), self.layout.blocks
        parts = zip(blocks, self._state.blocks, self._priors(self.layout, places), strict=True)
        terms = [
            kl(read_block(block, places), one.known.precision, prior.packed)
            for block, one, prior in parts
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def predict(self, *args: Any, num_samples: int | None = None, **kwargs: Any) -> Tensor:
        """Outputs of the network at samples of the posterior, [num_samples, ...].

        Takes the network's arguments; draws from torch's global generator. Use `net.eval()` where
        the network tells training from use. Before the first step it is the network itself.
        """
        places, outputs = self._places(), []
        precisions = [one.known.precision for one in self._state.blocks]
        used: list[Perturbation | None] = [None] * len(precisions)
        with self.use_mean():
            for _ in range(num_samples or self.num_samples):
                noise = None
                if precisions:
                    like = next(iter(places.values()))[0]
                    noise, used = sample_perturbations(precisions, used, like, self.antithetic)
                with sampling.at_sample(self.layout.blocks, noise, places):
                    outputs.append(self.net(*args, **kwargs))
        return torch.stack(outputs)

    # ---- saving ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._samples = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("num_data", "num_samples", "antithetic", "augmentation", "kl_warmup")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._normals, self._samples, self._num_parts = Priors(), None, 1
        self._is_sampling = self._is_closure = False
        self._before, self._means = {}, ((), ())
