"""Samples of the weights and the log density ratio of posterior and prior there."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.layers.block import Block
from pyrocurv.posterior.natural_gradient import (
    sampled_kl,
)
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior, kl
from pyrocurv.structures import Structure
from pyrocurv.structures.serialization import serializable

Weights = Mapping[str, Tensor]  # {name: [*shape]}


def sample_perturbations(
    precisions: Sequence[Structure | None], used: Sequence[Perturbation | None], like: Tensor,
    antithetic: bool,
) -> tuple[list[Perturbation] | None, list[Perturbation | None]]:
    """A sample's deviation from the mean, and what to mirror next; a list has one for each block.

    None for the deviation as long as there is no precision: the first step is at the mean.
    """
    nothing: list[Perturbation | None] = [None] * len(used)
    known = [precision for precision in precisions if precision is not None]
    mirrored = [noise.mirrored() for noise in used if noise is not None]
    if mirrored or not known:  # of all blocks, or of none
        return mirrored or None, nothing
    fresh = []
    for precision in known:
        z = torch.randn(precision.size, dtype=like.dtype, device=like.device)
        square = torch.dot(z, z)
        fresh.append(Perturbation(precision.rsqrt_(z), square))
    return fresh, [*fresh] if antithetic else nothing


def perturbed_weights(
    blocks: Sequence[Block], locs: Sequence[Tensor], noise: Sequence[Perturbation] | None
) -> list[Weights]:
    """The sampled weights of each block; the means themselves where there is no noise."""
    if noise is None:
        return [block.unpack(loc.clone()) for block, loc in zip(blocks, locs, strict=True)]
    parts = zip(noise, blocks, locs, strict=True)
    return [one.perturbed_weights(block, loc) for one, block, loc in parts]


@torch.no_grad()
def estimate_kl(
    blocks: Sequence[Block], sample: Sequence[Weights], noise: Sequence[Perturbation] | None,
    precisions: Sequence[Structure], priors: Sequence[BlockPrior],
) -> Tensor:
    """log q - log p of the sampled weights; without noise, the KL at the mean. In nats."""
    parts = [*zip(blocks, sample, precisions, priors, strict=True)]
    if noise is None:
        terms = [kl(block.pack(w), precision, prior.packed) for block, w, precision, prior in parts]
        return torch.stack(terms).sum()
    distances = [_distance(block, w, prior.packed) for block, w, _, prior in parts]
    squares = [one.square for one in noise]
    return sampled_kl(distances, squares, precisions, [prior.packed for prior in priors])


def _distance(block: Block, weights: Weights, prior: GaussianPrior) -> Tensor:
    """Σ δ (w - M₀)²; packed only where the prior is not the same for all."""
    if prior.precision.dim() or prior.loc.dim():
        return prior.distance(block.pack(weights))
    return functools.reduce(
        torch.add, (prior.distance(weights[name].flatten()) for name in block.tensors)
    )


@serializable
@dataclass(frozen=True, eq=False)
class Perturbation:
    """A deviation from the mean, epsilon = sign · drawn with drawn = Λ^-½ z [P], and |z|²."""

    direction: Tensor
    square: Tensor
    sign: float = 1.0

    @property
    def epsilon(self) -> Tensor:
        """The deviation itself."""
        return self.sign * self.direction

    def mirrored(self) -> Perturbation:
        """The antithetic deviation."""
        return Perturbation(self.direction, self.square, -self.sign)

    def perturbed_weights(self, block: Block, loc: Tensor) -> dict[str, Tensor]:
        """The sample loc + epsilon, unpacked in the same pass."""
        epsilon = block.strided_views(self.direction)
        return {
            name: torch.add(part, epsilon[name], alpha=self.sign).contiguous()
            for name, part in block.strided_views(loc).items()
        }
