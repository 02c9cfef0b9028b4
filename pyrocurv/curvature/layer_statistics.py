"""Inputs a [B, S, I] and output gradients g [K, B, S, O] of layers, reduced to a matrix.

The gradient of example n for vector k is the matrix J_kn = sum_s g_kns a_nsᵀ [O, I]; the curvature
of the layer is C = sum_kn vec(J) vec(J)ᵀ, a SUM over the examples. Several layers form one block by
concatenating their J. Kronecker factors treat positions as separate examples ("expand") or sum over
them ("reduce", Eschenhagen et al. 2023, arXiv:2311.00636). They are exact for one example at one
position, and for deep linear networks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocurv.curvature.likelihood import ExampleSelection
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen
from pyrocurv.structures.eigenspaces import multiplicities, squared_projections
from pyrocurv.structures.rescaled import KroneckerScaling

MAX_ELEMENTS = 2**22  # of the Jacobians that one product sums over


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Inputs a [1 or K, *lead, B, S, I] and output gradients g [1 or K, *lead, B, S, O].

    `position_mask` [B, S] is True at the positions that count as examples of the Kronecker factors;
    None: all of them.
    """

    a: Tensor
    g: Tensor
    position_mask: Tensor | None = None

    @staticmethod
    def zeros(layer: Layer, like: Tensor, count: int) -> LayerStatistics:
        """Zero inputs and gradients of `count` examples, for a layer that is not called."""
        a, g = (
            like.new_zeros(1, *layer.lead, count, 1, size)
            for size in (layer.in_features, layer.out_features)
        )
        return LayerStatistics(a, g)

    @property
    def num_vectors(self) -> int:
        """K."""
        return max(len(self.a), len(self.g))

    @property
    def is_rank_one(self) -> bool:
        """Whether each J is an outer product: one position, and K on one side only."""
        return self.a.shape[-2] == 1 and 1 in (len(self.a), len(self.g))

    def jacobian(self, vector: int) -> Tensor:
        """J of all examples for one k, [B, *lead, O, I]."""
        a, g = (rows[min(vector, len(rows) - 1)] for rows in (self.a, self.g))
        return (g.mT @ a).movedim(-3, 0)

    def __getitem__(self, examples: Tensor) -> LayerStatistics:
        mask = None if self.position_mask is None else self.position_mask[examples]
        return LayerStatistics(self.a[..., examples, :, :], self.g[..., examples, :, :], mask)

    def without(self, masked: Tensor | None) -> LayerStatistics:
        """Mask the positions of padding: `masked` [B, S] by the likelihood, and without gradients.

        Nothing is masked if the layer has another number of positions than the likelihood.
        """
        if masked is None or self.g.shape[-3:-1] != masked.shape:
            return self
        no_gradient = (self.g == 0).all(-1).flatten(0, -3).all(0)
        return LayerStatistics(self.a, self.g, ~(masked & no_gradient))

    def share_weights(self, sharing: str) -> LayerStatistics:
        """Positions as separate rows ("expand"), or mean inputs and summed gradients ("reduce")."""
        a, g = self.a, self.g
        if self.position_mask is None:
            return self if sharing == "expand" else LayerStatistics(
                a.mean(-2, keepdim=True), g.sum(-2, keepdim=True)
            )
        mask = self.position_mask.to(a).unsqueeze(-1)  # [B, S, 1]
        if sharing == "expand":
            # A is a mean over all S positions, of which the masked ones contribute 0
            return LayerStatistics(a * (mask / mask.mean().sqrt()), g)
        positions = mask.sum(-2, keepdim=True).clamp(min=1)
        return LayerStatistics(
            (a * mask).sum(-2, keepdim=True) / positions, g.sum(-2, keepdim=True)
        )

    def whiten(self, scaling: KroneckerScaling | None) -> LayerStatistics:
        """a / r and g / p for the roots p [*lead, O] and r [*lead, I] of a prior's scaling."""
        if scaling is None or scaling.roots is None:
            return self
        p, r = (root[..., None, None, :] for root in scaling.roots)
        return LayerStatistics(self.a / r, self.g / p, self.position_mask)

    def num_inputs(self, sharing: str) -> Tensor | int:
        """How many examples A is a mean over, by the positions that are not masked."""
        batch_size = self.a.shape[-3]
        if self.position_mask is None or sharing != "expand":
            return batch_size
        return self.position_mask.to(self.a).mean() * batch_size

    def factors(self) -> Kronecker:
        """G = sum_kns g gᵀ / S and A = sum_ns a aᵀ / B."""
        batch_size, positions = self.a.shape[-3:-1]
        return Kronecker(_second_moment(self.g, positions), _second_moment(self.a, batch_size))


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """Statistics of the layers of a block, for each use of a layer.

    A layer has two uses if its matrix is also used transposed; its J is their sum.
    """

    layers: Sequence[Sequence[LayerStatistics]]

    def __getitem__(self, examples: Tensor) -> GradientStatistics:
        return GradientStatistics([[use[examples] for use in layer] for layer in self.layers])

    def whiten(self, scaling: KroneckerScaling | None) -> GradientStatistics:
        """The statistics scaled by a prior."""
        return GradientStatistics([[use.whiten(scaling) for use in layer] for layer in self.layers])

    def jacobians(self) -> Iterator[Tensor]:
        """J of all examples [B, P], one vector after another."""
        for vector in range(_num_vectors(self.layers)):
            parts = [_jacobian(layer, vector).flatten(1) for layer in self.layers]
            yield torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def dense(self) -> Dense:
        """C itself."""
        total: Tensor | None = None
        for rows in _batched(self.jacobians()):
            total = rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)
        if total is None:
            raise ValueError("a block without weights has no matrix")
        return Dense(total)

    def diagonal(self) -> Diagonal:
        """diag C, exactly."""
        return Diagonal(torch.cat([_squares(layer) for layer in self.layers]))

    def kronecker(self, sharing: str) -> list[Kronecker]:
        """G ⊗ A of each use."""
        (layer,) = self.layers
        return [use.share_weights(sharing).factors() for use in layer]

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None = None
    ) -> KroneckerEigen:
        """The mean of C over the eigenspaces of a basis, sum_kn (Uᵀ J V)² for a full one.

        It is the nearest matrix to C with these eigenspaces in the Frobenius norm.
        """
        u, v = basis.output_basis, basis.input_basis
        (layer,) = self.whiten(scaling).layers
        if len(layer) == 1 and layer[0].is_rank_one:  # |uᵀ J v|² is a product
            a, g = layer[0].a.squeeze(-2), layer[0].g.squeeze(-2)  # [1 or K, *lead, B, n]
            output, input = _mean_squares(g, u).sum(0), _mean_squares(a, v).sum(0)
            return KroneckerEigen(u, v, output.mT @ input)
        total = torch.zeros_like(basis.spectrum)
        for vector in range(_num_vectors([layer])):
            total += _jacobian_mean_squares(_jacobian(layer, vector), u, v)
        return KroneckerEigen(u, v, total)

    def output_factor(self, sharing: str, scaling: KroneckerScaling | None) -> None:
        """None: G is averaged from its rows g."""


def gradient_statistics(
    block: Block, calls: Sequence[LayerCall], gradients: Sequence[Tensor],
    examples: ExampleSelection,
) -> GradientStatistics:
    """The statistics of the layers of a block, from the gradients onto the outputs of all calls.

    The calls of a layer are concatenated along S; a layer without a call has zeros.
    """
    pairs = [*zip(calls, gradients, strict=True)]
    statistics = GradientStatistics([
        _layer_statistics(layer, [pair for pair in pairs if pair[0].layer == layer], examples)
        or [LayerStatistics.zeros(layer, gradients[0], examples.count)] for layer in block.layers
    ])
    return statistics if examples.index is None else statistics[examples.index]


def _layer_statistics(
    layer: Layer, pairs: Sequence[tuple[LayerCall, Tensor]], examples: ExampleSelection
) -> list[LayerStatistics]:
    statistics = []
    for transposed in (False, True):
        calls = [(call, gradient) for call, gradient in pairs if call.transposed == transposed]
        if calls:
            a = _concatenate([call.input_rows(examples.count) for call, _ in calls]).unsqueeze(0)
            g = _concatenate([gradient for _, gradient in calls])
            statistics.append(LayerStatistics(g, a) if transposed else LayerStatistics(a, g))
    if layer.orientation == "per_unit":
        statistics = [_per_unit(use) for use in statistics]
    if len(statistics) > 1:
        return statistics
    return [use.without(examples.masked_positions) for use in statistics]


def _concatenate(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), -2)  # a single one is not copied


def _per_unit(statistics: LayerStatistics) -> LayerStatistics:
    """The same J of layers with one output, as inputs [K, Γ, B, 1, I] with gradients of one.

    Their Kronecker product is then exact.
    """
    a = statistics.g.mT @ statistics.a
    return LayerStatistics(a, a.new_ones(1, *a.shape[1:-1], 1))


def _batched(jacobians: Iterator[Tensor]) -> Iterator[Tensor]:
    """The Jacobians [B, P] of some vectors at a time, as rows of one matrix."""
    kept: list[Tensor] = []
    for jacobian in jacobians:
        kept.append(jacobian)
        if jacobian.numel() * len(kept) >= MAX_ELEMENTS:
            yield torch.cat(kept)
            kept = []
    if kept:
        yield torch.cat(kept)


def _num_vectors(layers: Sequence[Sequence[LayerStatistics]]) -> int:
    return max(use.num_vectors for layer in layers for use in layer)


def _jacobian(layer: Sequence[LayerStatistics], vector: int) -> Tensor:
    """J of one layer, [B, *lead, O, I]."""
    return functools.reduce(torch.add, (use.jacobian(vector) for use in layer))


def _squares(layer: Sequence[LayerStatistics]) -> Tensor:
    """sum_kn J_kn² of one layer [P]."""
    if len(layer) == 1 and layer[0].is_rank_one:  # the square of a product is one of squares
        a, g = (rows.squeeze(-2).square().sum(0) for rows in (layer[0].a, layer[0].g))
        return (g.mT @ a).flatten()  # [*lead, B, O], [*lead, B, I]
    jacobians = GradientStatistics([layer]).jacobians()
    return functools.reduce(torch.add, (jacobian.square().sum(0) for jacobian in jacobians))


def _second_moment(rows: Tensor, count: int) -> Tensor:
    """sum x xᵀ / count over rows [K, *lead, B, S, n], [*lead, n, n]."""
    rows = rows[0] if len(rows) == 1 else rows.movedim(0, -4).flatten(-4, -3)
    rows = rows.flatten(-3, -2)
    if rows.shape[-2] < rows.shape[-1]:  # divide the smaller of the two
        return rows.mT @ (rows / count)
    return (rows.mT @ rows) / count


def _mean_squares(rows: Tensor, basis: Tensor) -> Tensor:
    """(xᵀ b)² for rows [..., n], and the mean over the rest where the basis is truncated."""
    return squared_projections(rows, basis) / multiplicities(basis)


def _jacobian_mean_squares(jacobian: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The mean square of J [B, *lead, O, I] over each pair of eigenspaces, summed over B."""
    leading = _mean_squares(u.mT @ jacobian, v).sum(0)
    rest = u.shape[-2] - u.shape[-1]
    if rest == 0:
        return leading
    total = _mean_squares(jacobian, v).sum((0, -2))
    mean = (total - leading.sum(-2)).clamp(min=0) / rest
    return torch.cat([leading, mean.unsqueeze(-2)], -2)
