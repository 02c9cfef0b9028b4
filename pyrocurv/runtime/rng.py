"""Random streams that are separate from torch's global generators, which stay as they were.

A run that draws from its own stream can be stopped and resumed bit for bit, regardless of what else
the user's program draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor


class RandomStream:
    """A random stream that torch's global generators are switched to for a while.

    It is seeded from torch's global generator when it is made, so `torch.manual_seed` determines
    it, or with `seed`.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.states: dict[str, Tensor] = {}  # by type of device
        self.num_sections = (0, 0)  # of all processes, and of single ones

    @staticmethod
    def ahead(device: torch.device) -> RandomStream:
        """The numbers that torch's global generators give next; those stay where they are."""
        stream = RandomStream(seed=0)
        stream.states = {one.type: _get_state(one) for one in {torch.device("cpu"), device}}
        return stream

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """Draw from this stream inside; an exception leaves the stream where it was before."""
        global _current
        # not torch.random.fork_rng: in torch 2.6 the state of MPS does not take a device
        devices = {torch.device("cpu"), device}  # whose generators a computation may draw from
        global_states = {one: _get_state(one) for one in devices}
        outer, _current, sections = _current, self, self.num_sections
        try:
            for one in devices:
                _set_state(one, self._state(one))
            yield
            self.states = {one.type: _get_state(one) for one in devices}
            sections = self.num_sections
        finally:
            _current, self.num_sections = outer, sections
            for one, state in global_states.items():
                _set_state(one, state)

    def _state(self, device: torch.device) -> Tensor:
        if device.type in self.states:
            return self.states[device.type]
        return torch.Generator(device).manual_seed(self.seed).get_state()

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "seed": self.seed, "states": dict(self.states),
            "num_sections": list(self.num_sections),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.seed = state["seed"]
        self.states = {name: value.cpu() for name, value in state["states"].items()}
        self.num_sections = tuple(state["num_sections"])


_current: RandomStream | None = None  # that is drawn from


@contextmanager
def section(device: torch.device, process: int | None = None) -> Iterator[None]:
    """Draw from a stream that the present one determines, and the number of a process if given.

    Each section is another one. The present stream stays as it is, whatever is drawn inside.
    Outside of a stream it is torch's global generator.
    """
    stream = _current
    if stream is None:
        yield
        return
    shared, own = stream.num_sections
    stream.num_sections = (shared + 1, own) if process is None else (shared, own + 1)
    number = stream.num_sections[process is not None]
    with RandomStream(derived_seed(stream.seed, number, process))(device):
        yield


def derived_seed(*numbers: int | None) -> int:
    """A seed that numbers determine."""
    name = " ".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "little")


def next_seed() -> int:
    """The seed that a `RandomStream` made now would have; draws nothing."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.randint(2**62, (), generator=generator))


def isolated_rng(device: torch.device, seed: int = 0) -> AbstractContextManager[None]:
    """Draw from a generator seeded with `seed` inside; the global generators are left untouched."""
    return RandomStream(seed)(device)


@contextmanager
def rewind_rng_on_error(device: torch.device) -> Iterator[None]:
    """Draw from the global generators inside; an exception leaves them where they were before."""
    states = {one: _get_state(one) for one in {torch.device("cpu"), device}}
    try:
        yield
    except BaseException:
        for one, state in states.items():
            _set_state(one, state)
        raise


def device_of(values: Iterable[Any]) -> torch.device:
    """The device of the first tensor among the values, the CPU if there is none."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _get_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    module = torch.get_device_module(device)
    return module.get_rng_state(device) if device.type == "cuda" else module.get_rng_state()


def _set_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.get_device_module(device).set_rng_state(state)
