"""The optimizer of all that is no natural-gradient latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

MODEL_LR, GUIDE_LR = 2e-3, 1e-2  # of the default, Adam


class Rest:
    """Steps parameters as they are met, without touching anybody's `.grad`.

    `optim` is a callable from parameters (or groups of them) to a `torch.optim.Optimizer`, a
    `PyroOptim`, or None for Adam.
    """

    def __init__(self, optim: Callable[..., torch.optim.Optimizer] | PyroOptim | None) -> None:
        if optim is not None and not callable(optim):
            raise TypeError(
                "optim: a callable from parameters to a torch.optim.Optimizer (such as a class of "
                f"torch.optim) or a PyroOptim is needed, got {optim!r}"
            )
        self._make = optim
        self._optimizer: torch.optim.Optimizer | None = None
        self._rates: list[float] = []
        self._known: list[Tensor] = []
        self._made_of: list[tuple[torch.device, torch.dtype]] = []  # the known, at the last step
        self._waiting: dict[str, Any] | None = None  # a state loaded before its parameters are met

    def step(
        self, model: Sequence[Tensor], guide: Sequence[Tensor],
        gradients: Sequence[Tensor | None], factor: float, own: Sequence[Tensor] = (),
    ) -> None:
        """One step on the model's and the guide's parameters, at `factor` times their rates.

        A parameter joins when it first has a gradient; those in `own` are there from the start.
        """
        pairs = list(zip([*model, *guide], gradients, strict=True))
        moving = {id(param): param for param, gradient in pairs if gradient is not None}
        if not moving:
            return
        before = [param.grad for param, _ in pairs]
        try:
            for param, gradient in pairs:
                param.grad = gradient
            if isinstance(self._make, PyroOptim):
                self._make(moving.values())
                return
            for side, rate in ((model, MODEL_LR), (guide, GUIDE_LR)):
                joining = [p for p in side if id(p) in moving or any(p is q for q in own)]
                new = [p for p in joining if not any(p is q for q in self._known)]
                if new:
                    self._add(new, rate)
            self._torch_step(factor)
        finally:
            for (param, _), gradient in zip(pairs, before, strict=True):
                param.grad = gradient

    def _torch_step(self, factor: float) -> None:
        assert self._optimizer is not None
        if self._waiting is not None:
            self._optimizer.load_state_dict(self._waiting)
            self._waiting = None
        make = [(param.device, param.dtype) for param in self._known]
        if make != self._made_of:  # parameters have moved: let the state follow them
            self._optimizer.load_state_dict(self._optimizer.state_dict())
            self._made_of = make
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()

    def _add(self, params: list[Tensor], rate: float) -> None:
        if self._optimizer is None:
            make = self._make
            self._optimizer = make(params) if make else torch.optim.Adam(params, rate)
        else:
            group = {"params": params} if self._make else {"params": params, "lr": rate}
            self._optimizer.add_param_group(group)
        self._known += params
        self._rates.append(self._optimizer.param_groups[-1]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        if isinstance(self._make, PyroOptim):
            return {"pyro": self._make.get_state()}
        if self._optimizer is None:
            return {"torch": self._waiting}
        return {"torch": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, now or when the parameters are met."""
        if isinstance(self._make, PyroOptim):
            self._make.set_state(state["pyro"])
        else:
            self._waiting, self._optimizer, self._known, self._rates = state["torch"], None, [], []
