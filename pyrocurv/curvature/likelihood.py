"""The likelihood as terms of the curvature: distributions and data, weights and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from pyrocurv.runtime.choices import LikelihoodName
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.validation import check_choice, check_distribution

Likelihood = LikelihoodName | Callable[[Tensor], Distribution]


@dataclass(frozen=True, eq=False)
class LikelihoodTerm:
    """A likelihood term: its distribution (batch axis first), the data, and its weight.

    `weight` (a scalar, or broadcastable to the log density) multiplies the log likelihood, 1 unless
    tempered; a boolean `mask` drops examples or single entries.
    """

    likelihood: Distribution
    value: Tensor
    weight: float | Tensor = 1.0
    mask: Tensor | bool | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of other data with the same mask, without the weight."""
        log_prob = self.likelihood.log_prob(value)
        if self.mask is None:
            return log_prob
        return torch.where(torch.as_tensor(self.mask, device=log_prob.device), log_prob, 0.0)


@dataclass(frozen=True, eq=False)
class ExampleSelection:
    """The first `count` examples of a batch except those that the likelihood masks.

    `index` holds the examples that are left; None stands for all. `masked_positions` [count, S] is
    True at positions that the likelihood masks, such as padding in a sequence.
    """

    count: int
    index: Tensor | None = None
    masked_positions: Tensor | None = None

    @staticmethod
    def of(terms: Sequence[LikelihoodTerm], count: int) -> ExampleSelection:
        """The selection by the masks of the likelihood terms."""
        index, positions = _unmasked_examples(terms, count), _masked_positions(terms, count)
        return ExampleSelection(count, index, positions)

    @property
    def size(self) -> int:
        """The number of examples that are left."""
        return self.count if self.index is None else len(self.index)

    def select(self, rows: Tensor) -> Tensor:
        """The rows of the examples that are left: [..., count, S, n] -> [..., B, S, n]."""
        return rows if self.index is None else rows.index_select(-3, self.index)


def _masked_positions(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """None if there are several terms, or the mask has no axis besides the examples."""
    if len(terms) != 1 or terms[0].mask is None:
        return None
    mask, shape = torch.as_tensor(terms[0].mask), terms[0].likelihood.batch_shape
    return ~mask.expand(shape)[:count].flatten(1) if len(shape) > 1 and mask.dim() > 1 else None


def _unmasked_examples(terms: Sequence[LikelihoodTerm], count: int) -> Tensor | None:
    """The examples that at least one term does not mask; None if a term has no mask.

    None also for terms of different rows, which are not the same examples.
    """
    masks = [torch.as_tensor(term.mask) for term in terms if term.mask is not None]
    if len({term.likelihood.batch_shape[:1] for term in terms}) > 1:
        return None
    if len(masks) < len(terms) or not all(mask.dim() for mask in masks):
        return None
    unmasked = [
        mask.expand(term.likelihood.batch_shape)[:count].flatten(1).any(1) if mask.dim() > 1
        else mask[:count] for mask, term in zip(masks, terms, strict=True)
    ]
    return torch.stack([mask.expand(count) for mask in unmasked]).any(0).nonzero().squeeze(1)


def _independent(likelihood: Distribution) -> Distribution:
    """All axes but the first as one event."""
    return Independent(likelihood, max(len(likelihood.batch_shape) - 1, 0))


def _categorical(logits: Tensor) -> Distribution:
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
    """The function output -> `Distribution` of a name in the table, or of such a function."""
    if callable(likelihood):
        return partial(_distribution, likelihood)
    other = ", or give a callable output -> Distribution"
    check_choice("likelihood", likelihood, LIKELIHOODS, other)
    return LIKELIHOODS[likelihood]


def _distribution(likelihood: Callable[[Any], Distribution], output: Any) -> Distribution:
    """The distribution that a user's likelihood returns; TypeError if it is none."""
    returned = likelihood(output)
    check_distribution("the value of likelihood", returned)
    return _independent(returned)


def to_single_precision(output: Any) -> Any:
    """A tensor of half precision in single precision: densities of half are too coarse."""
    if not isinstance(output, Tensor):
        return output
    return output.to(torch.promote_types(output.dtype, torch.float32))


def likelihood_term(likelihood: Distribution, y: Tensor, output: Any) -> LikelihoodTerm:
    """The term of targets y [B, ...]; ValueError where they do not fit the likelihood."""
    shape = likelihood.batch_shape + likelihood.event_shape
    count = len(output) if isinstance(output, Tensor) and output.dim() else y.shape[:1].numel()
    if y.shape != shape:
        raise ValueError(
            f"targets {tuple(y.shape)} do not fit the network's output: the likelihood has shape "
            f"{tuple(shape)}"
        )
    if shape[:1] != (count,):
        raise ValueError(
            f"the likelihood has shape {tuple(shape)}, whose first axis is not that of the {count} "
            "examples"
        )
    base = unwrap(likelihood)
    if isinstance(base, Categorical):
        is_class = base.support.check(y)
        if bool(is_class.any() & ~is_class.all()):
            raise ValueError(
                f"targets from {int(y.min())} to {int(y.max())}, the classes are 0 to "
                f"{base.param_shape[-1] - 1}: leave such examples out, or mask them in a Pyro model"
            )
    if isinstance(base, Bernoulli) and not y.is_floating_point():
        y = y.to(base.logits.dtype)
    return LikelihoodTerm(likelihood, y)
