"""A Laplace approximation of a network that Adam has trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from pyrocurv.infer import Laplace
from pyrocurv.nn import Classifier, bayesianize
from vision.methods.dense import LIMIT, check_dense
from vision.methods.ngvi import GUIDES
from vision.methods.point import l2_adam, point
from vision.methods.trainer import Batch, Problem, Trainer

DRAWS = 64  # of the logits, which cost little


def laplace(problem: Problem) -> Trainer:
    """Weight decay λ is the normal prior of precision λN, whose mode Adam looks for."""
    net = problem.make_network()
    if problem.config.layers == "all":
        check_dense(net, problem.config.guide)
    trained = point(problem, l2_adam, net)
    fitted: list[Laplace] = []

    def finish(loader: Iterable[Batch]) -> None:
        fitted[:] = [fit(net, loader, problem)]

    def predict(x: Tensor) -> Tensor:
        if not fitted:
            return trained.predict(x)
        predicted: Any = fitted[0].predict(x, num_samples=DRAWS)
        return predicted.probs.clamp(min=1e-12).log()[None]

    return Trainer(
        trained.train_step, predict, trained.modules, trained.optimizers, trained.objects, finish
    )


def fit(net: nn.Module, loader: Iterable[Batch], problem: Problem) -> Laplace:
    """One pass over the data at the network's weights; then the evidence scales the prior."""
    config, copied = problem.config, copy.deepcopy(net).eval()
    layers, kind = None, config.guide
    if config.layers == "last":
        *_, last = (name for name, part in net.named_modules() if isinstance(part, nn.Linear))
        layers = [last]
        if sum(p.numel() for p in copied.get_submodule(last).parameters()) > LIMIT:
            kind = "kfac" if kind in ("full", "block") else kind
    prior = (problem.settings.weight_decay * problem.num_data) ** -0.5
    model = Classifier(bayesianize(copied, prior, layers), num_data=problem.num_data)
    curvature = "ggn" if config.curvature == "auto" else config.curvature
    fitted = Laplace(model, GUIDES[kind](model), curvature).fit(loader)
    fitted.tune_prior()
    return fitted
