"""The likelihood as terms of the curvature: distributions, data, weights and masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from pyrocurv.runtime.distributions import unwrap

Likelihood = str | Callable[[Tensor], Distribution]


def _independent(likelihood: Distribution) -> Distribution:
    """All axes but the first belong to one example."""
    return Independent(likelihood, max(len(likelihood.batch_shape) - 1, 0))


def _categorical(logits: Tensor) -> Distribution:
    """Of two classes or more: one alone is certain, whatever the network says."""
    if logits.shape[-1:] == (1,):
        raise ValueError(
            f"likelihood='categorical': an output {tuple(logits.shape)} has one class alone; "
            "'bernoulli' takes one logit for two, 'normal' a mean"
        )
    return _independent(Categorical(logits=logits))


LIKELIHOODS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": _categorical,
    "bernoulli": lambda logits: _independent(Bernoulli(logits=logits)),
    "normal": lambda mean: _independent(Normal(mean, torch.ones_like(mean))),
}


def as_likelihood(likelihood: Likelihood) -> Callable[[Tensor], Distribution]:
    """A name from the table, or a callable that gives a `Distribution` for an output."""
    if callable(likelihood):
        return lambda output: _independent(likelihood(output))
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood={likelihood!r}: choose one of {', '.join(LIKELIHOODS)}, "
            "or give a callable output -> Distribution"
        )
    return LIKELIHOODS[likelihood]


def to_single_precision(output: Any) -> Any:
    """In single precision at least: the densities of half of it are too coarse."""
    if not isinstance(output, Tensor):
        return output
    return output.to(torch.promote_types(output.dtype, torch.float32))


def likelihood_term(likelihood: Distribution, y: Tensor, output: Any) -> LikelihoodTerm:
    shape = likelihood.batch_shape + likelihood.event_shape
    count = len(output) if isinstance(output, Tensor) and output.dim() else y.shape[:1].numel()
    if y.shape != shape:
        raise ValueError(
            f"targets {tuple(y.shape)} do not fit the network's output: the likelihood has "
            f"{tuple(shape)}"
        )
    if shape[:1] != (count,):
        raise ValueError(
            f"the likelihood has {tuple(shape)}, its first axis is not that of {count} examples"
        )
    base = unwrap(likelihood)
    if isinstance(base, Categorical):
        are = base.support.check(y)
        if bool(are.any() & ~are.all()):
            raise ValueError(
                f"targets from {int(y.min())} to {int(y.max())}, the classes are 0 to "
                f"{base.param_shape[-1] - 1}: leave such examples out, or mask them in a Pyro model"
            )
    if isinstance(base, Bernoulli) and not y.is_floating_point():
        y = y.to(base.logits.dtype)
    return LikelihoodTerm(likelihood, y)


@dataclass(frozen=True, eq=False)
class LikelihoodTerm:
    """A likelihood term: its distribution (batch axis first), the data, and its weight.

    `weight` (a scalar, or broadcastable to the log density) multiplies the log likelihood, 1 unless
    tempered; a `mask` (boolean) drops examples.
    """

    likelihood: Distribution
    value: Tensor
    weight: float | Tensor = 1.0
    mask: Tensor | bool | None = None
