"""What may be wrong with a prediction: a guide without data, a mode, a distribution."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pyrocurv.guides import MixtureGuide, StructuredGuide


def uninitialized_guides(guide: Any) -> Iterator[Any]:
    """The guides in it that cannot be drawn from before they are called with the data."""
    if isinstance(guide, MixtureGuide):
        for component in guide:
            yield from uninitialized_guides(component)
    elif isinstance(guide, StructuredGuide) and not guide.is_initialized:
        yield guide


@contextmanager
def finite_probabilities() -> Iterator[None]:
    """FloatingPointError in place of torch's error about a draw without probabilities."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("probability tensor contains"):
            raise
        raise FloatingPointError(
            f"the model draws from a distribution that is not finite, from these inputs ({error})"
        ) from error


def updates_statistics(module: nn.Module) -> bool:
    """Whether a run of the module would change its running statistics."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats
