"""What curvature to estimate, and when: one frozen value for all users."""

from __future__ import annotations

from dataclasses import dataclass

from pyrocurv.curvature.update_interval import START, UpdateInterval

KINDS = ("hessian", "ggn", "fisher", "empirical")
PRICE = "noise"  # the diagonal of the Hessian by Price's theorem
SCHEDULE = ((100, 5), (300, 10), (600, 20))  # up to this step, this interval
LATE = 100
FIRST_INTERVAL = UpdateInterval()


@dataclass(frozen=True)
class Curvature:
    """Which curvature of the negative log likelihood, how often, from how many examples.

    Args:
        kind: "hessian" (second derivatives at the data, which may be indefinite: the running
            average is of the matrices as they are, a precision leaves out what is negative in it),
            "ggn" (exact generalised Gauss-Newton: the Fisher information of the likelihood in
            closed form, for those of finite support and most families on the line), "fisher" (the
            same by sampled targets, for any that can be sampled) or "empirical" (gradients at the
            data, summed over an example's positions but not over several likelihoods; a cheap
            relative, not an estimate of the other two). Diagonal posteriors also know "noise": the
            Hessian's diagonal from the gradients at the very samples that training draws (Price's
            theorem), at every step and at no cost.
        every: steps from one estimate to the next; "schedule": 5 steps up to step 100, 10 up to
            300, 20 up to 600, then 100; or "auto": each block by itself, from 20 steps at first
            down to 5 while its layers' inputs or gradients move, up to 500 while they do not.
            `benchmarks/update_interval.py` prints what either saves.
        eigen_every: steps between eigendecompositions of Kronecker factors; the 1st, 2nd, 4th, 8th
            and 16th estimate have one besides.
        batch: examples of a mini-batch that an estimate reads, the first ones; None for all.
        decay: weight of the past in the running average, per estimate; the first 1/(1 - decay)
            estimates are averaged equally.
        initial: an isotropic curvature per datum at the start, that fades as (1 - ρ)^step with
            ρ = B/N within [0.01, 0.05]. Without it the first samples of a network's posterior are
            so wide that training explodes. For "noise" it is where the average starts.
        num_samples: sampled targets for each example (kind "fisher"); draws of random signs (kind
            "hessian") for layers that an exact answer would take more than 512 backward passes
            for, and for no others.

    Raises:
        ValueError: an unknown kind, or a number out of its range.

    Example:
        >>> from pyrocurv.curvature import Curvature
        >>> Curvature("ggn", every=1, batch=None).kind
        'ggn'
    """

    kind: str
    every: int | str = 20
    eigen_every: int = 200
    batch: int | None = 32
    decay: float = 0.95
    initial: float = 0.1
    num_samples: int = 1

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, PRICE):
            raise ValueError(
                f"curvature={self.kind!r}: choose one of {', '.join(KINDS)} or, for diagonal "
                f"posteriors, {PRICE}"
            )
        for name in ("every", "eigen_every", "batch", "num_samples"):
            value = getattr(self, name)
            if (name, value) in (("batch", None), ("every", "schedule"), ("every", "auto")):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                also = {"every": ", 'auto' or 'schedule'", "batch": " or None"}.get(name, "")
                raise ValueError(
                    f"Curvature({name}={value!r}): a whole number from 1{also} is needed"
                )
        if not 0 <= self.decay < 1:
            raise ValueError(f"Curvature(decay={self.decay!r}): a number in [0, 1) is needed")
        if not self.initial >= 0:
            raise ValueError(f"Curvature(initial={self.initial!r}): a number from 0 is needed")

    @property
    def uses_sample_gradients(self) -> bool:
        """Whether it is taken from the gradients at the posterior's own samples, at every step."""
        return self.kind == PRICE

    def interval(self, step: int, interval: UpdateInterval = FIRST_INTERVAL) -> int:
        """Steps between two estimates of a block around `step`."""
        if self.every == "auto":
            return interval.interval
        if isinstance(self.every, int):
            return self.every
        return next((every for end, every in SCHEDULE if step < end), LATE)

    def is_due(self, step: int, interval: UpdateInterval = FIRST_INTERVAL) -> bool:
        """Whether a block takes an estimate at `step`."""
        if self.every == "auto":
            return step >= interval.due
        return step % self.interval(step) == 0

    def decays_at(self, step: int) -> bool:
        """Whether the initial curvature fades at `step` in blocks that take no estimate then."""
        return self.every == "auto" and step % START == 0

    def is_basis_due(self, step: int, interval: UpdateInterval = FIRST_INTERVAL) -> bool:
        """Whether the estimate at `step` is the first since a multiple of `eigen_every`."""
        if self.every == "auto":
            return step // self.eigen_every > interval.last // self.eigen_every
        return step % self.eigen_every < self.interval(step)


def as_curvature(curvature: str | Curvature) -> Curvature:
    """A string is short for `Curvature(kind)`."""
    if isinstance(curvature, str):
        return Curvature(curvature)
    if not isinstance(curvature, Curvature):
        raise TypeError(f"curvature: a name or a Curvature is needed, got {curvature!r}")
    return curvature
