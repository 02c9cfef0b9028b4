"""The state of an optimizer in plain values, and the checks before any of a saved one is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyrocurv.layers import Layer
from pyrocurv.layers.structure_selection import LEFT_OUT
from pyrocurv.optim.parameter_blocks import ParameterBlocks, add_layers
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.optim.traced_network import TracedNetwork
from pyrocurv.posterior.state import Posterior
from pyrocurv.runtime.validation import check_state_dict
from pyrocurv.structures.serialization import FORMAT_VERSION, check_version, from_state, to_state

STATE_KEYS = ("optimizer", "posterior", "left_out", "update", "auxiliary", "stream")


def posterior_state(name: str, layout: ParameterBlocks, posterior: Posterior) -> dict[str, Any]:
    """The blocks and the layers without one, as the optimizer of this class has them."""
    left_out = [
        {"as": kind, "layer": to_state(layer)}
        for layer, kind in layout.layers.items() if kind in LEFT_OUT
    ]
    return {
        "version": FORMAT_VERSION,
        "optimizer": name,
        "step": posterior.step,
        "posterior": to_state(posterior.without_means()),
        "left_out": left_out,
    }


def read_posterior(
    state: Mapping[str, Any], network: TracedNetwork, store: ParameterStore
) -> tuple[ParameterBlocks, Posterior]:
    """The layout and the posterior of a saved state.

    Raises ValueError for the state of another class, of a network with other parameters, of other
    structures, or of a newer version.
    """
    _check_class(state, network.owner)
    posterior = from_state(state["posterior"])
    layers = {
        layer: block.block.structure for block in posterior.blocks for layer in block.block.layers
    }
    layers |= {from_state(item["layer"]): item["as"] for item in state["left_out"]}
    layout = ParameterBlocks(layers, tuple(block.block for block in posterior.blocks))
    layout, posterior = network.restored(layout, posterior, state)
    _check_layers(layout.layers, network, store)
    _check_moments(state["auxiliary"], store)
    return layout, posterior.to(store.like)


def _check_class(state: Mapping[str, Any], name: str) -> None:
    """Raise ValueError unless it is the state of an optimizer of this class and version."""
    check_state_dict(state, name)
    if missing := {*STATE_KEYS} - state.keys():
        raise ValueError(
            f"the state is not of a {name}: it lacks {', '.join(sorted(missing))}, and has "
            f"{', '.join(list(state)[:5])}"
        )
    check_version(state, name)
    if state["optimizer"] != name:
        raise ValueError(f"the state is of a {state['optimizer']}, this is a {name}")


def _check_layers(
    layers: Mapping[Layer, Any], network: TracedNetwork, store: ParameterStore
) -> None:
    """Raise ValueError for saved {layer: structure} that the network or its optimizer differs in.
    """
    shapes = {name: tuple(p.shape) for name, (p, _) in store.named.items()}
    wanted = {n: tuple(shape) for layer in layers for n, shape in layer.tensors.items()}
    if unknown := {n: shape for n, shape in wanted.items() if shapes.get(n) != shape}:
        raise ValueError(f"the state is of parameters {unknown}, the network has {shapes}")
    expected = add_layers(
        ParameterBlocks({}), [*layers], network.structure, network.modules, store.named
    )
    structures = {x: block.structure for block in expected.blocks for x in block.layers}
    for layer, saved in layers.items():
        here = structures.get(layer, expected.layers[layer])
        if saved != here:
            raise ValueError(
                f"the state has structure {saved!r} for {layer.weight}, this "
                f"{network.owner} has {here!r}"
            )


def _check_moments(auxiliary: Mapping[str, Any], store: ParameterStore) -> None:
    """Raise ValueError for saved moments of Adam that no parameter of the network has."""
    shapes = {name: tuple(p.shape) for name, (p, _) in store.named.items()}
    for name, saved in auxiliary.items():
        moments = [tuple(value.shape) for value in saved["state"].values()
                   if isinstance(value, Tensor) and value.dim()]
        if name not in shapes or any(shape != shapes[name] for shape in moments):
            raise ValueError(
                f"the state has moments of shapes {moments} of a parameter {name}, the network "
                f"has {shapes}"
            )
