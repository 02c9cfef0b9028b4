"""Orthogonalized momentum: plain (Muon), or whitened by the input factor of the curvature.

With msign(U S Vᵀ) = U Vᵀ for the gradient h [O, I] of a weight matrix,

    muon            d = s msign(h)                  s = sqrt(max(1, O/I))
    whitened-muon   d = s' msign(h W) W             W = (A / a + ρ I)^-½,  a = tr A / I,  ρ = 1

where A is the mean of the layer's inputs a aᵀ, and s' gives d the Frobenius norm of Muon's. An
input that varies little then learns as fast as the others, up to ρ. Biases are columns of
the matrices that are whitened. All tensors that are not weight matrices (scales, embeddings, and in
"muon" biases) are Adam's, at a tenth of the learning rate. h may have Nesterov's momentum, which
trains in fewer steps where the gradients are not too noisy.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import cast

import torch
from torch import Tensor

from pyrocurv.posterior.adam import adam_directions, adam_steps
from pyrocurv.posterior.mean_update import (
    NATURAL,
    Direction,
    MeanUpdate,
    Push,
    add_priors,
    gradients,
    last_gradients,
)
from pyrocurv.posterior.orthogonalization import matrix_norms, orthogonalize
from pyrocurv.posterior.state import BlockState
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import KroneckerEigen, LazySolution
from pyrocurv.structures.stack import operands

ADAM_SHARE = 0.1  # of the learning rate
RIDGE = 1.0  # ρ
MAX_SIDE = 256  # of matrices whose orthogonalization costs less than a pass over one batch


@dataclass(frozen=True)
class Orthogonalizing(MeanUpdate):
    """What the rules of this file share: the momentum, Nesterov's or the plain one."""

    is_nesterov: bool = True

    def momenta(self, pushes: Sequence[Push]) -> list[Push]:
        """The pushes as the orthogonalization sees them."""
        found = [push.ahead() for push in pushes] if self.is_nesterov else [*pushes]
        add_priors(found)
        return found


class MuonUpdate(Orthogonalizing):
    """Orthogonalizes each weight matrix [O, rest]; Adam for all other tensors."""

    name = "muon"

    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        ahead = self.momenta(pushes)
        views = [push.state.block.views(push.scaled_gradient) for push in ahead]
        matrices = {
            layer.weight: view[layer.weight].flatten(1)
            for push, view in zip(pushes, views, strict=True)
            for layer in push.state.block.layers if layer.is_matrix
        }
        signs = dict(zip(matrices, _orthogonalized([*matrices.values()], workers), strict=True))
        others = _others(pushes, signs)
        return [
            _muon_direction(one, state, signs, values)
            for one, (state, values) in zip(ahead, others, strict=True)
        ]

    def costs(self, states: Sequence[BlockState]) -> dict[str, float]:
        """Those of the products of each weight matrix."""
        return {
            layer.weight: product_cost((shape[0], math.prod(shape) // shape[0]))
            for state in states for layer in state.block.layers if layer.is_matrix
            for shape in (layer.tensors[layer.weight],)
        }


def _muon_direction(
    push: Push, state: BlockState, signs: dict[str, Tensor], others: dict[str, Tensor]
) -> Direction:
    """The direction of a block whose weight matrices have been orthogonalized."""
    block = state.block
    values = {
        name: (muon_scale(*signs[name].shape) * signs[name]).view(shape)
        for name, shape in block.tensors.items() if name in signs
    }
    return Direction.of(push, block.pack(values | others), state.hyperparameters.lr, state)


def _others(
    pushes: Sequence[Push], signs: dict[str, Tensor]
) -> list[tuple[BlockState, dict[str, Tensor]]]:
    """Each block with its new second moments, and {name: d [*shape]} by Adam of its tensors that
    are not matrices.
    """
    found = [(push.state, dict[str, Tensor]()) for push in pushes]
    names = [[name for name in push.state.block.tensors if name not in signs] for push in pushes]
    used = [index for index, chosen in enumerate(names) if chosen]
    moving = [pushes[index] for index in used]
    h, last = (
        [_joined(pushes[index].state.block.views(vector), names[index])
         for index, vector in zip(used, vectors, strict=True)]
        for vectors in (gradients(moving), last_gradients(moving))
    )
    moments = [push.state.second_moment for push in moving]
    for index, vector, moment in zip(
        used, *adam_directions(h, last, moments, ADAM_SHARE), strict=True
    ):
        state, values = found[index]
        shapes = [state.block.tensors[name] for name in names[index]]
        pieces = vector.split([*map(math.prod, shapes)])
        for name, shape, piece in zip(names[index], shapes, pieces, strict=True):
            values[name] = piece.view(shape)
        found[index] = replace(state, second_moment=moment), values
    return found


def _joined(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


def muon_scale(outputs: int, inputs: int) -> float:
    """sqrt(max(1, O/I))."""
    return max(1.0, outputs / inputs) ** 0.5


class WhitenedMuonUpdate(Orthogonalizing):
    """Orthogonalizes the weight matrices of Kronecker blocks in whitened coordinates.

    Other structures, and matrices that are too wide, take the natural gradient.
    """

    name = "whitened-muon"
    default_lr = 0.03

    def directions(
        self, pushes: Sequence[Push], workers: Workers = ALONE
    ) -> list[Direction]:
        bases = [_input_basis(push.state) for push in pushes]
        ahead = self.momenta([*compress(pushes, bases)])
        natural = [not basis and _is_natural(p) for p, basis in zip(pushes, bases, strict=True)]
        scales = [not (basis or solved) for basis, solved in zip(bases, natural, strict=True)]
        by_curvature = iter(NATURAL.directions([*compress(pushes, natural)]))
        by_adam = iter(adam_steps([*compress(pushes, scales)], ADAM_SHARE))
        whitened = iter(_whitened_directions(ahead, [*filter(None, bases)], workers))
        return [
            next(by_curvature if solved else whitened if basis else by_adam)
            for basis, solved in zip(bases, natural, strict=True)
        ]

    def costs(self, states: Sequence[BlockState]) -> dict[str, float]:
        """Those of the products and the whitening of each block."""
        return {state.block.name: _cost(basis) for state in states
                if (basis := _input_basis(state))}


def _input_basis(state: BlockState) -> KroneckerEigen | None:
    """The curvature of a block whose matrices are whitened; None without a factor, or too wide."""
    curvature, layer = state.curvature, state.block.layers[0]
    basis = curvature.curvature
    if not (isinstance(basis, KroneckerEigen) and layer.is_matrix):
        return None
    return basis if min(basis.shape[-2:]) <= MAX_SIDE or curvature.positions > 1 else None


def _is_natural(push: Push) -> bool:
    """Whether a block that is not whitened is neither scales nor embeddings, which are Adam's."""
    block = push.state.block
    return block.layers[0].is_matrix or not block.structure.is_kronecker


def _orthogonalized(matrices: Sequence[Tensor], workers: Workers) -> list[Tensor]:
    """`orthogonalize`, shared out."""
    if workers.is_alone:
        return orthogonalize(matrices)
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in matrices]

    def compute(items: Sequence[int]) -> None:
        for item, sign in zip(items, orthogonalize([matrices[i] for i in items]), strict=True):
            results[item].copy_(sign)

    workers.share_out([product_cost(x.shape) for x in matrices], [(x,) for x in results], compute)
    return results


def product_cost(shape: Sequence[int]) -> float:
    """The multiplications of the Gram matrix of [..., n, m]: those of all products are as many
    times a number.
    """
    return math.prod(shape) * min(shape[-2:])


def _cost(basis: KroneckerEigen) -> float:
    """That of the products, and of whitening the inputs."""
    return product_cost(basis.shape) + math.prod(basis.shape) * basis.shape[-1]


def _whitened_directions(
    pushes: Sequence[Push], bases: Sequence[KroneckerEigen], workers: Workers
) -> list[Direction]:
    """Those of all blocks, shared out."""
    if workers.is_alone or not pushes:
        return _whitened(pushes, bases)
    vectors = [torch.empty_like(push.scaled_gradient) for push in pushes]
    dots = [vector.new_empty(()) for vector in vectors]

    def compute(items: Sequence[int]) -> None:
        own = _whitened([pushes[item] for item in items], [bases[item] for item in items])
        for item, direction in zip(items, own, strict=True):
            vectors[item].copy_(*direction.solution.factors)
            dots[item].copy_(direction.solution.dot)

    workers.share_out([*map(_cost, bases)], [*zip(vectors, dots, strict=True)], compute)
    return [
        Direction(push.state, LazySolution(dot, (vector,)), push.state.hyperparameters.lr)
        for push, vector, dot in zip(pushes, vectors, dots, strict=True)
    ]


def _whitened(pushes: Sequence[Push], bases: Sequence[KroneckerEigen]) -> list[Direction]:
    """Those of some blocks; equal shapes are stacked."""
    if not pushes:
        return []
    stacked = operands(bases, [_over_root(push, push.scaled_gradient) for push in pushes])
    matrices = [cast(KroneckerEigen, operand.matrix) for operand in stacked]
    h = [operand.vector.view(basis.shape) for basis, operand in zip(matrices, stacked, strict=True)]
    moved = orthogonalize(h, [partial(basis.whiten_input, ridge=RIDGE) for basis in matrices])
    norms = matrix_norms(moved)
    torch._foreach_div_(moved, torch._foreach_div(norms, [_norm(*x.shape[-2:]) for x in moved]))
    found: dict[int, Direction] = {}
    for operand, matrix, norm in zip(stacked, moved, norms, strict=True):
        sums = operand.split_dots(norm.view(-1) if norm.dim() else norm)
        parts = operand.split(matrix.reshape(-1))
        for index, vector, total in zip(operand.members, parts, sums, strict=True):
            push = pushes[index]
            lr = push.state.hyperparameters.lr
            if push.state.curvature.root is None:
                found[index] = Direction(push.state, LazySolution(total, (vector,)), lr)
            else:
                found[index] = Direction.of(push, _over_root(push, vector), lr)
    return [found[index] for index in range(len(pushes))]


def _over_root(push: Push, vector: Tensor) -> Tensor:
    """A vector [P] over the scale of the weights that the curvature belongs to."""
    root = push.state.curvature.root
    return vector if root is None else vector / root


def _norm(outputs: int, inputs: int) -> float:
    """The norm of Muon's step of a matrix."""
    return min(outputs, inputs) ** 0.5 * muon_scale(outputs, inputs)
