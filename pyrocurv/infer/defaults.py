"""The numbers of `NGVI` that a scheduler may turn, and what they may be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyrocurv.posterior.hyperparameters import AUTO
from pyrocurv.runtime.validation import check_positive, is_number


class NaturalGradient(torch.optim.Optimizer):
    """Holds the numbers; the step is `NGVI`'s to make.

    Raises ValueError for a number out of its range.
    """

    def __init__(
        self, *, lr: float, momentum: float, damping: float, kl_clip: float | None
    ) -> None:
        check_positive("lr", lr)
        if not (is_number(momentum) and 0 <= momentum < 1):
            raise ValueError(f"momentum={momentum!r}: a number in [0, 1) is needed")
        if not (is_number(damping) and damping >= 0):
            raise ValueError(f"damping={damping!r}: a number from 0 is needed")
        check_positive("kl_clip", kl_clip, None)
        numbers = {"lr": lr, "momentum": momentum, "damping": damping, "kl_clip": kl_clip}
        super().__init__([torch.zeros(())], numbers)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Carry out the step that `NGVI` has prepared."""
        if closure is None:
            raise RuntimeError("call ngvi.step(...): this optimizer is there for schedulers")
        return closure()
NETWORK: dict[str, Any] = {
    "lr": 0.02, "momentum": 0.9, "damping": 3e-3, "kl_clip": 1e-3, "num_particles": 1,
    "average": False,
}
WHOLE: dict[str, Any] = {
    "lr": 0.3, "momentum": 0.0, "damping": 0.0, "kl_clip": 1.0, "num_particles": AUTO,
    "average": True,
}


def chosen(numbers: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """The numbers that were given, and the defaults for those that are "auto"."""
    defaults = WHOLE if is_whole else NETWORK
    for name in ("momentum", "damping") if is_whole else ():
        if numbers[name] not in (AUTO, 0):
            raise ValueError(f"{name}={numbers[name]!r}: steps over all latents have none, give 0")
    return {n: defaults[n] if isinstance(v, str) and v == AUTO else v for n, v in numbers.items()}


class Loss(float):
    """A loss that says at which temperature it is meant."""

    temperature: float

    @staticmethod
    def at(value: float, temperature: float) -> Loss:
        """The loss of that value and temperature."""
        loss = Loss(value)
        loss.temperature = temperature
        return loss
