"""Adam for parameters that have no block: what no supported op consumes, and point estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyrocurv.optim.parameter_blocks import NamedParameters


class AuxiliaryOptimizer:
    """Steps parameters by name, each with moments of its own."""

    def __init__(self, lr: float) -> None:
        if not lr > 0:
            raise ValueError(f"fallback_lr={lr!r}: a positive number is needed")
        self.lr = lr
        self._names: list[str] = []
        self._adam: torch.optim.Adam | None = None
        self._waiting: dict[str, Any] | None = None  # a state whose parameters are not at hand yet

    def step(self, names: Sequence[str], places: NamedParameters, scale: float = 1.0) -> None:
        """One step on these, from their `.grad` times `scale`, in proportion to the schedule."""
        self._join([*self._names, *names] if self._adam is None else names, places)
        if self._adam is None:
            return
        before = {name: places[name][0].grad for name in self._names if name in places}
        try:
            for name, grad in before.items():
                moves = name in names and grad is not None
                places[name][0].grad = grad.mul(scale) if moves else None  # type: ignore[union-attr]  # it is not None
            for name, group in zip(self._names, self._adam.param_groups, strict=True):
                theirs = places[name][1]
                base = theirs.get("initial_lr", theirs["lr"])
                group["lr"] = self.lr * (theirs["lr"] / base if base else 1.0)
                group["weight_decay"] = theirs.get("weight_decay", 0.0)
            self._adam.step()
        finally:
            for name, grad in before.items():
                places[name][0].grad = grad

    def _join(self, names: Sequence[str], places: NamedParameters) -> None:
        for name in names:
            if self._adam is not None and name in self._names:
                continue
            group = {"params": [places[name][0]]}
            if self._adam is None:
                self._adam, self._names = torch.optim.Adam([group], self.lr), [name]
            else:
                self._adam.add_param_group(group)
                self._names.append(name)
        if self._waiting is not None and self._adam is not None:
            self._adam.load_state_dict(self._waiting)
            self._waiting = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        held = self._waiting if self._adam is None else self._adam.state_dict()
        return {"names": list(self._names), "adam": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` when the parameters are next at hand."""
        self._adam, self._names, self._waiting = None, list(state["names"]), state["adam"]
