"""Adam, for tensors and in the eigenbasis of Kronecker factors (SOAP).

    v ← average of g²,   d = h / (sqrt(v) + ε)

with g the gradient of one step and h its average by momentum, both with the prior's gradient. In an
eigenbasis g is projected onto it, and v follows when the basis changes. The second moments have to
include the prior's gradient: a direction that the likelihood does not depend on, as the mean of the
logits of a softmax, would have none, and its steps would explode.

Kingma & Ba 2015, arXiv:1412.6980; Vyas et al. 2024, "SOAP: Improving and stabilizing Shampoo using
Adam", arXiv:2409.11321.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import cast

import torch
from torch import Tensor

from pyrocurv.posterior.mean_update import (
    Direction,
    MeanUpdate,
    Push,
    gradients,
    last_gradients,
)
from pyrocurv.posterior.state import SecondMoment
from pyrocurv.runtime import foreach
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Diagonal, KroneckerEigen

DECAY, EPSILON = 0.99, 1e-8


def adam_directions(
    gradients: Sequence[Tensor], last_gradients: Sequence[Tensor],
    moments: Sequence[SecondMoment | None], share: float = 1.0,
) -> tuple[list[Tensor], list[SecondMoment]]:
    """share · d [n] of several tensors from their h and g [n], and the second moments after this
    step.
    """
    if not gradients:
        return [], []
    squares = torch._foreach_mul([*last_gradients], [*last_gradients])
    counts = [_next_count(moment) for moment in moments]
    before = [
        square if moment is None else moment.mean.diag()
        for moment, square in zip(moments, squares, strict=True)
    ]
    means = foreach.lerp(before, squares, [*map(_weight, counts)])
    scales = torch._foreach_sqrt(means)
    torch._foreach_add_(scales, EPSILON)
    directions = [*torch._foreach_div([*gradients], scales)]
    if share != 1:
        torch._foreach_mul_(directions, share)
    return directions, [
        SecondMoment(count, Diagonal(mean)) for count, mean in zip(counts, means, strict=True)
    ]


def _next_count(moment: SecondMoment | None) -> int:
    return 1 if moment is None else moment.count + 1


def _weight(count: int) -> float:
    """That of the last of `count` values in the running average: the first ones weigh equally."""
    return max(1 - DECAY, 1 / count)


class SoapUpdate(MeanUpdate):
    """Adam in the eigenbasis of the curvature's factors, and plain Adam for other structures."""

    name = "soap"
    default_lr = 0.003

    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        has_basis = [isinstance(p.state.curvature.curvature, KroneckerEigen) for p in pushes]
        projected = [*compress(pushes, has_basis)]
        plain = iter(adam_steps([*compress(pushes, map(operator.not_, has_basis))], 1.0))
        pairs = zip(projected, gradients(projected), last_gradients(projected), strict=True)
        soap = iter([_soap_direction(*pair) for pair in pairs])
        return [next(soap if has_one else plain) for has_one in has_basis]


def adam_steps(pushes: Sequence[Push], share: float) -> list[Direction]:
    """Directions of blocks by Adam, at a share of the learning rate."""
    moments = [push.state.second_moment for push in pushes]
    vectors, new = adam_directions(gradients(pushes), last_gradients(pushes), moments, share)
    return [
        Direction.of(
            push, vector, push.state.hyperparameters.lr, replace(push.state, second_moment=moment)
        ) for push, vector, moment in zip(pushes, vectors, new, strict=True)
    ]


def _soap_direction(push: Push, h: Tensor, last: Tensor) -> Direction:
    state, basis = push.state, cast(KroneckerEigen, push.state.curvature.curvature)
    root, lr = state.curvature.root, state.hyperparameters.lr
    if root is not None:
        h, last = h / root, last / root
    squares, old = basis.mean_squares(last), state.second_moment
    count = _next_count(old)
    mean = squares if old is None else old.mean.lerp(squares, _weight(count))
    if not isinstance(mean, KroneckerEigen):
        raise TypeError(f"{state.block.name} has second moments of {type(mean).__name__}")
    new = replace(state, second_moment=SecondMoment(count, mean))
    preconditioner = mean.map_eigenvalues(lambda v: v.sqrt() + EPSILON)
    if root is None:
        return Direction(new, preconditioner.solution(h), lr)
    return Direction.of(push, preconditioner.solve(h) / root, lr, new)
