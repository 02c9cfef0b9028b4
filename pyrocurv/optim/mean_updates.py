"""The rules for the step of the mean by name, and any optimizer of torch as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.optim.auxiliary_optimizer import AuxiliaryOptimizer, AuxiliaryParameter
from pyrocurv.posterior.adam import SoapUpdate
from pyrocurv.posterior.hyperparameters import AUTO
from pyrocurv.posterior.mean_update import NATURAL, Direction, MeanUpdate, Push, gradients
from pyrocurv.posterior.muon import MuonUpdate, Orthogonalizing, WhitenedMuonUpdate
from pyrocurv.runtime.choices import Auto, UpdateName
from pyrocurv.runtime.foreach import are_finite
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_flag
from pyrocurv.runtime.workers import ALONE, Workers

UPDATES = {rule.name: rule for rule in (NATURAL, WhitenedMuonUpdate(), MuonUpdate(), SoapUpdate())}
UpdateChoice = UpdateName | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def as_mean_update(
    update: UpdateChoice, automatic: str = "whitened-muon", nesterov: bool | Auto = AUTO,
    usual: bool = True,
) -> MeanUpdate:
    """The rule of that name, `automatic` for "auto", or of the optimizer that a callable makes.

    `nesterov` is whether the momentum of orthogonalized steps is Nesterov's, `usual` for "auto".

    Raises ValueError for an unknown name, and for a Nesterov's momentum where there is none;
    TypeError for anything else.
    """
    if nesterov != AUTO:
        check_flag("nesterov", nesterov)
    rule = _rule(update, automatic)
    if isinstance(rule, Orthogonalizing):
        return replace(rule, is_nesterov=usual if nesterov == AUTO else bool(nesterov))
    if nesterov is True:
        kind = "an optimizer of torch has its own" if rule.name == "torch" else (
            f"the update is {rule.name!r} here, without such a momentum"
        )
        raise ValueError(f"nesterov=True: {kind}; 'muon' and 'whitened-muon' have it")
    return rule


def _rule(update: UpdateChoice, automatic: str) -> MeanUpdate:
    names = ", ".join(map(repr, (AUTO, *UPDATES)))
    if isinstance(update, str):
        name = automatic if update == AUTO else update
        if name not in UPDATES:
            raise ValueError(
                f"update={update!r}: choose {names}, or a callable from parameters to a "
                "torch.optim.Optimizer"
            )
        return UPDATES[name]
    if not callable(update):
        raise TypeError(
            f"update: one of {names} or a callable from parameters to a torch.optim.Optimizer is "
            f"needed, got {type(update).__name__}"
        )
    return TorchUpdate(update)


def check_decay(rule: MeanUpdate, decay: float, lr: float | Auto) -> None:
    """Raise ValueError for a decoupled decay without the learning rate that it is a multiple of."""
    if decay and lr == AUTO and isinstance(rule, TorchUpdate):
        raise ValueError(
            f"decoupled_weight_decay={decay} is a multiple of lr=, which has to be given as well: "
            "that of an optimizer of torch as update= is its own, and so is its weight decay"
        )


def check_update(saved: str, here: str, owner: str) -> None:
    """Raise ValueError for a state that was saved with another rule."""
    if saved != here:
        raise ValueError(f"the state is of update={saved!r}, this {owner} has update={here!r}")


class TorchUpdate(MeanUpdate):
    """A `torch.optim.Optimizer` steps copies of the means, in the shapes of their weights.

    The callable makes parameter groups for each group of the caller, whose learning rates follow
    the one of that group in proportion, from the value that it was made with.
    """

    name = "torch"
    default_lr = 1.0  # of which a schedule is a multiple; the optimizer has its own
    uses_momentum = False

    def __init__(self, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> None:
        self._optimizer = AuxiliaryOptimizer(make)
        self._parameters: dict[str, nn.Parameter] = {}

    @torch.no_grad()
    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        found = gradients(pushes)
        if not are_finite(found):  # the optimizer may keep what it has seen, in any form
            raise FloatingPointError("a gradient is not finite")
        pairs = zip(pushes, found, strict=True)
        moving = [parameter for pair in pairs for parameter in self._load(*pair)]
        self._optimizer.step(moving)
        return [self._direction(push) for push in pushes]

    def _load(self, push: Push, gradient: Tensor) -> list[AuxiliaryParameter]:
        """The parameters of a block, with the values of its mean and their gradients."""
        block, numbers = push.state.block, push.state.hyperparameters
        values, factor = block.unpack(gradient), numbers.lr_factor
        return [
            AuxiliaryParameter(
                name, self._parameter(name, mean), values[name], numbers.group, {}, factor
            )
            for name, mean in block.views(push.state.mean).items()
        ]

    def _parameter(self, name: str, mean: Tensor) -> nn.Parameter:
        known = self._parameters.get(name)
        if known is None or (known.device, known.dtype) != (mean.device, mean.dtype):
            known = self._parameters[name] = nn.Parameter(torch.empty_like(
                mean, memory_format=torch.contiguous_format
            ))
        known.copy_(mean)
        return known

    def _direction(self, push: Push) -> Direction:
        moved = push.state.block.pack({n: self._parameters[n] for n in push.state.block.tensors})
        return Direction.of(push, push.state.mean - moved, 1.0)

    def keep(self, undo: Undo) -> None:
        undo.keep_attributes(self)
        self._optimizer.keep(undo, ())

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._parameters.clear()
        self._optimizer.load_state_dict(state)
