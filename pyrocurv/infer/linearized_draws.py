"""Averages over draws of the outputs of a linearized network, in antithetic pairs f ± d.

    E[softmax f(x, w)] ≈ 1/(2K) Σ_k (softmax(f + d_k) + softmax(f - d_k))

with d_k = S^½ z_k or J Λ^-½ z_k.

Where the covariance S of an example's outputs is known, z_k are normal quantiles of scrambled Sobol
points, whose error is a third or less of that of independent ones. Where the outputs are so many
that S would take more backward passes than there are draws, weights are drawn instead, and J ε is a
product of the Jacobian with a vector, which takes about as long as a forward pass.

All examples share the same z_k, and the random numbers are those of a fixed seed: a prediction does
not depend on the other examples of a batch, and repeats.

Sobol points: Owen 1997, "Scrambled net variance for integrals of smooth functions".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from pyrocurv.curvature.output_covariance import PROGRESS_DELAY, OutputCovariance
from pyrocurv.layers.block import Block
from pyrocurv.runtime.agreement import raise_together
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Structure
from pyrocurv.structures.linalg import at_least_single

SEED = 0
MAX_ELEMENTS = 2**19  # of the draws of one chunk, which a processor's cache holds
FINEST = 2.0**-31  # half the distance of Sobol points


def normal_points(count: int, like: Tensor) -> Tensor:
    """K = count quasi-random points of N(0, I) [C, K], for outputs `like` [N, C]."""
    size = like.shape[-1]
    if size > SobolEngine.MAXDIM:
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(size, count, dtype=torch.float64, generator=generator).to(like)
    points = SobolEngine(size, scramble=True, seed=SEED).draw(count, dtype=torch.float64)
    return torch.special.ndtri(points.clamp(FINEST, 1 - FINEST)).mT.to(like).contiguous()


@dataclass(frozen=True, eq=False)
class CovarianceDraws:
    """`pairs` of draws from N(f, S) at each place."""

    covariance: OutputCovariance
    pairs: int

    def log_mean(self, loc: Tensor, is_binary: bool = False) -> Tensor:
        """The logarithms of the mean probabilities [N, D] for logits f = loc [N, C].

        With `is_binary`, one logit stands for two classes, the other of which has logit 0.
        """
        loc = at_least_single(loc)
        z = normal_points(self.pairs, loc)
        step = max(1, MAX_ELEMENTS // z.numel())
        found = []
        for start in range(0, len(loc), step):
            places = slice(start, start + step)
            deviations = self.covariance[places].correlate(z)  # [n, C, K]: softmax is fast so
            center = loc[places].unsqueeze(-1)
            found.append(_log_sum(center + deviations, center - deviations, is_binary))
        return torch.cat(found) - math.log(2 * self.pairs)


def _log_sum(first: Tensor, second: Tensor, is_binary: bool) -> Tensor:
    """The logarithms of the sum of probabilities [n, D] over logits [n, C, K] of two halves."""
    if is_binary:
        first, second = (F.pad(logits, (0, 0, 0, 1)) for logits in (first, second))
    total = first.softmax(1).sum(-1) + second.softmax(1).sum(-1)
    if bool((total > torch.finfo(total.dtype).tiny).all()):
        return total.log()
    return torch.logaddexp(*(f.log_softmax(1).logsumexp(-1) for f in (first, second)))


@dataclass(frozen=True, eq=False)
class WeightDraws:
    """`pairs` of draws of the weights; `output` has a graph that can be differentiated twice.

    The workers share the pairs out.
    """

    blocks: Sequence[Block]
    precisions: Sequence[Structure]
    weights: Mapping[str, Tensor]
    output: Tensor
    pairs: int
    workers: Workers = ALONE

    def log_mean(self, loc: Tensor, is_binary: bool = False) -> Tensor:
        """As `CovarianceDraws.log_mean`."""
        center = at_least_single(loc).unsqueeze(-1)
        total = center.new_full((len(loc), loc.shape[-1] + is_binary), -torch.inf)
        with raise_together(self.workers, "predict"):
            for deviation in self.deviations():
                change = deviation.reshape(center.shape)
                both = _log_sum(center + change, center - change, is_binary)
                total = torch.logaddexp(total, both)
        return self.workers.stacked(total).logsumexp(0) - math.log(2 * self.pairs)

    def deviations(self) -> Iterator[Tensor]:
        """J ε in the shape of the output, for each draw ε ~ N(0, Λ⁻¹) of this worker."""
        with torch.enable_grad():  # vᵀ J is linear in v, and its derivative in v is J
            v = torch.zeros_like(self.output, requires_grad=True)
            names = [*self.weights]
            gradients = torch.autograd.grad(
                self.output, [self.weights[name] for name in names], v, create_graph=True,
                allow_unused=True,
            )
            rows = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        generator = torch.Generator(self.output.device).manual_seed(SEED)
        numbers = range(self.pairs)
        own = numbers[self.workers.rank::self.workers.size]
        for number in tqdm(numbers, "draws", disable=None, delay=PROGRESS_DELAY, leave=False):
            epsilons: dict[str, Tensor] = {}
            for block, precision in zip(self.blocks, self.precisions, strict=True):
                like = self.weights[next(iter(block.tensors))]
                z = torch.randn(
                    block.size, dtype=like.dtype, device=like.device, generator=generator
                )
                if number in own:
                    epsilons.update(block.unpack(precision.rsqrt(z)))
            if number not in own:
                continue
            used = [*rows]
            (change,) = torch.autograd.grad(
                [rows[n] for n in used], [v], [epsilons[n] for n in used], retain_graph=True
            )
            yield change.detach()
