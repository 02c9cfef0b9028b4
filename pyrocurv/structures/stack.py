"""Solutions and samples of several matrices, those of Kronecker factors of equal shape at once.

Their eigenbases are stacked to one `KroneckerEigen` with a group for each, whose products are
batched, so that layers of equal shape are dispatched as one. Wide layers, whose products take
longer than a launch, are not: their vectors would be copied.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pyrocurv.structures.base import LazySolution, Structure
from pyrocurv.structures.kronecker_eigen import KroneckerEigen, matmul

MAX_STACKED = 2**20  # weights of a layer


@dataclass(frozen=True, eq=False)
class Operand:
    """A vector [P], and a matrix or the stack of several; `members` are their positions."""

    members: Sequence[int]
    sizes: Sequence[int]
    matrix: Structure
    vector: Tensor

    def split(self, vector: Tensor) -> Sequence[Tensor]:
        """The parts [P] of the members."""
        return (vector,) if len(self.sizes) == 1 else vector.split([*self.sizes])

    def split_dots(self, dots: Tensor) -> Sequence[Tensor]:
        """A scalar for each member, from one for each group of the stack, [Γ] or ()."""
        if len(self.sizes) == 1:
            return (dots if dots.dim() == 0 else dots.sum(),)
        counts = [size * len(dots) // self.matrix.size for size in self.sizes]
        if max(counts) == 1:
            return dots.unbind()
        return [part.sum() for part in dots.split(counts)]


def solutions(matrices: Sequence[Structure], vectors: Sequence[Tensor]) -> list[LazySolution]:
    """`Structure.solution` of each matrix and vector."""
    found: dict[int, LazySolution] = {}
    stacked = operands(matrices, vectors)
    complete = [operand for operand in stacked if _is_complete(operand.matrix)]
    for operand in stacked:
        if _is_complete(operand.matrix):
            continue
        if len(operand.members) == 1:
            found[operand.members[0]] = operand.matrix.solution(operand.vector)
            continue
        solved, dots = cast(KroneckerEigen, operand.matrix).solve_(operand.vector)
        pairs = zip(operand.split_dots(dots), operand.split(solved), strict=True)
        found.update(zip(operand.members, (LazySolution(d, (x,)) for d, x in pairs), strict=True))
    if complete:
        found.update(_complete_solutions(complete))
    return [found[index] for index in range(len(matrices))]


def _complete_solutions(stacked: Sequence[Operand]) -> dict[int, LazySolution]:
    """Those of complete eigenbases, whose eigenvalues are applied to all at once."""
    matrices = [cast(KroneckerEigen, operand.matrix) for operand in stacked]
    projected = [
        matrix.project(operand.vector) for matrix, operand in zip(matrices, stacked, strict=True)
    ]
    scaled = torch._foreach_div(projected, [matrix.spectrum for matrix in matrices])
    products = torch._foreach_mul(projected, scaled)
    found: dict[int, LazySolution] = {}
    for operand, matrix, k, product in zip(stacked, matrices, scaled, products, strict=True):
        dots = operand.split_dots(product.sum((-2, -1)))
        left, right = matrix.output_basis, matmul(k, matrix.transposed[1])
        if left.dim() == 2:
            found[operand.members[0]] = LazySolution(dots[0], (left, right))
            continue
        parts = operand.split(matmul(left, right).view(-1))
        pairs = zip(dots, parts, strict=True)
        found.update(zip(operand.members, (LazySolution(d, (x,)) for d, x in pairs), strict=True))
    return found


def samples_(matrices: Sequence[Structure], noise: Sequence[Tensor]) -> list[Tensor]:
    """`Structure.rsqrt_` of each matrix and vector."""
    found: dict[int, Tensor] = {}
    stacked = operands(matrices, noise)
    complete = [operand for operand in stacked if _is_complete(operand.matrix)]
    drawn = iter(_complete_samples_(complete) if complete else ())
    for operand in stacked:
        is_complete = _is_complete(operand.matrix)
        vector = next(drawn) if is_complete else operand.matrix.rsqrt_(operand.vector)
        found.update(zip(operand.members, operand.split(vector), strict=True))
    return [found[index] for index in range(len(matrices))]


def _complete_samples_(stacked: Sequence[Operand]) -> list[Tensor]:
    """Those of complete eigenbases, whose standard deviations are applied to all at once."""
    matrices = [cast(KroneckerEigen, operand.matrix) for operand in stacked]
    noise = [o.vector.view(matrix.shape) for matrix, o in zip(matrices, stacked, strict=True)]
    torch._foreach_mul_(noise, [matrix.inverse_root for matrix in matrices])
    for matrix, z in zip(matrices, noise, strict=True):
        matmul(matmul(matrix.output_basis, z), matrix.transposed[1], out=z)
    return [operand.vector for operand in stacked]


def _is_complete(matrix: Structure) -> bool:
    return isinstance(matrix, KroneckerEigen) and matrix.is_complete


def operands(matrices: Sequence[Structure], vectors: Sequence[Tensor]) -> list[Operand]:
    """Each matrix and vector, those of Kronecker factors of equal shape as one."""
    stacked = []
    for members in _groups(matrices):
        chosen = [matrices[index] for index in members]
        parts = [vectors[index] for index in members]
        is_one = len(members) == 1
        stacked.append(Operand(
            members, [matrix.size for matrix in chosen], chosen[0] if is_one else _stack(chosen),
            parts[0] if is_one else torch.cat(parts),
        ))
    return stacked


def _groups(matrices: Sequence[Structure]) -> list[list[int]]:
    """The positions of matrices that can be stacked."""
    groups: dict[Hashable, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(_key(matrix), []).append(index)
    return [*groups.values()]


def _key(matrix: Structure) -> Hashable:
    if not isinstance(matrix, KroneckerEigen) or matrix.size > MAX_STACKED:
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
