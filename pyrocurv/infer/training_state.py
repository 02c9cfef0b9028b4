"""What a training can go back to, and go on from in another process."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from pyrocurv import checkpoint
from pyrocurv.handlers.modules import root_modules
from pyrocurv.infer.history import Epoch, History
from pyrocurv.infer.loaders import generators
from pyrocurv.infer.ngvi import NGVI
from pyrocurv.runtime.agreement import gather
from pyrocurv.runtime.workers import Workers


@dataclass(eq=False)
class TrainingState:
    """Model, guide, NGVI and schedule as one state.

    `plan` are the settings that a run and the one that goes on from it have in common.
    """

    ngvi: NGVI
    scheduler: LRScheduler | None
    plan: Mapping[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        ownership = self.ngvi.guide.ownership
        part = {} if ownership is None else {"sharding": ownership.state()}
        return {"plan": dict(self.plan), "scheduler": scheduler, **self.weights(), **part}

    def full_state_dict(self) -> dict[str, Any]:
        """That of all ranks of a network that was sharded, on rank 0."""
        full = {"guide": self.ngvi.guide.full_state_dict(), "ngvi": self.ngvi.full_state_dict()}
        return {**self.state_dict(), **full} if full["guide"] else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError for that of another plan."""
        saved = state["plan"]
        if others := [name for name in {**saved, **self.plan} if _differs(name, saved, self.plan)]:
            raise ValueError(
                f"checkpoint: it is of a run with {_listed(others, saved)}, this one has "
                f"{_listed(others, self.plan)}: take another file, or the settings of that run"
            )
        self.load_weights(state)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])

    def weights(self) -> dict[str, Any]:
        """All but the schedule; the tensors are those that training changes."""
        ngvi = self.ngvi
        return {
            "model": [module.state_dict() for module in root_modules(ngvi.model)],
            "guide": ngvi.guide.state_dict(), "ngvi": ngvi.state_dict(),
        }

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Put `weights` back."""
        for module, saved in zip(root_modules(self.ngvi.model), state["model"], strict=True):
            module.load_state_dict(saved)
        self.ngvi.guide.load_state_dict(state["guide"])
        self.ngvi.load_state_dict(state["ngvi"])


@dataclass(eq=False)
class Run:
    """A training so far: its history, and its best epoch."""

    state: TrainingState
    seed: int  # of the samples for the held-out data, the same in each epoch
    history: History = field(default_factory=History)
    best: dict[str, Any] | None = None  # the weights after the best epoch
    best_params: dict[str, Tensor] = field(default_factory=dict)  # outside of modules

    def add(self, epoch: Epoch) -> None:
        """Add an epoch that is complete, and keep its weights if it is the best one."""
        self.history = replace(self.history, epochs=(*self.history.epochs, epoch))
        if self.history.best is epoch:
            self.best = copy.deepcopy(self.state.weights())
            self.best_params = {name: x.clone() for name, x in self._loose_params().items()}

    def epochs_since_best(self) -> int:
        """How many epochs the best one is ago; all of them if no density is finite."""
        best = self.history.best
        return len(self.history) - (0 if best is None else best.epoch)

    def restore_best(self) -> None:
        """Go back to the best epoch, if there is one."""
        if self.best is None:
            return
        self.state.load_weights(self.best)
        for name, x in self._loose_params().items():
            if name in self.best_params:
                with torch.no_grad():
                    x.copy_(self.best_params[name])

    def _loose_params(self) -> dict[str, Tensor]:
        """The unconstrained `pyro.param`s that Pyro's store has, and no module."""
        ngvi = self.state.ngvi
        modules: list[nn.Module] = [*root_modules(ngvi.model), ngvi.guide]
        owned = {id(x) for m in modules for x in (*m.parameters(), *m.buffers())}
        params = pyro.get_param_store().named_parameters()
        return {name: x.detach() for name, x in params if id(x) not in owned}

    # ---- a file ---------------------------------------------------------------------------------

    def save(self, path: Path, loader: Iterable[Any], workers: Workers) -> None:
        """Write a checkpoint; all processes call it.

        Raises ValueError if a trained parameter belongs to no module.
        """
        names: set[str] = getattr(self.state.ngvi._auxiliary, "names", set())
        if lost := [name for name in self._loose_params() if f"param {name}" in names]:
            raise ValueError(
                f"checkpoint: {', '.join(lost)} is in Pyro's param store alone, and in no state "
                "dict: make it a PyroParam of a module"
            )
        content = {
            "training": self.state, "seed": self.seed, "best": self.best,
            "epochs": [asdict(epoch) for epoch in self.history],
            "stopped_early": self.history.stopped_early,
            "generators": gather(workers, [x.get_state() for x in generators(loader)]),
        }
        checkpoint.save(path, content, process_group=workers.group)

    def load(self, path: Path, loader: Iterable[Any], workers: Workers) -> None:
        """Go on from a checkpoint."""
        values = checkpoint.load(path, {"training": self.state})
        self.seed, self.best = values["seed"], values["best"]
        epochs = tuple(Epoch(**epoch) for epoch in values["epochs"])
        self.history = History(epochs, values["stopped_early"])
        saved = values["generators"]
        if len(saved) == workers.size:
            own, states = generators(loader), saved[workers.rank]
            if len(own) != len(states):
                raise ValueError(
                    f"checkpoint={str(path)!r} is of a loader with {len(states)} generators of its "
                    f"own, DataLoader(..., generator=...), this one has {len(own)}"
                )
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)


def _differs(name: str, saved: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    return name not in saved or name not in plan or bool(saved[name] != plan[name])


def _listed(names: Iterable[str], plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={plan[name]!r}" if name in plan else f"no {name}" for name in names)
