"""A normal distribution whose precision is a structured matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyrocurv.posterior.prior import GaussianPrior, kl
from pyrocurv.structures import Structure


class StructuredNormal(TorchDistribution):
    """N(loc, precision⁻¹), whose precision is never made dense.

    Args:
        loc: mean [P].
        precision: a positive definite `Structure` [P, P].
        sites: {name: shape} of the tensors that are flattened in `loc`, as in a guide's posterior.

    Raises:
        ValueError: `loc` is not a vector with as many entries as the precision has rows.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import Diagonal
        >>> q = StructuredNormal(torch.zeros(2), Diagonal(torch.tensor([1.0, 4.0])))
        >>> q.variance
        tensor([1.0000, 0.2500])
    """

    arg_constraints = {"loc": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, precision: Structure, validate_args: bool | None = None,
        sites: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        if loc.dim() != 1 or len(loc) != precision.size:
            raise ValueError(f"loc {tuple(loc.shape)} does not fit a precision of {precision.size}")
        self.loc, self.precision, self.sites = loc, precision, sites
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The marginal variances [P]."""
        return self.precision.inverse_diag()

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Samples [*sample_shape, P], differentiable in `loc` and in the precision's tensors."""
        noise = torch.randn(
            *sample_shape, *self.event_shape, dtype=self.loc.dtype, device=self.loc.device
        )
        return self.loc + self.precision.rsqrt(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log densities [...] of values [..., P]."""
        deviation = value - self.loc
        distance = (deviation * (self.precision @ deviation)).sum(-1)
        return (self.precision.logdet() - distance - len(self.loc) * math.log(2 * math.pi)) / 2

    def entropy(self) -> Tensor:
        """The entropy in nats, a scalar."""
        return (len(self.loc) * (1 + math.log(2 * math.pi)) - self.precision.logdet()) / 2

    def kl(self, prior_loc: Tensor, prior_precision: Tensor) -> Tensor:
        """KL(self ‖ N(prior_loc, diag(1 / prior_precision))) in nats; both are [P] or scalars."""
        return kl(self.loc, self.precision, GaussianPrior(prior_loc, prior_precision))
