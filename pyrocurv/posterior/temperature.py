"""The temperature T of a step, and the rule that "auto" stands for.

Whether a colder posterior predicts better shows in the weights that the data determine: are they as
large as the prior expects (MacKay 1992, "Bayesian interpolation")? With the curvature C per datum
of N data, the initial curvature e, the prior's mean M₀ and precision Λ₀, and d = M - M₀,

    D = Λ⁻¹ (N/T₁) C,   Λ = (N/T₁) (C + e) + Λ₀,   T₁ = 0.1
    γ = tr D,   r = dᵀ Λ₀ D d / γ
    T = 0.1 (2.5/r)³, but within [0.003, 0.1]

γ is the number of determined weights at T₁, and r is their mean square, in standard deviations of
the prior; those that are still at their random start do not count. For a prior that fits r is about
1. Up to 2.5 T is 0.1: so it is for photographs with a few wrong labels, and few rows with noise.
Clean data that a network fits exactly, or a prior that is too narrow, ask for larger weights. Then
T falls, which lets them grow. As wrong labels ask for large weights too, T stays at 0.02 or above
while the mean loss of a pass is more than 1/12 of the first. T is 0.02 in the first pass, in which
r means little. Networks with normalization layers need no large weights for clean data. There two
early passes tell, before much is memorized: if ρ, the mean loss of the second as a share of the
first step's, is below 1/20, T is at most ρ/4; if that of the fourth is below 1/12, less the cost of
the samples (below), or is 1.5 times that of the second, T is at most 0.02. With the posterior of
an earlier task as prior, or other means of single weights, T is 0.1 from the second step on.

γ and r are computed at every estimate of the curvature; before the first nothing is sampled. Of the
other weights a share counts in γ too, as much as is left of e. With `curvature="noise"`, which has
no such estimates, T is 0.1 after the first pass, or ρ/4. The numbers are from experiments with
networks from 10² to 10⁵ weights (`benchmarks/temperatures.py`).

After a pass in which the loss at the samples was where it started (2 % below to 50 % above) T is
0.02 at most. The highest T is also divided by 10, if the samples cost more than 2 % of the loss:
about T γ / (2N) nats per datum. A pass has 50 steps at least. `VIOptimizer` reads the loss off its
gradient in the output; with a callable as likelihood only a closure tells it, and T stays at 0.02
without one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyrocurv.posterior.hyperparameters import AUTO
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_integer, check_positive
from pyrocurv.structures.serialization import serializable

REFERENCE = 0.1  # T₁, and the highest T by the rule
LOWEST, CAUTIOUS = 0.003, 0.02  # by the rule, where `is_fitted` and elsewhere
LARGEST, POWER = 2.5, 3  # r at the highest T, and how T falls above
LEARNED = 1 / 20  # of the loss at the first step; a second pass below has clean data
FITTED = 1 / 12  # of the loss at the first step; a loss below is that of data without errors
RISEN = 1.5  # times the loss of the second pass; a loss above in the fourth was raised by T
FLOOR = 1e-3  # of a loss that does not fall
MIN_STEPS = 50  # before a loss that has not fallen says something
PROGRESS = 0.98  # of the loss at the first step; a loss above has not fallen
DIVERGED = 1.5  # of it; a loss above is that of a network that was trained before


@serializable
@dataclass(frozen=True)
class TemperatureState:
    """What a run has shown.

    `value` is T of the last step, `determined` is γ/N, `mean_square` is r, `is_informed` says
    whether weights have prior means of their own, and `factor` is what a loss that stays has left
    of the highest T. `start` is the negative log likelihood per datum of the first step,
    `loss` its mean over the last pass, `total` its sum over the `steps` since, in which `passes` of
    the data were seen; those three start again after a pass. `finished` is the number of passes
    until then, `second` the loss of the second, and `ceiling` the highest T that the second and the
    fourth have left.
    """

    value: float | None = None
    determined: float = 0.0
    mean_square: float = 0.0
    is_informed: bool = False
    factor: float = 1.0
    start: float | None = None
    loss: float | None = None
    total: float = 0.0
    steps: int = 0
    passes: float = 0.0
    finished: int = 0
    second: float | None = None
    ceiling: float = REFERENCE
    is_stalled: bool = False  # the loss of the last pass is where it started

    def after(self, value: float, nll: float, batch_fraction: float) -> TemperatureState:
        """With one more step at T = `value`: its loss per datum, on B/N of the data."""
        if self.start is None:
            return replace(self, value=value, start=nll)
        new = replace(
            self, value=value, total=self.total + nll, steps=self.steps + 1,
            passes=self.passes + batch_fraction,
        )
        if new.passes < 1 or new.steps < MIN_STEPS:
            return new
        loss, progress = new.total / new.steps, (1 - PROGRESS) * abs(self.start)
        is_stalled = -progress < loss - self.start < (DIVERGED - 1) * abs(self.start)
        is_noise = value * self.determined / 2 > progress
        return TemperatureState(
            value, self.determined, self.mean_square, self.is_informed,
            self.factor / 10 if is_stalled and is_noise else self.factor,
            self.start, loss, finished=self.finished + 1,
            second=loss if self.finished == 1 else self.second,
            ceiling=min(self.ceiling, self._ceiling_of_pass(value, loss)), is_stalled=is_stalled,
        )

    def _ceiling_of_pass(self, value: float, loss: float) -> float:
        """The highest T by the pass that is complete now, with this mean loss, at T = `value`."""
        if self.start is None or not 0 <= loss < self.start:  # a log density may be negative
            return REFERENCE
        if self.finished == 1 and loss < LEARNED * self.start:
            return max(LOWEST, loss / self.start / 4)
        if self.finished != 3 or self.second is None:
            return REFERENCE
        is_noise = loss - value * self.determined / 2 < FITTED * self.start
        return CAUTIOUS if is_noise or loss > RISEN * self.second else REFERENCE

    @property
    def is_first_pass(self) -> bool:
        """Whether no pass is complete yet."""
        return self.finished == 0

    @property
    def is_fitted(self) -> bool:
        """Whether nearly nothing of the loss is left."""
        if self.start is None or self.loss is None:
            return False
        return self.loss - self.start < (FITTED - 1) * abs(self.start)


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

    def __call__(self, state: TemperatureState, step: int) -> float:
        """T at a step, counted from 0."""
        share = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if isinstance(self.given, float | int):
            return share * self.given
        if state.is_informed:
            return share * max(FLOOR, state.factor * REFERENCE)
        highest = CAUTIOUS if state.is_first_pass or state.is_stalled else REFERENCE
        highest = max(FLOOR, state.factor * min(highest, state.ceiling))
        if state.is_first_pass:
            return share * highest
        fit = LARGEST / max(LARGEST, state.mean_square)
        lowest = LOWEST if state.is_fitted else CAUTIOUS
        return share * min(highest, max(lowest, REFERENCE * fit**POWER))


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
