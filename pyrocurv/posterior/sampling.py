"""Samples of the weights, and estimates of the KL divergence from the prior at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyrocurv.layers.block import Block
from pyrocurv.posterior.natural_gradient import sampled_kl
from pyrocurv.posterior.prior import kl
from pyrocurv.posterior.state import BlockState, Perturbation
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.workers import Workers
from pyrocurv.structures.stack import samples_

Weights = Mapping[str, Tensor]  # {name: [*shape]}
Noise = Callable[[Sequence[BlockState]], list[Tensor]]


class Sampler:
    """Draws perturbations of a posterior; if `antithetic`, every second one mirrors the last.

    `mirrors` are perturbations that have been used once, one for each block, or None. `noise` draws
    z [P] of each block.
    """

    def __init__(
        self, blocks: Sequence[BlockState], antithetic: bool,
        mirrors: list[Perturbation] | None = None, noise: Noise | None = None,
    ) -> None:
        self.blocks, self.antithetic, self.mirrors = blocks, antithetic, mirrors
        self.noise = noise or standard_normals

    @torch.no_grad()
    def draw(self) -> list[Perturbation]:
        """One perturbation for each block, from torch's global generator."""
        mirrors, self.mirrors = self.mirrors, None
        if mirrors is not None:
            return [perturbation.mirrored() for perturbation in mirrors]
        drawn = _perturbations(self.blocks, self.noise)
        if self.antithetic:
            self.mirrors = drawn
        return drawn

    @torch.no_grad()
    def draw_of(self, workers: Workers) -> list[Perturbation]:
        """A perturbation of this one of the workers; if `antithetic`, every second one mirrors the
        one before it.
        """
        if workers.is_alone or not self.blocks:
            return self.draw()
        number, is_mirrored = divmod(workers.rank, 2) if self.antithetic else (workers.rank, False)
        with workers.noise(self.blocks[0].mean.device, number):
            drawn = _perturbations(self.blocks, self.noise)
        return [perturbation.mirrored() for perturbation in drawn] if is_mirrored else drawn


def mirrors(blocks: Sequence[BlockState]) -> list[Perturbation] | None:
    """The perturbations to be mirrored: those of all blocks, or None."""
    stored = [state.mirror for state in blocks if state.mirror is not None]
    return stored if blocks and len(stored) == len(blocks) else None


def _perturbations(blocks: Sequence[BlockState], noise: Noise) -> list[Perturbation]:
    drawn = noise(blocks)
    norms = torch._foreach_norm(drawn)
    with disable_autocast(drawn[0].device):
        directions = samples_([state.precision for state in blocks], drawn)
    return [*map(Perturbation, directions, torch._foreach_mul(norms, norms))]


def standard_normals(blocks: Sequence[BlockState]) -> list[Tensor]:
    """z ~ N(0, 1) [P] of each block, those of one device and dtype by one draw."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, state in enumerate(blocks):
        groups.setdefault((state.mean.device, state.mean.dtype), []).append(index)
    found: dict[int, Tensor] = {}
    for (device, dtype), members in groups.items():
        sizes = [blocks[index].precision.size for index in members]
        drawn = torch.randn(sum(sizes), dtype=dtype, device=device)
        found.update(zip(members, drawn.split(sizes), strict=True))
    return [found[index] for index in range(len(blocks))]


def normals_of_all(
    own: Sequence[BlockState], blocks: Sequence[Block], like: Tensor
) -> list[Tensor]:
    """z [P] of each of this process's own blocks, which draws the noise of all `blocks`.

    So samples do not depend on how many processes share the blocks out.
    """
    mine, sizes = {state.block for state in own}, [block.size for block in blocks]
    z = torch.randn(sum(sizes), dtype=like.dtype, device=like.device)  # as one process does
    parts = zip(blocks, z.split(sizes), strict=True)
    return [part.clone() for block, part in parts if block in mine]


def perturbed_weights(
    blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None
) -> dict[str, Tensor]:
    """{name: sampled weights [*shape]} of all blocks; copies of the means for None."""
    if perturbations is None:
        unpacked = (state.block.unpack(state.mean.clone()) for state in blocks)
        return {name: value for values in unpacked for name, value in values.items()}
    means: dict[str, Tensor] = {}
    directions: dict[str, Tensor] = {}
    for state, perturbation in zip(blocks, perturbations, strict=True):
        means.update(state.mean_views)
        directions.update(perturbation.views(state.block))
    if not means:
        return {}
    added = torch._foreach_add(
        [*means.values()], [directions[name] for name in means], alpha=perturbations[0].sign
    )
    return {name: value.contiguous() for name, value in zip(means, added, strict=True)}


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
    return sampled_kl(
        _distances(blocks, weights), [perturbation.squared_norm for perturbation in perturbations],
        [state.precision for state in blocks], [state.prior.gaussian for state in blocks],
    )


def _distances(blocks: Sequence[BlockState], weights: Weights) -> list[Tensor]:
    """Terms that sum to Σ δ (w - M₀)²; by norms where each tensor's prior is a N(0, 1/δ)."""
    distances, precisions, names = list[Tensor](), list[Tensor](), list[str]()
    for state in blocks:
        prior = state.prior.gaussian
        by_tensor = prior.by_tensor(state.block)
        if by_tensor is None:
            distances.append(prior.distance(state.block.pack(weights)))
        else:
            names += state.block.tensors
            precisions.append(by_tensor)
    if names:
        norms = torch.stack(torch._foreach_norm([weights[name] for name in names]))
        distances.append(torch.dot(norms.square_(), torch.cat(precisions)))
    return distances
