"""Networks that differ by their first weights, trained by Adam on the same batches.

Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty estimation using deep
ensembles", arXiv:1612.01474.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vision.methods.point import adam, point
from vision.methods.trainer import Metrics, Problem, Trainer


def ensemble(problem: Problem) -> Trainer:
    """The metrics of a step are means over the members."""
    members = [point(problem, adam) for _ in range(problem.config.members)]

    def train_step(x: Tensor, y: Tensor) -> Metrics:
        all_metrics = [member.train_step(x, y) for member in members]
        return {
            name: torch.stack([torch.as_tensor(m[name]) for m in all_metrics]).mean()
            for name in all_metrics[0]
        }

    return Trainer(
        train_step, lambda x: torch.cat([member.predict(x) for member in members]),
        [module for member in members for module in member.modules],
        [optimizer for member in members for optimizer in member.optimizers],
        {
            f"member {k}, {name}": value for k, member in enumerate(members)
            for name, value in member.objects.items()
        },
    )
