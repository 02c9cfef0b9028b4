"""The loss of a guide as it stands, at samples from it."""

from __future__ import annotations

import torch

from pyrocurv import engine
from pyrocurv.infer import layered, whole
from pyrocurv.infer.known_priors import KnownPriors
from pyrocurv.infer.numbers import Loss
from pyrocurv.infer.run import Runner, leaves
from pyrocurv.modules import frozen_buffers
from pyrocurv.state import Noise


def negative_elbo(
    runner: Runner, numbers: layered.Settings | whole.Numbers, known: KnownPriors
) -> Loss:
    """N nll + T (log q - log p), the mean over as many samples as `numbers` has."""
    families, heat = runner.guide.blocks, numbers.temperature
    blocks = [family.block for family in families]
    locs = [family.raw_loc.detach() for family in families]
    precisions = [family.precision() for family in families]
    used: list[Noise | None] = [None] * len(locs)
    losses = []
    for _ in range(max(1, numbers.samples)):
        noise = None
        if numbers.samples:
            noise, used = engine.draw(precisions, used, locs[0], numbers.antithetic)
        weights = engine.around(blocks, locs, noise)
        asked = torch.set_grad_enabled(heat.asks_the_graph)
        with runner.network(), frozen_buffers(runner.model), asked:
            run = runner(leaves(weights))
            temperature = heat(run)
        if isinstance(numbers, whole.Numbers):
            square = noise[0].square if noise else locs[0].new_zeros(())
            log_q = whole.log_q(precisions[0], square)
            losses.append(run.joint(temperature) + temperature * log_q)
        else:
            divergence = engine.divergence(blocks, weights, noise, precisions, known.read(run))
            losses.append(run.energy(temperature) + temperature * divergence)
    return Loss.at(float(torch.stack(losses).mean()), temperature)
