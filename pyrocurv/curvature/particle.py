"""The weight of one sample's curvature in a running average."""

from __future__ import annotations

from dataclasses import dataclass

from pyrocurv.curvature.running_curvature import RunningCurvature


@dataclass(frozen=True)
class Particle:
    """Sample number `index` of the `of` samples whose curvatures a step averages.

    It may be a part of that sample's data only: the `share` that comes after the share `before`.
    """

    index: int = 0
    of: int = 1
    before: float = 0.0
    share: float = 1.0

    @property
    def _later(self) -> float:
        """How many samples are still to come, with the rest of this one."""
        rest = 1 - self.before - self.share
        return self.of - 1 - self.index + (rest if rest > 1e-9 else 0)

    @property
    def is_last(self) -> bool:
        """Whether it completes the estimate of the step."""
        return self._later == 0

    def count(self, average: RunningCurvature) -> int:
        """The number of the estimate that it belongs to, from 1."""
        is_first = self.index == 0 and self.before == 0
        return average.count + is_first if average.count else 1

    def weight(self, average: RunningCurvature, decay: float) -> float:
        """The weight of its curvature in the average.

        The samples of a step have equal weights, max(1 - decay, 1/count) in total. The first sample
        of a block has weight 1, even if it is not the first of the step.
        """
        if average.count == 0:
            return 1.0
        total = max(1 - decay, 1 / self.count(average))
        return total * self.share / (self.of - self._later * total)


SINGLE_PARTICLE = Particle()
