"""The character GPT as a Pyro model, and NGVI for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyrocurv
from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI

REST_LR = 4e-3  # of embeddings and norms
WARM_UP = 50  # steps


class Tokens(PyroModule):
    """Every token is an example: two plates, whose sizes multiply to N."""

    def __init__(self, net: nn.Module, sequences: int) -> None:
        super().__init__()
        self.net, self.sequences = net, sequences

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        rows = torch.arange(len(x))
        size = len(x) if y is None else self.sequences
        with pyro.plate("sequences", size, subsample=rows, dim=-2):
            with pyro.plate("positions", x.shape[1], dim=-1):
                pyro.sample("next", dist.Categorical(logits=logits), obs=y)
        return logits


def natural_gradient(
    net: nn.Module, sequences: int, lr: float, temperature: float = 0.01, rank: int = 64,
    damping: float = 3e-5, kl_clip: float = 0.1, initial: float = 0.1, every: int = 10,
) -> tuple[Tokens, KFACGuide, NGVI]:
    """A posterior over the weights of the linear layers; AdamW trains embeddings and norms.

    `sequences` times their length is N. `benchmarks/transformer.py` says how the numbers were
    chosen.
    """
    model = Tokens(pyrocurv.nn.bayesianize(net, layers=[nn.Linear]), sequences)
    guide = KFACGuide(model, structure={"*": KFAC(rank=rank)})
    engine = NGVI(
        model, guide, lr=lr, update="natural", damping=damping, kl_clip=kl_clip,
        temperature=temperature,
        curvature=Curvature(  # from 8 sequences
            "fisher", every=every, batch=8, initial=initial
        ),
        optim=lambda parameters: torch.optim.AdamW(parameters, lr=REST_LR),
    )
    return model, guide, engine


def falling(total: int, warm_up: int = WARM_UP) -> Callable[[int], float]:
    """Linear warm-up, then a cosine to 0."""
    return lambda t: min(1, (t + 1) / warm_up) * (1 + math.cos(math.pi * t / total)) / 2
