"""The two ways in which `NGVI` trains a guide: layer by layer, or all latents jointly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from pyrocurv.curvature import Curvature
from pyrocurv.handlers.modules import modules
from pyrocurv.infer import joint_step, layerwise_step
from pyrocurv.infer.guide_store import GuideStore
from pyrocurv.infer.layerwise_step import StepSettings
from pyrocurv.infer.model_run import BatchModel
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryParameter
from pyrocurv.posterior.joint_update import ill_conditioned
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import Evaluation, Update, step
from pyrocurv.runtime.module_state import save_buffers
from pyrocurv.runtime.validation import is_out_of_memory

Evaluated = tuple[Evaluation, list[AuxiliaryParameter]]


class UpdateRule(Protocol):
    """How a posterior is initialized, evaluated and updated."""

    is_joint: bool

    def init(self, group: Mapping[str, Any]) -> Posterior:
        """The posterior before the first step."""

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        """One step, ready to be committed."""

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        """The loss and the temperature."""


class LayerwiseRule:
    """Curvature layer by layer; see `pyrocurv.infer.layerwise_step`."""

    is_joint = False

    def __init__(self, spec: Curvature, store: GuideStore) -> None:
        self._spec, self._store = spec, store

    def init(self, group: Mapping[str, Any]) -> Posterior:
        return self._store.init(self._spec, group)

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        layerwise_step.check_samples(self._spec, self._store, settings.num_particles)
        evaluation, auxiliary = layerwise_step.evaluate(posterior, settings, self._store, model)
        return step(posterior, evaluation, settings.average), auxiliary

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        return layerwise_step.negative_elbo(posterior, settings, self._store, model)


class JointRule:
    """The Hessian of the log joint of a whole model; see `pyrocurv.infer.joint_step`."""

    is_joint = True

    def __init__(self, store: GuideStore) -> None:
        self._store = store
        self._can_vectorize = True  # until the model turns out to have no vectorized form

    def init(self, group: Mapping[str, Any]) -> Posterior:
        return self._store.init_joint(group)

    def update(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[Update, list[AuxiliaryParameter]]:
        evaluation, auxiliary = self._evaluate(posterior, settings, model)
        try:
            return step(posterior, evaluation, settings.average), auxiliary
        except torch.linalg.LinAlgError as error:
            raise ill_conditioned(posterior.step) from error

    def _evaluate(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> Evaluated:
        """In one vectorized run where the model allows it; the first step validates its values."""
        has_constrained = self._store.guide.has_constrained
        vectorize = self._can_vectorize and posterior.step > 0
        restore = save_buffers(modules(model.model))
        try:
            return joint_step.evaluate(posterior, settings, model, has_constrained, vectorize)
        except (RuntimeError, ValueError) as error:
            if not vectorize or is_out_of_memory(error):
                raise
            self._can_vectorize = False  # a genuine error is raised again below
            restore()
            return joint_step.evaluate(posterior, settings, model, has_constrained, False)

    def negative_elbo(
        self, posterior: Posterior, settings: StepSettings, model: BatchModel
    ) -> tuple[float, float]:
        has_constrained = self._store.guide.has_constrained
        return joint_step.negative_elbo(posterior, settings, model, has_constrained)


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
