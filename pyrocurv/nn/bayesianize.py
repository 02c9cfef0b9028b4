"""`bayesianize`: choose the weights of a network that become latents, and replace them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any, cast

from pyro.nn.module import PyroModule, to_pyro_module_
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from pyrocurv.layers.module_types import TRANSPOSED
from pyrocurv.layers.weight_gaussian import read_posterior
from pyrocurv.nn.forward_hooks import find_tied, keep_padding_output, tie
from pyrocurv.nn.posterior_prior import posterior_priors
from pyrocurv.nn.weight_priors import (
    PriorSpec,
    initial_value,
    latent_names,
    parse_prior,
    set_prior,
)
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_iterable, check_module, shown
from pyrocurv.runtime.whole_module import made_whole

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.MultiheadAttention,
    *RECURRENT,
)
Layers = Iterable[type[nn.Module] | str] | type[nn.Module] | str | None


def bayesianize(net: nn.Module, prior: PriorSpec = "fan_in", layers: Layers = None) -> nn.Module:
    """Turn the weights of a network into latents of a Pyro model, in place.

    Args:
        net: any network. The guides of `pyrocurv.guides` start at its current weights. One that
            `fully_shard` has sharded, on all ranks, has whole parameters afterwards, and is not
            sharded any more; the ranks share out the blocks of its posterior instead, see
            `NGVI`.
        prior: independent normals of mean 0 (1 for the scales of norm layers): "fan_in" (variance
            1/(fan_in + 1)), a standard deviation, or a callable (module, parameter name) ->
            Distribution of the parameter's shape. The callable runs once, here, so a latent in it
            becomes a constant. For a scale that is itself a latent, make the weights
            `pyro.nn.PyroSample`s yourself:
            `layer.weight = PyroSample(lambda layer: Normal(0, model.tau).expand(...))`.
            Or the posterior of an earlier task: a trained guide of the same network, its
            `.posterior`, or a `VIOptimizer`. Guides start at its mean then, and a network that
            `bayesianize` has seen before gets the prior in the place of the old one. Guides of the
            same structure add it to the curvature exactly, but for "kfac" and "ekfac", which keep
            the eigenvectors of the nearest Kronecker product to the sum, see
            `NGVI.prior_errors`. Latents outside of `net`, such as a noise scale, are integrated
            out, and keep the prior of the model.
        layers: the modules to choose, one or several, by type or by name as in
            `net.named_modules()` (with all modules inside). The default is `pyrocurv.nn.LAYERS`:
            linear layers, (transposed) convolutions, attention and recurrent layers; norm layers
            and embeddings have to be chosen explicitly. Other parameters keep point estimates,
            which the `summary()` of a guide lists too. Parameters with `requires_grad=False` stay
            as they are, except in modules chosen by name. The padding index of an embedding keeps
            its output.

    Returns:
        `net` itself, now a `PyroModule`. A site has the name of its parameter; a weight that two
        modules share is one site, named after the first module.

    Raises:
        ValueError: a prior out of range or of another shape, or of another network; a layer name
            that does not exist; no layer that matches, or none that is not a latent yet; a weight
            that a chosen module shares with one that is not chosen.
        TypeError: a prior that is another distribution or guide, or a callable that returns
            something else; a layer that is neither a type nor a name.
        RuntimeError: a guide that has not been called yet.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import bayesianize
        >>> net = bayesianize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> list(net.parameters())
        []
    """
    check_module("net", net)
    if any(isinstance(module, DistributedDataParallel) for module in net.modules()):
        raise ValueError(
            "net is in DistributedDataParallel: pass the network itself, net.module; NGVI averages "
            "over the ranks of a process group"
        )
    with made_whole(net):
        return _bayesianize(net, prior, layers)


def _bayesianize(net: nn.Module, prior: PriorSpec, layers: Layers) -> nn.Module:
    parts = read_posterior(prior)
    prior_fn = None if parts is not None else parse_prior(prior)
    chosen = _choose(net, layers, is_posterior=parts is not None)
    tied = find_tied(net, chosen)
    weights = {
        (module, name): initial_value(module, name)
        for module, names in chosen.items() for name in names if (module, name) not in tied
    }
    latents: dict[tuple[nn.Module, str], Any] = (
        {key: prior_fn(*key) for key in weights} if prior_fn is not None
        else posterior_priors(net, parts or (), weights)
    )
    for (module, name), fn in latents.items():
        _check_prior(f"{type(module).__name__}.{name}", fn, weights[module, name])
    if parts is not None:
        _leave_model(net)
    to_pyro_module_(net)
    for (module, name), owner in tied.items():
        tie(module, name, owner)
    for (module, name), fn in latents.items():
        initial = weights[module, name]
        set_prior(module, name, fn, initial if parts is None else fn.loc)
        if isinstance(module, nn.Embedding) and (module, name) not in tied.values():
            keep_padding_output(module, initial)
    return net


def _leave_model(net: nn.Module) -> None:
    """Let a network that has run in a model, as that of the last task, become a part of another."""
    if not (isinstance(net, PyroModule) and net._pyro_context.used):
        return
    context = type(net._pyro_context)()
    for path, module in net.named_modules():
        if isinstance(module, PyroModule):
            module._pyro_context, module._pyro_name = context, path


def _check_prior(name: str, fn: object, parameter: Tensor) -> None:
    if not isinstance(fn, Distribution):
        kind = type(fn).__name__
        raise TypeError(f"the prior of {name} is not a Distribution, but of type {kind}")
    shape, expected = tuple(fn.batch_shape + fn.event_shape), tuple(parameter.shape)
    if shape != expected:
        raise ValueError(f"the prior of {name} has shape {shape}, the parameter {expected}")


def _choose(net: nn.Module, layers: Layers, is_posterior: bool) -> dict[nn.Module, list[str]]:
    """{module: names of its parameters that become latents}.

    For a posterior as the prior also of those that are latents already.
    """
    modules = dict(net.named_modules())
    layers = (layers,) if isinstance(layers, (type, str)) else layers
    if layers is not None:
        check_iterable("layers", layers, "a list of module types and names")
    choices = LAYERS if layers is None else tuple(layers)
    for choice in choices:
        if not isinstance(choice, (type, str)):
            raise TypeError(f"layers: module types and names are needed, got {shown(choice)}")
    types = tuple(choice for choice in choices if isinstance(choice, type))
    prefixes = [choice for choice in choices if isinstance(choice, str)]
    for name in prefixes:
        if name not in modules:
            exist = ", ".join(filter(None, modules))
            raise ValueError(f"layers: no module {name!r}; {exist} exist")
    matches, chosen = {}, {}
    for path, module in modules.items():
        is_named = any(f"{path}.".startswith(f"{prefix}.") for prefix in prefixes)
        if isinstance(module, types) or is_named:
            matches[path] = module
            parameters = module.named_parameters(recurse=False)
            names = [name for name, p in parameters if p.requires_grad or is_named]
            if names := names + (latent_names(module) if is_posterior else []):
                chosen[module] = names
    _warn_of_parametrizations(matches, chosen)
    if not chosen:
        described = ", ".join(c if isinstance(c, str) else c.__name__ for c in choices)
        if any(getattr(module, "_pyro_samples", None) for module in matches.values()):
            raise ValueError(
                f"layers: all modules that match {described} have been bayesianized already"
            )
        kind = type(net).__name__
        raise ValueError(
            f"layers: no module in {kind} with a trainable parameter matches {described}"
        )
    return chosen


def _warn_of_parametrizations(
    matches: Mapping[str, nn.Module], chosen: Container[nn.Module]
) -> None:
    """Warn of weights that are computed by a parametrization whose parameters are not chosen."""
    computed = [
        f"{name}.{weight}" for name, module in matches.items() if is_parametrized(module)
        for weight, parametrization in cast(nn.ModuleDict, module.parametrizations).items()
        if parametrization not in chosen
        and any(parameter.requires_grad for parameter in parametrization.parameters())
    ]
    if computed:
        warn_user(
            f"bayesianize: a parametrization computes {', '.join(computed)} from parameters that "
            "stay point estimates; layers=torch.nn.Module makes latents of those too"
        )
