"""A diagonal Gaussian posterior by the package `ivon-opt`.

Shen et al. 2024, "Variational learning is effective for large deep networks", arXiv:2402.17641.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resuming import Refusal
from vision.methods.trainer import Metrics, Problem, Trainer, accuracy, log_softmax
from vision.processes import broadcast_

FEW = 500.0  # with less data the first samples are so wide that training does not start


class StepCount:
    """IVON's count of its steps, which its own state dict lacks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.optimizer.current_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.optimizer.current_step = state["steps"]


def ivon(problem: Problem) -> Trainer:
    """Of several processes, each has samples of its own, and IVON averages their gradients."""
    try:
        from ivon import IVON
    except ImportError:
        raise Refusal("--method ivon needs the package ivon-opt: pip install ivon-opt") from None
    settings, net = problem.settings, problem.make_network()
    broadcast_(net)
    optimizer = IVON(
        net.parameters(), lr=settings.lr, ess=problem.num_data, beta2=0.9995,
        hess_init=max(0.1, FEW / problem.num_data), weight_decay=settings.weight_decay, sync=True,
    )

    def train_step(x: Tensor, y: Tensor) -> Metrics:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad(set_to_none=True)
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            loss.backward()
        optimizer.step()
        return {"loss": loss.detach(), "nll": loss.detach(), "accuracy": accuracy(logits, y)}

    def predict(x: Tensor) -> Tensor:
        samples = []
        for _ in range(settings.samples):
            with optimizer.sampled_params():
                samples.append(log_softmax(net(x)))
        return torch.stack(samples)

    return Trainer(
        train_step, predict, [net], [optimizer],
        {"net": net, "optimizer": optimizer, "steps": StepCount(optimizer)},
    )
