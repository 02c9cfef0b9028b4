"""The vectors that are pulled back through the network: Gauss-Newton, Fisher, empirical Fisher.

All three are sum_n sum_k Jᵀ v vᵀ J with J the Jacobian of the likelihood's parameters in the
weights; they differ only in the vectors v (Martens 2020, arXiv:1412.1193):

    ggn        a root of the Fisher information, in closed form (`fisher_information`)
    fisher     v_k = ∇ log p(ỹ_k) / sqrt(K), ỹ_k sampled from the likelihood
    empirical  v   = ∇ log p(y) at the data

A vector is given as one scalar for each example, whose gradient it is. So masks, several axes and
any `Distribution` need no special treatment, and `torch.autograd.grad` does the pullback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from pyrocurv.curvature.fisher_information import root
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.layers.calls import LayerCall, MixedRowsCall, OpCall, UntracedWeight


def _ggn(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    for scalar in root(term.likelihood):
        scalar = scalar.reshape(scalar.shape[0], -1) if scalar.dim() else scalar.reshape(1, 1)
        weight = _root_weight(term, scalar)
        for position in range(scalar.shape[1]):  # independent: one vector for each
            column = torch.zeros_like(scalar)
            column[:, position] = weight[:, position]
            yield (scalar * column).sum(-1)


def _root_weight(term: LikelihoodTerm, scalar: Tensor) -> Tensor:
    """sqrt(weight · mask), in the shape [B, R] of a flattened scalar."""
    weight = torch.as_tensor(term.weight, dtype=scalar.dtype, device=scalar.device)
    if term.mask is not None:
        weight = weight * torch.as_tensor(term.mask, device=scalar.device)
    if weight.dim():
        weight = weight.expand(term.likelihood.batch_shape).reshape(scalar.shape[0], -1)
        weight = weight.repeat_interleave(scalar.shape[1] // weight.shape[1], -1)
    return weight.sqrt().expand(scalar.shape)


def _weighted_log_prob(term: LikelihoodTerm, value: Tensor) -> Tensor:
    """sqrt(weight) log p, so that the square of its gradient has the weight."""
    log_prob, weight = term.log_prob(value), term.weight
    if isinstance(weight, Tensor):
        return log_prob * weight.sqrt()
    return log_prob if weight == 1.0 else log_prob * math.sqrt(weight)


def _fisher(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    for _ in range(num_samples):
        with torch.no_grad():
            target = term.likelihood.sample()
        yield _weighted_log_prob(term, target) / math.sqrt(num_samples)


def _empirical(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    yield _weighted_log_prob(term, term.value)


VECTORS: dict[str, Callable[[LikelihoodTerm, int], Iterator[Tensor]]] = {
    "ggn": _ggn,
    "fisher": _fisher,
    "empirical": _empirical,
}


def pullback(
    kind: str, terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall], count: int,
    num_samples: int, rows: int,
) -> list[Tensor]:
    """Output gradients of the first `count` of `rows` examples, one [K, *lead, count, S, O] a call.

    The graph is kept, and no `.grad` is changed. Raises ValueError for a `pyro.factor`, which has
    no distribution, if the kind needs one.
    """
    if kind in ("ggn", "fisher") and not all(t.likelihood.event_shape.numel() for t in terms):
        raise ValueError(
            f"curvature={kind!r} is of a likelihood, and a factor is none: use 'hessian' or "
            "'empirical'"
        )
    scalars = (
        part for term in terms for scalar in VECTORS[kind](term, num_samples)
        for part in _of_other_rows(scalar, count, rows)
    )
    return pull(scalars, calls, count)


def _of_other_rows(scalar: Tensor, count: int, rows: int) -> Sequence[Tensor]:
    """The scalar; in parts of `count` where a likelihood has other rows than the `rows` examples.

    Of those, as of the examples, the first count/rows are taken.
    """
    if not scalar.dim() or len(scalar) == rows:
        return (scalar,)
    share = len(scalar) * count / rows
    taken = math.ceil(share)
    return (scalar[:taken] * math.sqrt(share / taken)).split(count)


def pull(scalars: Iterable[Tensor], calls: Sequence[LayerCall], count: int) -> list[Tensor]:
    """The same for K vectors that are given as scalars of each example, [B] or one for all."""
    traced = [call for call in calls if isinstance(call, OpCall)]
    others = [call for call in calls if not isinstance(call, OpCall)]
    ordered: list[LayerCall] = [*traced, *others]
    rows: dict[int, list[Tensor]] = {id(call): [] for call in calls}
    for scalar in scalars:
        if not scalar.requires_grad:
            continue
        gradients = [
            *_output_gradients(scalar, traced, count), *_example_gradients(scalar, others, count)
        ]
        for call, gradient in zip(ordered, gradients, strict=True):
            rows[id(call)].append(call.output_gradient_rows(gradient, count))
    return [
        torch.stack(rows.pop(id(call)) or [call.output_gradient_rows(None, count)])
        for call in calls
    ]


def _output_gradients(
    scalar: Tensor, calls: Sequence[OpCall], count: int
) -> Sequence[Tensor | None]:
    """Gradients onto the outputs, whose rows are those of the examples."""
    total = scalar[:count].sum() if scalar.dim() else scalar
    edges = [call.edge for call in calls]
    if not edges:
        return []
    return torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)


def _example_gradients(
    scalar: Tensor, calls: Sequence[UntracedWeight | MixedRowsCall], count: int
) -> Sequence[Tensor]:
    """The gradients of each example, [count, *shape], in one backward pass for each."""
    if not calls:
        return []
    if not scalar.dim():
        raise ValueError(
            "weights that no supported op consumes, or not by examples, need a density for each "
            "example"
        )
    edges = [
        call.edge if isinstance(call, MixedRowsCall) else get_gradient_edge(call.tensor)
        for call in calls
    ]
    rows = [
        torch.autograd.grad(example.sum(), edges, retain_graph=True, allow_unused=True)
        for example in scalar[:count]
    ]
    columns = zip(*rows, *[[None] * len(calls)] * (count - len(rows)), strict=True)
    return [
        torch.stack([call.zeros() if g is None else g for g in column])
        for call, column in zip(calls, columns, strict=True)
    ]
