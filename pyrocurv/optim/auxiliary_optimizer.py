"""The optimizer of all parameters without a Gaussian: Adam, or what the user chooses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrocurv.runtime.foreach import are_finite
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_is, is_function_of

Make = Callable[..., torch.optim.Optimizer]
FUSED = "cpu", "cuda"  # devices on which Adam steps all tensors in one kernel


class AuxiliaryParameter(NamedTuple):
    """A parameter and its gradient, None if it does not move in this step."""

    name: str
    tensor: Tensor
    gradient: Tensor | None
    group: Hashable  # parameters of one group share options and the factor of a schedule
    options: Mapping[str, Any]  # of Adam, for the group
    lr_factor: float = 1.0  # of a schedule
    weight_decay: float | None = None  # None: as the optimizer has it
    joins_without_gradient: bool = False


def _made_by(make: Make, tensors: list[Tensor]) -> torch.optim.Optimizer:
    """Raises TypeError for anything that is no optimizer, or one that asks for a closure, and
    ValueError for one of other parameters.
    """
    made = make(tensors)
    check_is("update or optim", made, torch.optim.Optimizer,
             "a callable from parameters to a torch.optim.Optimizer")
    name = type(made).__name__
    if not is_function_of(made.step):
        raise TypeError(
            f"update or optim: {name}.step needs a closure, which evaluates the loss again; an "
            "optimizer that steps from gradients alone is needed"
        )
    if {*map(id, tensors)} != {id(p) for group in made.param_groups for p in group["params"]}:
        raise ValueError(
            f"update or optim: the {name} has other parameters than those that the callable was "
            "given: it needs all of them, and no others"
        )
    return made


class AuxiliaryOptimizer:
    """Steps parameters by name, from given gradients; leaves every `.grad` as it was.

    A parameter joins at its first gradient. `make` maps parameters (or groups of them) to a
    `torch.optim.Optimizer`; None is Adam.
    """

    def __init__(self, make: Make | None = None) -> None:
        self._make = make
        self._optimizer: torch.optim.Optimizer | None = None
        self._known: dict[str, Tensor] = {}
        self._lr: list[float] = []  # of each of the optimizer's groups, before a schedule
        self._moved_to: list[tuple[torch.device, torch.dtype]] = []  # at the last step
        self._loaded: dict[str, dict[str, Any]] = {}  # states of parameters that have not joined

    @property
    def names(self) -> set[str]:
        """The parameters that have joined, or will with a loaded state."""
        return {*self._known, *self._loaded}

    def step(self, parameters: Sequence[AuxiliaryParameter], scale: float = 1.0) -> None:
        """One step from the gradients times `scale`.

        Raises FloatingPointError, after it, if a parameter or its state is not finite any more.
        """
        moving = [p for p in parameters if p.gradient is not None]
        joining = [p for p in parameters if p.gradient is not None or p.joins_without_gradient]
        if not moving and self._optimizer is None:
            return
        self._replace(parameters)
        for members in _grouped(p for p in joining if p.name not in self._known).values():
            for same in self._with_same_options(members):
                self._add(same)
        if self._optimizer is None:
            return
        with gradients([*self._known.values()], moving, scale):
            self._follow_moves()
            self._apply_schedule(parameters)
            for options in () if self._make else self._optimizer.param_groups:
                if options["fused"] is not None:  # whose kernel reads memory in order
                    options["fused"] = all(x.is_contiguous() for x in options["params"])
            self._optimizer.step()
        self._check_finite(self._optimizer, [p.tensor for p in moving])

    @staticmethod
    def _check_finite(optimizer: torch.optim.Optimizer, moved: Sequence[Tensor]) -> None:
        """In one synchronization."""
        states = [value for x in moved for value in optimizer.state.get(x, {}).values()]
        tensors = [x for x in states if isinstance(x, Tensor) and x.dim() and x.is_floating_point()]
        if moved and not are_finite([*moved, *tensors]):
            raise FloatingPointError(
                f"a parameter of {type(optimizer).__name__}, or its state, would not be finite: "
                "the learning rate or a gradient is too large"
            )

    def keep(self, undo: Undo, parameters: Iterable[AuxiliaryParameter]) -> None:
        """Have `undo` keep what a step changes."""
        undo.keep_attributes(self)
        undo.keep_tensors(p.tensor for p in parameters if p.gradient is not None)
        if self._optimizer is not None:
            undo.keep_optimizer(self._optimizer)

    def _replace(self, parameters: Iterable[AuxiliaryParameter]) -> None:
        """Let a parameter take the place of the one of its name, as after a store is loaded."""
        for parameter in parameters:
            old = self._known.get(parameter.name, parameter.tensor)
            if old is parameter.tensor or self._optimizer is None:
                continue
            self._known[parameter.name] = parameter.tensor
            for group in self._optimizer.param_groups:
                group["params"] = [parameter.tensor if p is old else p for p in group["params"]]
            if old in self._optimizer.state:
                self._optimizer.state[parameter.tensor] = self._optimizer.state.pop(old)
            self._moved_to = []

    def _follow_moves(self) -> None:
        """Move the state where the parameters have moved since the last step."""
        places = [(tensor.device, tensor.dtype) for tensor in self._known.values()]
        if places != self._moved_to and self._optimizer is not None:
            self._optimizer.load_state_dict(self._optimizer.state_dict())
            self._moved_to = places

    def _apply_schedule(self, parameters: Iterable[AuxiliaryParameter]) -> None:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        current = {id(p.tensor): p for p in parameters}
        for group, lr in zip(groups, self._lr, strict=True):
            parameter = next((current[id(p)] for p in group["params"] if id(p) in current), None)
            if parameter is not None:
                group["lr"] = lr * parameter.lr_factor
                if parameter.weight_decay is not None:
                    group["weight_decay"] = parameter.weight_decay

    def _with_same_options(
        self, parameters: Iterable[AuxiliaryParameter]
    ) -> list[list[AuxiliaryParameter]]:
        """The parameters by the options that were loaded for them."""
        groups: list[tuple[Any, list[AuxiliaryParameter]]] = []
        for parameter in parameters:
            options = self._loaded.get(parameter.name, {}).get("options")
            same = next((members for known, members in groups if known == options), None)
            if same is None:
                groups.append((options, [parameter]))
            else:
                same.append(parameter)
        return [members for _, members in groups]

    def _add(self, members: Sequence[AuxiliaryParameter]) -> None:
        """Add parameters with the same options, loaded or new."""
        tensors = [p.tensor for p in members]
        optimizer, added = self._with_groups(tensors, members[0].options)
        self._optimizer = optimizer
        self._known.update({p.name: p.tensor for p in members})
        loaded = {p.tensor: copy.deepcopy(self._loaded.pop(p.name, None)) for p in members}
        for group in added:
            base = group["lr"]
            for tensor in group["params"]:
                saved = loaded[tensor]
                if saved is not None:
                    group.update(saved["options"])
                    optimizer.state[tensor] = saved["state"]
                    base, self._moved_to = saved["base_lr"], []
            self._lr.append(base)
            if not self._make:
                group["fused"] = _can_fuse(tensors) or None

    def _with_groups(
        self, tensors: list[Tensor], options: Mapping[str, Any]
    ) -> tuple[torch.optim.Optimizer, list[dict[str, Any]]]:
        """The optimizer with new groups for these tensors, and those groups."""
        optimizer = self._optimizer
        if self._make is None:
            group = {"params": tensors, **options}
            if optimizer is None:
                optimizer = torch.optim.Adam([group], foreach=True)
            else:
                optimizer.add_param_group(group)
            return optimizer, optimizer.param_groups[-1:]
        made = _made_by(self._make, tensors)
        if optimizer is None:
            return made, made.param_groups
        for group in made.param_groups:
            optimizer.add_param_group(group)
        return optimizer, optimizer.param_groups[-len(made.param_groups):]

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint: {parameter name: its options and state}."""
        states, names = dict(self._loaded), {id(p): n for n, p in self._known.items()}
        if self._optimizer is None:
            return states
        for group, base_lr in zip(self._optimizer.param_groups, self._lr, strict=True):
            options = {key: value for key, value in group.items() if key != "params"}
            for param in group["params"]:
                state = dict(self._optimizer.state.get(param, {}))
                saved = {"options": options, "base_lr": base_lr, "state": state}
                states[names[id(param)]] = saved
        return states

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, with each parameter when it joins.

        Raises ValueError for the state of a `PyroOptim`.
        """
        if any("options" not in saved for saved in state.values()):
            raise ValueError(
                "the state is of a PyroOptim, this NGVI has a torch.optim.Optimizer: pass the "
                "optim= that the state was saved with"
            )
        vars(self).update(vars(AuxiliaryOptimizer(self._make)))
        self._loaded = dict(state)


def _can_fuse(tensors: Sequence[Tensor]) -> bool:
    return all(
        x.is_floating_point() and x.is_contiguous() and x.device.type in FUSED for x in tensors
    )


def _grouped(
    parameters: Iterable[AuxiliaryParameter]
) -> dict[Hashable, list[AuxiliaryParameter]]:
    groups: dict[Hashable, list[AuxiliaryParameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.group, []).append(parameter)
    return groups


@contextmanager
def gradients(
    known: Sequence[Tensor], moving: Iterable[AuxiliaryParameter], scale: float = 1.0
) -> Iterator[None]:
    """With these gradients, and no others, in `.grad`."""
    before = [tensor.grad for tensor in known]
    try:
        for tensor in known:
            tensor.grad = None
        for parameter in moving:
            gradient = parameter.gradient
            if gradient is not None:
                gradient = gradient if scale == 1 else gradient * scale
                is_strided = gradient.layout == torch.strided
                is_in_order = is_strided and parameter.tensor.is_contiguous()
                parameter.tensor.grad = gradient.contiguous() if is_in_order else gradient
        yield
    finally:
        for tensor, gradient in zip(known, before, strict=True):
            tensor.grad = gradient
