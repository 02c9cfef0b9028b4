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
from pyrocurv.curvature.in_weights import products
from pyrocurv.engine import average_weight
from pyrocurv.families import Family
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.infer.heat import Heat
from pyrocurv.infer.rest import Others
from pyrocurv.infer.run import Run, Runner
from pyrocurv.natural import trust
from pyrocurv.structures import Dense, Diagonal, Structure

CAP = 1.0  # on |X|, in steps of Λ
CHUNK = 256  # rows of a Hessian at once
LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Numbers:
    """Of a step: learning rate, its base, rate of Λ, κ, T, S, and whether samples come in pairs."""

    lr: float
    base_lr: float
    rate: float
    kl_clip: float | None
    temperature: Heat
    samples: int
    antithetic: bool
    average: bool

    @staticmethod
    def of(
        group: Mapping[str, Any], decay: float, samples: int | str, temperature: Heat,
        antithetic: bool, average: bool, has_scales: bool,
    ) -> Numbers:
        """From a parameter group; what was not given is slower and surer where there are scales."""
        rate, number = (0.1, 32) if has_scales else (0.3, 8)
        return Numbers(
            group["lr"], group.get("initial_lr", group["lr"]),
            rate if decay == Curvature.decay else 1 - decay, group["kl_clip"], temperature,
            samples if isinstance(samples, int) else number, antithetic, average,
        )


@dataclass(frozen=True, eq=False)
class Whole:
    """After `step` steps: the iterate, and its running average where there is one."""

    step: int
    loc: Tensor
    precision: Dense | Diagonal
    mean_loc: Tensor | None = None
    mean_precision: Dense | Diagonal | None = None

    def to(self, like: Tensor) -> Whole:
        """On the device and in the dtype of `like`."""
        if self.loc.device == like.device and self.loc.dtype == like.dtype:
            return self
        mean = self.mean_precision
        return Whole(
            self.step, self.loc.to(like), self.precision.map(lambda x: x.to(like)),
            None if self.mean_loc is None else self.mean_loc.to(like),
            None if mean is None else mean.map(lambda x: x.to(like)),
        )

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        mean = None if self.mean_precision is None else self.mean_precision.state()
        return {
            "step": self.step, "loc": self.loc, "precision": self.precision.state(),
            "mean_loc": self.mean_loc, "mean_precision": mean,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Whole:
        """The way back from `state`."""
        made = {
            name: None if state[name] is None else Structure.from_state(state[name])
            for name in ("precision", "mean_precision")
        }
        return Whole(**{**state, **made})


def suits(spec: Curvature, model: Callable[..., Any]) -> bool:
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


def blended(precision: Dense | Diagonal, target: Tensor, rate: float) -> Dense | Diagonal:
    """Λ moved towards the target H [P, P], or its diagonal [P]."""
    if isinstance(precision, Diagonal):
        values = precision.diag()
        x = target / values - 1
        r = _rate(x, rate)
        return Diagonal(values * (1 + r * x + (r * x).square() / 2))
    root = torch.linalg.cholesky(precision.dense())
    half = torch.linalg.solve_triangular(root, target, upper=False)
    x = torch.linalg.solve_triangular(root, half.mT, upper=False)
    x = (x + x.mT) / 2 - torch.eye(len(x)).to(x)
    r = _rate(x, rate)
    x = r * x
    change = x + x @ x / 2
    moved = precision.dense() + root @ change @ root.mT
    return Dense((moved + moved.mT) / 2)


def _rate(x: Tensor, rate: float) -> Tensor:
    return (CAP / x.norm()).clamp(max=rate)


def advance(state: Whole, gradient: Tensor, target: Tensor, numbers: Numbers) -> Whole:
    """One step from the means of gradient [P] and Hessian, both of E/T."""
    try:
        precision = blended(state.precision, target, numbers.rate)
        direction = precision.solve(gradient)
    except torch.linalg.LinAlgError as error:
        raise FloatingPointError(
            f"step {state.step}: the precision is too ill-conditioned to go on. Has the log joint "
            "no mode, as where a scale runs to 0? num_particles > 0 or a non-centred model help"
        ) from error
    power = float(numbers.base_lr**2 * torch.dot(direction, gradient))
    if not math.isfinite(power):
        raise FloatingPointError(f"step {state.step}: a gradient or a curvature is not finite")
    loc = state.loc - numbers.lr * trust(power, numbers.kl_clip) * direction
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
    others: Others

    def writer(self, families: Sequence[Family]) -> Callable[[], None]:
        """What puts it into the guide; all that may fail is done before."""
        (family,), new = families, self.state
        encoded = family.encode(new.mean_precision or new.precision)
        return lambda: family.write(new.loc if new.mean_loc is None else new.mean_loc, encoded)


def propose(state: Whole, numbers: Numbers, runner: Runner, at_once: bool) -> Step:
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
    samples: Tensor, temperature: Heat, runner: Runner, at_once: bool
) -> tuple[Tensor, Run, float]:
    """E of each sample [S, P], a run, and T."""
    (family,) = runner.guide.blocks
    runs: list[tuple[Run, float]] = []

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
        (found,) = products(gradient, [samples], vectors)
        rows.append(torch.zeros_like(part) if found is None else found.sum(1))
    matrix = torch.cat(rows).detach()
    return matrix.diagonal() if is_diagonal else (matrix + matrix.mT) / 2


def log_q(precision: Structure, square: Tensor) -> Tensor:
    """The log density of a sample, for square = |z|²."""
    return (precision.logdet() - square - precision.size * LOG_2PI) / 2


def start(guide_loc: Tensor, precision: Structure, untouched: bool, kind: str) -> Whole:
    """From the guide: its mean, and its precision unless nothing has been learnt yet, then 1."""
    diagonal = precision.diag().detach()
    if kind == "diag":
        return Whole(0, guide_loc, Diagonal(torch.ones_like(diagonal) if untouched else diagonal))
    matrix = torch.eye(len(diagonal)).to(diagonal) if untouched else precision.dense().detach()
    return Whole(0, guide_loc, Dense(matrix))
