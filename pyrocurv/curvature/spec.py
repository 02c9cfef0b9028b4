"""Which curvature to estimate, and when: one frozen value for all users."""

from __future__ import annotations

from dataclasses import dataclass

from pyrocurv.curvature.update_interval import START, UpdateInterval
from pyrocurv.runtime.choices import CurvatureKind, Schedule
from pyrocurv.runtime.validation import (
    check_choice,
    check_fraction,
    check_integer,
    check_is,
    check_nonnegative,
)

KINDS = ("hessian", "ggn", "fisher", "empirical")
PRICE = "noise"  # the diagonal of the Hessian by Price's theorem
SCHEDULE = ((100, 5), (300, 10), (600, 20))  # up to this step, this interval
LAST_INTERVAL = 100
FIRST = UpdateInterval()


@dataclass(frozen=True)
class Curvature:
    """Which curvature of the negative log likelihood, how often, and from how many examples.

    Args:
        kind: "hessian" (second derivatives at the data; it may be indefinite: matrices are averaged
            as they are, and a precision omits the negative part), "ggn" (exact generalized
            Gauss-Newton: the Fisher information of the likelihood in closed form, for likelihoods
            with finite support and most families on the real line), "fisher" (the same from sampled
            targets, for any likelihood that can be sampled) or "empirical" (gradients at the data,
            summed over an example's positions but not over several likelihoods; cheap and related,
            but not an estimate of the other two). Diagonal posteriors also support "noise": the
            diagonal of the Hessian from the gradients at the samples of the posterior that training
            draws (Price's theorem), at every step and without extra cost.
        every: steps from one estimate to the next; "schedule": 5 steps up to step 100, 10 up to
            300, 20 up to 600, then 100; or "auto": a separate interval for each block, 20 steps at
            first, down to 5 while the inputs or gradients of its layers change and up to 500 while
            they do not. `benchmarks/update_interval.py` measures what they save.
        eigen_every: steps between eigendecompositions of Kronecker factors; the 1st, 2nd, 4th, 8th
            and 16th estimate have one in addition.
        batch: the number of examples of a mini-batch that an estimate uses, the first ones; None:
            all of them.
        decay: the weight of the past in the running average, per estimate; the first 1/(1 - decay)
            estimates have equal weights.
        initial: an isotropic curvature per example at the start, which decays as (1 - ρ)^step with
            ρ = B/N clipped to [0.01, 0.05]. Without it, the first samples of a network's posterior
            are so wide that training diverges. For "noise", the initial value of the average.
        num_samples: sampled targets for each example (kind "fisher"); or draws of random signs
            (kind "hessian"), which are used for layers where an exact result would take more than
            512 backward passes.

    Raises:
        ValueError: an unknown kind, or a number out of its range.

    Example:
        >>> from pyrocurv.curvature import Curvature
        >>> Curvature("ggn", every=1, batch=None).kind
        'ggn'
    """

    kind: CurvatureKind
    every: int | Schedule = 20
    eigen_every: int = 200
    batch: int | None = 32
    decay: float = 0.95
    initial: float = 0.1
    num_samples: int = 1

    def __post_init__(self) -> None:
        check_choice("curvature", self.kind, (*KINDS, PRICE), " (the last for diagonal posteriors)")
        check_integer("every", self.every, 1, "auto", "schedule")
        check_integer("eigen_every", self.eigen_every, 1)
        check_integer("batch", self.batch, 1, None)
        check_integer("num_samples", self.num_samples, 1)
        check_fraction("decay", self.decay)
        check_nonnegative("initial", self.initial)

    @property
    def uses_sample_gradients(self) -> bool:
        """Whether it is computed from the gradients at the posterior's samples, at every step."""
        return self.kind == PRICE

    def interval(self, step: int, interval: UpdateInterval = FIRST) -> int:
        """The steps between two estimates of a block around `step`."""
        if self.every == "auto":
            return interval.interval
        if isinstance(self.every, int):
            return self.every
        return next((every for end, every in SCHEDULE if step < end), LAST_INTERVAL)

    def is_due(self, step: int, interval: UpdateInterval = FIRST) -> bool:
        """Whether a block takes an estimate at `step`."""
        if self.every == "auto":
            return step >= interval.due
        return step % self.interval(step) == 0

    def decays_at(self, step: int) -> bool:
        """Whether the initial curvature decays at `step` in blocks that take no estimate."""
        return self.every == "auto" and step % START == 0

    def is_basis_due(self, step: int, interval: UpdateInterval = FIRST) -> bool:
        """Whether the estimate at `step` is the first since a multiple of `eigen_every`."""
        if self.every == "auto":
            return step // self.eigen_every > interval.last // self.eigen_every
        return step % self.eigen_every < self.interval(step)


def as_curvature(curvature: CurvatureKind | Curvature) -> Curvature:
    """The curvature; a string is short for `Curvature(kind)`."""
    if isinstance(curvature, str):
        return Curvature(curvature)
    check_is("curvature", curvature, Curvature, "a name or a Curvature")
    return curvature
