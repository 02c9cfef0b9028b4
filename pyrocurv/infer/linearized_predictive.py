"""Predictive distributions of a network that is linearized in its weights around their mean.

For w ~ N(M, Λ⁻¹) the O outputs of an example, f(x, w) ≈ f(x, M) + J (w - M), are normal with
covariance S = J Λ⁻¹ Jᵀ [O, O]. The predictive distribution is then

    normal       N(f, S + σ²)                                               exact
    bernoulli    σ(κ f),  κ = (1 + π S / 8)^-½                              probit approximation
    categorical  p_k ∝ 1 / Σ_l exp(-κ_kl (f_k - f_l)),  κ_kl = (1 + π V_kl / 8)^-½

where V_kl = S_kk + S_ll - 2 S_kl is the variance of f_k - f_l. The last is the probit approximation
for every pair of classes, and the Bernoulli's for two classes. Unlike a probit approximation of
each logit, it does not depend on the variance of a shift that all logits share, and for few classes
it is closer to the integral.

MacKay 1992, "The evidence framework applied to classification networks"; Daxberger et al. 2021,
arXiv:2106.14806; pairs of classes: Lu, Ie & Sha 2020, arXiv:2006.07584.
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
    """The parameter [B, ...] of a likelihood that is linearized in the weights.

    Register a function for the likelihoods of your own, here and for `predictive`.

    Raises:
        ValueError: a likelihood that is not registered.

    Example:
        >>> import torch
        >>> from pyrocurv.infer.linearized_predictive import linear_predictor
        >>> linear_predictor(torch.distributions.Bernoulli(logits=torch.tensor([0.5])))
        tensor([0.5000])
    """
    raise ValueError(
        "predict() supports normal, multivariate normal, Bernoulli and categorical likelihoods, "
        f"got {type(likelihood).__name__}"
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
    """The predictive distribution for outputs with a covariance, without gradients.

    Args:
        likelihood: at the mean of the weights, inside of masks and `Independent`.
        event: how many of its last batch axes belong to one event.
        covariance: S of the linear predictor, [B, O, O].

    Raises:
        ValueError: a likelihood that is not registered.
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
        raise ValueError(
            "predict() needs a single MultivariateNormal for each datum, with loc [B, O], got "
            f"{tuple(loc.shape)}"
        )
    return dist.MultivariateNormal(loc, covariance + noise)


@predictive.register
def _(likelihood: Bernoulli, event: int, covariance: Tensor) -> Distribution:
    logits = likelihood.logits.detach()
    return dist.Bernoulli(logits=logits * _kappa(_variance(logits, covariance))).to_event(event)


@predictive.register
def _(likelihood: Categorical, event: int, covariance: Tensor) -> Distribution:
    logits = likelihood.logits.detach()  # [B, *R, C]
    classes = logits.shape[-1]
    # [B, R·C, R·C] -> [B, R, C, C]: the logits of one of R positions with each other
    blocks = covariance.unflatten(-1, (-1, classes)).unflatten(-3, (-1, classes))
    blocks = blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(*logits.shape, classes)
    variance = blocks.diagonal(dim1=-2, dim2=-1)
    pair_variance = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * blocks  # V_kl
    difference = logits.unsqueeze(-1) - logits.unsqueeze(-2)  # f_k - f_l
    scores = -torch.logsumexp(-_kappa(pair_variance.clamp(min=0)) * difference, -1)
    return dist.Categorical(logits=scores).to_event(event)


def _kappa(variance: Tensor) -> Tensor:
    return (1 + math.pi / 8 * variance).rsqrt()


def predict(
    model: Callable[..., Any], guide: StructuredGuide, args: Any, kwargs: Any
) -> Distribution:
    """The predictive distribution for the model's arguments.

    Raises ValueError for a model without a single likelihood, or one that is not registered.
    """
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
    calls = layer_calls(guide, capture.trace().calls, weights, len(outputs))
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
