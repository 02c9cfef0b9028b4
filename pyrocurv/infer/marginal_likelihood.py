"""The evidence of a Laplace approximation, and the prior precisions that maximize it.

With C the curvature of all data at the mean M, δ the prior precision, Λ = C + δ, for P weights:

    log p(D) ≈ log p(D | M) + log p(M) + ½ (P log 2π - log det Λ)
             = log p(D | M) + ½ (log det δ - Σ δ (M - M₀)² - log det Λ)

MacKay 1992, "A practical Bayesian framework for backpropagation networks"; with the structured
curvature of a deep network: Immer et al. 2021, arXiv:2104.04975.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrocurv.layers.block import Block
from pyrocurv.posterior.natural_gradient import posterior_precision
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.structures import Structure
from pyrocurv.structures.serialization import cast

MAX_LOG_FACTOR = 30.0  # where the evidence does not depend on a prior


@dataclass(frozen=True, eq=False)
class LaplaceBlock:
    """A block's curvature C, summed over the data and scaled by its prior; and its mean [P]."""

    block: Block
    curvature: Structure
    prior: BlockPrior
    loc: Tensor

    @property
    def precision(self) -> Structure:
        """Λ = C + δ."""
        return posterior_precision(self.curvature, 0.0, self.prior, 1.0, 0.0)[0]

    def log_evidence(self) -> Tensor:
        """The block's term of the log evidence, without log p(D | M). A scalar, in nats."""
        prior = self.prior.gaussian
        fit = prior.logdet(self.block.size) - prior.distance(self.loc)
        return (fit - self.precision.logdet()) / 2

    def with_prior_scales(self, factors: Tensor) -> LaplaceBlock:
        """With the prior precisions of its layers times `factors` [layers of the block]."""
        scaling, gaussian = self.prior.scaling, self.prior.gaussian
        sizes = torch.tensor([layer.size for layer in self.block.layers], device=factors.device)
        each = factors[0] if len(factors) == 1 else factors.repeat_interleave(sizes)
        gaussian = gaussian.scaled(each)
        if scaling is not None:
            scaling = replace(scaling, delta=scaling.delta * factors[0])
        return replace(self, prior=BlockPrior(gaussian, scaling))

    def to(self, dtype: torch.dtype) -> LaplaceBlock:
        """The same in another dtype."""
        curvature, prior, loc = cast(
            (self.curvature, self.prior, self.loc), self.loc.new_empty(0, dtype=dtype)
        )
        return replace(self, curvature=curvature, prior=prior, loc=loc)


def log_evidence(fitted: Sequence[LaplaceBlock], log_factors: Tensor) -> Tensor:
    """The log evidence without log p(D | M), in nats, with prior precisions δ exp(log_factors).

    One factor for all layers [1], or one for each [L], block after block.
    """
    scaled = with_prior_scales(fitted, log_factors)
    return torch.stack([block.log_evidence() for block in scaled]).sum()


def with_prior_scales(fitted: Sequence[LaplaceBlock], log_factors: Tensor) -> list[LaplaceBlock]:
    """With the prior precisions times exp(log_factors), [1] or [L]."""
    counts = [len(item.block.layers) for item in fitted]
    factors = log_factors.exp().expand(sum(counts)).split(counts)
    return [item.with_prior_scales(f) for item, f in zip(fitted, factors, strict=True)]


def maximize_evidence(fitted: Sequence[LaplaceBlock], per_layer: bool) -> Tensor:
    """The log_factors of the highest evidence, [1] or [L], in float64.

    With the curvature fixed, each layer's evidence is a sum over eigenvalues with a single maximum,
    which quasi-Newton steps find.
    """
    fitted = [block.to(torch.float64) for block in fitted]
    size = sum(len(item.block.layers) for item in fitted) if per_layer else 1
    like = fitted[0].loc
    factors = torch.zeros(size, dtype=like.dtype, device=like.device, requires_grad=True)
    weights = sum(item.block.size for item in fitted)
    optimizer = torch.optim.LBFGS(
        [factors], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_evidence(fitted, factors.clamp(-MAX_LOG_FACTOR, MAX_LOG_FACTOR)) / weights
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return factors.detach().clamp(-MAX_LOG_FACTOR, MAX_LOG_FACTOR)
