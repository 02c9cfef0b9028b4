"""Orthogonalized momentum: plain (Muon), or whitened by the input factor of the curvature.

With msign(U S Vᵀ) = U Vᵀ for the gradient h [O, I] of a weight matrix,

    muon            d = s msign(h)                  s = sqrt(max(1, O/I))
    whitened-muon   d = s' msign(h W) W             W = (A / a + ρ I)^-½,  a = tr A / I,  ρ = 1

where A is the mean of the layer's inputs a aᵀ, and s' gives d the Frobenius norm of Muon's. An
input that varies little then learns as fast as the others, up to ρ. Biases are columns of the
matrices that are whitened. All tensors that are not weight matrices (scales, embeddings, and in
"muon" biases) are Adam's, at a tenth of the learning rate.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
from torch import Tensor

from pyrocurv.posterior.adam import adam_direction
from pyrocurv.posterior.mean_update import NATURAL, Direction, MeanUpdate, Push
from pyrocurv.posterior.orthogonalization import orthogonalize
from pyrocurv.structures import KroneckerEigen

ADAM_SHARE = 0.1  # of the learning rate
RIDGE = 1.0  # ρ
MAX_SIDE = 256  # of matrices whose orthogonalization costs less than a pass over one batch


class MuonUpdate(MeanUpdate):
    """Orthogonalizes each weight matrix [O, rest]; Adam for all other tensors."""

    name = "muon"

    def directions(self, pushes: Sequence[Push]) -> list[Direction]:
        views = [push.state.block.views(push.scaled_gradient) for push in pushes]
        matrices = {
            layer.weight: view[layer.weight].flatten(1)
            for push, view in zip(pushes, views, strict=True)
            for layer in push.state.block.layers if layer.is_matrix
        }
        signs = dict(zip(matrices, orthogonalize([*matrices.values()]), strict=True))
        return [_muon_direction(push, signs) for push in pushes]


def _muon_direction(push: Push, signs: dict[str, Tensor]) -> Direction:
    """The direction of a block whose weight matrices have been orthogonalized."""
    state = push.state
    shapes = state.block.tensors
    rest = [name for name in shapes if name not in signs]
    values = {
        name: (muon_scale(*signs[name].shape) * signs[name]).view(shape)
        for name, shape in shapes.items() if name in signs
    }
    if rest:
        gradient, last = (
            torch.cat([state.block.views(vector)[name].flatten() for name in rest])
            for vector in (push.gradient, push.last_gradient)
        )
        vector, moment = adam_direction(gradient, last, state.second_moment)
        state = replace(state, second_moment=moment)
        pieces = (ADAM_SHARE * vector).split([math.prod(shapes[name]) for name in rest])
        values |= {name: piece.view(shapes[name]) for name, piece in zip(rest, pieces, strict=True)}
    return Direction.of(push, state.block.pack(values), state.hyperparameters.lr, state)


def muon_scale(outputs: int, inputs: int) -> float:
    """sqrt(max(1, O/I))."""
    return max(1.0, outputs / inputs) ** 0.5


class WhitenedMuonUpdate(MeanUpdate):
    """Orthogonalizes the weight matrices of Kronecker blocks in whitened coordinates.

    Other structures, and matrices that are too wide, take the natural gradient.
    """

    name = "whitened-muon"
    default_lr = 0.03

    def directions(self, pushes: Sequence[Push]) -> list[Direction]:
        whitened = [_Whitened.of(push) for push in pushes]
        groups = [[] if item is None else item.matrices for item in whitened]
        signs = iter(orthogonalize([matrix for group in groups for matrix in group]))
        natural = [not item and _is_natural(p) for p, item in zip(pushes, whitened, strict=True)]
        solved = iter(NATURAL.directions([*compress(pushes, natural)]))
        return [
            next(solved) if is_natural else _adam_direction(push) if item is None
            else item.direction(torch.stack([next(signs) for _ in group]))
            for push, item, group, is_natural in zip(pushes, whitened, groups, natural, strict=True)
        ]


def _is_natural(push: Push) -> bool:
    """Whether a block that is not whitened is neither scales nor embeddings, which are Adam's."""
    block = push.state.block
    return block.layers[0].is_matrix or not block.structure.is_kronecker


def _adam_direction(push: Push) -> Direction:
    state = push.state
    vector, moment = adam_direction(push.gradient, push.last_gradient, state.second_moment)
    new = replace(state, second_moment=moment)
    return Direction.of(push, ADAM_SHARE * vector, state.hyperparameters.lr, new)


@dataclass(frozen=True, eq=False)
class _Whitened:
    """A block whose matrices are whitened, with its curvature in the eigenbasis."""

    push: Push
    basis: KroneckerEigen

    @staticmethod
    def of(push: Push) -> _Whitened | None:
        """None for a block without an input factor, or too wide."""
        curvature, layer = push.state.curvature, push.state.block.layers[0]
        basis = curvature.curvature
        if not (isinstance(basis, KroneckerEigen) and layer.is_matrix):
            return None
        is_narrow = min(basis.shape[-2:]) <= MAX_SIDE or curvature.positions > 1
        return _Whitened(push, basis) if is_narrow else None

    @property
    def _root(self) -> Tensor | None:
        return self.push.state.curvature.root

    @property
    def matrices(self) -> list[Tensor]:
        """h W [O, I] of each group, up to its scale."""
        gradient, root = self.push.scaled_gradient, self._root
        gradient = gradient if root is None else gradient / root
        matrix = self.basis.whiten_input(gradient.view(self.basis.shape), RIDGE)
        return [*matrix.view(-1, *matrix.shape[-2:])]

    def direction(self, signs: Tensor) -> Direction:
        """From the orthogonalized matrices of all groups [Γ, O, I]."""
        matrix = self.basis.whiten_input(signs.view(self.basis.shape), RIDGE)
        outputs, inputs = self.basis.shape[-2:]
        norm = torch.linalg.matrix_norm(matrix, keepdim=True)
        size = min(outputs, inputs) ** 0.5 * muon_scale(outputs, inputs)
        vector = (matrix * (size / norm.clamp(min=torch.finfo(norm.dtype).tiny))).reshape(-1)
        if self._root is not None:
            vector = vector / self._root
        return Direction.of(self.push, vector, self.push.state.hyperparameters.lr)
