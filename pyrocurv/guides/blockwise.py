"""What a guide holds: Gaussians for blocks of its sites, laid out by a model or a saved state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.guides.families import FAMILIES
from pyrocurv.guides.marginals import BlockwisePosterior
from pyrocurv.guides.param_store import ParamStoreGuide
from pyrocurv.guides.unconstrained import UnconstrainedLatent, constrain
from pyrocurv.handlers.prototype import TraceSite
from pyrocurv.layers.block import Block
from pyrocurv.structures.serialization import FORMAT_VERSION, check_version, from_state, to_state


class BlockwiseGuide(ParamStoreGuide):
    """Gaussians for blocks and the sites they are over; a state has them as plain values.

    What a state has of the fallback guide is kept until the first call makes that guide.
    """

    structure: ClassVar[str]

    def __init__(
        self, model: Callable[..., Any], init_loc_fn: Callable[
            [TraceSite], Tensor
        ], init_scale: float,
        create_plates: Callable[..., Any] | None,
    ) -> None:
        super().__init__(model, init_loc_fn, create_plates)
        self._init_scale = init_scale
        self.sites: dict[str, tuple[int, ...]] = {}
        self.fallback_sites: tuple[str, ...] = ()
        self._excluded: dict[str, str] = {}  # of these, {site: "point" or "frozen"}
        self.is_joint = False  # whether one block has all latents, as real vectors
        self._latents: dict[str, UnconstrainedLatent] = {}
        # the Gaussian is a Laplace approximation, not fitted by its samples
        self.is_laplace = False
        self._fallback_state: dict[str, Any] = {}
        self._loaded_rest: tuple[str, ...] = ()  # fallback sites of a state that was loaded
        self.blocks = PyroModule[nn.ModuleList]([])

    def _build(self, blocks: Sequence[Block], values: Mapping[str, Tensor]) -> None:
        for block in blocks:
            self.blocks.append(FAMILIES[block.kind](block, block.pack(values), self._init_scale))
        self.sites = {name: tuple(value.shape) for name, value in values.items()}

    @property
    def is_initialized(self) -> bool:
        """Whether the guide can be drawn from: after its first call, or a state that suffices."""
        has_sites = bool(self.sites or self.fallback_sites)
        has_transforms = not self.is_joint or bool(self._latents)
        return has_sites and has_transforms and not self._fallback_state

    def _ready(self) -> BlockwisePosterior:
        """The Gaussians together, of a guide that has met its model."""
        if not self.sites and not self.fallback_sites:
            raise RuntimeError("the guide has not seen its model: call it once, guide(x, y)")
        if self.is_joint and not self._latents:
            raise RuntimeError(
                "the loaded state has latents of any support, whose transforms are met at the "
                "first call: call it once, guide(x, y)"
            )
        if self._fallback_state:
            raise RuntimeError(
                "the loaded state has latents of the fallback guide, which are met at the first "
                "call: call it once, guide(x, y)"
            )
        return BlockwisePosterior(tuple(self.blocks), self.sites, self._latents)

    def _ready_blocks(self) -> BlockwisePosterior:
        """The same, of a guide that has one at least."""
        posterior = self._ready()
        if not self.sites:
            raise RuntimeError(self.no_gaussian_reason)
        return posterior

    @property
    def no_gaussian_reason(self) -> str:
        """Why there is no Gaussian, where there is none."""
        left = [name for name in self.fallback_sites if name not in self._excluded]
        reasons = {
            'structure= leaves out, as "point" or "frozen"': [*self._excluded],
            "the fallback guide has, as no supported op consumes them as weights": left,
        }
        remedy = "" if self._excluded else (
            "; for a model without a network FullGuide or DiagonalGuide under "
            "NGVI(curvature='hessian') has all of them"
        )
        return "no latent has a Gaussian here: " + "; ".join(
            f"{reason} {', '.join(names)}" for reason, names in reasons.items() if names
        ) + remedy

    def constrain(self, real: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | float]:
        """The latents at values of `.sites`, and the log volume that their transforms have."""
        return constrain(self._latents, real) if self.is_joint else (dict(real), 0.0)

    @property
    def is_one_block(self) -> bool:
        """Whether all latents have one Gaussian, full or diagonal."""
        return len(self.blocks) == 1 and not self.fallback_sites

    @property
    def has_constrained(self) -> bool:
        """Whether a latent is not any real number, as a scale is not."""
        return any(not latent.is_real for latent in self._latents.values())

    @property
    def has_initial_scale(self) -> bool:
        """Whether every standard deviation is still what it was set to at first."""
        wanted = self._init_scale**-2
        diagonals = [family.precision().diag() for family in self.blocks]
        return all(bool(torch.allclose(d, torch.full_like(d, wanted))) for d in diagonals)

    # ---- saving ---------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """The layout, in plain values, so that a fresh guide can be loaded without data."""
        sites = {name: list(shape) for name, shape in self.sites.items()}
        blocks = to_state([family.block for family in self.blocks])
        rest = list(self.fallback_sites or self._loaded_rest)
        return {
            "version": FORMAT_VERSION, "structure": self.structure, "blocks": blocks,
            "sites": sites, "fallback": rest, "is_joint": self.is_joint, "at_mode": self.is_laplace,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Used by `load_state_dict`; the work is done before, in `_load_from_state_dict`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._fallback_state.items():
            destination[f"{prefix}fallback.{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        layout = state_dict.get(prefix + "_extra_state")
        if layout and "structure" not in layout:
            raise ValueError(
                f"the state is of no {type(self).__name__}: it has {', '.join(map(str, layout))}"
            )
        check_version(layout or {}, type(self).__name__)
        if layout and layout["structure"] != self.structure:
            raise ValueError(
                f"the state is of a guide with structure {layout['structure']!r}, this one is "
                f"{self.structure!r}"
            )
        self.is_laplace = bool(layout and layout.get("at_mode"))
        if layout and layout["blocks"] and not self.sites:
            plan = from_state(layout["blocks"])
            like = next(v for k, v in state_dict.items() if k.startswith(f"{prefix}blocks.0.loc"))
            self._build(plan, {n: like.new_zeros(s) for n, s in layout["sites"].items()})
            self.is_joint = layout["is_joint"]
        if "fallback" not in self._modules:  # its latents are met at the first call: keep for then
            start = prefix + "fallback."
            self._loaded_rest = tuple((layout or {}).get("fallback", ()))
            for key in [key for key in state_dict if key.startswith(start)]:
                self._fallback_state[key.removeprefix(start)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
