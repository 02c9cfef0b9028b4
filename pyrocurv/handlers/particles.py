"""Particles that an ELBO vectorizes by a plate around model and guide."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

PARTICLE_PLATE = "num_particles_vectorized"  # of Pyro's ELBOs, around model and guide


def check_particles(sites: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if an ELBO vectorizes particles over weights of torch's own modules."""
    frames = (frame for frame in _PYRO_STACK if isinstance(frame, IndepMessenger))
    if not any(frame.name == PARTICLE_PLATE for frame in frames):
        return
    for site in sites:
        owner = modules.get(site.rpartition(".")[0])
        if owner is not None and _uses_torch_forward(owner):
            raise ValueError(
                f"vectorize_particles=True: {site!r} is a weight of a torch.nn module, which takes "
                "one weight at a time: without the option, particles are run in a loop"
            )


def _uses_torch_forward(module: nn.Module) -> bool:
    """Whether the forward pass of a module is that of a layer in `torch.nn`."""
    source = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    return source is not nn.Module and source.__module__.startswith("torch.nn.modules")
