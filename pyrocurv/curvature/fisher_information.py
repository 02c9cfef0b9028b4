"""The Fisher information of a likelihood in its own parameters, as a root in closed form.

For parameters θ it is I = E[∇ log p ∇ log pᵀ] = Σ_k v_k v_kᵀ, and v_k is the gradient of a scalar:

    finite support       sqrt(p(y_k)) log p(y_k)
    location and scale   sqrt(i) μ/σ and sqrt(j) σ/σ with detached denominators, if p is symmetric
    others               Lᵀθ for I = L Lᵀ

All are exact. Pulled back through a network they give the Gauss-Newton matrix if θ is a linear
function of an exponential family's natural parameters. Otherwise (a scale, Student's t) they give
its generalization: the expected Hessian in θ, which is never indefinite.

Martens 2020, arXiv:1412.1193.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor
from torch import distributions as dist
from torch.distributions import Distribution


@singledispatch
def root(likelihood: Distribution) -> Iterator[Tensor]:
    """Scalars whose gradients are a root of the Fisher information; register other families.

    Yields tensors of the likelihood's batch shape [B, *R], possibly followed by event axes; the
    entries are independent variables.

    Raises ValueError for a family that is not registered and has no finite support, and for one
    that is only supported with a fixed shape parameter, if that requires a gradient.

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
    masked: Any = likelihood
    if hasattr(masked, "_mask"):  # Pyro's MaskedDistribution, without importing Pyro
        yield from _masked(masked.base_dist, torch.as_tensor(masked._mask))
        return
    if not likelihood.has_enumerate_support:
        names = ", ".join(sorted({family.__name__ for family in root.registry} - WRAPPERS))
        raise ValueError(
            f"curvature='ggn' supports likelihoods of finite support and {names}, got "
            f"{type(likelihood).__name__}: use 'fisher', which samples its targets"
        )
    for value in likelihood.enumerate_support(expand=False):
        log_prob = likelihood.log_prob(value)
        yield (log_prob.detach() / 2).exp() * log_prob


WRAPPERS = {"object", "Independent"}


@root.register(dist.Independent)
@root.register(dist.LogNormal)
def _(likelihood: dist.Independent | dist.LogNormal) -> Iterator[Tensor]:
    yield from root(likelihood.base_dist)


def _location_scale(
    likelihood: Any, loc: float | Tensor, scale: float | Tensor
) -> Iterator[Tensor]:
    """From the information in the location and in the scale of the density with scale 1."""
    divisor = likelihood.scale.detach()
    for value, information in ((likelihood.loc, loc), (likelihood.scale, scale)):
        if value.requires_grad:
            yield information**0.5 * value / divisor


for _family, _information in {
    dist.Normal: (1.0, 2.0), dist.Laplace: (1.0, 1.0), dist.Cauchy: (0.5, 0.5)
}.items():
    root.register(_family, partial(_location_scale, loc=_information[0], scale=_information[1]))


@root.register
def _(likelihood: dist.StudentT) -> Iterator[Tensor]:
    df = _fixed(likelihood, "df")
    return _location_scale(likelihood, (df + 1) / (df + 3), 2 * df / (df + 3))


@root.register
def _(likelihood: dist.MultivariateNormal) -> Iterator[Tensor]:
    """[B, *R, D]."""
    scale = _fixed(likelihood, "scale_tril")
    yield torch.linalg.solve_triangular(scale, likelihood.loc[..., None], upper=False).squeeze(-1)


@root.register
def _(likelihood: dist.Poisson) -> Iterator[Tensor]:
    yield likelihood.rate / _positive(likelihood.rate).sqrt()


@root.register
def _(likelihood: dist.NegativeBinomial) -> Iterator[Tensor]:
    """In the logits r p, for r failures."""
    count = _fixed(likelihood, "total_count")
    yield (count * likelihood.probs.detach()).sqrt() * likelihood.logits


@root.register
def _(likelihood: dist.Binomial) -> Iterator[Tensor]:
    """In the logits n p (1 - p), for n trials."""
    trials, p = _fixed(likelihood, "total_count"), likelihood.probs.detach()
    yield (trials * p * (1 - p)).sqrt() * likelihood.logits


@root.register
def _(likelihood: dist.Exponential) -> Iterator[Tensor]:
    yield likelihood.rate / _positive(likelihood.rate)


@root.register
def _(likelihood: dist.Gamma) -> Iterator[Tensor]:
    """In concentration a and rate r  [[ψ'(a), -1/r], [-1/r, a/r²]]."""
    shape, rate = _positive(likelihood.concentration), _positive(likelihood.rate)
    corner = torch.special.polygamma(1, shape).sqrt()
    below = -1 / (rate * corner)
    yield corner * likelihood.concentration + below * likelihood.rate
    yield (shape / rate.square() - below.square()).clamp(min=0).sqrt() * likelihood.rate


def _masked(likelihood: Distribution, mask: Tensor) -> Iterator[Tensor]:
    """Zero where the mask drops a value, such as single entries of an event."""
    mask = mask.expand(likelihood.batch_shape)
    for scalar in root(likelihood):
        keep = mask.reshape(*mask.shape, *[1] * (scalar.dim() - mask.dim()))
        yield torch.where(keep, scalar, torch.zeros_like(scalar))


def _fixed(likelihood: Distribution, name: str) -> Tensor:
    value: Tensor = getattr(likelihood, name)
    if value.requires_grad:
        raise ValueError(
            f"curvature='ggn' supports {type(likelihood).__name__} for a {name} that is fixed, "
            "here it is a latent, a parameter or an output of the network: use 'fisher', which "
            "samples its targets"
        )
    return value


def _positive(value: Tensor) -> Tensor:
    """The value as a constant that is safe to divide by."""
    return value.detach().clamp(min=torch.finfo(value.dtype).tiny)
