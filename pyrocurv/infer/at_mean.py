"""A model at the middle of its guide: the weights at the mean, other latents at their medians."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrocurv import engine
from pyrocurv.capture import Capture
from pyrocurv.curvature.pullback import Opaque
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.run import leaves
from pyrocurv.stream import Stream
from pyrocurv.uses import Call


def introduce(guide: StructuredGuide, args: Any, kwargs: Any) -> None:
    """Have the guide meet its model, if it has not, at no cost of random numbers."""
    if guide.prototype_trace is None:
        with Stream(0)(torch.device("cpu")), poutine.block():
            guide._setup_prototype(*args, **kwargs)


def mean_weights(guide: StructuredGuide) -> dict[str, Tensor]:
    """The weights, to take gradients in."""
    locs = [family.raw_loc.detach() for family in guide.blocks]
    return leaves(engine.around([family.block for family in guide.blocks], locs, None))


def other_medians(guide: StructuredGuide, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The medians {site: value} of the fallback guide's latents."""
    return guide.fallback.median(*args, **kwargs) if guide.fallback_sites else {}


def calls_of(
    guide: StructuredGuide, capture: Capture | None, weights: Mapping[str, Tensor], rows: int
) -> list[Call | Opaque]:
    """The ops of the guide's layers; weights that no supported op consumes are layers too."""
    assert capture is not None
    held = [family.block for family in guide.blocks]
    opaque = [layer for block in held if block.is_opaque for layer in block.layers]
    return [*capture.calls, *(Opaque(one, weights[one.weight], rows) for one in opaque)]
