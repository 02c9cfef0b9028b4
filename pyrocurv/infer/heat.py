"""The temperature of a run: the number that was given, or a rule of thumb from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyrocurv.infer.model_run import ModelRun
from pyrocurv.layers.block import Block
from pyrocurv.posterior.hyperparameters import AUTO, automatic_temperature


@dataclass(frozen=True)
class TemperatureRule:
    """A temperature as it was given, "auto" included; calling it with a run gives the number."""

    given: float | str
    blocks: Sequence[Block]

    @property
    def asks_the_graph(self) -> bool:
        """Whether T depends on what a run's data are, which only a graph can say."""
        return self.given == AUTO

    def __call__(self, run: ModelRun) -> float:
        """T."""
        if isinstance(self.given, float | int):
            return self.given
        size = sum(block.size for block in self.blocks)
        return automatic_temperature(run.num_data, size, run.has_finite_support)
