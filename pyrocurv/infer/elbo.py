"""The loss of a guide as it stands, at samples from it."""

from __future__ import annotations

import torch

from pyrocurv.handlers.modules import modules
from pyrocurv.infer import joint_step as whole
from pyrocurv.infer import layerwise_step as layered
from pyrocurv.infer.defaults import Loss
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.model_run import BatchModel, require_grad
from pyrocurv.posterior.sampling import (
    Perturbation,
    estimate_kl,
    perturbed_weights,
    sample_perturbations,
)
from pyrocurv.runtime.module_state import preserve_module_state


def negative_elbo(
    runner: BatchModel, numbers: layered.Settings | whole.Numbers, known: KnownPriors
) -> Loss:
    """N nll + T (log q - log p), the mean over as many samples as `numbers` has."""
    families, heat = runner.guide.blocks, numbers.temperature
    blocks = [family.block for family in families]
    locs = [family.raw_loc.detach() for family in families]
    precisions = [family.precision() for family in families]
    used: list[Perturbation | None] = [None] * len(locs)
    losses = []
    for _ in range(max(1, numbers.samples)):
        noise = None
        if numbers.samples:
            noise, used = sample_perturbations(precisions, used, locs[0], numbers.antithetic)
        weights = perturbed_weights(blocks, locs, noise)
        asked = torch.set_grad_enabled(heat.asks_the_graph)
        with runner.network(), preserve_module_state(modules(runner.model)), asked:
            run = runner(require_grad(weights))
            temperature = heat(run)
        if isinstance(numbers, whole.Numbers):
            square = noise[0].square if noise else locs[0].new_zeros(())
            log_q = whole.log_q(precisions[0], square)
            losses.append(run.joint(temperature) + temperature * log_q)
        else:
            divergence = estimate_kl(blocks, weights, noise, precisions, known.read(run))
            losses.append(run.energy(temperature) + temperature * divergence)
    return Loss.at(float(torch.stack(losses).mean()), temperature)
