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
        a = torch.cat([calls[i].rows(count) for i in mine], 1)
        g = torch.cat([gradients[i] for i in mine], 2)
        pairs.append((a, g))
    return pairs


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
    ((a, g),) = pairs
    if a.shape[1] == 1:  # one position: the square of a product is the product of squares
        a, g = a.squeeze(1).square(), g.squeeze(2).square()  # [B, I], [K, B, O]
        return Diagonal((g.sum(0).mT @ a).flatten())
    return Diagonal(sum(jacobian.square().sum(0) for jacobian in _jacobians(pairs)))  # type: ignore[arg-type]


def kronecker(pairs: Pairs) -> Kronecker:
    """G ⊗ A with G = sum_kns g gᵀ / S and A = sum_ns a aᵀ / B."""
    ((a, g),) = pairs
    batch, positions = a.shape[:2]
    a, g = a.flatten(0, 1), g.flatten(0, 2)
    return Kronecker(g.mT @ g / positions, a.mT @ a / batch)


def kronecker_eigen(pairs: Pairs, basis: KroneckerEigen) -> KroneckerEigen:
    """The diagonal of C in the basis: sum_kn (Q_Gᵀ J Q_A)², the nearest to C that basis allows."""
    ((a, g),) = pairs
    rotated = [(a @ basis.input_basis, g @ basis.output_basis)]
    spectrum = diagonal(rotated).entries.view(basis.spectrum.shape)
    return KroneckerEigen(basis.output_basis, basis.input_basis, spectrum)


PLAIN: Mapping[str, Callable[[Pairs], Any]] = {  # before any eigenbasis
    "full": dense,
    "block": dense,
    "diag": diagonal,
    "kfac": kronecker,
    "ekfac": kronecker,
}
