"""Evaluates a model at samples of a guide whose layers have separate Gaussians.

    N E[nll] + T KL(q ‖ prior)

The KL divergence is exact in the sampled weights; its gradient enters the step in closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.particle import Particle
from pyrocurv.infer.block_sharing import ReplicatedBlocks
from pyrocurv.infer.guide_store import GuideStore
from pyrocurv.infer.model_run import BatchModel, ModelRun, require_grad
from pyrocurv.infer.pooling import pool
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.hyperparameters import AUTO, Hyperparameters
from pyrocurv.posterior.mean_update import MeanUpdate
from pyrocurv.posterior.precision import (
    is_any_due,
    measure_determined,
    price_estimates,
    refresh,
    update_curvature,
    update_from_sample_gradients,
    uses_sample_gradients,
)
from pyrocurv.posterior.sampling import Sampler, estimate_kl, mirrors
from pyrocurv.posterior.state import Perturbation, Posterior
from pyrocurv.posterior.step import Evaluation, Update, step
from pyrocurv.posterior.temperature import TemperatureRule
from pyrocurv.runtime.validation import check_integer
from pyrocurv.runtime.workers import Workers


@dataclass(frozen=True)
class StepSettings:
    """Settings of one step; `group` is the parameter group that schedulers change.

    Raises ValueError for a number of samples that is none.
    """

    curvature: Curvature
    group: Mapping[str, Any]
    temperature: TemperatureRule
    num_particles: int
    antithetic: bool
    average: bool
    mean_update: MeanUpdate
    workers: Workers
    sample_parallel: bool

    def __post_init__(self) -> None:
        check_integer("num_particles", self.num_particles, 0, AUTO)

    def temperature_of(self, posterior: Posterior) -> float:
        """T of the posterior's next step."""
        return self.temperature(posterior.temperature, posterior.step)

    def draw(self, sampler: Sampler) -> list[Perturbation]:
        """The next perturbation: the same for all workers, or one for each."""
        return sampler.draw_of(self.workers) if self.sample_parallel else sampler.draw()

    def noise(self, posterior: Posterior, has_latents: bool) -> AbstractContextManager[None]:
        """For what a run of the model draws, of each worker its own unless they are latents."""
        device = posterior.blocks[0].mean.device
        workers = self.workers
        return workers.same_noise(device) if has_latents else workers.local_noise(device)


@dataclass(frozen=True, eq=False)
class Sample:
    """A run of the model at weights sampled from `posterior`, or at its mean."""

    posterior: Posterior  # with the priors and hyperparameters of the run
    perturbations: list[Perturbation] | None
    run: ModelRun
    temperature: float
    nll: Tensor  # N nll, and T times the divergence of latents that the fallback guide has

    @property
    def batch_fraction(self) -> float:
        """B/N."""
        return self.run.batch / self.run.num_data

    def loss(self, sharing: ReplicatedBlocks) -> Tensor:
        """N nll + T (log q - log p), in nats."""
        own = estimate_kl(self.posterior.blocks, self.run.weights, self.perturbations)
        divergence = sharing.total(own)
        with torch.no_grad():
            return torch.add(self.nll, divergence, alpha=self.temperature)


def _with_context(posterior: Posterior, sampled: Posterior) -> Posterior:
    """The posterior with the priors and hyperparameters of a sample."""
    pairs = zip(posterior.blocks, sampled.blocks, strict=True)
    return replace(posterior, blocks=tuple(
        replace(state, prior=other.prior, hyperparameters=other.hyperparameters)
        for state, other in pairs
    ))


def _observe(
    posterior: Posterior, sample: Sample, spec: Curvature, particle: Particle, workers: Workers,
    sharing: ReplicatedBlocks,
) -> Posterior:
    """The posterior with the curvature of a run, whose ops were captured, averaged in."""
    nll, batch = workers.sums([sample.nll.detach(), sample.nll.new_tensor(sample.batch_fraction)])
    if not bool(torch.isfinite(nll)):
        raise FloatingPointError(f"step {posterior.step}: the loss is {nll.item()}")
    run = sample.run
    run.check_per_example_density(spec.kind)
    rows = run.primary_likelihood.rows
    forward = ForwardPass(run.likelihood_terms, run.calls, rows, workers)
    fraction = sample.batch_fraction if workers.is_alone else float(batch)
    with sharing.owners.together(nll):
        return update_curvature(spec, posterior, forward, fraction, particle, sharing.average)


class SampleSums:
    """Sums the losses and gradients of `count` samples; each sample's graph is used up."""

    def __init__(self, spec: Curvature, count: int, sharing: ReplicatedBlocks) -> None:
        self._spec, self._count, self._sharing = spec, count, sharing
        self.losses: list[Tensor] = []  # at full-data scale
        self.nlls: list[Tensor] = []
        self.num_data = 0.0
        self.weights: dict[str, Tensor] = {}  # means per datum
        self.price: dict[str, Tensor] = {}  # means of Λ ε ∘ g, by block
        self.auxiliary: list[AuxiliaryParameter] = []
        self.batch_fraction = 0.0

    def add(self, sample: Sample) -> None:
        """Take the gradients of one more sample."""
        run = sample.run
        computed = torch.autograd.grad(
            sample.nll, [*run.weights.values(), *run.params],
            sample.nll.new_full((), 1 / (run.num_data * self._count)), allow_unused=True,
        )
        weights = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(run.weights.items(), computed, strict=False)
        }
        of_auxiliary = computed[len(weights):]
        weights = self._sharing.gradients(weights, sample.batch_fraction)
        if sample.perturbations is not None:
            self._add_price(sample, weights)
        for name, gradient in weights.items():
            old = self.weights.get(name)
            self.weights[name] = gradient if old is None else old + gradient
        before = {parameter.name: parameter.gradient for parameter in self.auxiliary}
        self.auxiliary = [
            parameter._replace(gradient=_sum(before.get(parameter.name), parameter.gradient))
            for parameter in run.auxiliary(of_auxiliary)
        ]
        self.losses.append(sample.loss(self._sharing))
        self.nlls.append(sample.run.nll.detach())
        self.num_data = run.num_data
        self.batch_fraction = sample.batch_fraction

    def pool(self, workers: Workers, model: Callable[..., Any]) -> None:
        """Take the means over all workers, also of the model's buffers."""
        losses = [torch.stack(self.losses), torch.stack(self.nlls)] if not workers.is_alone else []
        weights, price = map(self._sharing.unpooled, (self.weights, self.price))
        values, self.auxiliary, self.batch_fraction = pool(
            [*losses, *weights.values(), *price.values()], self.auxiliary,
            self.batch_fraction, self.num_data, workers, model,
        )
        if losses:
            self.losses, self.nlls = ([*x.unbind()] for x in values[:2])
            means = iter(values[2:])
            self.weights.update({name: next(means) for name in weights})
            self.price.update({name: next(means) for name in price})

    def _add_price(self, sample: Sample, weights: Mapping[str, Tensor]) -> None:
        pairs = zip(sample.posterior.blocks, sample.perturbations or (), strict=True)
        epsilons = {
            state.block.name: perturbation.epsilon for state, perturbation in pairs
            if uses_sample_gradients(self._spec, state.block)
        }
        if epsilons:
            blocks = sample.posterior.blocks
            for name, value in price_estimates(self._spec, blocks, epsilons, weights).items():
                self.price[name] = self.price[name] + value if name in self.price else value


def mean(values: Sequence[Tensor]) -> Tensor:
    """The mean of scalars, of one itself."""
    return values[0] if len(values) == 1 else torch.stack([*values]).mean()


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class LayerwiseRule:
    """Trains the layers of a guide by their own curvature."""

    is_joint = False

    def __init__(self, spec: Curvature, store: GuideStore) -> None:
        self._spec, self._store = spec, store

    def init(self, group: Mapping[str, Any]) -> Posterior:
        """The posterior before the first step."""
        return self._store.init(self._spec, group)

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        """A step from S samples, or from the mean, as the first step is.

        Raises FloatingPointError if the loss or a gradient is not finite, ValueError if there are
        no samples, but the curvature of a block is estimated from them.
        """
        spec, count = self._spec, max(1, settings.num_particles)
        self._check_samples(settings.num_particles)
        is_due = posterior.step == 0 or is_any_due(spec, posterior)
        sharing, blocks = self._store.sharing, posterior.blocks
        sampler = sharing.sampler(blocks, settings.antithetic, mirrors(blocks))
        sums, updated = SampleSums(spec, count, sharing), posterior
        for index in range(count):
            at_mean = posterior.step == 0 or not settings.num_particles
            perturbations = None if at_mean else settings.draw(sampler)
            sample = self._run(posterior, perturbations, settings, model, is_due)
            updated = _with_context(updated, sample.posterior) if index else sample.posterior
            if is_due:
                particle = Particle(index, count)
                updated = _observe(updated, sample, spec, particle, settings.workers, sharing)
            sums.add(sample)
        sums.pool(settings.workers, model.model)
        is_watched = settings.temperature.is_automatic or posterior.temperature.is_first_pass
        if is_due and is_watched:
            updated = measure_determined(spec, updated, sums.batch_fraction, sharing.owners)
        elif not is_due and spec.decays_at(posterior.step):
            updated = refresh(spec, updated, sums.batch_fraction)
        updated = update_from_sample_gradients(spec, updated, sums.price, sums.batch_fraction)
        evaluation = Evaluation(
            updated.with_mirrors(sampler.mirrors), mean(sums.losses), sums.weights,
            [parameter.gradient for parameter in sums.auxiliary], mean(sums.nlls),
            sharing.helpers(settings.workers), sharing.owners,
        )
        update = step(posterior, evaluation, settings.average, settings.mean_update)
        seen = update.posterior.temperature.after(
            sample.temperature, update.nll / sums.num_data, sums.batch_fraction
        )
        after = replace(update.posterior, temperature=seen)
        return replace(update, posterior=after, num_data=sums.num_data), sums.auxiliary

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        """N nll + T (log q - log p), the mean over as many samples as a step has; and T."""
        sharing = self._store.sharing
        sampler = sharing.sampler(posterior.blocks, settings.antithetic)
        losses = []
        for _ in range(max(1, settings.num_particles)):
            perturbations = sampler.draw() if settings.num_particles else None
            sample = self._run(posterior, perturbations, settings, model)
            losses.append(sample.loss(sharing))
        loss = torch.stack(losses).mean()
        return settings.workers.mean(loss, sample.batch_fraction), sample.temperature

    def _run(
        self, posterior: Posterior, perturbations: list[Perturbation] | None,
        settings: StepSettings, model: BatchModel, capture: bool = False,
    ) -> Sample:
        """Run the model at one sample; with `capture` its ops are recorded for the curvature."""
        weights = self._store.sharing.weights(posterior.blocks, perturbations)
        twice = capture and self._spec.kind == "hessian"
        noise = settings.noise(posterior, has_latents=bool(self._store.guide.fallback_sites))
        with noise, model.network(), twice_differentiable() if twice else nullcontext():
            run = model(require_grad(weights), capture)
        temperature = settings.temperature_of(posterior)
        numbers = Hyperparameters.of(settings.group, run.num_data, temperature)
        blocks = tuple(
            replace(state, prior=prior, hyperparameters=numbers)
            for state, prior in zip(posterior.blocks, self._store.priors(run), strict=True)
        )
        nll = run.tempered_nll(temperature)
        return Sample(replace(posterior, blocks=blocks), perturbations, run, temperature, nll)

    def _check_samples(self, num_particles: int) -> None:
        blocks = self._store.blocks
        names = [block.name for block in blocks if uses_sample_gradients(self._spec, block)]
        if names and not num_particles:
            raise ValueError(
                f"num_particles=0, but the curvature of {', '.join(names)} is estimated from "
                'samples alone: leave them out (structure={...: "point"}) or use another curvature'
            )
