"""The temperature T of a step, and the rule that "auto" stands for.

With s the eigenvalues of the curvature per datum, N data and δ the precision of the prior,

    γ = Σ s / (s + e + δT₀/N),   T₀ = 0.01
    T = 0.1 (2.8 N/γ)¹², but within [0.005, 0.1]

γ, or tr((N/T₀) C Λ⁻¹) where curvature and prior have other eigenvectors, is the number of weights
that the data determine at T₀ (MacKay 1992, "Bayesian interpolation"); it is exact for a linear
model if the structure of C is. So T is 0.1, but for networks with several such weights per datum,
which fit their data exactly: they have a narrow posterior. The numbers are from experiments with
networks from 10² to 10⁵ weights (`benchmarks/temperatures.py`). γ is computed at every estimate of
the curvature; before the first nothing is sampled. Of the other weights a share counts too, as much
as is left of the initial curvature e: so T starts low, where it would only slow the run down.

A sample costs about T γ / (2N) nats per datum more than the mean, with γ at the T of the run;
exactly that where the loss is quadratic. T is divided by 10 after a pass over the data, of 50 steps
at least, in which the loss at the samples was where it started (2 % below to 50 % above), if they
cost more than 2 % of it. `VIOptimizer` reads that loss off its gradient in the output; with a
callable as likelihood only a closure tells it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyrocurv.posterior.hyperparameters import AUTO
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_integer, check_positive
from pyrocurv.structures.serialization import serializable

HIGHEST, LOWEST = 0.1, 0.005  # by the rule
REFERENCE = 0.01  # T₀
MOST_PER_DATUM, POWER = 2.8, 12  # determined weights at the highest T, and how it falls above
FLOOR = 1e-3  # of a loss that does not fall
MIN_STEPS = 50  # before a loss that has not fallen says something
PROGRESS = 0.98  # of the loss at the first step; a loss above has not fallen
DIVERGED = 1.5  # of it; a loss above is that of a network that was trained before


@serializable
@dataclass(frozen=True)
class TemperatureState:
    """What a run has shown.

    `value` is T of the last step, `determined` and `determined_cold` are the numbers of weights
    that the data determine at T and at T₀, and `factor` is what a loss that stays has left of T.
    `start` is the negative log likelihood per datum of the first step, `total` its sum over the
    `steps` since, in which `passes` of the data were seen; those three start again after a pass.
    """

    value: float | None = None
    determined: float = 0.0
    determined_cold: float = 0.0
    factor: float = 1.0
    start: float | None = None
    total: float = 0.0
    steps: int = 0
    passes: float = 0.0
    is_first_pass: bool = True
    is_stalled: bool = False  # the loss of the last pass is where it started

    def after(
        self, value: float, nll: float, batch_fraction: float, num_data: float
    ) -> TemperatureState:
        """With one more step at T = `value`: its loss per datum, on B/N of the data."""
        if self.start is None:
            return replace(self, value=value, start=nll)
        new = replace(
            self, value=value, total=self.total + nll, steps=self.steps + 1,
            passes=self.passes + batch_fraction,
        )
        if new.passes < 1 or new.steps < MIN_STEPS:
            return new
        progress, change = (1 - PROGRESS) * abs(self.start), new.total / new.steps - self.start
        is_stalled = -progress < change < (DIVERGED - 1) * abs(self.start)
        is_noise = value * self.determined / (2 * num_data) > progress
        return TemperatureState(
            value, self.determined, self.determined_cold,
            self.factor / 10 if is_stalled and is_noise else self.factor,
            self.start, is_first_pass=False, is_stalled=is_stalled,
        )


@dataclass(frozen=True)
class TemperatureRule:
    """A temperature as the user gave it, "auto" included.

    It rises linearly over the first `warmup` steps. Raises ValueError for one out of its range.
    """

    given: float | str
    warmup: int = 0

    def __post_init__(self) -> None:
        check_positive("temperature", self.given, AUTO)
        check_integer("kl_warmup", self.warmup, 0)

    @property
    def is_automatic(self) -> bool:
        return self.given == AUTO

    def __call__(self, num_data: float, state: TemperatureState, step: int) -> float:
        """T at a step, counted from 0."""
        share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if isinstance(self.given, float | int):
            return share * self.given
        ratio = min(1.0, MOST_PER_DATUM * num_data / max(1.0, state.determined_cold))
        temperature = max(LOWEST, HIGHEST * ratio**POWER)
        return share * max(FLOOR, state.factor * temperature)


def warn_at_chance(before: TemperatureState, after: TemperatureState, is_automatic: bool) -> None:
    """Say once, after the first pass over the data, that the loss has not fallen."""
    if not (before.is_first_pass and after.is_stalled):
        return
    remedy = "unless the network was trained before, try another learning rate"
    if after.factor < before.factor:
        remedy = "the temperature is reduced" if is_automatic else (
            'the posterior may be too wide: try temperature="auto", or a lower one'
        )
    warn_user(
        "after one pass over the data the loss at samples of the posterior is where it started: "
        + remedy
    )
