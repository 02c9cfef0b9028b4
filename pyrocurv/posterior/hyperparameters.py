"""Hyper-parameters of a natural-gradient step, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hyperparameters:
    """A block's numbers: learning rate, its base (before a schedule), β, damping, κ, N and T."""

    lr: float
    base_lr: float
    momentum: float
    damping: float
    kl_clip: float | None
    num_data: float
    temperature: float

    @staticmethod
    def of(group: Mapping[str, Any], num_data: float, temperature: float) -> Hyperparameters:
        """From a parameter group, whose learning rate a scheduler may have turned."""
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


AUTO = "auto"


def automatic_temperature(num_data: float, size: int, is_finite: bool) -> float:
    """T by the rule of "auto", for `size` weights and a likelihood of finite support, or another.

    A rule of thumb, chosen after a handful of measured cases.
    """
    return min(0.1, num_data / max(size, 1)) if is_finite else 0.3
