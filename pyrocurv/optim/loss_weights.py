"""What a loss weighs, read off its gradient in the logits.

The loss is sum_n w_n ℓ_n with ℓ the negative log likelihood of entry n, p its probabilities:

    hard classes       g_c = w p_c for all but the class y, where g_y = -w (1 - p_y)
    smoothed labels    g_c = w (p_c - s) for these, with w and s the same in all entries
    bernoulli          |g| = w |p - y|, and g is negative where y = 1

From three classes on the first two can be checked. For two, a soft target has the same gradient as
a hard one of another weight. Weights are then taken for real if they depend on no more than the
example, or the class and the output, or if soft targets under a mean would leave [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from pyrocurv.optim.loss_scale import LossSize
from pyrocurv.runtime.distributions import unwrap


class LossReading(NamedTuple):
    """Entries [B, ...] of a loss: their targets, which of them count, and their weights w.

    `weight` is None where it cannot be told; then a mean over the entries that count is assumed.
    """

    target: Tensor
    mask: Tensor
    weight: Tensor | None
    doubt: str = ""  # for a warning


SOFT = (
    "the loss's gradient is not that of hard targets, so its weights cannot be read off it: the "
    "curvature is that of the mean over all entries"
)
UNCERTAIN = (
    "the loss's weights were read off its gradient as those of hard targets; of soft ones the "
    "curvature is too small"
)


def tolerance(gradient: Tensor) -> float:
    """The relative rounding of a gradient, with room for sums."""
    return 3 * torch.finfo(gradient.dtype).eps ** 0.5


def read(likelihood: str, output: Tensor, gradient: Tensor, size: LossSize) -> LossReading:
    """What the gradient in an output [B, ...] tells, with the classes of "categorical" last."""
    number = size.total * size.entries
    if likelihood != "normal":
        function = read_categorical if likelihood == "categorical" else read_bernoulli
        reading = function(output, gradient, number)
        if reading.doubt and not bool(torch.isfinite(gradient).all()):
            return reading._replace(weight=None, doubt="")  # the step will be refused
        return reading
    mask = gradient != 0
    counted = number * mask.sum() / mask.numel()
    return LossReading(output - gradient * counted, mask, None)


def read_categorical(logits: Tensor, gradient: Tensor, size: float) -> LossReading:
    """From the logits [B, ..., C] and the gradient in them; a mean would be over `size` entries."""
    accuracy, (logits, g) = tolerance(gradient), _single(logits, gradient)
    if logits.shape[-1] == 2:
        reading = read_bernoulli(logits[..., 1] - logits[..., 0], g[..., 1], size, accuracy)
        return reading._replace(target=reading.target.long())
    p = logits.softmax(-1)
    y = torch.where((g < 0).any(-1), g.argmin(-1), logits.argmax(-1))
    others = torch.arange(logits.shape[-1], device=g.device) != y.unsqueeze(-1)
    mask = (g != 0).any(-1)
    weight = (g * others).sum(-1) / (p * others).sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    if _fits(g, weight.unsqueeze(-1) * p, others, mask, accuracy):
        return LossReading(y, mask, weight)
    count = others.sum(-1, keepdim=True)
    deviation_p, deviation_g = (
        (x - (x * others).sum(-1, keepdim=True) / count) * (others & mask.unsqueeze(-1))
        for x in (p, g)
    )
    slope = (deviation_p * deviation_g).sum() / deviation_p.square().sum()
    if logits.shape[-1] > 3 and _fits(deviation_g, slope * deviation_p, others, mask, accuracy):
        return LossReading(y, mask, slope.expand_as(weight))
    return LossReading(y, mask | (p.amax(-1) == 1), None, SOFT)


def read_bernoulli(
    logits: Tensor, gradient: Tensor, size: float, accuracy: float | None = None
) -> LossReading:
    """From the logits [B, ...] and the gradient in them."""
    accuracy, (logits, g) = accuracy or tolerance(gradient), _single(logits, gradient)
    mask, p = g != 0, logits.sigmoid()
    y = torch.where(mask, g < 0, logits > 0)
    distance = torch.where(y, -logits, logits).sigmoid()  # |p - y|
    weight = g.abs() / distance.clamp(min=torch.finfo(p.dtype).tiny)
    accurate = mask & (distance > accuracy)
    target = y.to(p)
    if _is_structured(weight, y, accurate, accuracy):
        return LossReading(target, mask, weight)
    implied = p - g * size
    is_soft = bool(((implied > -accuracy) & (implied < 1 + accuracy)).all())
    if is_soft:
        return LossReading(target, mask, None, SOFT)
    return LossReading(target, mask, weight, UNCERTAIN)


def mean_nll(likelihood: str, output: Tensor, gradient: Tensor) -> Tensor:
    """The mean negative log likelihood [] of the entries that have a gradient; targets as `read`.

    Without a synchronization. The weights of the loss are not in it.
    """
    output, g = _single(output, gradient)
    if likelihood == "categorical":
        mask, target = (g != 0).any(-1), g.argmin(-1, keepdim=True)
        values = output.logsumexp(-1) - output.gather(-1, target).squeeze(-1)
    elif likelihood == "bernoulli":
        mask, values = g != 0, torch.nn.functional.softplus(torch.where(g < 0, -output, output))
    else:
        mask = g != 0
        values = (g * mask.sum()).square() / 2 + math.log(2 * math.pi) / 2
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _single(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _fits(
    found: Tensor, wanted: Tensor, where: Tensor, mask: Tensor, accuracy: float
) -> bool:
    """Whether they agree in nearly all entries, relative to the largest of an entry."""
    error = ((found - wanted) * where).abs().amax(-1)
    scale = (found * where).abs().amax(-1)
    fits = (error <= accuracy * scale) | ~mask
    return bool(fits.double().mean() > 0.95)


def _is_structured(weight: Tensor, y: Tensor, keep: Tensor, accuracy: float) -> bool:
    """Whether weights [B, ...] depend on class and output alone, or on the example alone."""
    weight, y, keep = (x.reshape(len(x), -1) for x in (weight, y, keep))
    by_class = [_spread(weight, keep & (y == value), 0) for value in (False, True)]
    by_row = [_spread(weight, keep, 1)] if weight.shape[1] > 1 else []
    return any(
        bool((torch.cat(spreads) <= accuracy).all()) for spreads in (by_class, by_row) if spreads
    )


def _spread(weight: Tensor, keep: Tensor, dim: int) -> Tensor:
    """(max - min) / max along an axis of those to keep."""
    high = torch.where(keep, weight, 0).amax(dim)
    low = torch.where(keep, weight, torch.inf).amin(dim)
    return torch.where(low < high, (high - low) / high, 0)


# ---- where the classes and the entries are -------------------------------------------------------


def find_class_dim(gradient: Tensor) -> int:
    """The axis over which a gradient [B, ...] sums to 0, as that of a cross entropy does."""
    norm, axes = gradient.norm(), [-1, *range(1, gradient.dim() - 1)]
    shares = torch.stack([gradient.sum(axis).norm() / norm for axis in axes]).tolist()
    best = min(range(len(axes)), key=shares.__getitem__)
    return axes[best] if shares[best] < 0.1 * shares[0] and shares[best] < 0.1 else -1


def read_distribution(
    fitted: Distribution, outputs: Sequence[Tensor], gradients: Sequence[Tensor], size: LossSize
) -> LossReading:
    """What the gradients in `outputs` tell of a distribution that is a function of them.

    Weights are only read if its logits are entries of the outputs, in any order.
    """
    base = unwrap(fitted, masks=True)
    values = [getattr(base, name) for name in base.arg_constraints if name in vars(base)]
    nonzero = [(g != 0) * torch.linspace(1, 2, g.numel()).to(g).view_as(g) for g in gradients]
    moved = [
        (x != 0).flatten(len(base.batch_shape)).any(-1) if x.dim() > len(base.batch_shape)
        else x != 0
        for x in _products(values, outputs, nonzero)
    ]
    shape = unwrap(fitted).batch_shape
    mask = torch.stack([x.expand(shape) for x in moved]).any(0) if moved else torch.ones(shape) > 0
    unknown = LossReading(torch.zeros(()), mask, None)
    if not isinstance(base, (Categorical, Bernoulli)) or not base.logits.requires_grad:
        return unknown
    (found,) = _products([base.logits], outputs, gradients)
    is_categorical = isinstance(base, Categorical)
    if is_categorical:  # the logits are normalized, the gradient sums to 0
        found = found - found.mean(-1, keepdim=True)
    back = torch.autograd.grad(
        base.logits, outputs, found, retain_graph=True, materialize_grads=True
    )
    error = sum(((b - g) * (b != 0)).square().sum() for b, g in zip(back, gradients, strict=True))
    if not bool(error <= tolerance(found) ** 2 * found.square().sum()):
        return unknown
    return read("categorical" if is_categorical else "bernoulli", base.logits.detach(), found, size)


def _products(
    values: Sequence[Tensor], outputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """The Jacobians of values in the outputs times vectors, by two backward passes."""
    values = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    ones = [torch.zeros_like(value, requires_grad=True) for value in values]
    if not values:
        return []
    pulled = torch.autograd.grad(
        values, outputs, ones, create_graph=True, materialize_grads=True
    )
    total = torch.stack([(g * v).sum() for g, v in zip(pulled, vectors, strict=True)]).sum()
    return [*torch.autograd.grad(total, ones, retain_graph=True, materialize_grads=True)]
