"""Hamiltonian Monte Carlo of many chains at once, the reference of the other benchmarks.

All chains go through one batched density, with one step size, one diagonal mass matrix (both set
during warm-up, then fixed) and one random number of leapfrog steps for each draw. Neal 2011, "MCMC
using Hamiltonian dynamics", arXiv:1206.1901; the step size by dual averaging as in Hoffman & Gelman
2014, arXiv:1111.4246.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor
from tqdm import tqdm

Density = Callable[[Tensor], Tensor]  # [C, D] -> log densities [C]


def value_and_slope(density: Density, at: Tensor) -> tuple[Tensor, Tensor]:
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        value = density(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), slope


def hmc(
    density: Density, start: Tensor, draws: int, warmup: int, leapfrogs: tuple[int, int],
    accept: float = 0.8, label: str = "HMC",
) -> Tensor:
    """Draws [draws, C, D] of C chains from `start` [C, D], after `warmup` that are left out.

    `leapfrogs` is the range of the number of steps of a draw. The mass is the inverse variance over
    chains and the second half of the draws so far, set at a quarter, a half and three quarters of
    the warm-up.
    """
    at = start.detach().clone()
    value, slope = value_and_slope(density, at)
    spread = torch.ones_like(at[0])  # standard deviations: the inverse root of the mass
    rule, step = DualAveraging(prox_center=math.log(1.0)), 0.1
    seen: list[Tensor] = []
    updates = {warmup * quarter // 4 for quarter in (1, 2, 3)}
    for number in tqdm(range(warmup + draws), label, disable=None, leave=False):
        if number in updates:
            spread = torch.cat(seen[len(seen) // 2 :]).std(0)
            rule.reset()
            rule.prox_center = math.log(10 * step)
        momentum = torch.randn_like(at)
        energy = value - momentum.square().sum(-1) / 2
        new, new_value, new_slope = at, value, slope
        count = int(torch.randint(leapfrogs[0], leapfrogs[1] + 1, ()))
        for _ in range(count):
            momentum = momentum + step / 2 * spread * new_slope
            new = new + step * spread * momentum
            new_value, new_slope = value_and_slope(density, new)
            momentum = momentum + step / 2 * spread * new_slope
        gain = new_value - momentum.square().sum(-1) / 2 - energy
        odds = gain.nan_to_num(-math.inf).clamp(max=0).exp()
        taken = torch.rand_like(odds) < odds
        at = torch.where(taken[:, None], new, at)
        value = torch.where(taken, new_value, value)
        slope = torch.where(taken[:, None], new_slope, slope)
        seen.append(at)
        if number < warmup:
            rule.step(accept - float(odds.mean()))
            step = math.exp(rule.get_state()[0 if number < warmup - 1 else 1])
    return torch.stack(seen[warmup:])
