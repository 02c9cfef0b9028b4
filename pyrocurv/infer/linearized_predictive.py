"""Predictive distributions of a network that is linear in its weights around their mean.

For w ~ N(M, Λ⁻¹) the outputs f(x, w) ≈ f(x, M) + J (w - M) are normal with covariance S = J Λ⁻¹ Jᵀ
[M, M] for each example. Then

    normal       N(f, S + σ²)                                               in closed form
    bernoulli    σ(κ f),  κ = (1 + π S / 8)^-½                              probit
    categorical  p_k ∝ 1 / Σ_l exp(-κ_kl (f_k - f_l)),  κ_kl = (1 + π V_kl / 8)^-½

with V_kl = S_kk + S_ll - 2 S_kl the variance of f_k - f_l: the probit for each pair of classes,
which for two of them is the bernoulli's. It does not ask for the logits' common shift, as a probit
for each logit by itself would; it is the nearer of the two to the integral for few classes.

MacKay 1992, "The evidence framework applied to classification networks"; Daxberger et al. 2021,
arXiv:2106.14806; the pairs: Lu, Ie & Sha 2020, arXiv:2006.07584.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    MultivariateNormal,
    Normal,
)

from pyrocurv.curvature.output_covariance import propagate
from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.replay import ReplayMessenger
from pyrocurv.infer.model_run import auxiliary_medians, layer_calls, mean_weights
from pyrocurv.layers.capture import Capture
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.module_state import eval_mode, still_frozen
from pyrocurv.runtime.rng import isolated_rng


@singledispatch
def linear_predictor(likelihood: Distribution) -> Tensor:
    """What is linear in the weights: the parameter of a likelihood [B, ...]. Register your own.

    Raises ValueError for a likelihood that has none here.
    """
    raise ValueError(
        "predict() knows the (multivariate) normal, Bernoulli and categorical likelihood, got "
        f"{type(likelihood).__name__}"
    )


@linear_predictor.register
def _(likelihood: Normal) -> Tensor:
    return likelihood.loc


@linear_predictor.register
def _(likelihood: MultivariateNormal) -> Tensor:
    return likelihood.loc


@linear_predictor.register
def _(likelihood: Bernoulli) -> Tensor:
    return likelihood.logits


@linear_predictor.register
def _(likelihood: Categorical) -> Tensor:
    return likelihood.logits


@singledispatch
def predictive(likelihood: Distribution, event: int, covariance: Tensor) -> Distribution:
    """The predictive distribution for outputs of covariance S [B, M, M].

    `likelihood` is the innermost, at the mean of the weights; its last `event` batch axes are one
    event. Without gradients.
    """
    raise ValueError(f"predict() has no closed form for {type(likelihood).__name__}")


def _variance(like: Tensor, covariance: Tensor) -> Tensor:
    return covariance.diagonal(dim1=-2, dim2=-1).reshape(like.shape)


@predictive.register
def _(likelihood: Normal, event: int, covariance: Tensor) -> Distribution:
    loc, noise = likelihood.loc.detach(), likelihood.scale.detach().square()
    if event == 1 and loc.dim() == 2:
        return dist.MultivariateNormal(loc, covariance + noise.diag_embed())
    return dist.Normal(loc, (_variance(loc, covariance) + noise).sqrt()).to_event(event)


@predictive.register
def _(likelihood: MultivariateNormal, event: int, covariance: Tensor) -> Distribution:
    loc, noise = likelihood.loc.detach(), likelihood.covariance_matrix.detach()
    if loc.dim() != 2:
        raise ValueError(f"predict() takes one MultivariateNormal a datum, got {tuple(loc.shape)}")
    return dist.MultivariateNormal(loc, covariance + noise)


@predictive.register
def _(likelihood: Bernoulli, event: int, covariance: Tensor) -> Distribution:
    logits = likelihood.logits.detach()
    return dist.Bernoulli(logits=logits * _kappa(_variance(logits, covariance))).to_event(event)


@predictive.register
def _(likelihood: Categorical, event: int, covariance: Tensor) -> Distribution:
    logits = likelihood.logits.detach()  # [B, *R, C]
    classes = logits.shape[-1]
    places = covariance.unflatten(-1, (-1, classes)).unflatten(-3, (-1, classes))
    places = places.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [B, R, C, C], of one place each
    places = places.reshape(*logits.shape, classes)
    own = places.diagonal(dim1=-2, dim2=-1)
    spread = own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * places  # V_kl
    apart = logits.unsqueeze(-1) - logits.unsqueeze(-2)  # f_k - f_l
    scores = -torch.logsumexp(-_kappa(spread.clamp(min=0)) * apart, -1)
    return dist.Categorical(logits=scores).to_event(event)


def _kappa(variance: Tensor) -> Tensor:
    return (1 + math.pi / 8 * variance).rsqrt()


def predict(
    model: Callable[..., Any], guide: StructuredGuide, args: Any, kwargs: Any
) -> Distribution:
    """The predictive distribution at the model's arguments; raises what `Laplace.predict` says."""
    weights = mean_weights(guide)
    replay = ReplayMessenger({**weights, **auxiliary_medians(guide)}, partial=True)
    with (
        torch.enable_grad(), isolated_rng(guide.blocks[0].raw_loc.device),
        eval_mode(modules(model)), still_frozen(modules(model)),
        replay, Capture(dict(weights)) as capture,
    ):
        model(*args, **kwargs)
    wrapped = _only_likelihood(replay)
    likelihood = unwrap(wrapped, masks=True)
    with torch.enable_grad():
        outputs = linear_predictor(likelihood)
    calls = layer_calls(guide, capture, weights, len(outputs))
    with torch.no_grad():
        precisions = [family.precision() for family in guide.blocks]
    covariance = propagate([f.block for f in guide.blocks], precisions, outputs, calls)
    with torch.no_grad():
        event = len(wrapped.event_shape) - len(likelihood.event_shape)
        return predictive(likelihood, event, covariance)


def _only_likelihood(replay: ReplayMessenger) -> Distribution:
    """The distribution of the one site that is not a latent of the guide, observed or not."""
    sites = [*replay.observed, *replay.latents.values()]
    likelihoods = {site.name: site.fn for site in sites if site.name not in replay.values}
    if len(likelihoods) != 1:
        raise ValueError(
            "predict() needs a model with exactly one site in addition to the latents, got "
            f"{', '.join(likelihoods) or 'none'}"
        )
    return next(iter(likelihoods.values()))
