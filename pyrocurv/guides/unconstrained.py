"""Latents as transforms of unconstrained tensors, over which the Gaussians of a guide are.

For weights the transform is the identity. A guide over all latents of a model uses the transform of
each latent's support, as Pyro's `AutoContinuous` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform, identity_transform

from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.sites import TraceSite, is_real

NETWORK_LAYERS = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention,
    nn.RNNBase, nn.RNNCellBase,
)


def has_network(model: Callable[..., Any]) -> bool:
    """Whether a model contains layers of a neural network."""
    return any(isinstance(module, NETWORK_LAYERS) for module in modules(model))


def is_local(site: TraceSite) -> bool:
    """Whether a latent is in a plate that is subsampled."""
    frames = site["cond_indep_stack"]
    return any(frame.full_size not in (None, frame.size) for frame in frames)


@dataclass(frozen=True)
class UnconstrainedLatent:
    """A latent z = transform(u) of an unconstrained tensor u."""

    transform: Transform
    shape: tuple[int, ...]  # of u
    batch_dim: int  # number of leading axes of u that broadcast with the plates
    event_dim: int  # of z
    plates: tuple[str, ...]
    is_real: bool  # whether the transform is the identity

    @staticmethod
    def weight(shape: tuple[int, ...], event_dim: int) -> UnconstrainedLatent:
        """A weight, which is unconstrained itself and in no plate."""
        return UnconstrainedLatent(identity_transform, shape, 0, event_dim, (), True)

    @staticmethod
    def of(site: TraceSite) -> UnconstrainedLatent:
        """The latent of any site of a trace.

        Raises ValueError for a latent in a subsampled plate, or of a support without a transform.
        """
        if is_local(site):
            raise ValueError(
                f"latent {site['name']!r} is in a subsampled plate: its size changes with the "
                "data; hide it, or do not subsample"
            )
        fn = site["fn"]
        try:
            transform = biject_to(fn.support)
        except NotImplementedError as error:
            raise ValueError(
                f"latent {site['name']!r} has the support {fn.support}, which no transform maps "
                "real numbers to; reparametrize it, as ProjectedNormalReparam does a sphere"
            ) from error
        shape = tuple(transform.inv(site["value"]).shape)
        plates = tuple(frame.name for frame in site["cond_indep_stack"])
        return UnconstrainedLatent(
            transform, shape, len(fn.batch_shape), fn.event_dim, plates, is_real(site)
        )

    def constrain(self, u: Tensor) -> tuple[Tensor, Tensor | float]:
        """z and ln |det dz/du|, the latter with the batch shape of the site; 0 for the identity."""
        if self.is_real:
            return u, 0.0
        z = self.transform(u)
        density = self.transform.log_abs_det_jacobian(u, z)
        return z, sum_rightmost(density, density.dim() - z.dim() + self.event_dim)

    def sample(self, name: str, u: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The sample site of z at u, inside its plates; its density is that of the transform."""
        z, log_volume = self.constrain(self._align(u))
        delta = dist.Delta(z, log_density=-log_volume, event_dim=self.event_dim)
        with ExitStack() as stack:
            for plate in self.plates:
                stack.enter_context(plates[plate])
            return pyro.sample(name, delta)

    def _align(self, u: Tensor) -> Tensor:
        """Broadcast the axes of a plate of particles, [*particles, *shape], with the own plates."""
        own, event = self.shape[: self.batch_dim], self.shape[self.batch_dim :]
        particles = u.shape[: u.dim() - len(self.shape)]
        return u.reshape(torch.broadcast_shapes(particles, own) + event) if particles else u
