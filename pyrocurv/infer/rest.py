"""The optimizer of all that is no natural-gradient latent."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

# Of the default, Adam. A noise scale's first gradients, with the weights far from where they
# belong, are so large that a longer memory for squares would rule its steps for thousands of them.
MODEL_LR, GUIDE_LR, BETAS = 2e-3, 1e-2, (0.9, 0.99)


@dataclass(frozen=True, eq=False)
class AuxiliaryParameters:
    """Parameters of the model and of the fallback guide, and the gradients of all in this order."""

    model: Mapping[str, Tensor]
    guide: Mapping[str, Tensor]
    own: Collection[str]  # those of the model that are its modules' own
    gradients: Sequence[Tensor | None]


class AuxiliaryOptimizer:
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
        self._known: dict[str, Tensor] = {}
        self._made_of: list[tuple[torch.device, torch.dtype]] = []  # the known, at the last step
        self._waiting: dict[str, dict[str, Any]] = {}  # loaded, for parameters not met yet

    def step(self, others: AuxiliaryParameters, factor: float) -> None:
        """One step at `factor` times the parameters' rates.

        A parameter joins when it first has a gradient; those in `own` are there from the start.
        """
        params = [*others.model.values(), *others.guide.values()]
        pairs = list(zip(params, others.gradients, strict=True))
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
            for side, rate in ((others.model, MODEL_LR), (others.guide, GUIDE_LR)):
                joining = {n: p for n, p in side.items() if id(p) in moving or n in others.own}
                self._replace(joining)
                new = {n: p for n, p in joining.items() if n not in self._known}
                for names in self._alike(new):
                    self._add({name: new[name] for name in names}, rate)
            self._torch_step(factor)
        finally:
            for (param, _), gradient in zip(pairs, before, strict=True):
                param.grad = gradient

    def _replace(self, named: Mapping[str, Tensor]) -> None:
        """Have a parameter take the place of the one of its name, as after a store is loaded."""
        for name, param in named.items():
            old = self._known.get(name, param)
            if old is param or self._optimizer is None:
                continue
            self._known[name] = param
            for group in self._optimizer.param_groups:
                group["params"] = [param if one is old else one for one in group["params"]]
            if old in self._optimizer.state:
                self._optimizer.state[param] = self._optimizer.state.pop(old)
            self._made_of = []

    def _torch_step(self, factor: float) -> None:
        assert self._optimizer is not None
        make = [(param.device, param.dtype) for param in self._known.values()]
        if make != self._made_of:  # parameters have moved: let the state follow them
            self._optimizer.load_state_dict(self._optimizer.state_dict())
            self._made_of = make
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.step()

    def _alike(self, names: Iterable[str]) -> list[list[str]]:
        """The names by the options that were loaded for them: groups of an optimizer."""
        groups: list[tuple[Any, list[str]]] = []
        for name in names:
            options = self._waiting.get(name, {}).get("options")
            mine = next((members for key, members in groups if key == options), None)
            if mine is None:
                groups.append((options, [name]))
            else:
                mine.append(name)
        return [members for _, members in groups]

    def _add(self, named: Mapping[str, Tensor], rate: float) -> None:
        options = {} if self._make else {"lr": rate, "betas": BETAS}
        group = {"params": list(named.values()), **options}
        if self._optimizer is None:
            make = self._make
            self._optimizer = make(group["params"]) if make else torch.optim.Adam([group])
        else:
            self._optimizer.add_param_group(group)
        made = self._optimizer.param_groups[-1]
        self._known.update(named)
        self._rates.append(made["lr"])
        for name, param in named.items():
            saved = copy.deepcopy(self._waiting.pop(name, None))
            if saved is not None:
                made.update(saved["options"])
                self._optimizer.state[param] = saved["state"]
                self._made_of = []

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: each parameter's by its name."""
        if isinstance(self._make, PyroOptim):
            return {"pyro": self._make.get_state()}
        found, names = dict(self._waiting), {id(param): n for n, param in self._known.items()}
        for group in [] if self._optimizer is None else self._optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            for param in group["params"]:
                state = dict(self._optimizer.state.get(param, {}))  # type: ignore[union-attr]  # it has groups
                found[names[id(param)]] = {"options": options, "state": state}
        return {"torch": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, with each parameter when it is met."""
        if isinstance(self._make, PyroOptim):
            self._make.set_state(state["pyro"])
        else:
            self._optimizer, self._known, self._rates = None, {}, []
            self._waiting = dict(state["torch"])
