"""Checks of hyperparameters, and of saved states before anything of them is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyrocurv.layers import Layer
from pyrocurv.layers.structure_selection import StructureChoice
from pyrocurv.optim.parameter_blocks import ParameterBlocks, add_layers
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.structures.serialization import check_version


def check_hyperparameters(values: Mapping[str, Any]) -> None:
    """Raise ValueError for one that is out of its range."""
    momentum, damping, kl_clip = (values[name] for name in ("momentum", "damping", "kl_clip"))
    if not values["lr"] >= 0:
        raise ValueError(f"lr={values['lr']!r}: a number from 0 is needed")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: a number in [0, 1) is needed")
    if not damping >= 0:
        raise ValueError(f"damping={damping!r}: a number from 0 is needed")
    if kl_clip is not None and not kl_clip > 0:
        raise ValueError(f"kl_clip={kl_clip!r}: a positive number or None is needed")


def check_state(state: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless it is the state of an optimizer of this class and version."""
    if missing := {"optimizer", "posterior", "left_out", "auxiliary", "stream"} - state.keys():
        raise ValueError(
            f"the state is not of a {name}: it lacks {', '.join(sorted(missing))}, and has "
            f"{', '.join(list(state)[:5])}"
        )
    check_version(state, name)
    if state["optimizer"] != name:
        raise ValueError(f"the state is of a {state['optimizer']}, this is a {name}")


def check_layers(
    layers: Mapping[Layer, Any], structure: StructureChoice, modules: Mapping[str, nn.Module],
    store: ParameterStore, name: str,
) -> None:
    """Raise ValueError for saved {layer: structure} that the network or its optimizer differs in.
    """
    shapes = {name: tuple(p.shape) for name, (p, _) in store.named.items()}
    wanted = {n: tuple(shape) for layer in layers for n, shape in layer.tensors.items()}
    if unknown := {n: shape for n, shape in wanted.items() if shapes.get(n) != shape}:
        raise ValueError(f"the state is of parameters {unknown}, the network has {shapes}")
    expected = add_layers(ParameterBlocks({}), [*layers], structure, modules, store.named)
    structures = {x: block.structure for block in expected.blocks for x in block.layers}
    for layer, saved in layers.items():
        here = structures.get(layer, expected.layers[layer])
        if saved != here:
            raise ValueError(
                f"the state has structure {saved!r} for {layer.weight}, this {name} has {here!r}"
            )
