"""Predictive distributions of a network that is linearized in its weights around their mean.

For w ~ N(M, Λ⁻¹) the O outputs of an example, f(x, w) ≈ f(x, M) + J (w - M), are normal with
covariance S = J Λ⁻¹ Jᵀ [O, O]. The predictive distribution is then

    normal       N(f, S + σ²)                                               exact
    bernoulli    σ(κ f),  κ = (1 + π S / 8)^-½                              "probit"
    categorical  p_k ∝ 1 / Σ_l exp(-κ_kl (f_k - f_l)),  κ_kl = (1 + π V_kl / 8)^-½
    both         the mean of the probabilities at draws of f                "mc"

where V_kl = S_kk + S_ll - 2 S_kl is the variance of f_k - f_l. The categorical rule is the probit
approximation for every pair of classes, and the Bernoulli's for two classes, where it is within
0.02 of the integral. From three classes on it is not: on ten classes it doubts so much that a third
or more of the negative log likelihood is its own, and draws are the default.

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

from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.last_layer import last_layer_covariance
from pyrocurv.curvature.output_covariance import BlockCovariance, OutputCovariance, propagate
from pyrocurv.guides import StructuredGuide
from pyrocurv.guides.families import DenseFamily
from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.replay import ReplayMessenger
from pyrocurv.infer.linearized_draws import CovarianceDraws, WeightDraws
from pyrocurv.infer.model_run import auxiliary_medians, layer_calls, mean_weights
from pyrocurv.layers.capture import Capture
from pyrocurv.runtime.choices import Link
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.module_state import eval_mode, still_frozen
from pyrocurv.runtime.rng import isolated_rng
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import InverseDense
from pyrocurv.structures.linalg import at_least_single

LINKS = ("auto", "mc", "probit")
MAX_PAIRS = 2**24  # of classes whose differences are in memory at once
Draws = CovarianceDraws | WeightDraws


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
def predictive(
    likelihood: Distribution, event: int, covariance: Tensor | OutputCovariance
) -> Distribution:
    """The predictive distribution for outputs with a covariance, in closed form.

    Args:
        likelihood: at the mean of the weights, inside of masks and `Independent`.
        event: how many of its last batch axes belong to one event.
        covariance: S of the linear predictor, [B, O, O]; for likelihoods that have a `place_size`,
            its blocks at each place.

    Raises:
        ValueError: a likelihood that is not registered.
    """
    raise ValueError(f"predict() has no closed form for {type(likelihood).__name__}")


@singledispatch
def place_size(likelihood: Distribution, event: int) -> int | None:
    """How many outputs that follow each other need their covariance; None: all of an example."""
    return None


@singledispatch
def averaged(likelihood: Distribution, event: int, draws: Draws) -> Distribution | None:
    """The predictive distribution from draws of the outputs; None where there is no such rule."""
    return None


def _at_places(covariance: Tensor | OutputCovariance, size: int) -> OutputCovariance:
    """The diagonal blocks [N, C, C] of S [B, O, O]."""
    if not isinstance(covariance, Tensor):
        return covariance
    blocks = covariance.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return BlockCovariance(blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1).flatten(0, 1))


# ---- normal -------------------------------------------------------------------------------------


@place_size.register
def _(likelihood: Normal, event: int) -> int:
    return likelihood.loc.shape[-1] if event == 1 and likelihood.loc.dim() == 2 else 1


@predictive.register
def _(likelihood: Normal, event: int, covariance: Tensor | OutputCovariance) -> Distribution:
    loc, noise = likelihood.loc.detach(), likelihood.scale.detach().square()
    if event == 1 and loc.dim() == 2:
        matrices = _at_places(covariance, loc.shape[-1]).dense() + noise.diag_embed()
        return dist.MultivariateNormal(*map(at_least_single, (loc, matrices)))
    places = _at_places(covariance, 1)
    return dist.Normal(loc, (places.diag().reshape(loc.shape) + noise).sqrt()).to_event(event)


@place_size.register
def _(likelihood: MultivariateNormal, event: int) -> int:
    return likelihood.loc.shape[-1]


@predictive.register
def _(
    likelihood: MultivariateNormal, event: int, covariance: Tensor | OutputCovariance
) -> Distribution:
    loc, noise = likelihood.loc.detach(), likelihood.covariance_matrix.detach()
    matrices = _at_places(covariance, loc.shape[-1]).dense().reshape(noise.shape)
    return dist.MultivariateNormal(loc, matrices + noise).to_event(event)


# ---- Bernoulli ----------------------------------------------------------------------------------


@place_size.register
def _(likelihood: Bernoulli, event: int) -> int:
    return 1


@predictive.register
def _(likelihood: Bernoulli, event: int, covariance: Tensor | OutputCovariance) -> Distribution:
    logits = likelihood.logits.detach()
    variance = _at_places(covariance, 1).diag().reshape(logits.shape)
    return dist.Bernoulli(logits=logits * _kappa(variance)).to_event(event)


@averaged.register
def _(likelihood: Bernoulli, event: int, draws: Draws) -> Distribution:
    logits = likelihood.logits.detach()
    both = draws.log_mean(logits.reshape(-1, 1), is_binary=True)
    return dist.Bernoulli(logits=(both[:, 0] - both[:, 1]).reshape(logits.shape)).to_event(event)


# ---- categorical --------------------------------------------------------------------------------


@place_size.register
def _(likelihood: Categorical, event: int) -> int:
    return likelihood.logits.shape[-1]


@predictive.register
def _(likelihood: Categorical, event: int, covariance: Tensor | OutputCovariance) -> Distribution:
    logits = likelihood.logits.detach()  # [B, *R, C]
    classes = logits.shape[-1]
    flat, places = logits.reshape(-1, classes), _at_places(covariance, classes)
    step = max(1, MAX_PAIRS // classes**2)
    scores = [
        _pairwise(flat[start:start + step], places[start:start + step].dense())
        for start in range(0, len(flat), step)
    ]
    return dist.Categorical(logits=torch.cat(scores).reshape(logits.shape)).to_event(event)


def _pairwise(logits: Tensor, covariance: Tensor) -> Tensor:
    """The probit approximation for all pairs of classes, for logits [N, C] and S [N, C, C]."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    pair_variance = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance  # V_kl
    difference = logits.unsqueeze(-1) - logits.unsqueeze(-2)  # f_k - f_l
    return -torch.logsumexp(-_kappa(pair_variance.clamp(min=0)) * difference, -1)


@averaged.register
def _(likelihood: Categorical, event: int, draws: Draws) -> Distribution:
    logits = likelihood.logits.detach()
    found = draws.log_mean(logits.reshape(-1, logits.shape[-1]))
    return dist.Categorical(logits=found.reshape(logits.shape)).to_event(event)


def _kappa(variance: Tensor) -> Tensor:
    return (1 + math.pi / 8 * variance).rsqrt()


# ---- prediction ---------------------------------------------------------------------------------


def predict(
    model: Callable[..., Any], guide: StructuredGuide, args: Any, kwargs: Any, link: Link = "auto",
    num_samples: int = 256, workers: Workers = ALONE,
) -> Distribution:
    """The predictive distribution for the model's arguments; workers share draws of weights out.

    Raises ValueError for a model without a single likelihood, or one that is not registered.
    """
    weights = mean_weights(guide)
    replay = ReplayMessenger({**weights, **auxiliary_medians(guide)}, partial=True)
    with (
        torch.enable_grad(), isolated_rng(guide.blocks[0].raw_loc.device),
        eval_mode(modules(model)), still_frozen(modules(model)), twice_differentiable(),
        replay, Capture(dict(weights)) as capture,
    ):
        model(*args, **kwargs)
    wrapped = _only_likelihood(replay)
    likelihood = unwrap(wrapped, masks=True)
    with torch.enable_grad():
        outputs = linear_predictor(likelihood)
    if not bool(outputs.isfinite().all()):
        name = replay.observed[0].name if replay.observed else "obs"
        raise FloatingPointError(f"site {name!r}: the network's output is not finite")
    event = len(wrapped.event_shape) - len(likelihood.event_shape)
    by_draws, pairs = _takes_draws(likelihood, link), (num_samples + 1) // 2
    calls = layer_calls(guide, capture.trace().calls, weights, len(outputs))
    blocks = [family.block for family in guide.blocks]
    with torch.no_grad():
        precisions = [
            InverseDense(family.scale_tril) if isinstance(family, DenseFamily)
            else family.precision() for family in guide.blocks
        ]
    size = place_size(likelihood, event)
    covariance: Tensor | OutputCovariance | None = None
    if size is not None:
        is_logits = isinstance(likelihood, Categorical)
        covariance = last_layer_covariance(blocks, precisions, outputs, calls, size, is_logits)
    if covariance is None and by_draws and outputs[0].numel() > pairs:
        draws = WeightDraws(blocks, precisions, weights, outputs, pairs, workers)
        found = averaged(likelihood, event, draws)
    else:
        if covariance is None:
            matrices = propagate(blocks, precisions, outputs, calls, size)  # [B, R, C, C]
            covariance = matrices[:, 0] if size is None else BlockCovariance(matrices.flatten(0, 1))
        with torch.no_grad():
            if by_draws and not isinstance(covariance, Tensor):
                found = averaged(likelihood, event, CovarianceDraws(covariance, pairs))
            else:
                found = predictive(likelihood, event, covariance)
    if found is None:
        raise ValueError(
            "link='mc' supports Bernoulli and categorical likelihoods (for a normal one the closed "
            f"form is exact), got {type(likelihood).__name__}"
        )
    return found


def _takes_draws(likelihood: Distribution, link: str) -> bool:
    """Whether the outputs are drawn: from three classes on, or where it is asked for."""
    if isinstance(likelihood, (Normal, MultivariateNormal)):
        return False  # the closed form is exact
    if link == "auto":
        return isinstance(likelihood, Categorical) and likelihood.logits.shape[-1] > 2
    return link == "mc"


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
