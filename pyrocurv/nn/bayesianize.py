"""`bayesianize`: which weights of a network become latents, and making them so."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import cast

from pyro.nn.module import to_pyro_module_
from torch import nn
from torch.distributions import Distribution
from torch.nn.utils.parametrize import is_parametrized

from pyrocurv.layers.module_types import TRANSPOSED
from pyrocurv.nn.embedding_padding import keep_padding_output
from pyrocurv.nn.weight_priors import PriorSpec, parse_prior, set_prior
from pyrocurv.nn.weight_tying import find_tied, tie
from pyrocurv.runtime.user_warnings import warn_user

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.MultiheadAttention,
    *RECURRENT,
)
Layers = Iterable[type[nn.Module] | str] | type[nn.Module] | str | None


def bayesianize(
    net: nn.Module,
    prior: PriorSpec = "fan_in",
    layers: Layers = None,
) -> nn.Module:
    """Turn the weights of a network into latents of a Pyro model, in place.

    Args:
        net: any network. Its present weights are where `pyrocurv.guides` start.
        prior: independent normals of mean 0 (1 for the scales of norm layers): "fan_in" (variance
            1/(fan_in + 1)), a standard deviation, or a callable (module, parameter name) ->
            Distribution of that shape. The callable runs once, here: a latent in it is a constant.
            For a scale that is a latent itself make the weights `pyro.nn.PyroSample`s of your own,
            `layer.weight = PyroSample(lambda layer: Normal(0, model.tau).expand(...))`.
        layers: which modules, by type or by name as in `net.named_modules()` (with all that is
            inside), one or several; by default `pyrocurv.nn.LAYERS`: linear layers, (transposed)
            convolutions, attention and recurrent layers. Norm layers and embeddings are left out
            unless asked for. What is left out keeps point estimates, which the `summary()` of a
            guide lists too; parameters with `requires_grad=False` stay as they are, but in modules
            asked for by name; the padding of an embedding keeps its output, whatever is sampled for
            its row.

    Returns:
        `net` itself, now a `PyroModule`; a site's name is that of its parameter. A weight that two
        modules share is one site, named after the first.

    Raises:
        ValueError: a prior out of range or of another shape; a layer name that does not exist; no
            layer that fits, or none that is no latent yet; a weight that a module asked for shares
            with one left out.
        TypeError: a prior that is a distribution or gives none; a layer that is neither a type nor
            a name.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import bayesianize
        >>> net = bayesianize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> list(net.parameters())
        []
    """
    make = parse_prior(prior)
    chosen = _chosen(net, layers)
    ties = find_tied(net, chosen)
    planned = [
        (module, name, make(module, name), getattr(module, name))
        for module, names in chosen.items() for name in names if (module, name) not in ties
    ]
    for module, name, fn, parameter in planned:
        if not isinstance(fn, Distribution):
            raise TypeError(
                f"the prior of {type(module).__name__}.{name} is no Distribution, but a "
                f"{type(fn).__name__}"
            )
        if fn.batch_shape + fn.event_shape != parameter.shape:
            raise ValueError(
                f"the prior of {type(module).__name__}.{name} has shape "
                f"{tuple(fn.batch_shape + fn.event_shape)}, the parameter {tuple(parameter.shape)}"
            )
    to_pyro_module_(net)
    for (module, name), owner in ties.items():
        tie(module, name, owner)
    for module, name, fn, parameter in planned:
        set_prior(module, name, fn, parameter)
        if isinstance(module, nn.Embedding) and (module, name) not in ties.values():
            keep_padding_output(module, parameter)
    return net


def _chosen(net: nn.Module, layers: Layers) -> dict[nn.Module, list[str]]:
    """{module: the names of its parameters that become latents}."""
    named = dict(net.named_modules())
    layers = (layers,) if isinstance(layers, (type, str)) else layers
    wanted = LAYERS if layers is None else tuple(layers)
    for want in wanted:
        if not isinstance(want, (type, str)):
            raise TypeError(f"layers: module types and names are needed, got {want!r}")
    types = tuple(want for want in wanted if isinstance(want, type))
    names = [want for want in wanted if isinstance(want, str)]
    for name in names:
        if name not in named:
            raise ValueError(f"layers: no module {name!r}; {', '.join(filter(None, named))} exist")
    asked = {name for name in named if any(f"{name}.".startswith(f"{want}.") for want in names)}
    fitting = {m: name in asked for name, m in named.items()
               if isinstance(m, types) or name in asked}
    found = {
        module: [n for n, p in module.named_parameters(recurse=False) if p.requires_grad or by_name]
        for module, by_name in fitting.items()
    }
    chosen = {module: theirs for module, theirs in found.items() if theirs}
    _note_parametrized(named, fitting, chosen)
    if not chosen:
        fits = ", ".join(want if isinstance(want, str) else want.__name__ for want in wanted)
        are = any(getattr(module, "_pyro_samples", None) for module in fitting)
        if are:
            raise ValueError(f"layers: all that fits {fits} has been bayesianized already")
        raise ValueError(
            f"layers: nothing in {type(net).__name__} with a trainable parameter fits {fits}"
        )
    return chosen


def _note_parametrized(
    named: Mapping[str, nn.Module], fitting: Container[nn.Module], chosen: Container[nn.Module]
) -> None:
    """Say which weights stay points because a parametrization makes them."""
    left = [
        f"{name}.{tensor}" for name, module in named.items()
        if module in fitting and is_parametrized(module)
        for tensor, made in cast(nn.ModuleDict, module.parametrizations).items()
        if made not in chosen and any(p.requires_grad for p in made.parameters())
    ]
    if left:
        warn_user(
            f"bayesianize: {', '.join(left)}, made by a parametrization, of parameters that stay "
            "points; layers=torch.nn.Module takes those too"
        )
