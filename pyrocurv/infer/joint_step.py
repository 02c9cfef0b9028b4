"""Evaluates a whole model, without layers, at samples of one joint Gaussian over its latents.

Loss, gradient and Hessian are those of E(z) = -log p(y | z) - T (log p(z) + ln |det dz/du|) in
unconstrained space; see `pyrocurv.posterior.joint_update` for the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.hessian_weights import vector_hessian_products
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.handlers.modules import modules
from pyrocurv.infer.guide_store import GuideStore
from pyrocurv.infer.layerwise_step import StepSettings
from pyrocurv.infer.model_run import BatchModel, ModelRun, require_grad
from pyrocurv.infer.pooling import pool
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.joint_update import ill_conditioned, log_density, update_joint
from pyrocurv.posterior.mean_update import NATURAL
from pyrocurv.posterior.sampling import Sampler, perturbed_weights
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import Evaluation, Update, step
from pyrocurv.runtime.module_state import save_buffers
from pyrocurv.runtime.validation import is_out_of_memory
from pyrocurv.structures import Diagonal

MAX_ROWS = 256  # of a Hessian at once


def uses_joint_update(spec: Curvature, model: Callable[..., Any]) -> bool:
    """Whether a curvature is plainly "hessian"; without a network its other settings are unused."""
    is_plain = replace(spec, decay=Curvature.decay) == Curvature("hessian")
    return is_plain or spec.kind == "hessian" and not has_network(model)


class JointRule:
    """Trains one Gaussian over all latents of a guide by the Hessian of the log joint."""

    is_joint = True

    def __init__(self, store: GuideStore) -> None:
        self._store = store
        self._can_vectorize = True  # until the model turns out to have no vectorized form

    def init(self, group: Mapping[str, Any]) -> Posterior:
        """The posterior before the first step."""
        return self._store.init_joint(group)

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        """A step from S samples, in one vectorized run if the model allows it.

        The first step runs them one by one, and so validates the model's values. Raises ValueError
        for a log joint that does not depend on the latents, FloatingPointError if the loss is not
        finite or the precision too ill-conditioned.
        """
        if settings.mean_update is not NATURAL:
            raise ValueError(
                f"update={settings.mean_update.name!r}: one Gaussian over all latents moves by the "
                "natural gradient, update='natural'"
            )
        vectorize = self._can_vectorize and posterior.step > 0
        restore = save_buffers(modules(model.model))
        try:
            evaluation, auxiliary, num_data = self._evaluate(posterior, settings, model, vectorize)
        except (RuntimeError, ValueError) as error:
            if not vectorize or is_out_of_memory(error):
                raise
            self._can_vectorize = False  # a genuine error is raised again below
            restore()
            evaluation, auxiliary, num_data = self._evaluate(posterior, settings, model, False)
        try:
            update = step(posterior, evaluation, settings.average)
        except torch.linalg.LinAlgError as error:
            raise ill_conditioned(posterior.step) from error
        return replace(update, num_data=num_data), auxiliary

    def _evaluate(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel, vectorize: bool
    ) -> tuple[Evaluation, list[AuxiliaryParameter], int | None]:
        """Loss, gradient and Hessian at S samples; and N, if it is known."""
        (state,) = posterior.blocks
        rate, num_particles = self._defaults(settings)
        z = torch.stack([*_antithetic_normals(num_particles, state, settings.antithetic)])
        samples = (state.mean + state.precision.rsqrt(z)).detach().requires_grad_()
        workers = settings.workers
        with workers.local_noise(samples.device), twice_differentiable():
            energies, nlls, run, temperature, num_data = _energies(
                samples, posterior, settings, model, vectorize
            )
        gradient, *rest = torch.autograd.grad(
            energies.mean(), [samples, *run.params], create_graph=True, allow_unused=True
        )
        if gradient is None:
            raise ValueError("the log joint does not depend on the latents")
        hessian = mean_hessian(gradient, samples, isinstance(state.precision, Diagonal))
        log_q = log_density(state.precision, z.square().sum(-1))
        loss = (energies.detach() + temperature * log_q).mean()
        (loss, nll, slope, hessian), auxiliary, _ = pool(
            [loss, nlls.mean(), gradient.detach().sum(0), hessian],
            run.auxiliary([None if g is None else g.detach() for g in rest]),
            1.0 if workers.is_alone else run.batch / run.num_data,
            1.0 if workers.is_alone else run.num_data, workers, model.model,
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {posterior.step}: the loss is {loss.item()}")
        state = replace(state, hyperparameters=Hyperparameters.of(settings.group, 1, 1))
        moved = update_joint(state, hessian / temperature, rate, posterior.step)
        gradients = state.block.unpack(slope / temperature)
        seen = replace(posterior.temperature, value=temperature)
        evaluation = Evaluation(
            replace(posterior, blocks=(moved,), temperature=seen), loss, gradients,
            [p.gradient for p in auxiliary], nll,
        )
        return evaluation, auxiliary, num_data

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        """E + T log q, the mean over as many samples as a step has; and T."""
        (state,) = posterior.blocks
        _, num_particles = self._defaults(settings)
        sampler = Sampler(posterior.blocks, settings.antithetic)
        losses = []
        for _ in range(max(1, num_particles)):
            perturbations = sampler.draw() if num_particles else None
            weights = require_grad(perturbed_weights(posterior.blocks, perturbations))
            square = perturbations[0].squared_norm if perturbations else state.mean.new_zeros(())
            with model.network():
                run = model(weights)
            temperature = settings.temperature_of(posterior)
            log_q = log_density(state.precision, square)
            losses.append(run.negative_log_joint(temperature).detach() + temperature * log_q)
        loss, workers = torch.stack(losses).mean(), settings.workers
        weight = 1.0 if workers.is_alone else run.batch / run.num_data
        return workers.mean(loss, weight), temperature

    def _defaults(self, settings: StepSettings) -> tuple[float, int]:
        """Rate of the precision's step and number of samples; careful if a latent has bounds."""
        rate, num_particles = (0.1, 32) if self._store.guide.has_constrained else (0.3, 8)
        if settings.curvature.decay != Curvature.decay:
            rate = 1 - settings.curvature.decay
        if isinstance(settings.num_particles, int):
            num_particles = settings.num_particles
        return rate, num_particles


def _antithetic_normals(
    count: int, state: BlockState, antithetic: bool
) -> Iterator[Tensor]:
    """Standard normal z [P] for each of `count` samples, every second one mirroring the last.

    A single z = 0, the mean, for a count of 0.
    """
    z = torch.zeros_like(state.mean)
    if not count:
        yield z
    for index in range(count):
        z = -z if antithetic and index % 2 else torch.randn_like(z)
        yield z


def _energies(
    samples: Tensor, posterior: Posterior, settings: StepSettings, model: BatchModel,
    vectorize: bool,
) -> tuple[Tensor, Tensor, ModelRun, float, int | None]:
    """E and N nll of each sample [S, P], the last run, T, and N if it is known."""
    (state,) = posterior.blocks
    runs: list[tuple[ModelRun, float, int | None]] = []

    def energy(sample: Tensor) -> tuple[Tensor, Tensor]:
        with model.network():
            run = model(state.block.unpack(sample))
        temperature = settings.temperature_of(posterior)
        # N is read off here, since the graph of a run under vmap ends with it
        runs.append((run, temperature, runs[-1][2] if runs else run.num_data_if_known))
        return run.negative_log_joint(temperature), run.nll.detach()

    if vectorize:
        energies, nlls = torch.func.vmap(energy, randomness="different")(samples)
    else:
        energies, nlls = map(torch.stack, zip(*map(energy, samples), strict=True))
    return energies, nlls, *runs[-1]


def mean_hessian(gradient: Tensor, samples: Tensor, is_diagonal: bool) -> Tensor:
    """The sum of the samples' Hessians [P, P], or its diagonal [P], from the gradients [S, P].

    The gradients are those of the mean energy, so that the sum is the mean Hessian.
    """
    rows = []
    for identity in torch.eye(samples.shape[1]).to(samples).split(MAX_ROWS):
        vectors = identity.unsqueeze(1).expand(-1, len(samples), -1)
        (products,) = vector_hessian_products(gradient, [samples], vectors)
        rows.append(torch.zeros_like(identity) if products is None else products.sum(1))
    matrix = torch.cat(rows).detach()
    return matrix.diagonal() if is_diagonal else (matrix + matrix.mT) / 2
