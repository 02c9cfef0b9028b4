"""What natural-gradient training carries from step to step, as one immutable value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.curvature.clock import Clock
from pyrocurv.curvature.estimator import Running
from pyrocurv.natural import Metric
from pyrocurv.structures import Structure


@dataclass(frozen=True, eq=False)
class Noise:
    """A deviation from the mean, epsilon = sign · drawn with drawn = Λ^-½ z [P], and |z|²."""

    drawn: Tensor
    square: Tensor
    sign: float = 1.0

    @property
    def epsilon(self) -> Tensor:
        """The deviation itself."""
        return self.sign * self.drawn

    def mirrored(self) -> Noise:
        """The antithetic deviation."""
        return Noise(self.drawn, self.square, -self.sign)

    def around(self, block: Block, loc: Tensor) -> dict[str, Tensor]:
        """The sample loc + epsilon, unpacked in the same pass."""
        epsilon = block.parts(self.drawn)
        return {
            name: torch.add(part, epsilon[name], alpha=self.sign).contiguous()
            for name, part in block.parts(loc).items()
        }


@dataclass(frozen=True, eq=False)
class Carried:
    """What one block carries; the lists of a state have one for each."""

    running: Running | None = None
    metric: Metric | None = None
    momentum: Tensor | None = None
    noise: Noise | None = None  # used once already: the next sample is its mirror image
    iterate: Tensor | None = None  # the mean that training is at, when the guide holds an average
    average: Structure | None = None  # the averaged precision
    clock: Clock | None = None  # of `every="auto"`

    @property
    def known(self) -> Metric:
        """The metric, which every block has from the first step on."""
        assert self.metric is not None
        return self.metric

    @property
    def seen(self) -> Running:
        """The running curvature, which every block has from the first step on."""
        assert self.running is not None
        return self.running

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        running, metric, noise = self.running, self.metric, self.noise
        return {
            "running": None if running is None else running.state(),
            "metric": None if metric is None else (
                metric.precision.state(), metric.preconditioner.state()
            ),
            "momentum": self.momentum,
            "noise": None if noise is None else (
                noise.drawn, noise.square, noise.sign
            ),
            "iterate": self.iterate,
            "average": None if self.average is None else self.average.state(),
            "clock": None if self.clock is None else self.clock.state(),
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> Carried:
        """The way back from `state`."""
        running, metric, noise = state["running"], state["metric"], state["noise"]
        average, clock = state["average"], state["clock"]
        return Carried(
            None if running is None else Running.from_state(running),
            None if metric is None else Metric(*(Structure.from_state(part) for part in metric)),
            state["momentum"],
            None if noise is None else Noise(*noise),
            state["iterate"],
            None if average is None else Structure.from_state(average),
            None if clock is None else Clock.from_state(clock),
        )


@dataclass(frozen=True, eq=False)
class State:
    """After `step` steps."""

    step: int
    blocks: tuple[Carried, ...]

    def to(self, like: Tensor) -> State:
        """On the device and in the dtype of `like`."""
        held = next((block.momentum for block in self.blocks if block.momentum is not None), like)
        if held.device == like.device and held.dtype == like.dtype:
            return self
        return State.from_state(_map(self.state(), lambda tensor: tensor.to(like)))

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"step": self.step, "blocks": [block.state() for block in self.blocks]}

    @staticmethod
    def from_state(state: dict[str, Any]) -> State:
        """The way back from `state`."""
        return State(state["step"], tuple(Carried.from_state(block) for block in state["blocks"]))


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in a nest of plain values."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, function) for item in value)
    return value
