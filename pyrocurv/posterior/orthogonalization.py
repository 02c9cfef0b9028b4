"""The nearest matrices with orthonormal rows or columns, by a Newton-Schulz iteration.

    X ← X / |XXᵀ|^½,   X ← (aₜ I + bₜ XXᵀ + cₜ (XXᵀ)²) X,   t = 1 … 3

keeps the singular vectors of X and takes singular values from 0.011 to 1 into [0.7, 1.2]. The
largest is at most 1, and closer to 1 than after a division by |X|, which would cost an iteration.

Every iterate is P X with P, and its Gram matrix P XXᵀ P, polynomials of XXᵀ, so that X itself,
which may be wide, is multiplied twice in all. For X = H W with a positive definite W, of which
P X W is wanted, a wide H is multiplied by W² alone: with Y = H W² the Gram matrix is Y Hᵀ, and the
result P Y. Gram matrices of many sizes are iterated together, as diagonal blocks of a few matrices
of one size.

The Gram matrix has the squared condition number, and the iteration amplifies eigenvalues that are
negative by rounding: the error is at most 1e-3 in single precision, but in half precision it would
diverge. There X is iterated itself.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Each polynomial is
the nearest to 1 on the interval to which the last has taken the singular values, widened by 1 %
for rounding errors: Amsel et al. 2025, "The Polar Express: Optimal matrix sign methods and their
application to the Muon algorithm", arXiv:2505.16932.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pyrocurv.runtime.foreach import largest
from pyrocurv.structures.kronecker_eigen import matmul
from pyrocurv.structures.linalg import at_least_single

COEFFICIENTS = (  # a, b, c; the last polynomial times 0.95, for values around 1
    (8.0535, -23.4631, 17.3211), (3.5653, -2.6215, 0.5097), (2.4739, -1.8099, 0.4122),
)
MAX_SHARED = 256  # rows of a Gram matrix whose products cost a GPU less than their launches
MAX_PADDING, MIN_SIDE = 1.5, 64  # up to which multiple, or number, of its rows one is padded

Whitening = Callable[[Tensor, int], Tensor]  # X [..., k, m], p -> X Wᵖ, for a W > 0 [..., m, m]


def orthogonalize(
    matrices: Sequence[Tensor], whitenings: Sequence[Whitening | None] | None = None
) -> list[Tensor]:
    """About U Vᵀ for each matrix U S Vᵀ, [n, m] or a stack [k, n, m]; zeros for zeros.

    With a whitening of a matrix H it is U Vᵀ W for U S Vᵀ = H W. On a GPU matrices of more than 256
    rows and columns are iterated in bfloat16.

    Example:
        >>> import torch
        >>> (x,) = orthogonalize([torch.diag(torch.tensor([3.0, 1.0]))])
        >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.35)
        True
    """
    if not matrices:
        return []
    single = [*map(at_least_single, matrices)]
    scaled = torch._foreach_div(single, _magnitudes(single))  # whose squares are in range
    factored = [
        _Factored(x, whitening, matrix.dtype == x.dtype) for x, whitening, matrix
        in zip(scaled, whitenings or [None] * len(matrices), matrices, strict=True)
    ]
    found: dict[int, Tensor] = {}
    for group in _groups(tuple((one.gram_shape, one.h.dtype, one.h.device) for one in factored)):
        members = [factored[place.index] for place in group.places]
        if group.side > MAX_SHARED and _is_fast_in_half(members[0].h):
            done = [one.iterated() for one in members]
        else:
            done = _iterate_grams(group, members)
        found.update(zip([place.index for place in group.places], done, strict=True))
    return [found[index].to(matrix.dtype) for index, matrix in enumerate(matrices)]


def _magnitudes(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitude in each matrix or stack, (); never zero."""
    found = largest(matrices)
    torch._foreach_clamp_min_(found, max(torch.finfo(value.dtype).tiny for value in found))
    return found


def matrix_norms(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The Frobenius norm of each matrix, (), or those of a stack, [k, 1, 1]; never zero."""
    counts = [len(x) if x.dim() > 2 else 0 for x in matrices]
    pairs = zip(matrices, counts, strict=True)
    norms = torch._foreach_norm([*chain(*(x.unbind() if k else (x,) for x, k in pairs))])
    info = torch.finfo(norms[0].dtype)
    torch._foreach_clamp_min_(norms, info.tiny / info.eps)
    values = iter(norms)
    return [
        torch.stack([next(values) for _ in range(k)]).view(k, 1, 1) if k else next(values)
        for k in counts
    ]


def _is_fast_in_half(x: Tensor) -> bool:
    return x.device.type != "cpu" and x.dtype == torch.float32


def _iterate(x: Tensor) -> Tensor:
    """About U Vᵀ of a wide X = U S Vᵀ, by products with X itself in its own precision."""
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        gram = x @ x.mT
        if number == 0:
            scale = 1.01 * matrix_norms([gram])[0].sqrt()  # as norms are rounded too
            x, gram = x / scale, gram / scale.square()
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


@dataclass(frozen=True, eq=False)
class _Factored:
    """X = H W, [..., n, m], or H without a whitening, of which P X W is wanted."""

    h: Tensor
    whitening: Whitening | None
    is_accurate: bool  # whether W² is that of W but for rounding errors of single precision

    @property
    def is_wide(self) -> bool:
        return self.h.shape[-2] <= self.h.shape[-1]

    @property
    def gram_shape(self) -> tuple[int, ...]:
        """The rows of the Gram matrix, after the size of a stack."""
        return (*self.h.shape[:-2], min(self.h.shape[-2:]))

    @cached_property
    def x(self) -> Tensor:
        return self._whiten(self.h)

    @cached_property
    def y(self) -> Tensor | None:
        """H W²; None if X itself is to be used."""
        if self.whitening is None or not (self.is_wide and self.is_accurate):
            return None
        return self.whitening(self.h, 2)

    def _whiten(self, matrix: Tensor) -> Tensor:
        return matrix if self.whitening is None else self.whitening(matrix, 1)

    def write_gram(self, block: Tensor) -> None:
        """XXᵀ of a wide X, XᵀX of a tall one, into a block."""
        if not self.is_wide:
            matmul(self.x.mT, self.x, out=block)
        elif self.y is None:
            matmul(self.x, self.x.mT, out=block)
        else:
            matmul(self.y, self.h.mT, out=block)

    def result(self, factor: Tensor) -> Tensor:
        """P X W, or X P W of a tall one."""
        if not self.is_wide:
            return matmul(self.x, self._whiten(factor))
        return self._whiten(matmul(factor, self.x)) if self.y is None else matmul(factor, self.y)

    def iterated(self) -> Tensor:
        """`result`, by an iteration of X in half precision."""
        sign = _iterate((self.x if self.is_wide else self.x.mT).bfloat16()).to(self.h.dtype)
        return self._whiten(sign if self.is_wide else sign.mT)


# ---- Gram matrices ------------------------------------------------------------------------------


def _iterate_grams(group: _Group, members: Sequence[_Factored]) -> list[Tensor]:
    """The results of the members of a group, from the blocks of Gram matrices [K, s, s]."""
    grams = members[0].h.new_zeros(len(group.filled), group.side, group.side)
    blocks = group.blocks(grams)
    for member, block in zip(members, blocks, strict=True):
        member.write_gram(block)
    norms = matrix_norms(blocks)
    torch._foreach_div_(blocks, norms)
    factors = group.blocks(_factor(grams))
    torch._foreach_div_(factors, [*torch._foreach_sqrt(norms)])
    return [member.result(factor) for member, factor in zip(members, factors, strict=True)]


def _factor(gram: Tensor) -> Tensor:
    """P [K, s, s] of the Gram matrices XXᵀ, of which the iteration ends at P X."""
    (a, b, c), *others = COEFFICIENTS
    change = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = torch.add(change, identity, alpha=a)
    for a_next, b, c in others:
        half = torch.baddbmm(gram, change, gram, beta=a)
        gram = torch.baddbmm(half, change, half, beta=a)
        change, a = torch.baddbmm(gram, gram, gram, beta=b, alpha=c), a_next
        product = torch.baddbmm(product, change, product, beta=a)
    return product


@dataclass(frozen=True)
class _Place:
    """Where the k blocks of a stack lie: at one row of k matrices that follow each other."""

    index: int
    shape: tuple[int, ...]  # [n, n] or [k, n, n]
    first: int
    row: int


@dataclass(frozen=True)
class _Group:
    """Gram matrices that are iterated together, as diagonal blocks of matrices of `side` rows."""

    side: int
    filled: list[int] = field(default_factory=list)  # rows of each matrix that are taken
    places: list[_Place] = field(default_factory=list)

    def place(self, index: int, shape: tuple[int, ...], is_last: bool) -> bool:
        """Find room for the blocks of a stack; in new matrices if it is the last group."""
        *stack, rows = shape
        count = stack[0] if stack else 1
        largest = min(MAX_SHARED, max(MIN_SIDE, MAX_PADDING * rows))
        may_grow = not self.places or is_last and self.side <= largest
        for first in range(len(self.filled) + may_grow):
            taken = self.filled[first : first + count]
            row = max(taken, default=0)
            if row + rows <= self.side and (may_grow or len(taken) == count):
                self.filled[first : first + count] = [row + rows] * count
                self.places.append(_Place(index, (*shape, rows), first, row))
                return True
        return False

    def blocks(self, matrices: Tensor) -> list[Tensor]:
        """The blocks in matrices [K, s, s], as views."""
        s = self.side
        return [
            matrices.as_strided(
                place.shape, (s * s, s, 1)[-len(place.shape):],
                place.first * s * s + place.row * (s + 1),
            ) for place in self.places
        ]


@lru_cache
def _groups(kinds: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]) -> list[_Group]:
    """Places for Gram matrices of these shapes [(k,) n], dtypes and devices, the largest first."""
    groups: dict[Any, list[_Group]] = {}
    for index in sorted(range(len(kinds)), key=lambda index: -kinds[index][0][-1]):
        shape, *kind = kinds[index]
        alike = groups.setdefault((*kind,), [])
        if not any(group.place(index, shape, group is alike[-1]) for group in alike):
            alike.append(_Group(shape[-1]))
            alike[-1].place(index, shape, True)
    return [group for alike in groups.values() for group in alike]
