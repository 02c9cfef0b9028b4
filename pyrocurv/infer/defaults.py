"""The hyperparameters of `NGVI`: their defaults, and the optimizer that schedulers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim

from pyrocurv.handlers.modules import modules
from pyrocurv.optim.auxiliary_optimizer import AuxiliaryOptimizer, AuxiliaryParameter, gradients
from pyrocurv.optim.checks import check_hyperparameters
from pyrocurv.posterior.hyperparameters import AUTO, lr_factor, set_base_lr
from pyrocurv.runtime.sharding import check_unsharded
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import (
    check_callable,
    check_choice,
    check_flag,
    check_fraction,
    check_integer,
    check_nonnegative,
    check_positive,
    is_number,
    shown,
)

LAYERWISE: dict[str, Any] = {
    "lr": 0.02, "momentum": 0.9, "damping": 3e-3, "decoupled_weight_decay": 0.0, "kl_clip": 1e-3,
    "num_particles": 1, "average": False,
}
JOINT: dict[str, Any] = {
    "lr": 0.3, "momentum": 0.0, "damping": 0.0, "decoupled_weight_decay": 0.0, "kl_clip": 1.0,
    "num_particles": AUTO, "average": True,
}


class ScheduledHyperparameters(torch.optim.Optimizer):
    """Holds the hyperparameters that `torch.optim.lr_scheduler` may change; `NGVI` steps.

    Raises ValueError for a hyperparameter out of its range, also for one that is changed later.
    """

    def __init__(
        self, *, lr: float, momentum: float, damping: float, decoupled_weight_decay: float,
        kl_clip: float | None,
    ) -> None:
        check_positive("lr", lr)
        check_fraction("momentum", momentum)
        check_nonnegative("damping", damping)
        check_nonnegative("decoupled_weight_decay", decoupled_weight_decay)
        check_positive("kl_clip", kl_clip, None)
        values = {
            "lr": lr, "momentum": momentum, "damping": damping,
            "decoupled_weight_decay": decoupled_weight_decay, "kl_clip": kl_clip,
        }
        super().__init__([torch.zeros(())], values)
        set_base_lr(self.param_groups[0])

    @property
    def group(self) -> dict[str, Any]:
        """The hyperparameters as they are now."""
        (group,) = self.param_groups
        check_hyperparameters(group)
        return group

    @property
    def lr_factor(self) -> float:
        """The learning rate relative to the one that was given."""
        (group,) = self.param_groups
        return lr_factor(group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Called by `NGVI.step` with its commit, so that schedulers count the steps."""
        if closure is None:
            raise RuntimeError("call ngvi.step(...): this optimizer is there for schedulers")
        return closure()


def resolve_defaults(values: dict[str, Any], is_joint: bool) -> dict[str, Any]:
    """The values that were given, and the defaults for those that are "auto"."""
    defaults = JOINT if is_joint else LAYERWISE
    for name in ("momentum", "damping", "decoupled_weight_decay") if is_joint else ():
        value = values[name]
        if not (isinstance(value, str) and value == AUTO or is_number(value) and value == 0):
            raise ValueError(f"{name}={shown(value)}: steps over all latents have none, use 0")
    given = {n: defaults[n] if isinstance(v, str) and v == AUTO else v for n, v in values.items()}
    if given["num_particles"] != AUTO:
        check_integer("num_particles", given["num_particles"], 0)
    check_flag("average", given["average"])
    return given


def check_options(
    model: Any, temperature: Any, kl_warmup: Any, antithetic: Any, on_nonfinite: Any
) -> None:
    """Raise TypeError or ValueError for an argument of `NGVI` that is out of its range."""
    check_callable("model", model, "a Pyro model, a callable,")
    check_unsharded("model", modules(model))
    check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
    check_positive("temperature", temperature, "auto")
    check_integer("kl_warmup", kl_warmup, 0)
    check_flag("antithetic", antithetic)


class Loss(float):
    """A loss with the temperature that it was computed at."""

    temperature: float

    @staticmethod
    def at(value: float, temperature: float) -> Loss:
        """The loss of that value and temperature."""
        loss = Loss(value)
        loss.temperature = temperature
        return loss


class PyroAuxiliaryOptimizer:
    """A `PyroOptim` in the place of an `AuxiliaryOptimizer`."""

    def __init__(self, optim: PyroOptim) -> None:
        self._optim = optim

    def step(self, parameters: Sequence[AuxiliaryParameter]) -> None:
        """One step from the gradients."""
        moving = [p for p in parameters if p.gradient is not None]
        with gradients([p.tensor for p in parameters], moving):
            self._optim(p.tensor for p in moving)

    def keep(self, undo: Undo, parameters: Iterable[AuxiliaryParameter]) -> None:
        """Have `undo` keep what a step changes."""
        undo.keep_attributes(self._optim)
        undo.keep_tensors(p.tensor for p in parameters if p.gradient is not None)
        for optimizer in self._optim.optim_objs.values():
            if isinstance(optimizer, torch.optim.Optimizer):
                undo.keep_optimizer(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return self._optim.get_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises ValueError for the state of a torch optimizer.
        """
        if any("options" in saved for saved in state.values()):
            raise ValueError(
                "the state is of a torch.optim.Optimizer, this NGVI has a PyroOptim: pass the "
                "optim= that the state was saved with"
            )
        self._optim.set_state(dict(state))


def auxiliary_optimizer(
    optim: Callable[..., torch.optim.Optimizer] | PyroOptim | None
) -> AuxiliaryOptimizer | PyroAuxiliaryOptimizer:
    """The optimizer for `NGVI(optim=...)`. Raises TypeError for anything else."""
    if optim is not None:
        check_callable(
            "optim", optim, "a callable from parameters to a torch.optim.Optimizer (such as a "
            "class of torch.optim) or a PyroOptim"
        )
    return PyroAuxiliaryOptimizer(optim) if isinstance(optim, PyroOptim) else (
        AuxiliaryOptimizer(optim)
    )
