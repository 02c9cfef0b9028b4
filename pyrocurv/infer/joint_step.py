"""A Gaussian over all latents of a model, by natural gradients of the log joint.

For E(z) = -log p(y | z) - T (log p(z) + ln |det dz/du|) of real vectors u ~ N(m, Λ⁻¹), at S samples
in antithetic pairs, with g and H the means of ∇E and ∇²E and Λ = L Lᵀ:

    X = L⁻¹ (H/T - Λ) L⁻ᵀ,   r = min(rate, 1/|X|)
    Λ ← L (1 + r X + r² X²/2) Lᵀ          stays positive definite, as 1 + x + x²/2 > 0 does
    m ← m - lr ν Λ⁻¹ g/T,    ν = min(1, sqrt(κ / (lr² <Λ⁻¹g/T, g/T>)))

Exact where the posterior is Gaussian, a diagonal Λ then in its conditional variances; elsewhere it
rests where the ELBO does. The cap on the covariance's step keeps a sample from a heavy tail from
blowing up Λ.

Lin, Schmidt & Khan 2020, arXiv:2002.10060; Khan & Rue 2023, arXiv:2107.04562.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.hessian_weights import vector_hessian_products
from pyrocurv.guides.families import Family
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.infer.heat import TemperatureRule
from pyrocurv.infer.model_run import BatchModel, ModelRun
from pyrocurv.infer.rest import AuxiliaryParameters
from pyrocurv.posterior.joint_update import Whole, log_q, retract
from pyrocurv.posterior.natural_gradient import trust_region_scale
from pyrocurv.posterior.step import average_weight
from pyrocurv.structures import Dense, Diagonal, Structure

CHUNK = 256  # rows of a Hessian at once


@dataclass(frozen=True)
class Numbers:
    """Of a step: learning rate, its base, rate of Λ, κ, T, S, and whether samples come in pairs."""

    lr: float
    base_lr: float
    rate: float
    kl_clip: float | None
    temperature: TemperatureRule
    samples: int
    antithetic: bool
    average: bool

    @staticmethod
    def of(
        group: Mapping[str, Any], decay: float, samples: int | str, temperature: TemperatureRule,
        antithetic: bool, average: bool, has_constrained: bool,
    ) -> Numbers:
        """From a parameter group; what was not given is slower and surer where there are scales."""
        rate, number = (0.1, 32) if has_constrained else (0.3, 8)
        return Numbers(
            group["lr"], group.get("initial_lr", group["lr"]),
            rate if decay == Curvature.decay else 1 - decay, group["kl_clip"], temperature,
            samples if isinstance(samples, int) else number, antithetic, average,
        )


def uses_joint_update(spec: Curvature, model: Callable[..., Any]) -> bool:
    """Whether it is of Hessians and, for a network, of nothing else that running estimates have."""
    plain = replace(spec, decay=Curvature.decay) == Curvature("hessian")
    return plain or spec.kind == "hessian" and not has_network(model)


def noises(count: int, precision: Structure, antithetic: bool) -> Iterator[Tensor]:
    """Standard normal z [P] for each of `count` samples; every second one mirrors the last.

    For none there is the mean, z = 0.
    """
    diagonal = precision.diag()
    z = torch.zeros_like(diagonal)
    if not count:
        yield z
    for number in range(count):
        z = -z if antithetic and number % 2 else torch.randn_like(diagonal)
        yield z


def advance(state: Whole, gradient: Tensor, target: Tensor, numbers: Numbers) -> Whole:
    """One step from the means of gradient [P] and Hessian, both of E/T."""
    try:
        precision = retract(state.precision, target, numbers.rate)
        direction = precision.solve(gradient)
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(
            f"step {state.step}: the precision is too ill-conditioned to go on. Has the log joint "
            "no mode, as where a scale runs to 0? num_particles > 0 or a non-centred model help"
        ) from error
    power = float(numbers.base_lr**2 * torch.dot(direction, gradient))
    if not math.isfinite(power):
        raise FloatingPointError(f"step {state.step}: a gradient or a curvature is not finite")
    loc = state.loc - numbers.lr * trust_region_scale(power, numbers.kl_clip) * direction
    new = replace(state, step=state.step + 1, loc=loc, precision=precision)
    if not numbers.average:
        return new
    weight = average_weight(state.step)
    old_loc = loc if state.mean_loc is None else state.mean_loc
    old_precision = precision if state.mean_precision is None else state.mean_precision
    return replace(
        new, mean_loc=old_loc.lerp(loc, weight),
        mean_precision=old_precision.lerp(precision, weight),  # type: ignore[arg-type]  # both of one kind
    )


@dataclass(frozen=True, eq=False)
class Step:
    """A step that is ready to be made."""

    loss: float
    state: Whole
    others: AuxiliaryParameters

    def writer(self, families: Sequence[Family]) -> Callable[[], None]:
        """What puts it into the guide; all that may fail is done before."""
        (family,), new = families, self.state
        encoded = family.encode(new.mean_precision or new.precision)
        return lambda: family.write(new.loc if new.mean_loc is None else new.mean_loc, encoded)


def propose(state: Whole, numbers: Numbers, runner: BatchModel, at_once: bool) -> Step:
    """Look at S samples, together if they can be, and step."""
    z = torch.stack([*noises(numbers.samples, state.precision, numbers.antithetic)])
    samples = (state.loc + state.precision.rsqrt(z)).detach().requires_grad_()
    with twice_differentiable():
        energies, run, heat = _energies(samples, numbers.temperature, runner, at_once)
    gradient, *rest = torch.autograd.grad(
        energies.mean(), [samples, *run.params], create_graph=True, allow_unused=True
    )
    if gradient is None:
        raise ValueError("the log joint does not depend on the latents")
    curvature = hessian(gradient, samples, runner.guide.blocks[0].block.kind == "diag")
    losses = energies.detach() + heat * log_q(state.precision, z.square().sum(-1))
    loss = float(losses.mean())
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {state.step}: the loss is {loss}")
    new = advance(state, gradient.detach().sum(0) / heat, curvature / heat, numbers)
    return Step(loss, new, run.others([None if g is None else g.detach() for g in rest]))


def _energies(
    samples: Tensor, temperature: TemperatureRule, runner: BatchModel, at_once: bool
) -> tuple[Tensor, ModelRun, float]:
    """E of each sample [S, P], a run, and T."""
    (family,) = runner.guide.blocks
    runs: list[tuple[ModelRun, float]] = []

    def energy(sample: Tensor) -> Tensor:
        with runner.network():
            run = runner(family.block.unpack(sample))
        runs.append((run, temperature(run)))
        return run.joint(runs[-1][1])

    if at_once:
        return torch.func.vmap(energy, randomness="different")(samples), *runs[-1]
    return torch.stack([energy(sample) for sample in samples]), *runs[-1]


def hessian(gradient: Tensor, samples: Tensor, is_diagonal: bool) -> Tensor:
    """The sum of the samples' Hessians [P, P], or its diagonal [P], from the gradients [S, P]."""
    rows = []
    for part in torch.eye(samples.shape[1]).to(samples).split(CHUNK):
        vectors = part.unsqueeze(1).expand(-1, len(samples), -1)
        (found,) = vector_hessian_products(gradient, [samples], vectors)
        rows.append(torch.zeros_like(part) if found is None else found.sum(1))
    matrix = torch.cat(rows).detach()
    return matrix.diagonal() if is_diagonal else (matrix + matrix.mT) / 2


def start(guide_loc: Tensor, precision: Structure, untouched: bool, kind: str) -> Whole:
    """From the guide: its mean, and its precision unless nothing has been learnt yet, then 1."""
    diagonal = precision.diag().detach()
    if kind == "diag":
        return Whole(0, guide_loc, Diagonal(torch.ones_like(diagonal) if untouched else diagonal))
    matrix = torch.eye(len(diagonal)).to(diagonal) if untouched else precision.dense().detach()
    return Whole(0, guide_loc, Dense(matrix))
