"""Networks as Pyro models: weights become sample sites, with ready likelihoods around them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv.priors import NORMS, TRANSPOSED, as_normal, compact, fan_in
from pyrocurv.prototype import named_modules

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
LAYERS: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.MultiheadAttention,
    *RECURRENT,
)
Layers = Iterable[type[nn.Module] | str] | type[nn.Module] | str | None
Prior = float | str | Callable[[nn.Module, str], Distribution]


class _NormalPrior:
    """A normal prior whose numbers are buffers of the module, so they move with `.to`.

    The distribution is built anew only when the buffers have been moved; it carries the weight that
    it replaced as `.initial`, where guides start.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._parts = [f"_{name}_{part}" for part in ("loc", "scale", "initial")]
        self._made: tuple[tuple[Tensor, ...], Distribution] | None = None

    def __call__(self, module: nn.Module) -> Distribution:
        buffers: dict[str, Any] = module._buffers
        parts = tuple(buffers[part] for part in self._parts)
        made = self._made
        if made is None or not all(map(operator.is_, made[0], parts)):
            loc, scale, initial = parts
            fn = dist.Normal(loc.expand(initial.shape), scale.expand(initial.shape))
            fn = fn.to_event(initial.dim())
            fn.initial = initial
            made = self._made = parts, fn
        return made[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}


def bayesianize(
    net: nn.Module,
    prior: Prior = "fan_in",
    layers: Layers = None,
) -> nn.Module:
    """Turn the weights of a network into latents of a Pyro model, in place.

    Args:
        net: any network. Its present weights are where `pyrocurv.guides` start.
        prior: independent normals of mean 0 (1 for the scales of norm layers): "fan_in" (variance
            1/(fan_in + 1)), a standard deviation, or a callable (module, parameter name) ->
            Distribution of that shape.
        layers: which modules, by type or by name as in `net.named_modules()`, one or several; by
            default `pyrocurv.nn.LAYERS`: linear layers, (transposed) convolutions, attention and
            recurrent layers. Norm layers and embeddings are left out unless asked for. What is left
            out keeps point estimates, which the `summary()` of a guide lists too; and the padding
            of an embedding keeps its output, whatever is sampled for its row.

    Returns:
        `net` itself, now a `PyroModule`; a site's name is that of its parameter. A weight that two
        modules share is one site, named after the first.

    Raises:
        ValueError: a prior out of range or of another shape; a layer name that does not exist; no
            layer that fits, or none that is no latent yet; a weight that a module asked for shares
            with one left out.
        TypeError: a prior that is a distribution.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import bayesianize
        >>> net = bayesianize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)))
        >>> list(net.parameters())
        []
    """
    make = _prior_maker(prior)
    chosen = _chosen(net, layers)
    ties = _ties(net, chosen)
    planned = [
        (module, name, make(module, name), parameter)
        for module in chosen for name, parameter in module.named_parameters(recurse=False)
        if (module, name) not in ties
    ]
    for module, name, fn, parameter in planned:
        if fn.batch_shape + fn.event_shape != parameter.shape:
            raise ValueError(
                f"the prior of {type(module).__name__}.{name} has shape "
                f"{tuple(fn.batch_shape + fn.event_shape)}, the parameter {tuple(parameter.shape)}"
            )
    to_pyro_module_(net)
    for (module, name), owner in ties.items():
        _tie(module, name, owner)
    for module, name, fn, parameter in planned:
        _set_prior(module, name, fn, parameter)
        if isinstance(module, nn.Embedding) and (module, name) not in ties.values():
            _keep_padding(module, parameter)
    return net


def _prior_maker(prior: Prior) -> Callable[[nn.Module, str], Distribution]:
    if isinstance(prior, Distribution):
        raise TypeError(
            f"prior={prior!r}: a standard deviation is needed, or a callable (module, name) -> "
            "Distribution of the parameter's shape, as in lambda module, name: "
            "dist.Normal(0.0, 1.0).expand(getattr(module, name).shape)"
        )
    if callable(prior):
        return prior
    if prior == "fan_in":
        return lambda module, name: _normal(module, name, 1 / math.sqrt(fan_in(module) + 1))
    if isinstance(prior, str) or not prior > 0:
        raise ValueError(
            f"prior={prior!r}: 'fan_in', a positive standard deviation or a callable "
            "(module, name) -> Distribution is needed"
        )
    return lambda module, name: _normal(module, name, float(prior))


def _normal(module: nn.Module, name: str, scale: float) -> Distribution:
    like = getattr(module, name)
    loc = like.new_full((), float(isinstance(module, NORMS) and name == "weight"))
    return dist.Normal(loc, like.new_full((), scale)).expand(like.shape)


def _chosen(net: nn.Module, layers: Layers) -> list[nn.Module]:
    named = dict(net.named_modules())
    layers = (layers,) if isinstance(layers, (type, str)) else layers
    wanted = LAYERS if layers is None else tuple(layers)
    types = tuple(want for want in wanted if isinstance(want, type))
    names = [want for want in wanted if isinstance(want, str)]
    for name in names:
        if name not in named:
            raise ValueError(f"layers: no module {name!r}; {', '.join(filter(None, named))} exist")
    fitting = [m for name, m in named.items() if isinstance(m, types) or name in names]
    chosen = [m for m in fitting if any(True for _ in m.parameters(recurse=False))]
    if not chosen:
        fits = ", ".join(want if isinstance(want, str) else want.__name__ for want in wanted)
        are = any(getattr(module, "_pyro_samples", None) for module in fitting)
        why = "is no latent yet, of what" if are else "with a parameter"
        raise ValueError(f"layers: nothing in {type(net).__name__} {why} fits {fits}")
    return chosen


def _ties(
    net: nn.Module, chosen: list[nn.Module]
) -> dict[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """{(module, parameter): the first module and name that have the same tensor}."""
    owners: dict[int, tuple[nn.Module, str, str]] = {}
    ties = {}
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            owner, attribute, other = owners.setdefault(id(parameter), (module, name, full))
            if owner is module and attribute == name:
                continue
            if (owner in chosen) != (module in chosen):
                left = other if module in chosen else full
                raise ValueError(
                    f"{other} and {full} are one tensor, a tied weight: choose both layers or "
                    f"none; layers=[*pyrocurv.nn.LAYERS, {left.rpartition('.')[0]!r}] has both"
                )
            if module in chosen:
                ties[module, name] = owner, attribute
    return ties


def _tie(module: nn.Module, name: str, owner: tuple[nn.Module, str]) -> None:
    """Let a module use, during its forward pass, the weight that another one samples."""
    delattr(module, name)
    if "_tied" not in module.__dict__:
        module.__dict__["_tied"] = {}  # beside the submodules; deepcopy and pickle keep it
        module.register_forward_pre_hook(_borrow)
        module.register_forward_hook(_give_back, always_call=True)
    module.__dict__["_tied"][name] = owner


def _borrow(module: nn.Module, args: Any) -> None:
    for name, (owner, attribute) in module.__dict__["_tied"].items():
        module.__dict__[name] = getattr(owner, attribute)


def _give_back(module: nn.Module, args: Any, output: Any) -> None:
    for name in module.__dict__["_tied"]:
        module.__dict__.pop(name, None)


def _keep_padding(module: nn.Embedding, weight: Tensor) -> None:
    """Let the padding be what it was: no data say anything of its row, which is prior alone."""
    if module.padding_idx is not None:
        row = weight.detach()[module.padding_idx].clone()
        module.register_buffer("_padding", row, persistent=False)
        module.register_forward_hook(_pad, with_kwargs=True)


def _pad(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    index = args[0] if args else kwargs["input"]
    return torch.where((index == module.padding_idx).unsqueeze(-1), module._padding, output)


def _set_prior(module: nn.Module, name: str, fn: Any, parameter: Tensor) -> None:
    initial = parameter.detach().clone()
    normal = as_normal(fn)
    if normal is None:
        if fn.event_dim < initial.dim():
            fn = fn.to_event(initial.dim() - fn.event_dim)
        fn.initial = initial
        setattr(module, name, PyroSample(fn))
        return
    loc, scale = compact(normal.loc.detach()), compact(normal.scale.detach())
    for part, value in (("loc", loc), ("scale", scale), ("initial", initial)):
        module.register_buffer(f"_{name}_{part}", value.to(initial).clone(), persistent=False)
    setattr(module, name, PyroSample(_NormalPrior(name)))


def rescale_prior(model: Any, site: str, factor: Tensor) -> bool:
    """Multiply the standard deviation of a bayesianized weight's prior by a number.

    False where the site is no weight that `bayesianize` gave a normal prior.
    """
    path, _, name = site.rpartition(".")
    module = named_modules(model).get(path)
    buffers: dict[str, Any] = {} if module is None else module._buffers
    scale = buffers.get(f"_{name}_scale")
    if scale is None:
        return False
    buffers[f"_{name}_scale"] = scale * factor.to(scale)
    return True


class Classifier(PyroModule):
    """A network whose outputs are the logits of a categorical: (x, y=None) -> logits [B, C].

    Args:
        net: a network, bayesianized.
        num_data: N, the number of training examples.

    The sites are the network's weights under "net." and "obs", in the plate "data" of size N.
    Raises ValueError for logits of another shape, or a batch of more than N targets.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import Classifier, bayesianize
        >>> model = Classifier(bayesianize(torch.nn.Linear(4, 3)), num_data=100)
        >>> model(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, net: nn.Module, num_data: int) -> None:
        super().__init__()
        self.net, self.num_data = net, _check_num_data(num_data)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        logits = self.net(x)
        if logits.dim() != 2:
            raise ValueError(f"logits [B, C] are needed, the network gave {tuple(logits.shape)}")
        if y is not None and y.shape != logits.shape[:1]:
            raise ValueError(
                f"classes {tuple(y.shape)} do not fit logits {tuple(logits.shape)}: [B] is needed"
            )
        with _data_plate(self.num_data, logits, y):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)
        return logits


class Regressor(PyroModule):
    """A network whose outputs are the means of normals: (x, y=None) -> mean [B] or [B, D].

    Args:
        net: a network, bayesianized. A single output [B, 1] is taken as [B].
        num_data: N, the number of training examples.
        noise: the standard deviation of the targets; None for a latent "sigma" with a
            LogNormal(0, 1) prior, which suits standardised targets.

    The sites are the network's weights under "net.", "obs" in the plate "data" of size N, and
    "sigma". Raises ValueError for targets of another shape, or a batch of more than N.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import Regressor, bayesianize
        >>> model = Regressor(bayesianize(torch.nn.Linear(4, 1)), num_data=100)
        >>> model(torch.randn(5, 4)).shape
        torch.Size([5])
    """

    def __init__(self, net: nn.Module, num_data: int, noise: float | None = None) -> None:
        super().__init__()
        if noise is not None and not noise > 0:
            raise ValueError(f"noise={noise!r}: a positive standard deviation, or None, is needed")
        self.net, self.num_data, self.noise = net, _check_num_data(num_data), noise

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.net(x)
        if mean.dim() == 2 and mean.shape[-1] == 1:
            mean = mean.squeeze(-1)
            y = y.squeeze(-1) if y is not None and y.dim() == 2 and y.shape[-1] == 1 else y
        if y is not None and y.shape != mean.shape:
            raise ValueError(f"targets {tuple(y.shape)} do not fit means {tuple(mean.shape)}")
        noise = self.noise
        if noise is None:
            zero = mean.new_zeros(())
            noise = pyro.sample("sigma", dist.LogNormal(zero, zero + 1))
        with _data_plate(self.num_data, mean, y):
            normal = dist.Normal(mean, mean.new_ones(()) * noise)
            pyro.sample("obs", normal.to_event(mean.dim() - 1), obs=y)
        return mean


def _check_num_data(num_data: int) -> int:
    if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
        raise ValueError(f"num_data={num_data!r}: the number of training examples is needed")
    return num_data


def _data_plate(num_data: int, output: Tensor, y: Tensor | None) -> pyro.plate:
    """The plate of the data; in prediction (no targets) it is as large as the batch."""
    batch = len(output)
    if y is not None and batch > num_data:
        raise ValueError(f"a batch of {batch} targets, but num_data={num_data}")
    indices = torch.arange(batch, device=output.device)
    return pyro.plate("data", batch if y is None else num_data, subsample=indices, dim=-1)
