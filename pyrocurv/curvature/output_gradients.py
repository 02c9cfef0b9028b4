"""Which vectors are pulled back through the network: Gauss-Newton, Fisher and empirical Fisher.

All three are sum_n sum_k Jᵀ v v ᵀJ with J the Jacobian of the likelihood's parameters in the
weights; they differ in the vectors v alone (Martens 2020, arXiv:1412.1193):

    ggn        a root of the Fisher information, in closed form (`information`)
    fisher     v_k = ∇ log p(ỹ_k) / sqrt(K), ỹ_k drawn from the likelihood
    empirical  v   = ∇ log p(y) at the data

A vector is given as a scalar for each example, whose gradient it is: so masks, several axes and any
`Distribution` need nothing special, and `torch.autograd.grad` does the pulling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyrocurv.curvature.fisher_information import root
from pyrocurv.curvature.likelihood import LikelihoodTerm
from pyrocurv.layers.calls import LayerCall, OpCall, UntracedWeight


def _ggn(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    for scalar in root(term.likelihood):
        scalar = scalar.reshape(scalar.shape[0], -1) if scalar.dim() else scalar.reshape(1, 1)
        weight = _root_weight(term, scalar)
        for position in range(scalar.shape[1]):  # independent: a vector for each
            column = torch.zeros_like(scalar)
            column[:, position] = weight[:, position]
            yield (scalar * column).sum(-1)


def _root_weight(term: LikelihoodTerm, scalar: Tensor) -> Tensor:
    """sqrt(weight · mask) as [B, R] beside a flattened scalar."""
    shape = term.likelihood.batch_shape
    weight = torch.as_tensor(term.weight, dtype=scalar.dtype, device=scalar.device)
    if term.mask is not None:
        weight = weight * torch.as_tensor(term.mask, device=scalar.device)
    if weight.dim():
        weight = weight.expand(shape).reshape(scalar.shape[0], -1)
        weight = weight.repeat_interleave(scalar.shape[1] // weight.shape[1], -1)
    return weight.sqrt().expand(scalar.shape)


def _weighted(term: LikelihoodTerm, value: Tensor) -> Tensor:
    log_prob = term.likelihood.log_prob(value)
    if term.mask is not None:
        log_prob = torch.where(torch.as_tensor(term.mask, device=log_prob.device), log_prob, 0.0)
    weight = term.weight
    root = weight.sqrt() if isinstance(weight, Tensor) else math.sqrt(weight)
    return log_prob if isinstance(root, float) and root == 1.0 else log_prob * root


def _fisher(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    for _ in range(num_samples):
        with torch.no_grad():
            target = term.likelihood.sample()
        yield _weighted(term, target) / math.sqrt(num_samples)


def _empirical(term: LikelihoodTerm, num_samples: int) -> Iterator[Tensor]:
    yield _weighted(term, term.value)


VECTORS: dict[str, Callable[[LikelihoodTerm, int], Iterator[Tensor]]] = {
    "ggn": _ggn,
    "fisher": _fisher,
    "empirical": _empirical,
}


def pullback(
    kind: str, terms: Sequence[LikelihoodTerm], calls: Sequence[LayerCall], count: int,
    num_samples: int,
) -> list[Tensor]:
    """Output gradients of the first `count` examples, one [K, *lead, count, S, O] for each call.

    The graph is kept; nobody's `.grad` is touched. Raises ValueError for a `pyro.factor`, which has
    no value, where a likelihood is needed.
    """
    if kind in ("ggn", "fisher") and not all(t.likelihood.event_shape.numel() for t in terms):
        raise ValueError(
            f"curvature={kind!r} is of a likelihood, and a factor is none: use 'hessian' or "
            "'empirical'"
        )
    scalars = (scalar for term in terms for scalar in VECTORS[kind](term, num_samples))
    return pull(scalars, calls, count)


def pull(
    scalars: Iterable[Tensor], calls: Sequence[LayerCall], count: int
) -> list[Tensor]:
    """The same for K vectors that are given as scalars of each example, [B] or one for all."""
    edges = [call.edge for call in calls if isinstance(call, OpCall)]
    tensors = [call.tensor for call in calls if isinstance(call, UntracedWeight)]
    pulled: dict[int, list[Tensor]] = {id(call): [] for call in calls}
    for scalar in scalars:
        if not scalar.requires_grad:
            continue
        onto_edges = _at_once(scalar, edges, count)
        onto_tensors = _one_by_one(scalar, tensors, count)
        for call in calls:
            gradient = next(onto_edges if isinstance(call, OpCall) else onto_tensors)
            pulled[id(call)].append(call.output_gradient_rows(gradient, count))
    return [
        torch.stack(pulled.pop(id(call)) or [call.output_gradient_rows(None, count)])
        for call in calls
    ]


def _at_once(
    scalar: Tensor, edges: Sequence[GradientEdge], count: int
) -> Iterator[Tensor | None]:
    """Gradients whose rows are those of the examples."""
    total = scalar[:count].sum() if scalar.dim() else scalar
    yield from torch.autograd.grad(
        total, edges, retain_graph=True, allow_unused=True
    ) if edges else ()


def _one_by_one(scalar: Tensor, tensors: Sequence[Tensor], count: int) -> Iterator[Tensor]:
    """The gradients [count, P] of each example."""
    if not tensors:
        return
    if not scalar.dim():
        raise ValueError("weights that no supported op consumes need a density for each example")
    rows = [
        torch.autograd.grad(example.sum(), tensors, retain_graph=True, materialize_grads=True)
        for example in scalar[:count]
    ]
    yield from (torch.stack([g.flatten() for g in each]) for each in zip(*rows, strict=True))
