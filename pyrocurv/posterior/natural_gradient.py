"""The natural-gradient update of a Gaussian over one block of weights, as functions of tensors.

With C the running curvature per datum, N data, T the temperature, δ the prior precision, g the
gradient of the negative log likelihood per datum at sampled weights, e a fading initial curvature:

    posterior   Λ = (N/T)(C + e) + δ                      exact: the prior enters as it is
    momentum    m ← β m + (1-β) g,   h = m/(1-βᵗ) + (δT/N)(M - M₀)
    direction   d = (C + e + δT/N + damping)⁻¹ h          damping never shrinks the posterior
    mean        M ← M - lr ν d,      ν = min(1, sqrt(κ / Σ lr₀² <d, h>))   over all blocks
    outliers    m ← m min(1, 10 ν)                        a gradient far outside is soon forgotten

Khan & Rue 2023, "The Bayesian learning rule", arXiv:2107.04562; the clip is that of Ba, Grosse &
Martens 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.posterior.prior import BlockPrior, GaussianPrior
from pyrocurv.structures import Diagonal, Rescaled, Structure
from pyrocurv.structures.serialization import serializable


@serializable
@dataclass(frozen=True, eq=False)
class Metric:
    """What the curvature gives a block until its next estimate."""

    precision: Structure  # Λ, of the posterior
    preconditioner: Structure  # C + e + δT/N + damping, of the mean's step


def posterior_precision(
    curvature: Structure, initial_curvature: float, prior: BlockPrior, likelihood_weight: float,
    damping: float
) -> Metric:
    """Λ and the preconditioner, with ratio = N/T and faint = e.

    Where the prior has units they are reckoned in them, `initial_curvature` and `damping` too:
    those then are
    multiples of p_i r_j instead of 1.
    """
    units = prior.units
    delta = prior.packed.precision if units is None else units.delta
    precision = curvature.scale(likelihood_weight).shift(
        delta + likelihood_weight * initial_curvature
    )
    preconditioner = curvature.shift(delta / likelihood_weight + (initial_curvature + damping))
    root = None if units is None else units.root
    if root is None:
        return Metric(precision, preconditioner)
    return Metric(Rescaled(precision, root), Rescaled(preconditioner, root))


def price_hessian_update(
    curvature: Structure, estimate: Tensor, rate: float, prior: GaussianPrior,
    likelihood_weight: float
) -> Diagonal:
    """The diagonal curvature S with one more estimate f [P] averaged in, at `rate` r.

    For w = M + ε, ε ~ N(0, Λ⁻¹), the mean of f = Λ ε ∘ g is that of the Hessian's diagonal (Price's
    theorem). It may be negative, and the last term of

        S ← (1 - r) S + r f + r² (S - f)² / (2 (S + δT/N))

    keeps S + δT/N positive. Where δ has become so small that it was not, S starts anew from 0.
    Lin, Schmidt & Khan 2020, arXiv:2002.10060; IVON: arXiv:2402.17641.
    """
    held, share = curvature.diag(), prior.precision / likelihood_weight
    held = torch.where(held + share > 0, held, torch.zeros_like(held))
    change = estimate - held
    return Diagonal(held + rate * change + (rate * change).square() / (2 * (held + share)))


def regularized_gradient(
    momentum: Tensor, loc: Tensor, prior: GaussianPrior, likelihood_weight: float, bias: float
) -> Tensor:
    """bias · h [P], with bias = 1-βᵗ, for the momentum m of the t-th step (from 1)."""
    return torch.addcmul(
        momentum, prior.deviation(loc), prior.precision, value=bias / likelihood_weight
    )


def trust_region_scale(power: float, kl_clip: float | None) -> float:
    """ν, from power = Σ lr₀² <d, h> over all blocks, with their base learning rates."""
    if kl_clip is None or power <= 0:
        return 1.0
    return min(1.0, math.sqrt(kl_clip / power))


def clip_momentum(momentum: Tensor, power: float, kl_clip: float | None) -> None:
    """Have m, in place, ask for no more than ten times the radius of the trust region.

    The clip makes one step short, while m keeps the direction for as long as it takes to forget it:
    an outlier of 1e15, as a learned log scale gives at an unlucky sample, would rule 300 steps.
    """
    kept = trust_region_scale(power / 100, kl_clip)
    if kept < 1:
        momentum.mul_(kept)


def sampled_kl(
    distances: Sequence[Tensor], squares: Sequence[Tensor], precisions: Sequence[Structure],
    priors: Sequence[GaussianPrior],
) -> Tensor:
    """log q(w) - log p(w) over all blocks: distances Σ δ (w - M₀)², squares εᵀΛε of w = M + ε."""
    pairs = zip(priors, precisions, strict=True)
    narrower = [precision.logdet() for precision in precisions]
    wider = [prior.logdet(precision.size) for prior, precision in pairs]
    return (torch.stack([*narrower, *distances]).sum() - torch.stack([*wider, *squares]).sum()) / 2
