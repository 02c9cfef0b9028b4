"""Random numbers of one's own: a stream beside torch's global one, which it leaves as it was.

A run that keeps its own stream can be stopped and resumed bit for bit, whatever the user's program
draws in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _devices(device: torch.device) -> list[torch.device]:
    """The devices whose global generators a computation on `device` draws from."""
    cpu = torch.device("cpu")
    return [cpu] if device.type == "cpu" else [cpu, device]


def _get(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state()


def _set(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.get_device_module(device).set_rng_state(state)


class RandomStream:
    """Seeded from torch's global generator when made, so `torch.manual_seed` reaches it."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.states: dict[str, Tensor] = {}

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """Draw from this stream inside; on an exception it stays where it was before."""
        outside = {place: _get(place) for place in _devices(device)}
        try:
            for place in outside:
                fresh = None if place.type in self.states else torch.Generator(place)
                _set(place, self.states[place.type] if fresh is None else
                     fresh.manual_seed(self.seed).get_state())
            yield
            self.states = {place.type: _get(place) for place in outside}
        finally:
            for place, state in outside.items():
                _set(place, state)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"seed": self.seed, "states": dict(self.states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.seed = state["seed"]
        self.states = {name: value.cpu() for name, value in state["states"].items()}
