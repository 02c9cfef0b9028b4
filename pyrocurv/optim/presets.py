"""Optimizers of the literature, each a curvature, a structure and an update of `VIOptimizer`.

All take its further arguments as `options`, but for the curvature, the structure and what their own
arguments stand for, and raise what it raises. As in the papers, the mean moves by
`update="natural"` at `temperature=1` unless told otherwise.

    >>> import torch
    >>> from pyrocurv.optim import vogn
    >>> optimizer = vogn(torch.nn.Linear(4, 3), num_data=100, temperature=0.1)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pyrocurv.curvature import Curvature
from pyrocurv.optim.vi import VIOptimizer
from pyrocurv.runtime.validation import (
    check_fraction,
    check_integer,
    check_nonnegative,
    check_positive,
)


def _published(
    name: str, net: nn.Module, num_data: int, lr: float, options: dict[str, Any], **method: Any
) -> VIOptimizer:
    """With the update and the temperature of the papers; TypeError for what defines the method."""
    for option in options:
        if option in method:
            raise TypeError(f"{name} has a {option} of its own: use VIOptimizer({option}=...)")
    usual = {"update": "natural", "temperature": 1.0}
    return VIOptimizer(net, num_data, lr, **{**usual, **options, **method})


def noisy_kfac(net: nn.Module, num_data: int, lr: float = 0.02, **options: Any) -> VIOptimizer:
    """Noisy K-FAC, Zhang et al. 2018, arXiv:1712.02390, with the prior exact in the posterior."""
    return _published(
        "noisy_kfac", net, num_data, lr, options, curvature="fisher", structure="kfac"
    )


def noisy_ekfac(net: nn.Module, num_data: int, lr: float = 0.02, **options: Any) -> VIOptimizer:
    """Noisy EK-FAC, Bae, Zhang & Grosse 2018, arXiv:1811.12565."""
    return _published(
        "noisy_ekfac", net, num_data, lr, options, curvature="fisher", structure="ekfac"
    )


def vogn(
    net: nn.Module, num_data: int, lr: float = 1e-2, *, prior_precision: float = 1.0,
    beta1: float = 0.9, beta2: float = 0.99, damping: float = 0.0, **options: Any,
) -> VIOptimizer:
    """VOGN, Osawa et al. 2019, arXiv:1906.02506: squares of every example's gradient, each step.

        s ← (1-w) s + w mean g²,   w = max(1-β₂, 1/t),   μ ← μ - lr (m̂ + δ̃ μ) / (s + δ̃ + damping)
        σ² = T / (N (s + δ̃)),   δ̃ = T δ / N
    """
    check_fraction("beta1", beta1)
    check_fraction("beta2", beta2)
    curvature = Curvature("empirical", every=1, batch=None, decay=beta2, initial=0.0)
    return _published(
        "vogn", net, num_data, lr, options, curvature=curvature, structure="diag",
        prior_precision=prior_precision, momentum=beta1, damping=damping, kl_clip=None,
    )


def ivon(
    net: nn.Module, num_data: int, lr: float = 0.1, *, weight_decay: float = 1e-4,
    beta1: float = 0.9, beta2: float = 0.99999, hess_init: float = 1.0, **options: Any,
) -> VIOptimizer:
    """IVON, Shen et al. 2024, arXiv:2402.17641: the Hessian's diagonal from the samples' noise.

    `num_data` is the effective sample size λ of the paper, δ the weight decay:

        ĥ = ĝ (θ - m) / σ²,   σ² = 1 / (λ (h + δ)),   m ← m - lr (ḡ + δ m) / (h + δ)
        h ← β₂ h + (1-β₂) ĥ + ½ (1-β₂)² (h - ĥ)² / (h + δ)

    The learning rate is that of these equations: the authors' package multiplies it by
    hess_init + δ unless told `rescale_lr=False`. With a `GradScaler` call
    `scaler.unscale_(optimizer)` inside of `sampled_params()`.
    """
    check_integer("num_data", num_data, 1)
    check_positive("weight_decay", weight_decay)
    check_nonnegative("hess_init", hess_init)
    check_fraction("beta1", beta1)
    check_fraction("beta2", beta2)
    curvature = Curvature("noise", every=1, decay=beta2, initial=hess_init)
    options = {"antithetic": False, "damping": 0.0, "kl_clip": None, **options}
    return _published(
        "ivon", net, num_data, lr, options, curvature=curvature, structure="diag", momentum=beta1,
        prior_precision=weight_decay * num_data,
    )
