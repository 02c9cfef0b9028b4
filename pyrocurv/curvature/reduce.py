"""Into which structure: inputs a [B, S, I] and output gradients g [K, B, S, O] become a matrix.

The gradient of example n in vector k is the matrix J_kn = sum_s g_kns a_nsᵀ [O, I]; the curvature
of the layer is C = sum_kn vec(J) vec(J)ᵀ, a SUM over the examples. Several layers make one block by
joining their J. Kronecker factors take the positions apart ("expand", Eschenhagen et al. 2023,
arXiv:2311.00636): exact for one datum at one position, and for deep linear networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrocurv.blocks import Block
from pyrocurv.capture import Call
from pyrocurv.structures import Dense, Diagonal, Kronecker, KroneckerEigen

Pairs = Sequence[tuple[Tensor, Tensor]]  # (a, g) of each layer of a block


def gather(block: Block, calls: Sequence[Call], gradients: Sequence[Tensor], count: int) -> Pairs:
    """(a [B, S, I], g [K, B, S, O]) of each layer; the calls of one layer are joined along S."""
    pairs = []
    for layer in block.layers:
        mine = [i for i, call in enumerate(calls) if call.layer == layer]
        if not mine:
            raise ValueError(f"{layer.weight!r} took no part in this forward pass")
        a = _joined([calls[i].rows(count) for i in mine], 1)
        g = _joined([gradients[i] for i in mine], 2)
        pairs.append((a, g))
    return pairs


def only(pairs: Pairs, rows: Tensor | None) -> Pairs:
    """Of these examples; None: of all."""
    return pairs if rows is None else [(a[rows], g[:, rows]) for a, g in pairs]


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)  # one is not copied


def check_batch(calls: Sequence[Call], batch: int) -> None:
    """Examples must be the first axis of every layer's input."""
    for call in calls:
        if call.batch != batch:
            raise ValueError(
                f"{call.layer.weight!r} reads {call.batch} rows where there are {batch} examples: "
                "keep the batch as the first axis of the layer's input, other axes behind it"
            )


def _jacobians(pairs: Pairs) -> Iterator[Tensor]:
    """J of all examples [B, P], one vector after the other."""
    for vector in range(pairs[0][1].shape[0]):
        parts = [torch.bmm(g[vector].mT, a).flatten(1) for a, g in pairs]
        yield torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def dense(pairs: Pairs) -> Dense:
    """C itself."""
    return Dense(sum(jacobian.mT @ jacobian for jacobian in _jacobians(pairs)))  # type: ignore[arg-type]


def diagonal(pairs: Pairs) -> Diagonal:
    """diag C, exactly."""
    return Diagonal(torch.cat([_squares(a, g) for a, g in pairs]))


def _squares(a: Tensor, g: Tensor) -> Tensor:
    """sum_kn J_kn² of one layer [P]."""
    if a.shape[1] == 1:  # one position: the square of a product is the product of squares
        a, g = a.squeeze(1).square(), g.squeeze(2).square()  # [B, I], [K, B, O]
        return (g.sum(0).mT @ a).flatten()
    return sum(jacobian.square().sum(0) for jacobian in _jacobians([(a, g)]))  # type: ignore[return-value]


def kronecker(pairs: Pairs) -> Kronecker:
    """G ⊗ A with G = sum_kns g gᵀ / S and A = sum_ns a aᵀ / B."""
    ((a, g),) = pairs
    batch, positions = a.shape[:2]
    return Kronecker(_gram(g.flatten(0, 1)) / positions, _gram(a) / batch)


def _gram(rows: Tensor) -> Tensor:
    """sum x xᵀ over rows [B, S, n]."""
    rows = rows.flatten(0, 1)
    return rows.mT @ rows


def kronecker_eigen(pairs: Pairs, basis: KroneckerEigen) -> KroneckerEigen:
    """The mean of C over the basis' eigenspaces, for a full basis sum_kn (Uᵀ J V)².

    Of all matrices with these eigenspaces the nearest to C in the Frobenius norm.
    """
    u, v = basis.output_basis, basis.input_basis
    ((a, g),) = pairs
    if a.shape[1] == 1:  # one position: |uᵀ J v|² is a product
        output, input = _energies(g.flatten(0, 1).squeeze(1), u), _energies(a.squeeze(1), v)
        input = input.repeat(g.shape[0], 1)
        return KroneckerEigen(u, v, output.mT @ input)
    total = torch.zeros_like(basis.spectrum)
    for jacobian in _jacobians(pairs):
        total += _block_energies(jacobian.view(len(a), len(u), len(v)), u, v)
    return KroneckerEigen(u, v, total)


def _energies(rows: Tensor, basis: Tensor) -> Tensor:
    """(xᵀ b)² for rows [N, n], and the mean over the rest where the basis is truncated."""
    leading = (rows @ basis).square()
    rest = basis.shape[0] - basis.shape[1]
    if rest == 0:
        return leading
    left = rows.square().sum(1) - leading.sum(1)
    return torch.cat([leading, (left.clamp(min=0) / rest)[:, None]], 1)


def _block_energies(jacobian: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The mean square of J [B, O, I] over each pair of eigenspaces, summed over B."""
    rows = _energies((u.mT @ jacobian).flatten(0, 1), v).unflatten(0, (len(jacobian), -1)).sum(0)
    rest = u.shape[0] - u.shape[1]
    if rest == 0:
        return rows
    whole = _energies(jacobian.flatten(0, 1), v).sum(0)
    return torch.cat([rows, ((whole - rows.sum(0)).clamp(min=0) / rest)[None]])


PLAIN: Mapping[str, Callable[[Pairs], Any]] = {  # before any eigenbasis
    "full": dense,
    "block": dense,
    "diag": diagonal,
    "kfac": kronecker,
    "ekfac": kronecker,
}
