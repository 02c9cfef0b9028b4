"""Dropout that stays on for predictions.

Gal & Ghahramani 2016, "Dropout as a Bayesian approximation", arXiv:1506.02142; here at the inputs
of the linear layers only, which of a residual network is the last layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.methods.point import adam, point
from vision.methods.trainer import Problem, Trainer


def mc_dropout(problem: Problem) -> Trainer:
    """Adam; a prediction has other dropped inputs for each sample and image."""
    net, rate = problem.make_network(), problem.config.dropout

    def drop(layer: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return (F.dropout(inputs[0], rate), *inputs[1:])  # in eval() mode too

    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(drop)
    trained = point(problem, adam, net)

    def predict(x: Tensor) -> Tensor:
        return torch.cat([trained.predict(x) for _ in range(problem.settings.samples)])

    return replace(trained, predict=predict)
