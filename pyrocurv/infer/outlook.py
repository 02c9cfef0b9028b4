"""The prediction of a model whose network is linearised at its guide's mean.

The model runs once, without data; what it then says of the site without a value, and the network's
derivatives there, are what the closed forms of `linearised` take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.capture import Capture
from pyrocurv.curvature.propagate import propagate
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.at_mean import calls_of, mean_weights, other_medians
from pyrocurv.infer.linearised import innermost, output, predictive
from pyrocurv.infer.run import evaluated
from pyrocurv.modules import modules, still_frozen
from pyrocurv.prototype import is_deterministic
from pyrocurv.stream import Stream


def predict(
    model: Callable[..., Any], guide: StructuredGuide, args: Any, kwargs: Any
) -> Distribution:
    """The predictive distribution, at the model's arguments. Raises as `Laplace.predict` says."""
    weights = mean_weights(guide)
    look = _Outlook({**weights, **other_medians(guide)})
    with (
        torch.enable_grad(), Stream(0)(guide.blocks[0].raw_loc.device), evaluated(model),
        still_frozen(modules(model)), look, Capture(dict(weights)) as capture,
    ):
        model(*args, **kwargs)
    likelihood, event = look.likelihood()
    with torch.enable_grad():
        outputs = output(likelihood)
    calls = calls_of(guide, capture, weights, len(outputs))
    with torch.no_grad():
        precisions = [family.precision() for family in guide.blocks]
    covariance = propagate([f.block for f in guide.blocks], precisions, outputs, calls)
    with torch.no_grad():
        return predictive(likelihood, event, covariance)


class _Outlook(Messenger):
    """Runs a model at `values` {site: tensor} and keeps the likelihoods of what is no latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Distribution] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        beside = site_is_subsample(msg) or is_deterministic(msg)
        if msg["name"] not in self.values and not beside:
            self.found[msg["name"]] = msg["fn"]

    def likelihood(self) -> tuple[Distribution, int]:
        """The one there is, without what is around it, and its event axes."""
        if len(self.found) != 1:
            raise ValueError(
                "predict() needs a model with one site beside the latents, got "
                f"{', '.join(self.found) or 'none'}"
            )
        return innermost(*self.found.values())
