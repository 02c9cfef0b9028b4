"""The methods by the name of `--method`: a step, and the networks that predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from language.config import Config
from language.posterior import REST_LR, natural_gradient
from matrix_muon import MatrixMuon
from pyrocurv.optim import SecondOrderOptimizer
from resuming import Refusal

MUON_REST = 0.15  # learning rate of Muon's AdamW, relative to that of the matrices
LRS = {"adam": 3e-3, "muon": 0.04, "second-order": 0.04, "ngvi": 0.04}
# the best of a few in `benchmarks/optimizers.py`, where 5e-3 is that of AdamW


@dataclass(frozen=True)
class Method:
    """How it steps and predicts, and the objects whose states are a checkpoint.

    `networks(S)` are S plain networks, samples of the posterior, or the one that there is;
    `networks(0)` is the mean of the posterior.
    """

    step: Callable[[Tensor, Tensor], float]  # the loss of a batch, in nats per character
    networks: Callable[[int], Sequence[nn.Module]]
    optimizers: Sequence[torch.optim.Optimizer]  # whose learning rates follow the schedule
    objects: Mapping[str, Any]


def make_method(config: Config, net: nn.Module, num_characters: int) -> Method:
    """Of a network with new weights."""
    lr = LRS[config.method] if config.lr is None else config.lr
    if config.method == "ngvi":
        return ngvi(config, net, num_characters, lr)
    return point(net, OPTIMIZERS[config.method](net, lr))


# ---- one value for each weight ------------------------------------------------------------------


def point(net: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Method:
    def step(x: Tensor, y: Tensor) -> float:
        net.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    states = {f"optimizer {number}": value for number, value in enumerate(optimizers)}
    return Method(step, lambda samples: [net], optimizers, {"net": net, **states})


def adam(net: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
    return [torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99))]


def muon(net: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for head, embeddings, norms and biases."""
    if not hasattr(torch.optim, "Muon"):
        raise Refusal(f"--method muon needs torch 2.9, this is {torch.__version__}")
    layers = [m for n, m in net.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    weights = [layer.weight for layer in layers]
    rest = [p for p in net.parameters() if all(p is not weight for weight in weights)]
    return [MatrixMuon(weights, lr=lr), torch.optim.AdamW(rest, MUON_REST * lr)]


def second_order(net: nn.Module, lr: float) -> Sequence[torch.optim.Optimizer]:
    """The curvature for linear layers, AdamW for embeddings and norms."""
    layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
    own = [p for layer in layers for p in layer.parameters()]
    rest = [p for p in net.parameters() if all(p is not weight for weight in own)]
    return [
        SecondOrderOptimizer(net, lr, params=own, class_dim=-1),
        torch.optim.AdamW(rest, REST_LR),
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Sequence[torch.optim.Optimizer]]] = {
    "adam": adam, "muon": muon, "second-order": second_order,
}


# ---- a posterior --------------------------------------------------------------------------------


def ngvi(config: Config, net: nn.Module, num_characters: int, lr: float) -> Method:
    sequences = max(1, num_characters // config.context)
    model, guide, engine = natural_gradient(
        net, sequences, lr, temperature=config.kl_temperature,
        rank=min(64, config.width // 2),
    )

    def step(x: Tensor, y: Tensor) -> float:
        engine.step(x, y)
        assert engine.loss_terms is not None
        return engine.loss_terms.nll / num_characters

    def networks(samples: int) -> Sequence[nn.Module]:
        if samples == 0:
            return [guide.to_module()]
        return [guide.to_module(sample=True) for _ in range(samples)]

    return Method(
        step, networks, [engine.optimizer], {"model": model, "guide": guide, "ngvi": engine}
    )
