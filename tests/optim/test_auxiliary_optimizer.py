"""Adam of the parameters without a Gaussian, against torch.optim.Adam."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyrocurv.optim.auxiliary_optimizer import AuxiliaryOptimizer, AuxiliaryParameter


def gradients(step: int, transposed: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    matrix = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    scale = torch.randn((), generator=generator, dtype=torch.float64).expand(7)
    return [matrix.mT if transposed else matrix.mT.contiguous(), scale]


@pytest.mark.parametrize("at", [0, 3, None])
def test_it_is_adam_in_every_memory_layout(at: int | None) -> None:
    """Gradients that are transposed or expanded, and a parameter that is transposed in step `at`.

    The kernel of fused Adam reads its arguments as if they were contiguous.
    """
    ours = [torch.ones(3, 5, dtype=torch.float64), torch.ones(7, dtype=torch.float64)]
    theirs = [x.clone() for x in ours]
    adam, optimizer = torch.optim.Adam(theirs, lr=0.1, foreach=False), AuxiliaryOptimizer()
    for step in range(6):
        if step == at:
            ours[0].data = ours[0].mT.contiguous().mT
        given = gradients(step, True)
        optimizer.step([
            AuxiliaryParameter(name, x, g, 0, {"lr": 0.1})
            for name, x, g in zip("ab", ours, given, strict=True)
        ])
        for x, g in zip(theirs, gradients(step, False), strict=True):
            x.grad = g.clone()
        adam.step()
        assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(ours, theirs, strict=True))
