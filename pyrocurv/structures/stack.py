"""Solutions and samples of several matrices, those of Kronecker factors of equal shape at once.

Their eigenbases are stacked to one `KroneckerEigen` with a group for each, whose products are
batched, so that layers of equal shape are dispatched as one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from pyrocurv.structures.base import LazySolution, Structure
from pyrocurv.structures.kronecker_eigen import KroneckerEigen


def solutions(matrices: Sequence[Structure], vectors: Sequence[Tensor]) -> list[LazySolution]:
    """`Structure.solution` of each matrix and vector."""
    found: dict[int, LazySolution] = {}
    for members in _groups(matrices):
        if len(members) == 1:
            (index,) = members
            found[index] = matrices[index].solution(vectors[index])
            continue
        stack = _stack([matrices[index] for index in members])
        solved, dots = stack.solve_(torch.cat([vectors[index] for index in members]))
        sizes = [matrices[index].size for index in members]
        counts = [size * len(dots) // stack.size for size in sizes]  # of groups
        if max(counts) > 1:
            dots = torch.stack([part.sum() for part in dots.split(counts)])
        pairs = zip(dots.unbind(), solved.split(sizes), strict=True)
        found.update(zip(members, (LazySolution(dot, (x,)) for dot, x in pairs), strict=True))
    return [found[index] for index in range(len(matrices))]


def samples_(matrices: Sequence[Structure], noise: Sequence[Tensor]) -> list[Tensor]:
    """`Structure.rsqrt_` of each matrix and vector."""
    found: dict[int, Tensor] = {}
    for members in _groups(matrices):
        if len(members) == 1:
            (index,) = members
            found[index] = matrices[index].rsqrt_(noise[index])
            continue
        stack = _stack([matrices[index] for index in members])
        drawn = stack.rsqrt_(torch.cat([noise[index] for index in members]))
        parts = drawn.split([matrices[index].size for index in members])
        found.update(zip(members, parts, strict=True))
    return [found[index] for index in range(len(matrices))]


def _groups(matrices: Sequence[Structure]) -> list[list[int]]:
    """The positions of matrices that can be stacked."""
    groups: dict[Hashable, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(_key(matrix), []).append(index)
    return [*groups.values()]


def _key(matrix: Structure) -> Hashable:
    if not isinstance(matrix, KroneckerEigen):
        return id(matrix)
    bases = matrix.output_basis, matrix.input_basis
    return tuple((b.shape[-2:], b.dtype, b.device) for b in bases)


def _stack(matrices: Sequence[Structure]) -> KroneckerEigen:
    """One matrix with the groups of all, kept with the first as long as the others are the same."""
    first, *others = matrices
    known, stack = vars(first).get("_stack", ((), None))
    if stack is None or [*map(id, known)] != [*map(id, others)]:
        stack = KroneckerEigen(*(
            torch.cat([_grouped(getattr(matrix, name)) for matrix in matrices])
            for name in ("output_basis", "input_basis", "spectrum")
        ))
        vars(first)["_stack"] = others, stack
    return stack


def _grouped(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() > 2 else tensor[None]
