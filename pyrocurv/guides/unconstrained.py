"""Latents of any support as real vectors: how a guide over a whole model sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform
from torch.distributions.utils import _sum_rightmost

from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.prototype import TraceSite, is_real
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import parse_structure

NETWORKS = (
    nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention,
    nn.RNNBase, nn.RNNCellBase,
)


def has_network(model: Callable[..., Any]) -> bool:
    """Whether layers of a network are in a model."""
    return any(isinstance(module, NETWORKS) for module in modules(model))


def is_local(site: TraceSite) -> bool:
    """Whether a latent is in a plate of which the model takes a part."""
    frames = site["cond_indep_stack"]
    return any(frame.full_size not in (None, frame.size) for frame in frames)


@dataclass(frozen=True)
class UnconstrainedLatent:
    """A latent as the image of a real tensor."""

    transform: Transform
    shape: tuple[int, ...]  # of the real tensor
    batch_dim: int  # how many axes of that are plates'
    event_dim: int  # of the latent
    plates: tuple[str, ...]
    is_real: bool  # whether it is its own image

    @staticmethod
    def of(site: TraceSite) -> UnconstrainedLatent:
        """From a site of a trace; ValueError where a plate around it is subsampled."""
        frames = site["cond_indep_stack"]
        if is_local(site):
            raise ValueError(
                f"latent {site['name']!r} is in a subsampled plate: its size changes with the "
                "data; hide it, or do not subsample"
            )
        try:
            transform = biject_to(site["fn"].support)
        except NotImplementedError as error:
            raise ValueError(
                f"latent {site['name']!r} has the support {site['fn'].support}, which no transform "
                "maps real numbers to; reparametrise it, as ProjectedNormalReparam does a sphere"
            ) from error
        shape = tuple(transform.inv(site["value"]).shape)
        names, fn = tuple(frame.name for frame in frames), site["fn"]
        return UnconstrainedLatent(
            transform, shape, len(fn.batch_shape), fn.event_dim, names, is_real(site)
        )

    def in_plates(self, real: Tensor) -> Tensor:
        """[*particles, *shape] with the particles' plates, further out, beside the latent's own."""
        own, event = self.shape[: self.batch_dim], self.shape[self.batch_dim :]
        lead = real.shape[: real.dim() - len(self.shape)]
        return real.reshape(torch.broadcast_shapes(lead, own) + event) if lead else real

    def log_volume(self, real: Tensor, value: Tensor) -> Tensor:
        """ln |det dvalue/dreal|, of the batch shape of the site."""
        density = self.transform.log_abs_det_jacobian(real, value)
        return _sum_rightmost(density, density.dim() - value.dim() + self.event_dim)

    def sample(self, name: str, real: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The site at the image of `real`, with the density that the transform gives it."""
        real = self.in_plates(real)
        value = self.transform(real)
        delta = dist.Delta(
            value, log_density=-self.log_volume(real, value), event_dim=self.event_dim
        )
        with _inside([plates[plate] for plate in self.plates]):
            return pyro.sample(name, delta)


def constrain(
    latents: Mapping[str, UnconstrainedLatent], real: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """The values of latents at real tensors, and the log volume of all transforms there."""
    values = {name: latents[name].transform(one) for name, one in real.items()}
    volumes = [latents[n].log_volume(real[n], value).sum() for n, value in values.items()]
    return values, torch.stack(volumes).sum()


@contextmanager
def _inside(plates: list[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for plate in plates:
            stack.enter_context(plate)
        yield


def joint_block(latents: Mapping[str, UnconstrainedLatent], structure: str) -> Block:
    """One block over all latents."""
    layers = tuple(Layer(name, None, one.shape, "untraced") for name, one in latents.items())
    return Block(layers, parse_structure(structure))
