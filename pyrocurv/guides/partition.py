"""The partition of a model's latents: blocks with a Gaussian, point estimates, and the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyrocurv.guides.unconstrained import UnconstrainedLatent, is_local
from pyrocurv.handlers.modules import named_modules
from pyrocurv.handlers.prototype import Prototype
from pyrocurv.layers import Layer, structure_spec
from pyrocurv.layers.block import Block, make_blocks
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, select_structures
from pyrocurv.layers.structure_spec import parse_structure
from pyrocurv.nn.weight_priors import initial_value, latent_names

MAX_DENSE_SIZE = 10_000  # parameters in a dense block; a warning is given above


@dataclass(frozen=True)
class LatentPartition:
    """Blocks over `latents`, `excluded` sites {name: "point" or "frozen"}, and `fallback` sites."""

    blocks: list[Block]
    latents: Mapping[str, UnconstrainedLatent]  # those of the blocks, in the order of the model
    excluded: Mapping[str, str]
    fallback: tuple[str, ...]
    is_joint: bool = False  # one block over all latents of a model

    @staticmethod
    def by_layer(
        prototype: Prototype, choice: StructureChoice, default: str,
        modules: Mapping[str, nn.Module],
    ) -> LatentPartition:
        """Blocks of layers, whose structures are those of `choice` or the default."""
        structures = select_structures(choice, default, prototype.layers, modules, LEFT_OUT)
        excluded = {
            name: structure for layer, structure in structures.items() if structure in LEFT_OUT
            for name in layer.tensors
        }
        layers = [layer for layer, structure in structures.items() if structure not in LEFT_OUT]
        blocks = make_blocks(layers, structures.__getitem__)
        weights = {name for layer in layers for name in layer.tensors}
        latents = {
            name: UnconstrainedLatent.weight(tuple(site["value"].shape), site["fn"].event_dim)
            for name, site in prototype.latents.items() if name in weights
        }
        fallback = tuple(n for n in prototype.latents if n not in weights and n not in excluded)
        return LatentPartition(blocks, latents, excluded, fallback)

    @staticmethod
    def joint(prototype: Prototype, structure: str) -> LatentPartition:
        """One block over all latents, unconstrained."""
        latents = {name: UnconstrainedLatent.of(site) for name, site in prototype.latents.items()}
        layers = tuple(Layer(n, None, latent.shape, "untraced") for n, latent in latents.items())
        return LatentPartition(
            [Block(layers, parse_structure(structure))], latents, {}, (), is_joint=True
        )

    def suggests_joint(self, prototype: Prototype) -> bool:
        """Whether some latents are not weights of a layer, as in models without a network.

        Local latents rule it out: the fallback guide amortizes or refuses them.
        """
        has_others = bool(self.fallback) or any(block.is_untraced for block in self.blocks)
        return has_others and not any(map(is_local, prototype.latents.values()))

    def warning(self, prototype: Prototype) -> str:
        """A warning about large dense blocks and weights without curvature, or ""."""
        dense = (structure_spec.Full, structure_spec.Block)
        notes = [
            f"{block.name} has a dense matrix of {block.size:,} x {block.size:,}, factorized at "
            "each update, which may take minutes" for block in self.blocks
            if isinstance(block.structure, dense) and block.size > MAX_DENSE_SIZE
        ]
        if self.is_joint:
            return "; ".join(notes)
        untraced = [name for block in self.blocks if block.is_untraced for name in block.tensors]
        others = [name for name in self.fallback if name in prototype.unsupported]
        reasons = {
            "consumed by no supported op: independent Gaussians, from gradients": untraced,
            "left to the fallback guide": others,
        }
        notes += [
            f"{', '.join(f'{name} ({prototype.unsupported[name]})' for name in names)} {reason}"
            for reason, names in reasons.items() if names
        ]
        return "; ".join(notes)


def describe_empty(
    others: Mapping[str, str], excluded: Collection[str], structure: str
) -> str:
    """Why a guide of this structure has no Gaussian, and what has one.

    Args:
        others: {site: reason} of the latents of the fallback guide.
        excluded: the sites that `structure=` leaves out.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in others.items():
        reasons.setdefault(reason, []).append(name)
    notes = [f"the fallback guide has {', '.join(names)} ({reason})"
             for reason, names in reasons.items()]
    if excluded:
        notes.append(f'structure= leaves out {", ".join(excluded)}, as "point" or "frozen"')
    remedies = ["pyro.infer.SVI trains the guide as it is"]
    if any(reason.endswith(" prior") for reason in reasons):
        remedies.append("independent normal priors give weights a Gaussian")
    if not excluded:
        guide = "this guide, without structure=," if structure == "full" else "FullGuide(model)"
        remedies.append(
            f"{guide} has one Gaussian over all latents, of any prior, in NGVI with "
            "curvature='hessian' and no other setting of Curvature"
        )
    return f"no latent has a Gaussian here: {'; '.join(notes)}. {'; '.join(remedies)}"


def check_layout(
    loaded: Sequence[Block], current: Sequence[Block], names: tuple[str, str]
) -> None:
    """Raise ValueError if loaded blocks differ from current ones; `names` say whose they are."""
    old, new = _layout(loaded), _layout(current)
    if old != new:
        raise ValueError(f"{names[0]} has weights {old}, {names[1]} {new}")


def _layout(blocks: Sequence[Block]) -> dict[str, tuple[Any, ...]]:
    return {n: (s, block.structure) for block in blocks for n, s in block.tensors.items()}


def check_weight_shapes(sites: Mapping[str, Sequence[int]], model: Any) -> None:
    """Raise ValueError if saved sites have other shapes than the weights of a model's modules."""
    wrong = []
    for path, module in named_modules(model).items():
        for weight in latent_names(module):
            name, shape = f"{path}.{weight}".lstrip("."), tuple(initial_value(module, weight).shape)
            if name in sites and tuple(sites[name]) != shape:
                wrong.append(f"{name} {tuple(sites[name])} in place of {shape}")
    if wrong:
        raise ValueError(f"the state is of another network: it has {', '.join(wrong)}")
