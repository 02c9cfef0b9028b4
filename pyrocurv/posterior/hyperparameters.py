"""The hyperparameters of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyrocurv.structures.serialization import serializable

AUTO: Final = "auto"


@serializable
@dataclass(frozen=True)
class Hyperparameters:
    """Of one block: learning rate, its base value before a schedule, β, damping, κ, N and T.

    And λ, the decoupled weight decay.
    """

    lr: float
    base_lr: float
    momentum: float
    damping: float
    kl_clip: float | None
    num_data: float
    temperature: float
    group: int = 0  # which of the caller's groups they are from
    decay: float = 0.0

    @staticmethod
    def of(
        group: Mapping[str, Any], num_data: float, temperature: float, number: int = 0
    ) -> Hyperparameters:
        """From a parameter group, whose learning rate a scheduler may have changed."""
        base = group.get("initial_lr", group["lr"])
        return Hyperparameters(
            group["lr"], base, group["momentum"], group["damping"], group["kl_clip"], num_data,
            temperature, number, group.get("decoupled_weight_decay", 0.0),
        )

    @property
    def likelihood_weight(self) -> float:
        """N/T."""
        return self.num_data / self.temperature

    def bias_correction(self, step: int) -> float:
        """1 - βᵗ, for t = step + 1."""
        return 1 - self.momentum ** (step + 1)
