"""Questions about one site of a Pyro trace: is it data, is it a latent, do its shapes fit?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

ENUMERATION = (
    "NGVI does not enumerate discrete latents; SVI with TraceEnum_ELBO on the same guide does, see "
    "https://pyro.ai/examples/enumeration.html"
)
TraceSite = Mapping[str, Any]
MixtureConstraint = constraints.MixtureSameFamilyConstraint


@biject_to.register(MixtureConstraint)
def _transform_of_mixture(constraint: Any) -> Transform:
    """A mixture has the support of its components; torch has no transform for it."""
    return biject_to(constraint.base_constraint)


def is_deterministic(site: TraceSite) -> bool:
    """Whether a site is a `pyro.deterministic`, which Pyro marks as observed but is not data."""
    return bool(site["infer"] and site["infer"].get("_deterministic"))


def is_real(site: TraceSite) -> bool:
    """Whether a latent is unconstrained, as weights are and scales are not."""
    support = site["fn"].support
    while isinstance(support, (constraints.independent, MixtureConstraint)):
        support = support.base_constraint
    return support is constraints.real


def is_single_event(site: TraceSite) -> bool:
    """Whether all axes of a site belong to one event, as those of a weight do."""
    return 0 < site["fn"].event_dim == site["value"].dim()


def prior_power(name: str, scale: float | Tensor) -> float:
    """The power that `poutine.scale` raises the prior of a weight to; ValueError for several."""
    if isinstance(scale, Tensor) and scale.numel() > 1:
        raise ValueError(
            f"site {name!r} has a scale of shape {tuple(scale.shape)}: the prior of a weight can "
            "be scaled by a single number only"
        )
    return float(scale)


def check_latent(site: TraceSite) -> None:
    """Raise ValueError for a latent of a guide that is observed in this call."""
    if site["is_observed"]:
        raise ValueError(
            f"site {site['name']!r} is observed in this call, and was a latent at the first call "
            "of the guide, without its data: make a new guide, and call it with the data first"
        )


def check_data(site: TraceSite) -> None:
    """Raise ValueError for an observed site with batch axes in no plate, or with broadcast data.

    Pyro's ELBOs make the first check where validation is enabled. Outside of any plate all axes are
    data.
    """
    plates = {frame.dim: frame.size for frame in site["cond_indep_stack"] if frame.vectorized}
    batch = tuple(site["fn"].batch_shape)
    axes = {axis - len(batch) for axis, size in enumerate(batch) if size != 1}
    if plates and not axes <= plates.keys():
        raise ValueError(
            f"site {site['name']!r}: a batch of shape {batch} in plates of sizes "
            f"{tuple(plates.values())}; does an output [B, 1] need .squeeze(-1)? Declare axes that "
            "belong to one datum with .to_event(...), and put other data into a plate of their own"
        )
    shape, value = tuple(site["fn"].shape()), tuple(site["value"].shape)
    if value == shape or not site["cond_indep_stack"]:
        return
    if torch.broadcast_shapes(value, shape) != shape:
        raise ValueError(
            f"site {site['name']!r}: data of shape {value} against a distribution of shape {shape}"
        )
