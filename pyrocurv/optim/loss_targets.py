"""From a network's output to terms of the curvature: the likelihood, and the data behind a loss.

The loss is the user's own, PyTorch's mean over all entries of the batch (rows; tokens; pixels). Its
gradient in the output tells the targets of the named likelihoods, where a curvature asks for them:

    categorical  p - y   negative at the class alone
    bernoulli    p - y   negative where y = 1
    normal       μ - y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.curvature.likelihood import Likelihood, LikelihoodTerm, as_likelihood
from pyrocurv.runtime.distributions import unwrap
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import is_out_of_memory

DATA_KINDS = ("empirical", "hessian")


def targets_from_gradient(
    likelihood: Likelihood, output: Tensor, gradient: Tensor, size: int
) -> Tensor:
    """The data behind the gradient of a mean over `size` entries."""
    if likelihood == "categorical":
        known = (gradient < 0).any(-1)  # at a probability of 1 nothing is left of it
        return torch.where(known, gradient.argmin(-1), output.argmax(-1))
    if likelihood == "bernoulli":
        return torch.where(gradient == 0, output > 0, gradient < 0).to(output)
    return output - gradient * size


def check_loss(likelihood: Likelihood, gradient: Tensor) -> None:
    """Warn of a loss that cannot be the likelihood's, by its gradient in the output.

    That of a cross entropy sums to 0 over the classes, weighted or smoothed as it may be; that of
    the others does so by chance alone.
    """
    if not isinstance(likelihood, str) or gradient.dim() < 2 or gradient.shape[-1] < 2:
        return
    share = gradient.sum(-1).norm() / gradient.norm()
    if likelihood == "categorical" and bool(share > 0.1):
        warn_user(
            "likelihood='categorical': the loss's gradient does not sum to 0 over the last axis of "
            f"the output [B{''.join(f', {n}' for n in gradient.shape[1:])}], as that of a cross "
            "entropy does over the classes: say likelihood='bernoulli', 'normal' or your own, or "
            "have the classes last"
        )
    elif likelihood != "categorical" and bool(share < 1e-5):
        warn_user(
            f"likelihood={likelihood!r}: the loss's gradient sums to 0 over the last axis of the "
            "output, as that of a cross entropy does: say likelihood='categorical'"
        )


def unignored_mask(output: Tensor, gradient: Tensor) -> Tensor | None:
    """Which entries of a "categorical" the loss is of: not those of `ignore_index`; None: all.

    Nothing comes back through such an entry. Through another nothing does only at a probability of
    1, of no curvature either; that it counts there is what the probability tells.
    """
    mask = (gradient != 0).any(-1) | (output.softmax(-1).amax(-1) == 1)
    return None if bool(mask.all()) else mask


@dataclass(eq=False)
class LossLikelihood:
    """The likelihood of a loss, for one kind of curvature.

    `has_finite_support` is as observed in the last pass. Raises ValueError for a likelihood that
    has not what the curvature needs.
    """

    likelihood: Likelihood
    kind: str
    has_finite_support: bool = False

    def __post_init__(self) -> None:
        as_likelihood(self.likelihood)
        self.has_finite_support = self.likelihood in ("categorical", "bernoulli")
        if self.kind in DATA_KINDS and not isinstance(self.likelihood, str):
            raise ValueError(
                f"curvature={self.kind!r} takes the targets from the loss's gradient, which a "
                "likelihood of your own does not allow: use 'fisher' or 'ggn'"
            )

    def term(
        self, output: Any, gradient: Tensor | None, total: int, rows: int
    ) -> LikelihoodTerm:
        """The term of one pass over `rows` examples; `gradient` is that of a mean over `total`.

        The data are read off it where the curvature wants them.

        Raises ValueError for an output that the likelihood does not fit, FloatingPointError for one
        that is not finite.
        """
        fitted = self._distribution(output, rows)
        entries = unwrap(fitted)
        self.has_finite_support = entries.has_enumerate_support
        each = entries.batch_shape.numel() // rows
        value = output.new_zeros(()) if isinstance(output, Tensor) else torch.zeros(())
        mask = None
        if gradient is not None and self.likelihood == "categorical":
            mask = unignored_mask(output.detach(), gradient)
        if gradient is not None and self.kind in DATA_KINDS:
            size = total * each
            value = targets_from_gradient(self.likelihood, output.detach(), gradient, size)
        if mask is None:
            return LikelihoodTerm(fitted, value, 1 / each)
        return LikelihoodTerm(entries, value, rows / mask.sum().clamp(min=1), mask)

    def _distribution(self, output: Any, rows: int) -> Distribution:
        likelihood = self.likelihood
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        least = 2 if likelihood == "categorical" else 1
        is_deep = isinstance(output, Tensor) and output.dim() >= least
        if isinstance(likelihood, str) and not is_deep:
            raise ValueError(
                f"likelihood={likelihood!r} wants an output of {least} axes or more, the batch "
                f"first, got {shape}"
            )
        if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
            raise FloatingPointError("the network's output is not finite")
        try:
            fitted = as_likelihood(likelihood)(output)
        except (AttributeError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"likelihood={likelihood!r} does not fit an output {shape}"
            ) from error
        if not isinstance(fitted, Distribution):
            raise ValueError(
                f"likelihood={likelihood!r} gave no Distribution: {type(fitted).__name__}"
            )
        if fitted.batch_shape[:1] != (rows,):
            raise ValueError(
                f"likelihood={likelihood!r} has batch shape {tuple(fitted.batch_shape)} for {rows} "
                f"inputs and an output {shape}: the batch is the first axis"
            )
        return fitted
