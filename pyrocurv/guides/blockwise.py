"""Guides that hold a Gaussian for each block of latents, and their state dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.guides.families import Family, family_of
from pyrocurv.guides.marginals import BlockwisePosterior
from pyrocurv.guides.owned_blocks import MeanOnly, Ownership, check_part
from pyrocurv.guides.partition import check_layout, check_weight_shapes, describe_empty
from pyrocurv.guides.shared_guide import SharedGuide
from pyrocurv.guides.task_posterior import normal_parts
from pyrocurv.guides.unconstrained import UnconstrainedLatent
from pyrocurv.handlers.sites import TraceSite
from pyrocurv.layers.block import Block
from pyrocurv.layers.weight_gaussian import WeightGaussian, split_gaussian
from pyrocurv.nn.plain_module import find_network, plain_module
from pyrocurv.runtime.representation import counted, described
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_flag
from pyrocurv.structures.serialization import FORMAT_VERSION, check_version, from_state, to_state


class BlockwiseGuide(SharedGuide):
    """Gaussians over blocks of latents, which a state dict restores without data.

    The part of a state dict that belongs to the fallback guide is kept until the first call, which
    creates the fallback guide.
    """

    structure: ClassVar[str]

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[[TraceSite], Tensor],
        init_scale: float, create_plates: Callable[..., Any] | None,
    ) -> None:
        super().__init__(model, init_loc_fn, create_plates)
        self._init_scale = init_scale
        self.sites: dict[str, tuple[int, ...]] = {}  # shapes of the unconstrained tensors
        self.fallback_sites: tuple[str, ...] = ()
        self._excluded: dict[str, str] = {}  # fallback sites that are "point" or "frozen"
        self._unsupported: dict[str, str] = {}  # reasons why other fallback sites are there
        self.is_joint = False  # one block over all latents of a model, unconstrained
        self._latents: dict[str, UnconstrainedLatent] = {}  # empty until the transforms are known
        self.is_laplace = False  # the precision is the curvature at a mode
        self.temperature: float | None = None  # T of the last step of `NGVI`
        self._has_warned = False  # of samples of that
        self._fallback_state: dict[str, Any] = {}
        self._loaded_fallback: tuple[str, ...] = ()  # fallback sites of a loaded state
        self.blocks = PyroModule[nn.ModuleList]([])

    def __repr__(self) -> str:
        """The structure, and what it has by now; nothing is run or read from Pyro's store."""
        size = sum(math.prod(shape) for shape in self.sites.values())
        blocks = f"{counted(size, 'weight')} in {counted(len(self.blocks), 'block')}"
        others = self.fallback_sites or self._loaded_fallback
        temperature = None if self.temperature is None else f"temperature={self.temperature:.3g}"
        return described(
            self, f"structure={self.structure!r}",
            blocks if self.sites else "" if others else "not called yet",
            f"fallback={[*others]}" if others else "",
            "a Laplace approximation" if self.is_laplace else temperature or "",
        )

    def _build(self, blocks: Sequence[Block], values: Mapping[str, Tensor]) -> None:
        """Create the Gaussians with the means {site: unconstrained tensor}."""
        self.ownership = Ownership.of(blocks, self.workers)
        for block in blocks:
            make: Callable[..., Family] = family_of(type(block.structure))
            if self.ownership is not None and not self.ownership.has(block):
                make = partial(MeanOnly, owner=self.ownership.owners[block.name])
            self.blocks.append(make(block, block.pack(values), self._init_scale))
        self.sites = {name: tuple(value.shape) for name, value in values.items()}
        self._name_families()

    def _pyro_set_supermodule(self, name: str, context: Any) -> None:
        super()._pyro_set_supermodule(name, context)
        self._name_families()

    def _name_families(self) -> None:
        """The parameters' names in the store: "FullGuide.loc", "KFACGuide.net.0.loc"."""
        families = [*self._modules.get("blocks", ())]
        names = [family.block.name for family in families]
        for family, name in zip(families, names, strict=True):
            own = name if names.count(name) == 1 else next(iter(family.block.tensors))
            family._pyro_name = ".".join([self._pyro_name, own][: len(families)])

    # ---- the Gaussians --------------------------------------------------------------------------

    @property
    def is_initialized(self) -> bool:
        """Whether the guide can be sampled: after its first call, or a state that suffices."""
        return not self._uninitialized_reason

    @property
    def _uninitialized_reason(self) -> str:
        """The reason why the guide cannot be sampled yet, or ""."""
        if not self.sites and not self.fallback_sites:
            return "the guide is not initialized"
        if self.sites and not self._latents:
            return "the loaded state has constrained latents, and their transforms are not in it"
        if self._fallback_state:
            return "the loaded state has latents of the fallback guide, which is not initialized"
        return ""

    def _ready(self) -> BlockwisePosterior:
        """The posterior over the sites, also over none; RuntimeError before initialization."""
        if reason := self._uninitialized_reason:
            raise RuntimeError(f"{reason}: call it once with the data, guide(x, y)")
        self.sync_with_store()
        return BlockwisePosterior(tuple(self.blocks), self._latents)

    def _ready_blocks(self) -> BlockwisePosterior:
        """The posterior over the sites; RuntimeError also if there are none."""
        posterior = self._ready()
        if not self.sites:
            raise RuntimeError(self.no_gaussian_reason)
        self.check_complete()
        return posterior

    @torch.no_grad()
    def weight_gaussians(self) -> list[WeightGaussian]:
        """The posterior in independent parts, for `prior=`; see `pyrocurv.nn.bayesianize`.

        The blocks, and the latents that the fallback guide has in an `AutoNormal`. Raises
        RuntimeError for a guide that is not initialized, ValueError for one that is not trained.
        """
        self._ready()
        parts = normal_parts(self.fallback) if self.fallback_sites else []
        if not self.sites:
            return parts
        self.check_complete()
        if self.has_initial_scale:
            raise ValueError(
                "prior: the guide still has its initial scale, which no data have changed: train "
                "it first, or give a standard deviation"
            )
        normal = self.posterior
        return [*split_gaussian(normal.sites, normal.loc, normal.precision), *parts]

    @property
    def no_gaussian_reason(self) -> str:
        """The reason why no latent has a Gaussian, if none has."""
        others = {
            name: self._unsupported.get(name, "no weight of a layer")
            for name in self.fallback_sites if name not in self._excluded
        }
        return describe_empty(others, self._excluded, self.structure)

    def constrain(
        self, unconstrained: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | float]:
        """The latents at unconstrained tensors, and the log volume of all transforms there."""
        values: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        for name, u in unconstrained.items():
            values[name], log_volume = self._latents[name].constrain(u)
            total = total + (log_volume.sum() if isinstance(log_volume, Tensor) else log_volume)
        return values, total

    @property
    def is_one_block(self) -> bool:
        """Whether all latents are in one block."""
        return len(self.blocks) == 1 and not self.fallback_sites

    @property
    def has_constrained(self) -> bool:
        """Whether a latent of the blocks is constrained, as a scale is."""
        return any(not latent.is_real for latent in self._latents.values())

    @property
    def has_initial_scale(self) -> bool:
        """Whether all standard deviations still have their initial value."""
        self.sync_with_store()
        initial = self._init_scale**-2
        diagonals = [family.precision().diag() for family in self.blocks]
        return all(bool(torch.allclose(d, torch.full_like(d, initial))) for d in diagonals)

    def _warn_of_laplace_samples(self) -> None:
        if self.is_laplace and not self._has_warned:
            self._has_warned = True
            warn_user(
                "sampling a Laplace approximation: its width is that of the network linearized at "
                "the mode, and predictions of the network itself at its samples are far off; use "
                "pyrocurv.infer.Laplace(model, guide).predict(x)"
            )

    # ---- the network ----------------------------------------------------------------------------

    def to_module(self, sample: bool = False, module: str | None = None) -> nn.Module:
        """The network of the model as a plain `torch.nn.Module`, without Pyro, in eval mode.

        For `torch.export`, `torch.compile`, `state_dict` or another process. Its classes and the
        names of its parameters are those before `bayesianize`, its weights the posterior's median,
        all else, as statistics of batch norm, is that of the model: a copy, which nothing trains.
        It returns what the network does, as the logits of a `Classifier`, without the likelihood.

        Args:
            sample: weights that are one sample from the posterior instead.
            module: the name of the network in the model, by default that of the module called
                "net", as in `Classifier` and `Regressor`, or the model if it is a network itself.

        Raises:
            ValueError: a model without that module, or with latents in it that the guide has not.
            TypeError: a module in it whose own class is a `PyroModule`.
            RuntimeError: the guide is not initialized, or was unpickled without its model.

        Example:
            >>> import torch, pyrocurv
            >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
            >>> guide = pyrocurv.guides.KFACGuide(pyrocurv.nn.Classifier(net, num_data=10))
            >>> weights = guide(torch.randn(10, 4), torch.randint(3, (10,)))
            >>> guide.to_module()
            Linear(in_features=4, out_features=3, bias=True)
        """
        check_flag("sample", sample)
        self._ready()
        if not self._base_model:
            raise RuntimeError("the guide was unpickled, without its model, which has the network")
        prefix, net = find_network(self._base_model[0], module)
        draws = self.sample_posterior(1) if sample else {}
        values = {name: draw[0] for name, draw in draws.items()} if sample else self.median()
        own = [name for name in values if name.startswith(prefix)]
        return plain_module(net, {name.removeprefix(prefix): values[name] for name in own})

    # ---- saving ---------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The blocks and sites in plain values, which a new guide is built from without data."""
        return {
            "version": FORMAT_VERSION,
            "structure": self.structure,
            "blocks": to_state([family.block for family in self.blocks]),
            "sites": {name: list(shape) for name, shape in self.sites.items()},
            "fallback": list(self.fallback_sites or self._loaded_fallback),
            "is_joint": self.is_joint,
            "is_laplace": self.is_laplace,
            "temperature": self.temperature,
            **({} if self.ownership is None else {"sharding": self.ownership.state()}),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`; `_load_from_state_dict` has used the state by then."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._fallback_state.items():
            destination[f"{prefix}fallback.{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        layout = state_dict.get(f"{prefix}_extra_state", {})
        if layout != {}:
            self._check_state(layout)
        self.is_laplace = bool(layout.get("is_laplace"))
        self.temperature = layout.get("temperature")
        if layout.get("blocks") and not self.sites:
            start = f"{prefix}blocks.0.loc"
            loc = next((v for k, v in state_dict.items() if k.startswith(start)), torch.zeros(()))
            self._build_from_state(layout, loc)
        check_part(layout.get("sharding"), self.ownership, "guide.full_state_dict()")
        if "sharding" not in layout:
            self._leave_to_owners(state_dict, f"{prefix}blocks.")
        if "fallback" not in self._modules:
            self._loaded_fallback = tuple(layout.get("fallback", ()))
            start = f"{prefix}fallback."
            for key in [key for key in state_dict if key.startswith(start)]:
                self._fallback_state[key.removeprefix(start)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, layout: Any) -> None:
        """Raise ValueError for the state of something else, or of other structures or weights."""
        name = type(self).__name__
        if not isinstance(layout, Mapping) or not {"structure", "blocks", "sites"} <= {*layout}:
            found = ", ".join(map(str, layout)) if isinstance(layout, Mapping) else layout
            raise ValueError(f"the state is not of a {name}: it has {found}")
        check_version(layout, name)
        if layout["structure"] != self.structure:
            raise ValueError(
                f"the state is of a guide with structure {layout['structure']!r}, this one has "
                f"{self.structure!r}"
            )
        if self.sites or self.fallback_sites:
            blocks = [family.block for family in self.blocks]
            check_layout(from_state(layout["blocks"]), blocks, ("the state", "this guide"))
            saved = layout.get("fallback", ())
            current = self.fallback_sites or self._loaded_fallback
            if {*saved} != {*current}:
                raise ValueError(
                    f"the state has the fallback latents {[*saved]}, this guide {[*current]}"
                )
        elif self._base_model:
            check_weight_shapes(layout["sites"], self._base_model[0])

    def _build_from_state(self, layout: Mapping[str, Any], like: Tensor) -> None:
        """Create the Gaussians that a state describes, with the dtype and device of `like`."""
        zeros = {name: like.new_zeros(shape) for name, shape in layout["sites"].items()}
        self._build(from_state(layout["blocks"]), zeros)
        self.is_joint = layout["is_joint"]
        if not self.is_joint:  # weights; the transforms of other latents are known from a model
            self._latents = {
                name: UnconstrainedLatent.weight(shape, len(shape))
                for name, shape in self.sites.items()
            }
