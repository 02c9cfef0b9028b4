"""Ready models around a network: a classifier and a regressor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import pyro
import torch
import torch.nn.functional as F
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.runtime.choices import Heteroscedastic
from pyrocurv.runtime.outputs import logits_of, named_outputs
from pyrocurv.runtime.validation import (
    as_number,
    check_callable,
    check_inputs,
    check_tensor,
    is_integer,
    is_number,
    shown,
)

BY_NETWORK: Final = "heteroscedastic"
MIN_SCALE = 1e-3  # of targets of unit variance
SOFTPLUS_ONE = math.log(math.e - 1)  # where softplus is 1


class Classifier(PyroModule):
    """A network with a categorical likelihood: (x, y=None) -> logits [B, C].

    The sites are the weights of the network, with the prefix "net.", and "obs" in the plate "data"
    of size N. Without targets the plate has the size of the batch.

    A batch may also be a dict, `model(batch)`, or keywords, `model(**batch)`: "labels" or "y" are
    the targets, all else the arguments of the network. Of a network that returns a dict or an
    object of several tensors, the logits are those called "logits", otherwise the first of them.

    Args:
        net: a bayesianized network with outputs [B, C].
        num_data: N, the number of training examples: the batches of an epoch hold that many. It
            weighs the data against the prior, and no pass over the data corrects it. With data
            augmentation it stays the number of distinct images, however many versions of each are
            drawn: versions of one image say nothing independent of each other. A repeated data set
            (`ConcatDataset([data] * 4)`, several crops of an image in a batch) counts once too.

    Raises:
        ValueError: `num_data` is not a positive integer; when called, outputs or targets of another
            shape or, in training mode, more than N targets in a batch.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import Classifier, bayesianize
        >>> model = Classifier(bayesianize(torch.nn.Linear(4, 3)), num_data=100)
        >>> model(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """

    def __init__(self, net: nn.Module, num_data: int) -> None:
        super().__init__()
        check_callable("net", net, "a torch.nn.Module")
        self.net, self.num_data = net, _check_num_data(num_data)

    def extra_repr(self) -> str:
        """N, before the network."""
        return f"num_data={self.num_data}"

    def forward(self, x: Any = None, y: Tensor | None = None, **batch: Any) -> Tensor:
        logits, y = _run(self.net, x, y, batch)
        shape = tuple(logits.shape)
        if len(shape) != 2:
            raise ValueError(f"logits [B, C] are needed, the network returned {shape}")
        if y is not None and tuple(y.shape) != shape[:1]:
            hint = "; of one-hot targets take y.argmax(-1)" if tuple(y.shape) == shape else ""
            raise ValueError(
                f"classes {tuple(y.shape)} do not fit logits {shape}: [B] is needed{hint}"
            )
        with _data_plate(self, logits, y):
            pyro.sample("obs", _made(dist.Categorical, logits, logits=logits), obs=y)
        return logits


class Regressor(PyroModule):
    """A network with a normal likelihood: (x, y=None) -> mean [B] or [B, D].

    The sites are the weights of the network, with the prefix "net.", "obs" in the plate "data" of
    size N, and "sigma" where the noise is a latent. Without targets the plate has the size of the
    batch. Batches and outputs may be of the forms that `Classifier` takes.

    Args:
        net: a bayesianized network with outputs [B, D]. A single output [B, 1] is squeezed to [B],
            like its targets.
        num_data: N, the number of training examples, see `Classifier`.
        noise: the standard deviation of the targets, or None for a latent "sigma" with a
            LogNormal(0, 1) prior, which suits standardized targets; or "heteroscedastic", where the
            network has twice as many outputs [B, 2 D], the means and then s, and the targets have
            the standard deviation 0.001 + softplus(s + log(e - 1)), 1 for s = 0. That neither
            overflows nor vanishes, and also suits standardized targets. It is in the site "scale";
            the return value is the mean.

    With "heteroscedastic" every curvature is of the means and of s together. `Laplace.predict`
    takes the standard deviations at the mean of the weights.

    Raises:
        ValueError: `num_data` is not a positive integer, or `noise` not positive; when called,
            targets of another shape, an odd number of outputs with "heteroscedastic", or, in
            training mode, more than N targets in a batch.

    Example:
        >>> import torch
        >>> from pyrocurv.nn import Regressor, bayesianize
        >>> model = Regressor(bayesianize(torch.nn.Linear(4, 1)), num_data=100)
        >>> model(torch.randn(5, 4)).shape
        torch.Size([5])
    """

    def __init__(
        self, net: nn.Module, num_data: int, noise: float | Heteroscedastic | None = None
    ) -> None:
        super().__init__()
        check_callable("net", net, "a torch.nn.Module")
        value = as_number(noise)
        is_scale = is_number(value) and value > 0
        if not (noise is None or is_scale or isinstance(noise, str) and noise == BY_NETWORK):
            raise ValueError(
                f"noise={shown(noise)}: a positive standard deviation, None or {BY_NETWORK!r} is "
                "needed"
            )
        self.net, self.num_data, self.noise = net, _check_num_data(num_data), noise

    def extra_repr(self) -> str:
        """N and the noise, before the network."""
        return f"num_data={self.num_data}, noise={self.noise!r}"

    def forward(self, x: Any = None, y: Tensor | None = None, **batch: Any) -> Tensor:
        mean, y = _run(self.net, x, y, batch)
        noise, scale = self.noise, mean.new_ones(())
        if noise == BY_NETWORK:
            mean, scale = _mean_and_scale(mean)
        if mean.dim() == 2 and mean.shape[-1] == 1:
            mean, scale = mean.squeeze(-1), scale.squeeze(-1) if scale.dim() else scale
            y = y.squeeze(-1) if y is not None and y.dim() == 2 and y.shape[-1] == 1 else y
        if y is not None and y.shape != mean.shape:
            raise ValueError(f"targets {tuple(y.shape)} do not fit means {tuple(mean.shape)}")
        if noise is None:
            zero = mean.new_zeros(())
            scale = pyro.sample("sigma", dist.LogNormal(zero, zero + 1))
        elif not isinstance(noise, str):
            scale = scale * noise
        with _data_plate(self, mean, y):
            if noise == BY_NETWORK:
                pyro.deterministic("scale", scale, event_dim=mean.dim() - 1)
            normal = _made(dist.Normal, mean, mean, scale)
            pyro.sample("obs", normal.to_event(mean.dim() - 1), obs=y)
        return mean


def _mean_and_scale(output: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of [B, 2 D] as means and standard deviations [B, D]."""
    if output.dim() < 2 or output.shape[-1] % 2:
        raise ValueError(
            f"outputs [B, 2 D] are needed for noise={BY_NETWORK!r}, means and then scales, the "
            f"network returned {tuple(output.shape)}"
        )
    mean, raw = output.chunk(2, -1)
    return mean, MIN_SCALE + F.softplus(raw + SOFTPLUS_ONE)


def _run(
    net: nn.Module, x: Any, y: Tensor | None, batch: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The output of a network on a batch, and the targets."""
    arguments = {**x, **batch} if isinstance(x, Mapping) else {**batch}
    for targets in ("labels", "y"):
        given = arguments.pop(targets, None)
        y = given if y is None else y
    if y is not None:
        check_tensor("y", y)
    if isinstance(x, Mapping) or x is None and arguments:
        output = net(**arguments)
    else:
        check_inputs("x", x)
        output = net(x, **arguments)
    outputs = named_outputs(output)
    name = logits_of(outputs, 1)
    if name is None:
        raise ValueError(f"the network returned no tensor with a batch, but {shown(output)}")
    return outputs[name], y


def _check_num_data(num_data: int) -> int:
    if not is_integer(num_data, 1):
        needed = "the number of training examples is needed, an integer of at least 1"
        raise ValueError(f"num_data={shown(num_data)}: {needed}")
    return num_data


def _made(kind: Callable[..., Any], output: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A distribution; FloatingPointError if torch refuses it for outputs that are not finite."""
    try:
        return kind(*args, **kwargs)
    except ValueError as error:
        if bool(output.isfinite().all()):
            raise
        raise FloatingPointError("site 'obs': the network's output is not finite") from error


def _data_plate(model: Classifier | Regressor, output: Tensor, y: Tensor | None) -> pyro.plate:
    """The plate of the data; without targets, in prediction, it has the size of the batch."""
    batch, num_data = len(output), model.num_data
    if not batch:
        raise ValueError("x: the batch has no examples")
    if y is not None and batch > num_data and model.training:
        raise ValueError(f"a batch of {batch} targets, but num_data={num_data}")
    indices = torch.arange(batch, device=output.device)
    return pyro.plate("data", batch if y is None else num_data, subsample=indices, dim=-1)
