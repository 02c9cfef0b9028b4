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

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pyrocurv.posterior.mean_update import Direction, MeanUpdate, Push
from pyrocurv.posterior.state import SecondMoment
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Diagonal, KroneckerEigen, Structure

DECAY, EPSILON = 0.99, 1e-8


def average_squares(old: SecondMoment | None, squares: Structure) -> SecondMoment:
    """The running average of squares with one more value, in which the first ones weigh equally."""
    if old is None:
        return SecondMoment(1, squares)
    count = old.count + 1
    return SecondMoment(count, old.mean.lerp(squares, max(1 - DECAY, 1 / count)))


def adam_direction(
    gradient: Tensor, last_gradient: Tensor, moment: SecondMoment | None
) -> tuple[Tensor, SecondMoment]:
    """d [n] from h and g [n], and the second moment after this step."""
    moment = average_squares(moment, Diagonal(last_gradient.square()))
    return gradient / (moment.mean.diag().sqrt() + EPSILON), moment


class SoapUpdate(MeanUpdate):
    """Adam in the eigenbasis of the curvature's factors, and plain Adam for other structures."""

    name = "soap"
    default_lr = 0.003

    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        return [_soap_direction(push) for push in pushes]


def _soap_direction(push: Push) -> Direction:
    state, basis = push.state, push.state.curvature.curvature
    if not isinstance(basis, KroneckerEigen):
        vector, moment = adam_direction(push.gradient, push.last_gradient, state.second_moment)
        new = replace(state, second_moment=moment)
        return Direction.of(push, vector, state.hyperparameters.lr, new)
    root, lr = state.curvature.root, state.hyperparameters.lr
    h, last = (
        gradient if root is None else gradient / root
        for gradient in (push.gradient, push.last_gradient)
    )
    moment = average_squares(state.second_moment, basis.mean_squares(last))
    new = replace(state, second_moment=moment)
    if not isinstance(moment.mean, KroneckerEigen):
        raise TypeError(f"{state.block.name} has second moments of {type(moment.mean).__name__}")
    preconditioner = moment.mean.map_eigenvalues(lambda v: v.sqrt() + EPSILON)
    if root is None:
        return Direction(new, preconditioner.solution(h), lr)
    return Direction.of(push, preconditioner.solve(h) / root, lr, new)
