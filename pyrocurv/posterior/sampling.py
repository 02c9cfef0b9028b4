"""Samples of the weights, and estimates of the KL divergence from the prior at them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyrocurv.layers.block import Block
from pyrocurv.posterior.natural_gradient import sampled_kl
from pyrocurv.posterior.prior import Prior, kl
from pyrocurv.posterior.state import BlockState, Perturbation

Weights = Mapping[str, Tensor]  # {name: [*shape]}


class Sampler:
    """Draws perturbations of a posterior; if `antithetic`, every second one mirrors the last.

    `mirrors` are perturbations that have been used once, one for each block, or None.
    """

    def __init__(
        self, blocks: Sequence[BlockState], antithetic: bool,
        mirrors: list[Perturbation] | None = None,
    ) -> None:
        self.blocks, self.antithetic, self.mirrors = blocks, antithetic, mirrors

    @torch.no_grad()
    def draw(self) -> list[Perturbation]:
        """One perturbation for each block, from torch's global generator."""
        mirrors, self.mirrors = self.mirrors, None
        if mirrors is not None:
            return [perturbation.mirrored() for perturbation in mirrors]
        drawn = [_perturbation(state) for state in self.blocks]
        if self.antithetic:
            self.mirrors = drawn
        return drawn


def mirrors(blocks: Sequence[BlockState]) -> list[Perturbation] | None:
    """The perturbations to be mirrored: those of all blocks, or None."""
    stored = [state.mirror for state in blocks if state.mirror is not None]
    return stored if blocks and len(stored) == len(blocks) else None


def _perturbation(state: BlockState) -> Perturbation:
    mean = state.mean
    z = torch.randn(state.precision.size, dtype=mean.dtype, device=mean.device)
    squared_norm = torch.dot(z, z)
    return Perturbation(state.precision.rsqrt_(z), squared_norm)


def perturbed_weights(
    blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None
) -> dict[str, Tensor]:
    """{name: sampled weights [*shape]} of all blocks; copies of the means for None."""
    weights: dict[str, Tensor] = {}
    if perturbations is None:
        for state in blocks:
            weights.update(state.block.unpack(state.mean.clone()))
        return weights
    for state, perturbation in zip(blocks, perturbations, strict=True):
        direction = state.block.strided_views(perturbation.direction)
        for name, mean in state.block.strided_views(state.mean).items():
            weights[name] = torch.add(mean, direction[name], alpha=perturbation.sign).contiguous()
    return weights


@torch.no_grad()
def estimate_kl(
    blocks: Sequence[BlockState], weights: Weights, perturbations: Sequence[Perturbation] | None
) -> Tensor:
    """log q - log p of sampled weights in nats; the KL divergence itself at the mean (None)."""
    if perturbations is None:
        return torch.stack([
            kl(state.block.pack(weights), state.precision, state.prior.gaussian)
            for state in blocks
        ]).sum()
    distances = [_distance(state.block, weights, state.prior.gaussian) for state in blocks]
    return sampled_kl(
        distances, [perturbation.squared_norm for perturbation in perturbations],
        [state.precision for state in blocks], [state.prior.gaussian for state in blocks],
    )


def _distance(block: Block, weights: Weights, prior: Prior) -> Tensor:
    """Σ δ (w - M₀)²; weights are packed only where the prior is not the same for all."""
    if not prior.is_uniform:
        return prior.distance(block.pack(weights))
    return functools.reduce(
        torch.add, (prior.distance(weights[name].flatten()) for name in block.tensors)
    )
