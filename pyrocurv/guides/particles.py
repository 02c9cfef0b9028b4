"""What many particles at once ask of a model: weights with a batch axis, which few modules take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import nn

PLATE = "num_particles_vectorized"  # the one that Pyro's ELBOs put around model and guide


def check_particles(sites: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where an ELBO vectorises over weights that torch's own modules consume."""
    if not any(isinstance(frame, IndepMessenger) and frame.name == PLATE for frame in _PYRO_STACK):
        return
    for site in sites:
        owner = modules.get(site.rpartition(".")[0])
        if owner is not None and _is_of_torch(owner):
            raise ValueError(
                f"vectorize_particles=True: {site!r} is a weight of a torch.nn module, which takes "
                "one weight at a time; leave it out, num_particles alone does the same in a loop"
            )


def _is_of_torch(module: nn.Module) -> bool:
    """Whether its forward pass is torch's, of a layer with weights."""
    source = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    return source is not nn.Module and source.__module__.startswith("torch.nn.modules")
