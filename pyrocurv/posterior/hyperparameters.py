"""The hyperparameters of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyrocurv.runtime.validation import as_number
from pyrocurv.structures.serialization import serializable

AUTO: Final = "auto"
BASE_LR = "base_lr"  # of a parameter group: its learning rate when it was made


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
        """From a parameter group, whose learning rate may have been changed since it was made."""
        return Hyperparameters(
            group["lr"], _base_lr(group), group["momentum"], group["damping"], group["kl_clip"],
            num_data, temperature, number, group.get("decoupled_weight_decay", 0.0),
        )

    @property
    def lr_factor(self) -> float:
        """The learning rate relative to its base value; if that was 0, whether it is another now.
        """
        return self.lr / self.base_lr if self.base_lr else float(self.lr > 0)

    @property
    def likelihood_weight(self) -> float:
        """N/T."""
        return self.num_data / self.temperature

    def bias_correction(self, step: int) -> float:
        """1 - βᵗ, for t = step + 1."""
        return 1 - self.momentum ** (step + 1)


def set_base_lr(group: dict[str, Any]) -> None:
    """Keep the learning rate of a new group, of which a later one is a multiple.

    It is not "initial_lr", which only schedulers write, and some, as `OneCycleLR`, anew.
    """
    group.setdefault(BASE_LR, as_number(group.get("initial_lr", group["lr"])))


def lr_factor(group: Mapping[str, Any]) -> float:
    """The learning rate of a group relative to that when it was made.

    1 if that was 0, for parameters that have a learning rate of their own.
    """
    base = _base_lr(group)
    return group["lr"] / base if base else 1.0


def _base_lr(group: Mapping[str, Any]) -> float:
    return group.get(BASE_LR, group.get("initial_lr", group["lr"]))
