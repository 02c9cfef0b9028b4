"""When a block's curvature is estimated next: rarely while it is at rest, often while it changes.

Two statistics of each layer are tracked, whatever the structure of its curvature: the second moment
A = E[a aᵀ] of its inputs, and ln tr G for G = E[g gᵀ], that of its output gradients. With a hundred
rows, the noise of either hides all changes; its size is estimated from the two halves X₁, X₂ of the
rows. With X̄ the running average, v its variance, and w = max(0.05, 1/n) at the n-th estimate,

    X = (X₁ + X₂)/2,   V = |X₁ - X₂|²/4          the new value, and an unbiased variance
    ρ = (|X - X̄|² - V - v) / (|X| |X̄|)           the drift: zero on average at rest
    z = |X - X̄|² / (V + v)                       the same in units of the noise
    X̄ ← X̄ + w (X - X̄),   v ← (1-w)² v + w² V

where |ln tr G| is replaced by 1, and V in z by its own running mean if that is larger: the halves
may agree by chance when few gradients are large. The interval doubles, up to 500, while a running
mean of ρ is small; it halves, down to 5, while it is large; at a jump it falls to 5 at once and the
averages start again. The layer and statistic with the largest drift decide. A rotation of G that
keeps its trace is not detected: with sampled targets its noise is larger than G itself. For the
Hessian the gradients are those at the data.

Osawa et al. 2020, arXiv:2002.06015, compare successive statistics without subtracting the noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, cycle

import torch
from torch import Tensor

from pyrocurv.curvature.layer_statistics import LayerStatistics
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures.serialization import serializable

START, SHORTEST, LONGEST = 20, 5, 500  # intervals, in steps
NUM_DIRECTIONS = 64  # random directions of wider inputs that A is computed in
MIN_WEIGHT = 0.05  # of an estimate in the averages
NOISE_WEIGHT = 0.3  # of the latest value in the running means of ρ and of V
LOW_DRIFT, HIGH_DRIFT = 0.2, 0.4  # of the mean ρ: the interval doubles below and halves above
PATIENCE = 2  # estimates at an interval before it changes again
MIN_COUNT = 3  # up to so many estimates in the averages, the interval does not change
JUMP_DRIFT, JUMP_SIZE = (0.5, 1.0), (1.3, 6.0)  # a jump exceeds both, ρ and z: for A, for ln tr G
TINY = 1e-300  # in denominators


@serializable
@dataclass(frozen=True, eq=False)
class MomentEstimate:
    """X̄ with its variance v, and running means of V and of ρ."""

    mean: Tensor
    variance: float
    noise: float
    drift: float = 0.0


@serializable
@dataclass(frozen=True, eq=False)
class UpdateInterval:
    """A block's interval, the steps of its next and its last estimate, and the averages.

    `estimates_since_change` counts estimates since the interval changed, `count` those in the
    averages.
    """

    interval: int = START
    due: int = 0
    last: int = -1
    estimates_since_change: int = 0
    count: int = 0
    averages: tuple[MomentEstimate, ...] = ()  # of A and of ln tr G, for each layer

    def postpone(self, step: int) -> UpdateInterval:
        """The next estimate at the first multiple of the interval after `step`: blocks coincide."""
        return replace(self, due=(step // self.interval + 1) * self.interval)

    def after_estimate(
        self, step: int, layers: Sequence[Sequence[LayerStatistics]], workers: Workers = ALONE
    ) -> UpdateInterval:
        """The interval after an estimate at `step` from these statistics of the block's layers.

        All axes of a [*, B, S, I] and g [*, B, S, O] before the examples count as positions. A
        single example has no halves, and does not change the interval.
        """
        new = replace(self, last=step)
        half = layers[0][0].a.shape[-3] // 2
        pairs = [
            sums for layer in layers for statistics in layer
            for sums in (_second_moments(statistics.a), _traces(statistics.g))
        ]
        (count,), *sums = workers.sums([pairs[0][0].new_tensor([half]), *chain(*pairs)])
        if half or not workers.is_alone and count:
            means = [total / count for total in sums]
            new = new._with_moments([
                pair if pair[0].dim() else (_log(pair[0]), _log(pair[1]))
                for pair in zip(means[::2], means[1::2], strict=True)
            ])
        return new.postpone(step)

    def _with_moments(self, halves: Sequence[tuple[Tensor, Tensor]]) -> UpdateInterval:
        """With one more value of each statistic, and the interval that follows."""
        values = [(first + second) / 2 for first, second in halves]
        is_first = len(self.averages) != len(values)  # or a weight is used in another way
        means = values if is_first else [average.mean for average in self.averages]
        distances = torch.stack([
            _distances(*pair, value, mean)
            for pair, value, mean in zip(halves, values, means, strict=True)
        ]).tolist()  # the one synchronization
        moments = tuple(
            MomentEstimate(x, V, V) for x, (V, *_) in zip(values, distances, strict=True)
        )
        if is_first:
            return replace(self, estimates_since_change=1, count=1, averages=moments)
        count = self.count + 1
        drifts = [_drift(old, *row) for old, row in zip(self.averages, distances, strict=True)]
        bounds = zip(cycle(JUMP_DRIFT), cycle(JUMP_SIZE), strict=True)
        if count > MIN_COUNT and any(
            rho > max_rho and z > max_z
            for (rho, z), (max_rho, max_z) in zip(drifts, bounds, strict=False)
        ):
            return replace(
                self, interval=SHORTEST, estimates_since_change=0, count=1, averages=moments
            )
        averages = tuple(
            _average(old, new, rho, max(MIN_WEIGHT, 1 / count))
            for old, new, (rho, _) in zip(self.averages, moments, drifts, strict=True)
        )
        drift = max(average.drift for average in averages)
        new = replace(
            self, estimates_since_change=self.estimates_since_change + 1, count=count,
            averages=averages,
        )
        if (
            new.estimates_since_change < PATIENCE or count <= MIN_COUNT
            or LOW_DRIFT <= drift <= HIGH_DRIFT
        ):
            return new
        interval = _half(self.interval) if drift > HIGH_DRIFT else min(LONGEST, 2 * self.interval)
        if interval == self.interval:
            return new
        return replace(new, interval=interval, estimates_since_change=0)


def _distances(first: Tensor, second: Tensor, value: Tensor, mean: Tensor) -> Tensor:
    """V, |X - X̄|² and |X| |X̄|, which is 1 for a logarithm."""
    size = value.norm() * mean.norm() if value.dim() else torch.ones_like(value)
    return torch.stack([(first - second).square().sum() / 4, (value - mean).square().sum(), size])


def _drift(old: MomentEstimate, V: float, distance: float, size: float) -> tuple[float, float]:
    """ρ and z."""
    noise = max(V, old.noise) + old.variance
    return (distance - V - old.variance) / max(size, TINY), distance / max(noise, TINY)


def _average(
    old: MomentEstimate, new: MomentEstimate, rho: float, weight: float
) -> MomentEstimate:
    return MomentEstimate(
        old.mean.lerp(new.mean, weight),
        (1 - weight) ** 2 * old.variance + weight**2 * new.variance,
        old.noise + NOISE_WEIGHT * (new.noise - old.noise),
        old.drift + NOISE_WEIGHT * (rho - old.drift),
    )


def _half(interval: int) -> int:
    """At most half, of the form 5 · 2ʲ."""
    return SHORTEST << max(0, (interval // SHORTEST).bit_length() - 2)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd rows, equally many: the data may be sorted."""
    rows = rows[: len(rows) // 2 * 2]
    return rows[0::2], rows[1::2]


def _second_moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Σ a aᵀ of both halves of the rows, in at most 64 fixed random directions of the inputs."""
    rows = a.movedim(-3, 0).flatten(1, -2)  # [B, *, I]
    if rows.shape[-1] > NUM_DIRECTIONS:
        rows = rows @ _directions(rows.shape[-1]).to(rows)
    first, second = (half.flatten(0, 1) for half in _halves(rows))
    return first.mT @ first, second.mT @ second


def _traces(g: Tensor) -> tuple[Tensor, Tensor]:
    """Σ |g|² of both halves of the examples."""
    first, second = _halves(g.square().sum((-2, -1)).flatten(0, -2).sum(0))
    return first.sum(), second.sum()


def _log(trace: Tensor) -> Tensor:
    return trace.clamp(min=torch.finfo(trace.dtype).tiny).log()


@lru_cache(maxsize=64)
def _directions(size: int) -> Tensor:
    """A random map [size, 64] that preserves distances, the same in every run."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, NUM_DIRECTIONS, generator=generator) / math.sqrt(NUM_DIRECTIONS)
