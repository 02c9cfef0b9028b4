"""The retraction of one Gaussian over all latents of a model.

For E(z) = -log p(y | z) - T (log p(z) + ln |det dz/du|) of real vectors u ~ N(m, Λ⁻¹), at samples
in antithetic pairs, with g and H the means of ∇E and ∇²E and Λ = L Lᵀ:

    X = L⁻¹ (H/T - Λ) L⁻ᵀ,   r = min(rate, 1/|X|)
    Λ ← L (1 + r X + r² X²/2) Lᵀ          stays positive definite, as 1 + x + x²/2 > 0 does
    m ← m - lr ν Λ⁻¹ g/T,    ν = min(1, sqrt(κ / (lr² <Λ⁻¹g/T, g/T>)))

Exact for a Gaussian posterior (a diagonal Λ converges to its conditional variances); for others its
fixed point is that of the ELBO. The bound on r keeps a sample from a heavy tail from blowing up Λ.

Lin, Schmidt & Khan 2020, arXiv:2002.10060; Khan & Rue 2023, arXiv:2107.04562.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyrocurv.curvature.running_curvature import RunningCurvature
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior
from pyrocurv.posterior.state import BlockState
from pyrocurv.structures import Dense, Diagonal, Structure
from pyrocurv.structures.linalg import at_least_single

MAX_STEP = 1.0  # of |r X|
LOG_2PI = math.log(2 * math.pi)


def init_joint(
    block: Block, hyperparameters: Hyperparameters, mean: Tensor, precision: Structure
) -> BlockState:
    """The joint Gaussian before the first step; its prior is part of the log joint."""
    zero = mean.new_zeros(())
    if not isinstance(precision, Diagonal):
        precision = Dense(precision.dense())
    return BlockState(
        block, BlockPrior(GaussianPrior(zero, zero, zero_mean=True)), hyperparameters, mean,
        RunningCurvature(0, precision), precision, precision, torch.zeros_like(mean),
    )


def update_joint(state: BlockState, target: Tensor, rate: float, step: int) -> BlockState:
    """The block with its precision moved towards the Hessian of E/T, [P, P] or its diagonal [P].

    Raises FloatingPointError if the precision is too ill-conditioned.
    """
    try:
        precision = retract(state.precision, target, rate)
    except torch.linalg.LinAlgError as error:
        raise ill_conditioned(step) from error
    curvature = RunningCurvature(state.curvature.count + 1, precision)
    return replace(state, precision=precision, preconditioner=precision, curvature=curvature)


def ill_conditioned(step: int) -> FloatingPointError:
    """The error of a log joint without a mode."""
    return FloatingPointError(
        f"step {step}: the precision is too ill-conditioned to go on. Has the log joint no mode, "
        "as where a scale runs to 0? num_particles > 0 or a non-centered model help"
    )


def retract(precision: Structure, target: Tensor, rate: float) -> Dense | Diagonal:
    """Λ moved towards the target H [P, P], or its diagonal [P]."""
    if isinstance(precision, Diagonal):
        values = precision.diag()
        x = target / values - 1
        r = _bounded(x, rate)
        return Diagonal(values * (1 + r * x + (r * x).square() / 2))
    given = precision.dense()
    matrix, target = at_least_single(given), at_least_single(target)
    root = torch.linalg.cholesky(matrix)
    half = torch.linalg.solve_triangular(root, target, upper=False)
    x = torch.linalg.solve_triangular(root, half.mT, upper=False)
    x = (x + x.mT) / 2 - torch.eye(len(x)).to(x)
    x = _bounded(x, rate) * x
    change = x + x @ x / 2
    moved = matrix + root @ change @ root.mT
    return Dense(((moved + moved.mT) / 2).to(given.dtype))


def _bounded(x: Tensor, rate: float) -> Tensor:
    return (MAX_STEP / x.norm()).clamp(max=rate)


def log_density(precision: Structure, squared_norm: Tensor) -> Tensor:
    """log q of a sample with |z|² = squared_norm."""
    return (precision.logdet() - squared_norm - precision.size * LOG_2PI) / 2
