"""Numbers that say how good and how certain predictions are.

The uncertainty of a mixture of predictions, one for each sample of a posterior, has two parts: what
the samples say themselves (aleatoric), and what they disagree about (epistemic). With p_s the
prediction of sample s and p their mean,

    H(p)  =  1/S Σ_s H(p_s)  +  1/S Σ_s KL(p_s ‖ p),

where the last term is the mutual information of the outcome and the weights; for means μ_s and
scales σ_s the law of total variance has mean(σ_s²) + var(μ_s) in its place.
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, OneHotCategorical

from pyrocurv.runtime.validation import (
    as_number,
    check_choice,
    check_nonnegative,
    check_tensor,
    is_integer,
    shown,
)

__all__ = ["Uncertainty", "uncertainty"]

LIKELIHOODS = ("categorical", "bernoulli")


class Uncertainty(NamedTuple):
    """The uncertainty of each prediction: total = aleatoric + epistemic, both at least 0.

    Entropies in nats for classes, variances in squared units of the target for normals.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def uncertainty(
    samples: Any = None, *, logits: Tensor | None = None, probs: Tensor | None = None,
    mean: Tensor | None = None, scale: Tensor | float | None = None,
    likelihood: str = "categorical", dim: int = 0,
) -> Uncertainty:
    """Total, aleatoric and epistemic uncertainty of the predictions of S samples.

    Exactly one of `samples`, `logits`, `probs` and `mean` is needed. With `"_RETURN"` of
    `pyrocurv.infer.Predictive` for a `Classifier` that is `uncertainty(logits=...)`.

    Args:
        samples: a `Categorical`, `OneHotCategorical`, `Bernoulli` or `Normal` distribution with an
            axis of samples in its batch shape.
        logits: of the classes, [S, N, C] (or [S, ..., C]), or with likelihood="bernoulli" of the
            outcome 1, [S, N] (or [S, ...]).
        probs: probabilities in the place of the logits.
        mean: means of normal predictions [S, N] (or [S, ...]).
        scale: their standard deviations, a number or a tensor that broadcasts with `mean`. None:
            the noise is not counted, aleatoric is 0.
        likelihood: "categorical" or "bernoulli", what `logits` or `probs` are of.
        dim: the axis of samples.

    Returns:
        `Uncertainty(total, aleatoric, epistemic)`, each [N] (or [...]): entropies in nats,
        epistemic being the mutual information of outcome and weights, 0 for one sample; for normals
        variances, with 1/S.

    Raises:
        TypeError: not exactly one of the four, something that is no tensor of real numbers, or
            another distribution.
        ValueError: too few axes, no sample, `dim` not an axis of samples, NaN, negative scales,
            `probs` that are not probabilities, or `logits` that are.

    Reference: Depeweg et al. 2018, "Decomposition of uncertainty in Bayesian deep learning",
    arXiv:1710.07283.

    Example:
        >>> import torch
        >>> sure, torn = [[[0.0, 0.0]], [[0.0, 0.0]]], [[[9.0, -9.0]], [[-9.0, 9.0]]]
        >>> [round(float(x), 3) for x in uncertainty(logits=torch.tensor(sure))]
        [0.693, 0.693, 0.0]
        >>> [round(float(x), 3) for x in uncertainty(logits=torch.tensor(torn))]
        [0.693, 0.0, 0.693]
        >>> uncertainty(mean=torch.tensor([[1.0], [3.0]]), scale=0.5).total
        tensor([1.2500])
    """
    given = {"samples": samples, "logits": logits, "probs": probs, "mean": mean}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        got = " and ".join(names) or "none"
        raise TypeError(f"one of samples, logits, probs and mean is needed, got {got}")
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if scale is not None and mean is None:
        raise TypeError(f"scale={shown(scale)}: it belongs to mean, which was not given")
    if samples is not None:
        return _parts(samples, dim)
    if mean is not None:
        return _normal(mean, scale, dim)
    name, values = ("probs", probs) if logits is None else ("logits", logits)
    assert values is not None
    kind = _bernoulli if likelihood == "bernoulli" else _categorical
    return kind(name, values, dim)


# ---- distributions ------------------------------------------------------------------------------


@singledispatch
def _parts(samples: Any, dim: int) -> Uncertainty:
    raise TypeError(
        "samples: a Categorical, OneHotCategorical, Bernoulli or Normal distribution is needed, "
        f"got {shown(samples) if isinstance(samples, Tensor) else type(samples).__name__}; "
        "tensors are given by name, logits=, probs= or mean="
    )


@_parts.register(Categorical)
@_parts.register(OneHotCategorical)
def _(samples: Categorical | OneHotCategorical, dim: int) -> Uncertainty:
    axis = _sample_axis("samples", samples.batch_shape, dim)
    return _of_log_probs(samples.logits.movedim(axis, 0).log_softmax(-1))


@_parts.register
def _(samples: Bernoulli, dim: int) -> Uncertainty:
    return _bernoulli("logits", samples.logits, _sample_axis("samples", samples.batch_shape, dim))


@_parts.register
def _(samples: Normal, dim: int) -> Uncertainty:
    axis = _sample_axis("samples", samples.batch_shape, dim)
    return _normal(samples.loc, samples.scale, axis)


# ---- the parts ----------------------------------------------------------------------------------


def _categorical(name: str, values: Tensor, dim: int) -> Uncertainty:
    is_coarse, values = _is_coarse(values), _real(name, values)
    if values.dim() < 2 or not values.shape[-1]:
        raise ValueError(f"{name} has shape {list(values.shape)}: [S, N, C] is needed")
    if values.shape[-1] == 1:
        raise ValueError(
            f"{name} has shape {list(values.shape)}, one class in the last axis: of two classes in "
            'one number the likelihood is "bernoulli"'
        )
    axis = _sample_axis(name, values.shape[:-1], dim, values.dim())
    values = values.movedim(axis, 0)
    if name == "logits":
        _check_logits(values)
        return _of_log_probs(values.log_softmax(-1))
    sums = values.sum(-1, keepdim=True)
    is_off = bool(((sums - 1).abs() > (2e-2 if is_coarse else 1e-3)).any())
    if is_off or _is_negative(values):
        raise ValueError("probs must be >= 0 and sum to 1 in the last axis: are these logits?")
    return _of_log_probs((values / sums).log())


def _bernoulli(name: str, values: Tensor, dim: int) -> Uncertainty:
    values = _real(name, values)
    values = values.movedim(_sample_axis(name, values.shape, dim), 0)
    if name == "logits":
        return _of_log_probs(torch.stack([F.logsigmoid(-values), F.logsigmoid(values)], -1))
    if _is_negative(values) or bool((values > 1).any()):
        raise ValueError("probs must be in [0, 1]: are these logits?")
    return _of_log_probs(torch.stack([torch.log1p(-values), values.log()], -1))


def _of_log_probs(log_probs: Tensor) -> Uncertainty:
    """The parts from log p_s [S, ..., C]."""
    probs = log_probs.exp()
    log_mean = log_probs.logsumexp(0) - math.log(len(probs))
    # where a probability is 0, its logarithm has no part
    aleatoric = -torch.where(probs > 0, probs * log_probs, 0.0).sum(-1).mean(0)
    ratio = torch.where(probs > 0, probs * (log_probs - log_mean), 0.0)
    return _sum(aleatoric, ratio.sum(-1).mean(0))


def _normal(mean: Tensor, scale: Tensor | float | None, dim: int) -> Uncertainty:
    mean = _real("mean", mean)
    axis = _sample_axis("mean", mean.shape, dim)
    if scale is None:
        spread = mean.new_zeros(())
    elif isinstance(scale, Tensor):
        spread = _real("scale", scale).to(mean.dtype)
        if _is_negative(spread):
            raise ValueError("scale must be at least 0")
    else:
        check_nonnegative("scale", as_number(scale))
        spread = mean.new_tensor(float(scale))
    try:
        spread = spread.expand_as(mean)
    except RuntimeError:
        raise ValueError(
            f"scale has shape {list(spread.shape)}, which does not broadcast with mean, "
            f"{list(mean.shape)}"
        ) from None
    return _sum(spread.square().mean(axis), mean.var(axis, correction=0))


def _sum(aleatoric: Tensor, epistemic: Tensor) -> Uncertainty:
    aleatoric, epistemic = aleatoric.clamp(min=0), epistemic.clamp(min=0)
    return Uncertainty(aleatoric + epistemic, aleatoric, epistemic)


# ---- arguments ----------------------------------------------------------------------------------


def _real(name: str, values: Any) -> Tensor:
    """A tensor of real numbers without NaN, of 32 bits at least."""
    check_tensor(name, values)
    if not values.is_floating_point():
        raise TypeError(f"{name}: a Tensor of real numbers is needed, got {shown(values)}")
    if bool(values.isnan().any()):
        raise ValueError(f"{name} has NaN in it")
    return values.detach().float() if _is_coarse(values) else values.detach()


def _is_coarse(values: Any) -> bool:
    """Whether a tensor has numbers of fewer than 32 bits."""
    return isinstance(values, Tensor) and values.element_size() < 4


def _sample_axis(
    name: str, shape: tuple[int, ...] | torch.Size, dim: int, axes: int | None = None
) -> int:
    """`dim` counted from 0, of a tensor with `axes` axes, of which `shape` may have samples."""
    total = len(shape) if axes is None else axes
    if not is_integer(dim, -total):
        raise ValueError(f"dim={shown(dim)}: one of the {len(shape)} axes of {name} is needed")
    axis = dim + total if dim < 0 else dim
    if axis >= len(shape):
        raise ValueError(
            f"dim={dim}: {name} has {len(shape)} axes that may be that of the samples, {[*shape]}"
        )
    if not shape[axis]:
        raise ValueError(f"{name} has no samples: axis {axis} of {[*shape]} is empty")
    return axis


def _check_logits(logits: Tensor) -> None:
    """Raise ValueError for probabilities in the place of logits, and for infinite ones."""
    if bool((logits == float("inf")).any()):
        raise ValueError("logits has infinity in it")
    if logits.numel() and logits.shape[-1] > 1 and not _is_negative(logits):
        if bool(((logits.sum(-1) - 1).abs() < 1e-5).all()):
            raise ValueError("logits are at least 0 and sum to 1: give them as probs=")


def _is_negative(values: Tensor) -> bool:
    return bool((values < 0).any())
