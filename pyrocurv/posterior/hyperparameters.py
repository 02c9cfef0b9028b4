"""Hyperparameters of a natural-gradient step, and the temperature that "auto" stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrocurv.layers.block import Block
from pyrocurv.structures.serialization import serializable

AUTO = "auto"


@serializable
@dataclass(frozen=True)
class Hyperparameters:
    """Of one block: learning rate, its base value before a schedule, β, damping, κ, N and T."""

    lr: float
    base_lr: float
    momentum: float
    damping: float
    kl_clip: float | None
    num_data: float
    temperature: float

    @staticmethod
    def of(group: Mapping[str, Any], num_data: float, temperature: float) -> Hyperparameters:
        """From a parameter group, whose learning rate a scheduler may have changed."""
        base = group.get("initial_lr", group["lr"])
        return Hyperparameters(
            group["lr"], base, group["momentum"], group["damping"], group["kl_clip"], num_data,
            temperature,
        )

    @property
    def likelihood_weight(self) -> float:
        """N/T."""
        return self.num_data / self.temperature

    def bias_correction(self, step: int) -> float:
        """1 - βᵗ, for t = step + 1."""
        return 1 - self.momentum ** (step + 1)


@dataclass(frozen=True)
class TemperatureRule:
    """A temperature as the user gave it, "auto" included, for the weights of some blocks."""

    given: float | str
    blocks: Sequence[Block]

    @property
    def is_automatic(self) -> bool:
        """Whether T depends on the data and so on the graph of a run."""
        return self.given == AUTO

    def __call__(self, num_data: float, has_finite_support: bool) -> float:
        """T: min(0.1, N/P) for P weights and likelihoods of finite support, 0.3 for others.

        The rule of thumb was chosen after a handful of measured cases.
        """
        if isinstance(self.given, float | int):
            return self.given
        size = sum(block.size for block in self.blocks)
        return min(0.1, num_data / max(size, 1)) if has_finite_support else 0.3
