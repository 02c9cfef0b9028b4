"""The natural-gradient update of a Gaussian over one block of weights, as functions of tensors.

With C the running curvature per datum, N data, T the temperature, δ the prior precision, g the
gradient of the negative log likelihood per datum at sampled weights, e a decaying initial
curvature:

    posterior   Λ = (N/T)(C + e) + δ                      exact, without damping
    momentum    m ← β m + (1-β) g,   h = m/(1-βᵗ) + (δT/N)(M - M₀)
    direction   d = (C + e + δT/N + damping)⁻¹ h          damping never shrinks the posterior
    mean        M ← M - lr ν d,      ν = min(1, sqrt(κ / Σ lr₀² <d, h>))   over all blocks
    outliers    m ← m min(1, 10 ν)                        bounds the momentum of an outlier

Khan & Rue 2023, "The Bayesian learning rule", arXiv:2107.04562; the trust region is that of Ba,
Grosse & Martens 2017, "Distributed second-order optimization using Kronecker-factored
approximations".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyrocurv.posterior.correlated_prior import CorrelatedPrior
from pyrocurv.posterior.prior import BlockPrior, Prior
from pyrocurv.structures import Diagonal, Rescaled, Structure
from pyrocurv.structures.sums import add


def posterior_precision(
    curvature: Structure, initial_curvature: float, prior: BlockPrior, likelihood_weight: float,
    damping: float,
) -> tuple[Structure, Structure]:
    """Λ and the preconditioner C + e + δT/N + damping, with likelihood_weight = N/T.

    With a Kronecker scaling of the prior, `curvature` is that of the scaled weights, and
    `initial_curvature` and `damping` are multiples of p_i r_j instead of 1. With a correlated prior
    the sum may be approximate, see `pyrocurv.structures.sums`.
    """
    scaling = prior.scaling
    if isinstance(prior.gaussian, CorrelatedPrior):
        total = add(curvature.scale(likelihood_weight), prior.gaussian.precision)
        preconditioner = total.scale(1 / likelihood_weight).shift(initial_curvature + damping)
        return total.shift(likelihood_weight * initial_curvature), preconditioner
    delta = prior.gaussian.precision if scaling is None else scaling.delta
    precision = curvature.scale(likelihood_weight).shift(
        delta + likelihood_weight * initial_curvature
    )
    preconditioner = curvature.shift(delta / likelihood_weight + (initial_curvature + damping))
    root = None if scaling is None else scaling.root
    if root is None:
        return precision, preconditioner
    return Rescaled(precision, root), Rescaled(preconditioner, root)


def price_hessian_update(
    curvature: Structure, estimate: Tensor, rate: float, prior: Prior,
    likelihood_weight: float,
) -> Diagonal:
    """The diagonal curvature S with one more estimate f [P] averaged in, at `rate` r.

    For w = M + ε, ε ~ N(0, Λ⁻¹), the mean of f = Λ ε ∘ g is that of the Hessian's diagonal (Price's
    theorem). It may be negative, and the last term of

        S ← (1 - r) S + r f + r² (S - f)² / (2 (S + δT/N))

    keeps S + δT/N positive. Where δ has become so small that it was not, S starts again from 0.
    Lin, Schmidt & Khan 2020, arXiv:2002.10060; IVON: arXiv:2402.17641.
    """
    old, share = curvature.diag(), prior.diagonal / likelihood_weight
    old = torch.where(old + share > 0, old, torch.zeros_like(old))
    change = estimate - old
    return Diagonal(old + rate * change + (rate * change).square() / (2 * (old + share)))


def trust_region_scale(energy: float, kl_clip: float | None) -> float:
    """ν, from energy = Σ lr₀² <d, h> over all blocks, with their base learning rates."""
    if kl_clip is None or energy <= 0:
        return 1.0
    return min(1.0, math.sqrt(kl_clip / energy))


def clip_momentum(momenta: Sequence[Tensor], energy: float, kl_clip: float | None) -> None:
    """Shrink all m, in place, to a step of at most ten times the radius of the trust region.

    The trust region shortens one step, but m keeps an outlier for as long as it takes to decay: one
    of 1e15, as a learned log scale gives at an unlucky sample, would dominate 300 steps.
    """
    scale = trust_region_scale(energy / 100, kl_clip)
    if scale < 1:
        torch._foreach_mul_([*momenta], scale)


def sampled_kl(
    distances: Sequence[Tensor], squared_norms: Sequence[Tensor], precisions: Sequence[Structure],
    priors: Sequence[Prior],
) -> Tensor:
    """log q(w) - log p(w) over all blocks: distances Σ δ (w - M₀)², norms εᵀΛε of w = M + ε."""
    pairs = zip(priors, precisions, strict=True)
    positive = [precision.logdet() for precision in precisions]
    negative = [prior.logdet(precision.size) for prior, precision in pairs]
    opposite = torch._foreach_neg([*negative, *squared_norms])
    return torch.stack([*positive, *distances, *opposite]).sum() / 2
