"""torch's Muon for the weights of convolutions too: shared by examples and benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Base: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # torch has it since 2.9


class MatrixMuon(Base):
    """torch's Muon for weights of any number of axes, as matrices [O, rest] in the same memory.

    On a CPU it iterates in the dtype of the weights: bfloat16, torch's choice, can be a hundred
    times slower there.
    """

    def __init__(self, weights: Sequence[Tensor], **options: Any) -> None:
        self.weights = weights
        self.matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(self.matrices, **options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        on_cpu = self.matrices[0].device.type == "cpu"
        with mock.patch.object(Tensor, "bfloat16", Tensor.clone) if on_cpu else nullcontext():
            return super().step(closure)
