"""Into which structure: inputs a [B, S, I] and output gradients g [K, B, S, O] become a matrix.

The gradient of example n in vector k is the matrix J_kn = sum_s g_kns a_nsᵀ [O, I]; the curvature
of the layer is C = sum_kn vec(J) vec(J)ᵀ, a SUM over the examples. Several layers make one block by
joining their J. Kronecker factors take the positions apart ("expand") or add them up ("reduce",
Eschenhagen et al. 2023, arXiv:2311.00636): exact for one datum at one position, and for deep linear
networks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen
from pyrocurv.structures.kronecker_eigen import multiplicities, squared_projections


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Inputs a [1 or K, *lead, B, S, I] and output gradients g [1 or K, *lead, B, S, O].

    `kept` [B, S] are the positions that count as examples of the Kronecker factors; None: all.
    """

    a: Tensor
    g: Tensor
    kept: Tensor | None = None

    @property
    def vectors(self) -> int:
        """K."""
        return max(len(self.a), len(self.g))

    def jacobian(self, vector: int) -> Tensor:
        """J of all examples for one k, [B, *lead, O, I]."""
        a, g = (part[min(vector, len(part) - 1)] for part in (self.a, self.g))
        return (g.mT @ a).movedim(-3, 0)

    def __getitem__(self, rows: Tensor | slice) -> LayerStatistics:
        """Some of the examples."""
        kept = None if self.kept is None else self.kept[rows]
        return LayerStatistics(self.a[..., rows, :, :], self.g[..., rows, :, :], kept)

    def without(self, masked: Tensor | None) -> LayerStatistics:
        """Without the positions `masked` [B, S] of a likelihood: padding, unless it has gradients.

        Of as many positions elsewhere none is dropped.
        """
        if masked is None or self.g.shape[-3:-1] != masked.shape:
            return self
        silent = (self.g == 0).all(-1).flatten(0, -3).all(0)
        return LayerStatistics(self.a, self.g, ~(masked & silent))


# of one layer: one, or two where its matrix is also used transposed
Uses = Sequence[LayerStatistics]
Pairs = Sequence[Uses]  # of each layer of a block


def collect(
    block: Block, calls: Sequence[LayerCall], gradients: Sequence[Tensor], count: int,
    masked: Tensor | None = None,
) -> Pairs:
    """What each layer of a block saw, zeros where that is nothing; calls are joined along S.

    `masked` [count, S] are positions of the likelihood that count for nothing.
    """
    pairs: list[Uses] = []
    for layer in block.layers:
        mine = [i for i, call in enumerate(calls) if call.layer == layer]
        if not mine:
            pairs.append(zeros(layer, gradients[0], count))
            continue
        uses = _uses(layer, [calls[i] for i in mine], [gradients[i] for i in mine], count)
        pairs.append([uses[0].without(masked)] if len(uses) == 1 else uses)
    return pairs


def _uses(
    layer: Layer, calls: Sequence[LayerCall], gradients: Sequence[Tensor], count: int
) -> Uses:
    uses = []
    for transposed in (False, True):
        mine = [i for i, call in enumerate(calls) if call.transposed == transposed]
        if mine:
            a = _joined([calls[i].input_rows(count) for i in mine]).unsqueeze(0)
            g = _joined([gradients[i] for i in mine])
            uses.append(LayerStatistics(g, a) if transposed else LayerStatistics(a, g))
    return [_per_unit(pair) for pair in uses] if layer.orientation == "per_unit" else uses


def zeros(layer: Layer, like: Tensor, count: int) -> Uses:
    """Zero inputs and gradients, for a layer that was not called."""
    sizes = layer.in_features, layer.out_features
    a, g = (like.new_zeros(1, *layer.lead, count, 1, size) for size in sizes)
    return [LayerStatistics(a, g)]


def select_examples(pairs: Pairs, rows: Tensor | None) -> Pairs:
    """The pairs of some `rows` of the examples; None: of all."""
    return pairs if rows is None else [[pair[rows] for pair in uses] for uses in pairs]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -2)  # one is not copied


def _per_unit(pair: LayerStatistics) -> LayerStatistics:
    """The same J [K, Γ, B, 1, I] of layers of one output: their Kronecker product is then exact."""
    a = pair.g.mT @ pair.a
    return LayerStatistics(a, a.new_ones(1, *a.shape[1:-1], 1))


def _jacobian(uses: Uses, vector: int) -> Tensor:
    """J of one layer, [B, *lead, O, I]."""
    return sum((pair.jacobian(vector) for pair in uses[1:]), uses[0].jacobian(vector))


def jacobians(pairs: Pairs) -> Iterator[Tensor]:
    """J of all examples [B, P], one vector after the other."""
    for vector in range(max(pair.vectors for uses in pairs for pair in uses)):
        parts = [_jacobian(uses, vector).flatten(1) for uses in pairs]
        yield torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def dense(pairs: Pairs) -> Dense:
    """C itself."""
    return Dense(sum(jacobian.mT @ jacobian for jacobian in jacobians(pairs)))  # type: ignore[arg-type]  # a sum of tensors, never 0


def diagonal(pairs: Pairs) -> Diagonal:
    """diag C, exactly."""
    return Diagonal(torch.cat([_squares(uses) for uses in pairs]))


def _squares(uses: Uses) -> Tensor:
    """sum_kn J_kn² of one layer [P]."""
    if is_rank_one(uses):  # the square of a product is the product of squares
        a, g = (part.squeeze(-2).square().sum(0) for part in (uses[0].a, uses[0].g))
        return (g.mT @ a).flatten()  # [*lead, B, O], [*lead, B, I]
    return sum(jacobian.square().sum(0) for jacobian in jacobians([uses]))  # type: ignore[return-value]  # the same


def is_rank_one(uses: Uses) -> bool:
    """Whether J is an outer product: one use, one position, and K on one side only."""
    (pair, *more) = uses
    return not more and pair.a.shape[-2] == 1 and 1 in (len(pair.a), len(pair.g))


def kronecker(pairs: Pairs, sharing: str = "expand") -> Kronecker:
    """G ⊗ A with G = sum_kns g gᵀ / S and A = sum_ns a aᵀ / B.

    Where a matrix is used transposed as well, the nearest product to the sum of both.
    """
    (uses,) = pairs
    factors = [_factors(apply_weight_sharing(pair, sharing)) for pair in uses]
    return functools.reduce(Kronecker.nearest_kronecker_sum, factors)


def apply_weight_sharing(pair: LayerStatistics, sharing: str) -> LayerStatistics:
    """Positions by themselves ("expand"), or inputs averaged and gradients summed ("reduce")."""
    a, g = pair.a, pair.g
    if pair.kept is None:
        return pair if sharing == "expand" else LayerStatistics(
            a.mean(-2, keepdim=True), g.sum(-2, keepdim=True)
        )
    kept = pair.kept.to(a).unsqueeze(-1)  # [B, S, 1]
    if sharing == "expand":
        # A is a mean over S, of which some are 0
        return LayerStatistics(a * (kept / kept.mean().sqrt()), g)
    positions = kept.sum(-2, keepdim=True).clamp(min=1)
    return LayerStatistics((a * kept).sum(-2, keepdim=True) / positions, g.sum(-2, keepdim=True))


def _factors(pair: LayerStatistics) -> Kronecker:
    batch, positions = pair.a.shape[-3:-1]
    return Kronecker(_gram(pair.g, positions), _gram(pair.a, batch))


def _gram(rows: Tensor, count: int) -> Tensor:
    """sum x xᵀ / count over rows [K, *lead, B, S, n], [*lead, n, n]."""
    rows = rows[0] if len(rows) == 1 else rows.movedim(0, -4).flatten(-4, -3)
    rows = rows.flatten(-3, -2)
    if rows.shape[-2] < rows.shape[-1]:  # the fewer to divide
        return rows.mT @ (rows / count)
    return (rows.mT @ rows) / count


def kronecker_eigen(pairs: Pairs, basis: KroneckerEigen) -> KroneckerEigen:
    """The mean of C over the basis' eigenspaces, for a full basis sum_kn (Uᵀ J V)².

    Of all matrices with these eigenspaces the nearest to C in the Frobenius norm.
    """
    u, v = basis.output_basis, basis.input_basis
    (uses,) = pairs
    if is_rank_one(uses):  # |uᵀ J v|² is a product
        a, g = uses[0].a.squeeze(-2), uses[0].g.squeeze(-2)  # [1 or K, *lead, B, n]
        output, input = _energies(g, u).sum(0), _energies(a, v).sum(0)
        return KroneckerEigen(u, v, output.mT @ input)
    total = torch.zeros_like(basis.spectrum)
    for vector in range(max(pair.vectors for pair in uses)):
        total += _block_energies(_jacobian(uses, vector), u, v)
    return KroneckerEigen(u, v, total)


def _energies(rows: Tensor, basis: Tensor) -> Tensor:
    """(xᵀ b)² for rows [..., n], and the mean over the rest where the basis is truncated."""
    return squared_projections(rows, basis) / multiplicities(basis)


def _block_energies(jacobian: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The mean square of J [B, *lead, O, I] over each pair of eigenspaces, summed over B."""
    rows = _energies(u.mT @ jacobian, v).sum(0)
    rest = u.shape[-2] - u.shape[-1]
    if rest == 0:
        return rows
    whole = _energies(jacobian, v).sum((0, -2))
    return torch.cat([rows, ((whole - rows.sum(-2)).clamp(min=0) / rest).unsqueeze(-2)], -2)


def assemble(block: Block, pairs: Pairs) -> Any:
    """In the block's structure, before any eigenbasis: a `Kronecker` for the Kronecker ones."""
    if block.structure.is_kronecker:
        return kronecker(pairs, block.kronecker.sharing)
    return diagonal(pairs) if block.kind == "diag" else dense(pairs)


def whiten(pairs: Pairs, roots: tuple[Tensor, Tensor] | None) -> Pairs:
    """Of a Kronecker block in the units of a prior: a / r, g / p for p [*lead, O], r [*lead, I]."""
    if roots is None:
        return pairs
    p, r = (root[..., None, None, :] for root in roots)
    return [[LayerStatistics(pair.a / r, pair.g / p, pair.kept) for pair in uses] for uses in pairs]
