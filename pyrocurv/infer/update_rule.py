"""The two ways in which `NGVI` trains a guide: layer by layer, or all latents jointly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pyrocurv.curvature import Curvature
from pyrocurv.infer.guide_store import GuideStore
from pyrocurv.infer.joint_step import JointRule
from pyrocurv.infer.layerwise_step import LayerwiseRule, StepSettings
from pyrocurv.infer.model_run import BatchModel
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import Update


class UpdateRule(Protocol):
    """How a posterior is initialized, stepped and scored."""

    is_joint: bool

    def init(self, group: Mapping[str, Any]) -> Posterior:
        """The posterior before the first step."""

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        """A step that is ready to be committed."""

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        """The loss and the temperature."""


def choose_rule(spec: Curvature, store: GuideStore, prefers_joint: bool) -> UpdateRule:
    """Joint for one Gaussian over all latents, if that is preferred or the guide is laid out so.

    Raises ValueError for a joint guide with a curvature of layers, and for a guide that has been
    laid out layer by layer although the joint rule is preferred.
    """
    guide = store.guide
    if guide.is_joint and spec.kind != "hessian":
        raise ValueError(
            f"curvature={spec.kind!r} is computed layer by layer, but this guide has all latents "
            "in one Gaussian, as for a model without a network: use 'hessian', or a Gaussian for "
            f"the layers alone, structure={{'*': {guide.structure!r}}}"
        )
    if not (prefers_joint or guide.is_joint):
        return LayerwiseRule(spec, store)
    if not guide.is_one_block:
        raise ValueError(
            "this NGVI was made to train all latents jointly, but since then the guide was called "
            "or loaded and has separate Gaussians: make the NGVI after that, or leave the guide's "
            "first call to NGVI.step"
        )
    return JointRule(store)
