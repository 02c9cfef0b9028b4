"""`update_bn`: running statistics of batch norm at the mean of a posterior.

While a guide is trained at samples of the weights, the running statistics average over samples, and
fit predictions by samples. The network at the mean weights needs its own, which are found here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from tqdm import tqdm

from pyrocurv.handlers.modules import module_tensors, modules, named_modules
from pyrocurv.runtime.module_state import eval_mode, save_buffers, still_frozen
from pyrocurv.runtime.rng import isolated_rng
from pyrocurv.runtime.undo import complete
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import (
    check_callable,
    check_integer,
    check_is,
    check_loader,
    check_method,
)

TARGETS = ("labels", "y")  # keys of a batch that are not inputs, as in `Classifier`


@torch.no_grad()
def update_bn(
    model: Callable[..., Any], guide: Any, loader: Iterable[Any], *,
    num_batches: int | None = None, progress: bool | None = None,
) -> dict[str, float]:
    """Set the running statistics of batch norm by a pass over data, at the mean of a guide.

    They are for the network at the mean weights: for `guide.to_module()` and other predictions at
    the mean. `NGVI` trains at samples of the weights, so the running statistics are those of
    samples already: for predictions by samples keep them (those at the mean may make such
    predictions much worse), or compare `pyrocurv.infer.log_predictive_density` before and after.

    As `torch.optim.swa_utils.update_bn`: the new statistics are averages over the batches, and have
    nothing of the old ones. Layers without running statistics stay as they are, and a model without
    any is not run. Only batch norm is in training mode during the pass: there is no dropout, as in
    prediction. The modes and momenta of the layers are as before afterwards, and after an error
    also their statistics.

    Args:
        model: the model of the guide.
        guide: a guide that has been trained or loaded, any with a `median()`. For a `MixtureGuide`
            call this for each guide with its own model, and mix them then.
        loader: batches, of which the first item of a tuple or list is the input of the model; of a
            mapping all but "labels" and "y" are its keyword arguments; all else is the input
            itself. They are moved to the device of the model.
        num_batches: how many of them to use, all by default. A few dozen are enough.
        progress: whether to show a progress bar, by default on a terminal only.

    Returns:
        {layer: distance} between the statistics before and those now, in nats: the KL divergence of
        N(old mean, old variance) from N(mean, variance), averaged over the channels. {} without
        batch norm. A small distance does not say that predictions stay as they were.

    The wider the posterior is, as at a temperature of 1, or after few steps, the more its samples
    differ from its mean.

    Raises:
        ValueError: no batch in the loader.
        RuntimeError: the guide has been neither called nor loaded.
        FloatingPointError: the new statistics are not finite.
        Exception: any error of the model or of the loader.

    In several processes each call sets the statistics of its own copy of the model: give all of
    them the same data.

    Example:
        >>> import torch, pyrocurv
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> model = pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(net), num_data=64)
        >>> guide = pyrocurv.guides.KFACGuide(model)
        >>> x, y = torch.randn(64, 4), torch.randint(8, (64,))
        >>> weights = guide(x, y)  # in place of training
        >>> distances = pyrocurv.nn.update_bn(model, guide, [(x[:32], y[:32]), (x[32:], y[32:])])
        >>> list(distances)
        ['net.1']
    """
    check_callable("model", model, "a Pyro model, a callable,")
    check_method("guide", guide, "median", "a guide with a median()")
    check_loader("loader", loader)
    if num_batches is not None:
        check_integer("num_batches", num_batches, 1)
    check_is("progress", progress, (bool, type(None)), "True, False or None")
    layers = {
        name: module for name, module in named_modules(model).items()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        return {}
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        if not getattr(guide, "is_initialized", False):
            raise RuntimeError("the guide is not initialized: call it once with the data")
    every, before = modules(model), _statistics(layers)
    device = next(iter(module_tensors(model).values())).device
    with _new_statistics(layers.values(), every), still_frozen(every), poutine.block():
        has_batch = False
        batches = tqdm(
            islice(loader, num_batches), "update_bn", unit="batch",
            disable=None if progress is None else not progress,
        )
        for batch in batches:
            has_batch = True
            args, kwargs = _inputs(batch, device)
            values = guide.median(*args, **kwargs)
            with isolated_rng(device):  # the observed site is drawn
                poutine.condition(model, data=values)(*args, **kwargs)
        if not has_batch:
            raise ValueError("loader: there is no batch in it")
        after = _statistics(layers)
        infinite = [name for name, pair in after.items() if not _is_finite(*pair)]
        if infinite:
            raise FloatingPointError(f"the statistics of {', '.join(infinite[:3])} are not finite")
    return {name: _distance(*before[name], *after[name]) for name in layers}


def warn_of_initial_statistics(model: Any, given: Container[str] = ()) -> None:
    """Warn of batch norm that would predict with the statistics of a network that is new.

    `given` are the names of those that come with the samples.
    """
    names = [
        name for name, module in named_modules(model).items()
        if isinstance(module, _BatchNorm) and not module.training
        and module.running_mean is not None and module.running_var is not None
        and f"{name}.running_mean".lstrip(".") not in given
        and not bool(module.running_mean.any()) and bool((module.running_var == 1).all())
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warn_user(
            f"the running statistics of {', '.join(names[:3])}{more} are those of a new network: "
            "they are in the state of the model, not in that of its guide. Load that too, or call "
            "pyrocurv.nn.update_bn(model, guide, loader)"
        )


def _inputs(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model without the targets."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("loader: a batch is empty")
        batch = batch[0]
    batch = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    if isinstance(batch, Mapping):
        return (), {name: x for name, x in batch.items() if name not in TARGETS}
    return (batch,), {}


@contextmanager
def _new_statistics(layers: Iterable[Any], every: Iterable[nn.Module]) -> Iterator[None]:
    """Average the statistics of the batches inside; after an error they are as before."""
    layers = [*layers]
    restore, momenta = save_buffers(layers), [layer.momentum for layer in layers]
    try:
        with eval_mode(every), _training(layers):
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the average over all batches
            yield
    except BaseException:
        complete(restore)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@contextmanager
def _training(layers: list[nn.Module]) -> Iterator[None]:
    """Put layers that are in eval mode into training mode."""
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False


def _statistics(layers: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of mean and variance [C] by the name of the layer."""
    return {
        name: (layer.running_mean.double().clone(), layer.running_var.double().clone())
        for name, layer in layers.items()
    }


def _is_finite(mean: Tensor, variance: Tensor) -> bool:
    return bool(mean.isfinite().all() and variance.isfinite().all())


def _distance(old_mean: Tensor, old_var: Tensor, mean: Tensor, var: Tensor) -> float:
    """KL(N(mean, var) ‖ N(old_mean, old_var)) on average over the channels, in nats."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = var.clamp(min=tiny) / old_var.clamp(min=tiny)
    shift = (mean - old_mean) ** 2 / old_var.clamp(min=tiny)
    return float((ratio - 1 - ratio.log() + shift).mean() / 2)
