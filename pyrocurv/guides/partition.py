"""How the latents of a model are shared out: blocks with a Gaussian, points, frozen, the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pyrocurv.guides.unconstrained import UnconstrainedLatent, is_local, joint_block
from pyrocurv.handlers.prototype import Prototype
from pyrocurv.layers.block import Block, make_blocks
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, select_structures

WIDE = 10_000  # numbers in a dense block, from which on a word is due


@dataclass(frozen=True)
class LatentPartition:
    """The blocks, what is `excluded` {site: "point" or "frozen"}, and names of what is `left`."""

    blocks: list[Block]
    excluded: dict[str, str]
    left: tuple[str, ...]
    # of a block over a whole model
    latents: Mapping[str, UnconstrainedLatent] = field(default_factory=dict)

    @staticmethod
    def of(
        found: Prototype, choice: StructureChoice, default: str, modules: Mapping[str, nn.Module]
    ) -> LatentPartition:
        """By the choice, and by the default where it says nothing."""
        chosen = select_structures(choice, default, found.layers, modules, LEFT_OUT)
        excluded = {
            name: kind for layer, kind in chosen.items() if kind in LEFT_OUT
            for name in layer.tensors
        }
        blocks = make_blocks(
            [layer for layer, kind in chosen.items() if kind not in LEFT_OUT], chosen.__getitem__
        )
        taken = {*excluded, *(name for block in blocks for name in block.tensors)}
        left = tuple(name for name in found.latents if name not in taken)
        return LatentPartition(blocks, excluded, left)

    @staticmethod
    def joint(found: Prototype, structure: str) -> LatentPartition:
        """One block over all latents, as real vectors."""
        latents = {name: UnconstrainedLatent.of(site) for name, site in found.latents.items()}
        return LatentPartition([joint_block(latents, structure)], {}, (), latents)

    def prefers_joint(self, found: Prototype) -> bool:
        """Whether latents are left or known from gradients alone, as in models without a network.

        Not with local latents: those are the fallback's, which amortises or refuses them.
        """
        short = bool(self.left) or any(block.is_untraced for block in self.blocks)
        return short and not any(map(is_local, found.latents.values()))

    def warning(self, found: Prototype) -> str:
        """A warning of weights without the Gaussian one may expect, or of large blocks; or ""."""
        wide = [block for block in self.blocks if block.kind in ("full", "block")
                and block.size > WIDE]
        notes = [
            f"{block.name} has a dense matrix of {block.size:,} x {block.size:,}, factorised at "
            "each update, which may take minutes" for block in wide
        ]
        if self.latents:
            return "; ".join(notes)
        opaque = [name for block in self.blocks if block.is_untraced for name in block.tensors]
        others = [name for name in self.left if name in found.unsupported]
        reasons = {
            "consumed by no supported op: independent Gaussians, from gradients": opaque,
            "left to the fallback guide": others,
        }
        notes += [
            f"{', '.join(f'{name} ({found.unsupported[name]})' for name in names)} {reason}"
            for reason, names in reasons.items() if names
        ]
        return "; ".join(notes)


def check_layout(have: Sequence[Block], want: Sequence[Block]) -> None:
    """Raises ValueError where a loaded guide's blocks are not those of the model."""
    loaded, planned = _layout(have), _layout(want)
    if loaded != planned:
        raise ValueError(f"the loaded guide has weights {loaded}, the model {planned}")


def _layout(blocks: Sequence[Block]) -> dict[str, tuple[Any, ...]]:
    return {n: (s, block.structure) for block in blocks for n, s in block.tensors.items()}
