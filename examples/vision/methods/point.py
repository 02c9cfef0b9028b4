"""One value for each weight: Adam, SGD, Muon, and the curvature as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matrix_muon import MatrixMuon
from pyrocurv.optim import SecondOrderOptimizer
from resuming import Refusal
from vision.methods.dense import check_dense
from vision.methods.trainer import Metrics, Problem, Trainer, accuracy, log_softmax
from vision.processes import parallel

Optimizers = Sequence[torch.optim.Optimizer]
MakeOptimizers = Callable[[nn.Module, Problem], Optimizers]
REST_LR = 0.15  # of Muon's AdamW, relative to the learning rate of the matrices


def point(problem: Problem, make: MakeOptimizers, net: nn.Module | None = None) -> Trainer:
    """The loop of an optimizer, or of several that share the weights of a network."""
    net = problem.make_network() if net is None else net
    shared = parallel(net)
    optimizers = make(shared, problem)

    def train_step(x: Tensor, y: Tensor) -> Metrics:
        shared.zero_grad(set_to_none=True)
        logits = shared(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return {"loss": loss.detach(), "nll": loss.detach(), "accuracy": accuracy(logits, y)}

    return Trainer(
        train_step, lambda x: log_softmax(net(x))[None], [net], optimizers,
        {"net": net, **{f"optimizer {k}": value for k, value in enumerate(optimizers)}},
    )


# ---- optimizers ---------------------------------------------------------------------------------


def adam(net: nn.Module, problem: Problem) -> Optimizers:
    """AdamW, without decay of norm layers and biases."""
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    settings = problem.settings
    groups: list[Any] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, settings.lr, weight_decay=settings.weight_decay)]


def l2_adam(net: nn.Module, problem: Problem) -> Optimizers:
    """Adam whose decay is part of the loss, as of a normal prior of precision N · decay."""
    settings = problem.settings
    return [torch.optim.Adam(net.parameters(), settings.lr, weight_decay=settings.weight_decay)]


def sgd(net: nn.Module, problem: Problem) -> Optimizers:
    settings = problem.settings
    return [torch.optim.SGD(
        net.parameters(), settings.lr, momentum=0.9, nesterov=True,
        weight_decay=settings.weight_decay,
    )]


def muon(net: nn.Module, problem: Problem) -> Optimizers:
    """Muon for the weights of linear and convolutional layers, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise Refusal(f"--method muon needs torch 2.9, this is {torch.__version__}")
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    weights = [layer.weight for layer in layers]
    rest = [p for p in net.parameters() if all(p is not weight for weight in weights)]
    settings = problem.settings
    return [
        MatrixMuon(weights, lr=settings.lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, REST_LR * settings.lr),
    ]


def second_order(net: nn.Module, problem: Problem) -> Optimizers:
    config, settings = problem.config, problem.settings
    check_dense(net, config.guide)
    structure: Any = {"diagonal": "diag"}.get(config.guide, config.guide)
    return [SecondOrderOptimizer(
        net, settings.lr, decoupled_weight_decay=settings.weight_decay, update=config.update,
        structure=structure,
        curvature="fisher" if config.curvature == "auto" else config.curvature,
    )]
