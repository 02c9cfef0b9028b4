"""The Fisher information of a likelihood in its own parameters, as a root in closed form.

For parameters θ it is I = E[∇ log p ∇ log pᵀ] = Σ_k v_k v_kᵀ, and v_k is given as a scalar whose
gradient it is:

    finite support       sqrt(p(y_k)) log p(y_k)
    location and scale   sqrt(i) μ/σ and sqrt(j) σ/σ, denominators detached, for symmetric densities
    others               Lᵀθ for I = L Lᵀ

All are exact. Pulled back through a network they give the Gauss-Newton matrix where θ is a linear
function of an exponential family's natural parameters, and elsewhere (a scale, Student's t) what
stands for it: the expected Hessian in θ, which is never indefinite.

Martens 2020, arXiv:1412.1193.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch

import torch
from torch import Tensor
from torch.distributions import (
    Binomial,
    Cauchy,
    Distribution,
    Exponential,
    Gamma,
    Independent,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)


@singledispatch
def root(likelihood: Distribution) -> Iterator[Tensor]:
    """Scalars whose gradients are a root of the Fisher information; register your own family.

    Yields tensors of the likelihood's batch shape [B, *R], or with event axes behind it; the
    entries are independent variables.

    Raises ValueError for a family that is not registered and has no finite support, and for one
    that is known with a fixed shape only, where that needs a gradient.

    Example:
        >>> import torch
        >>> from torch.distributions import HalfNormal
        >>> from pyrocurv.curvature.fisher_information import root
        >>> @root.register
        ... def _(likelihood: HalfNormal):  # the information in the scale is 2/σ²
        ...     yield 2**0.5 * likelihood.scale / likelihood.scale.detach()
        >>> scale = torch.tensor([2.0], requires_grad=True)
        >>> (scalar,) = root(HalfNormal(scale))
        >>> torch.autograd.grad(scalar.sum(), scale)[0] ** 2
        tensor([0.5000])
    """
    if hasattr(likelihood, "_mask"):  # Pyro's MaskedDistribution, without Pyro
        base: Distribution = likelihood.base_dist  # type: ignore[attr-defined]  # all that have a mask
        yield from _masked(base, torch.as_tensor(likelihood._mask))
        return
    if not likelihood.has_enumerate_support:
        known = ", ".join(sorted({family.__name__ for family in root.registry} - WRAPPERS))
        raise ValueError(
            f"curvature='ggn' knows likelihoods of finite support and {known}, got "
            f"{type(likelihood).__name__}: use 'fisher', which samples its targets"
        )
    for value in likelihood.enumerate_support(expand=False):
        log_prob = likelihood.log_prob(value)
        yield (log_prob.detach() / 2).exp() * log_prob


WRAPPERS = {"object", "Independent"}


@root.register
def _(likelihood: Independent) -> Iterator[Tensor]:
    yield from root(likelihood.base_dist)


@root.register
def _(likelihood: LogNormal) -> Iterator[Tensor]:
    yield from root(likelihood.base_dist)


@root.register
def _(likelihood: Normal) -> Iterator[Tensor]:
    return _located(likelihood, 1.0, 2.0)


@root.register
def _(likelihood: Laplace) -> Iterator[Tensor]:
    return _located(likelihood, 1.0, 1.0)


@root.register
def _(likelihood: Cauchy) -> Iterator[Tensor]:
    return _located(likelihood, 0.5, 0.5)


@root.register
def _(likelihood: StudentT) -> Iterator[Tensor]:
    df = _fixed(likelihood, "df")
    return _located(likelihood, (df + 1) / (df + 3), 2 * df / (df + 3))


@root.register
def _(likelihood: MultivariateNormal) -> Iterator[Tensor]:
    """[B, *R, D]."""
    scale = _fixed(likelihood, "scale_tril")
    yield torch.linalg.solve_triangular(scale, likelihood.loc[..., None], upper=False).squeeze(-1)


@root.register
def _(likelihood: Poisson) -> Iterator[Tensor]:
    yield likelihood.rate / _positive(likelihood.rate).sqrt()


@root.register
def _(likelihood: NegativeBinomial) -> Iterator[Tensor]:
    """In the logits r p, for r failures."""
    count = _fixed(likelihood, "total_count")
    yield (count * likelihood.probs.detach()).sqrt() * likelihood.logits


@root.register
def _(likelihood: Binomial) -> Iterator[Tensor]:
    """In the logits n p (1 - p), for n trials."""
    trials, p = _fixed(likelihood, "total_count"), likelihood.probs.detach()
    yield (trials * p * (1 - p)).sqrt() * likelihood.logits


@root.register
def _(likelihood: Exponential) -> Iterator[Tensor]:
    yield likelihood.rate / _positive(likelihood.rate)


@root.register
def _(likelihood: Gamma) -> Iterator[Tensor]:
    """In concentration a and rate r  [[ψ'(a), -1/r], [-1/r, a/r²]]."""
    shape, rate = _positive(likelihood.concentration), _positive(likelihood.rate)
    corner = torch.special.polygamma(1, shape).sqrt()
    beside = -1 / (rate * corner)
    yield corner * likelihood.concentration + beside * likelihood.rate
    yield (shape / rate.square() - beside.square()).clamp(min=0).sqrt() * likelihood.rate


def _masked(likelihood: Distribution, mask: Tensor) -> Iterator[Tensor]:
    """Nothing where the mask drops a value: single entries of an event, say."""
    mask = mask.expand(likelihood.batch_shape)
    for scalar in root(likelihood):
        kept = mask.reshape(*mask.shape, *[1] * (scalar.dim() - mask.dim()))
        yield torch.where(kept, scalar, torch.zeros_like(scalar))


def _located(
    likelihood: Normal | Laplace | Cauchy | StudentT, of_loc: float | Tensor,
    of_scale: float | Tensor,
) -> Iterator[Tensor]:
    """From the information in location and scale at scale 1."""
    scale = likelihood.scale.detach()
    for value, information in ((likelihood.loc, of_loc), (likelihood.scale, of_scale)):
        if value.requires_grad:
            yield information**0.5 * value / scale


def _fixed(likelihood: Distribution, name: str) -> Tensor:
    value: Tensor = getattr(likelihood, name)
    if value.requires_grad:
        raise ValueError(
            f"curvature='ggn' knows {type(likelihood).__name__} for a {name} that is fixed, here "
            "it is a latent, a parameter or of the network: use 'fisher', which samples its targets"
        )
    return value


def _positive(value: Tensor) -> Tensor:
    """Detached, and so far from 0 that it divides."""
    return value.detach().clamp(min=torch.finfo(value.dtype).tiny)
