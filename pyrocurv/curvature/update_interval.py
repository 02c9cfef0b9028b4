"""When a block's curvature is estimated next: seldom while it stands still, often while it moves.

Two statistics of each layer are watched, whatever the structure of its curvature: the second moment
A = E[a aᵀ] of its inputs, and ln tr G for G = E[g gᵀ], that of its output gradients. From a hundred
rows the noise of either hides all movement; two halves X₁, X₂ of the rows tell how large it is.
With X̄ the running average and v its variance, w = max(0.05, 1/n) at the n-th estimate,

    X = (X₁ + X₂)/2,   V = |X₁ - X₂|²/4          the new value, and its variance without bias
    ρ = (|X - X̄|² - V - v) / (|X| |X̄|)           how far it has moved: zero on average at rest
    z = |X - X̄|² / (V + v)                       in units of the noise
    X̄ ← X̄ + w (X - X̄),   v ← (1-w)² v + w² V

where |ln tr G| counts as 1, and V in z as its own running mean if that is more: few gradients are
large, so that the halves may agree by chance. The interval doubles, up to 500, while a running mean
of ρ is small; it halves, down to 5, while that is large; at a jump it falls back to 5 at once and
the averages start anew. Of the layers and statistics the one that moves most decides. A turn of G
that leaves its trace alone is not seen: with sampled targets its noise is larger than G itself.
For the Hessian the gradients are those at the data.

Osawa et al. 2020, arXiv:2002.06015, compare successive statistics without taking the noise out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle

import torch
from torch import Tensor

from pyrocurv.curvature.layer_statistics import Pairs
from pyrocurv.structures.serialization import serializable

START, SHORTEST, LONGEST = 20, 5, 500  # intervals, in steps
WIDTH = 64  # directions of a layer's inputs that are looked at
MEMORY = 0.05  # least weight of an estimate in the averages
NEWS = 0.3  # weight of the latest in the running means of ρ and of V
CALM, MOVED = 0.2, 0.4  # of the running mean of ρ: below, the interval doubles; above, it halves
PATIENCE = 2  # estimates at an interval before it changes again
FEW = 3  # estimates in the averages from which nothing is concluded
JUMP, SURE = (0.5, 1.0), (1.3, 6.0)  # a jump has ρ above the one and z above the other: A, ln tr G
TINY = 1e-300  # lest nothing be divided by nothing


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
    """A block's interval, the step of its next estimate, and what it knows of its layers.

    `last` is the step of the latest estimate; `estimates_since_change` counts estimates since the
    interval changed,
    `count` those in the averages.
    """

    interval: int = START
    due: int = 0
    last: int = -1
    estimates_since_change: int = 0
    count: int = 0
    averages: tuple[MomentEstimate, ...] = ()  # of A and of ln tr G, for each layer

    def postponed(self, step: int) -> UpdateInterval:
        """Due at the first multiple of the interval after `step`."""
        return replace(self, due=_after(step, self.interval))


def tick(clock: UpdateInterval, step: int, pairs: Pairs) -> UpdateInterval:
    """The clock after an estimate at `step` from what the block's layers saw.

    All axes of a [*, B, S, I] and g [*, B, S, O] before the examples count as positions. A single
    example has no halves, and leaves the interval as it is.
    """
    clock = replace(clock, last=step)
    if pairs[0][0].a.shape[-3] > 1:
        seen = [half for uses in pairs for pair in uses
                for half in (_moment(pair.a), _size(pair.g))]
        clock = _seen(clock, seen)
    return clock.postponed(step)


def _seen(clock: UpdateInterval, halves: Sequence[tuple[Tensor, Tensor]]) -> UpdateInterval:
    """With one more value of each statistic, and the interval that follows."""
    values = [(one + other) / 2 for one, other in halves]
    first = len(clock.averages) != len(values)  # or a weight has another use than before
    means = values if first else [average.mean for average in clock.averages]
    numbers = torch.stack([
        _distances(*half, value, mean)
        for half, value, mean in zip(halves, values, means, strict=True)
    ]).tolist()  # the one synchronisation
    fresh = tuple(MomentEstimate(x, V, V) for x, (V, *_) in zip(values, numbers, strict=True))
    if first:
        return replace(clock, estimates_since_change=1, count=1, averages=fresh)
    count = clock.count + 1
    moves = [_move(old, *row) for old, row in zip(clock.averages, numbers, strict=True)]
    jumps = zip(moves, cycle(JUMP), cycle(SURE), strict=False)
    if count > FEW and any(rho > far and z > sure for (rho, z), far, sure in jumps):
        return replace(clock, interval=SHORTEST, estimates_since_change=0, count=1, averages=fresh)
    averages = tuple(
        _averaged(old, new, rho, max(MEMORY, 1 / count))
        for old, new, (rho, _) in zip(clock.averages, fresh, moves, strict=True)
    )
    clock = replace(
        clock, estimates_since_change=clock.estimates_since_change + 1, count=count,
        averages=averages
    )
    drift = max(average.drift for average in averages)
    if clock.estimates_since_change < PATIENCE or count <= FEW or CALM <= drift <= MOVED:
        return clock
    interval = _half(clock.interval) if drift > MOVED else min(LONGEST, 2 * clock.interval)
    return clock if interval == clock.interval else replace(
        clock, interval=interval, estimates_since_change=0
    )


def _distances(one: Tensor, other: Tensor, value: Tensor, mean: Tensor) -> Tensor:
    """V, |X - X̄|² and |X| |X̄|, which is 1 for a logarithm."""
    size = value.norm() * mean.norm() if value.dim() else torch.ones_like(value)
    return torch.stack([(one - other).square().sum() / 4, (value - mean).square().sum(), size])


def _move(old: MomentEstimate, V: float, gap: float, size: float) -> tuple[float, float]:
    """ρ and z."""
    noise = max(V, old.noise) + old.variance
    return (gap - V - old.variance) / max(size, TINY), gap / max(noise, TINY)


def _averaged(
    old: MomentEstimate, new: MomentEstimate, rho: float, weight: float
) -> MomentEstimate:
    return MomentEstimate(
        old.mean.lerp(new.mean, weight),
        (1 - weight) ** 2 * old.variance + weight**2 * new.variance,
        old.noise + NEWS * (new.noise - old.noise),
        old.drift + NEWS * (rho - old.drift),
    )


def _half(interval: int) -> int:
    """At most half, of the form 5 · 2ʲ."""
    return SHORTEST << max(0, (interval // SHORTEST).bit_length() - 2)


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Every other row each, as many in one as in the other: data may be in some order."""
    rows = rows[: len(rows) // 2 * 2]
    return rows[0::2], rows[1::2]


def _moment(a: Tensor) -> tuple[Tensor, Tensor]:
    """A, of at most 64 fixed random directions of the inputs, from both halves of the rows."""
    rows = a.movedim(-3, 0).flatten(1, -2)  # [B, *, I]
    if rows.shape[-1] > WIDTH:
        rows = rows @ _directions(rows.shape[-1]).to(rows)
    one, other = (half.flatten(0, 1) for half in _halves(rows))
    count = len(rows) // 2
    return one.mT @ one / count, other.mT @ other / count


def _size(g: Tensor) -> tuple[Tensor, Tensor]:
    """ln tr G from both halves of the examples."""
    one, other = _halves(g.square().sum((-2, -1)).flatten(0, -2).sum(0))
    tiny = torch.finfo(g.dtype).tiny
    return one.mean().clamp(min=tiny).log(), other.mean().clamp(min=tiny).log()


@lru_cache(maxsize=64)
def _directions(size: int) -> Tensor:
    """A random map [size, 64] that keeps distances, the same in every run."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, WIDTH, generator=generator) / math.sqrt(WIDTH)


def _after(step: int, interval: int) -> int:
    """The first multiple of the interval after the step: blocks meet there."""
    return (step // interval + 1) * interval
