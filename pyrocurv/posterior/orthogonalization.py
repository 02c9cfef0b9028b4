"""The nearest matrices with orthonormal rows or columns, by a Newton-Schulz iteration.

    X ← X / |X|,   X ← (a I + b XXᵀ + c (XXᵀ)²) X,   five times

keeps the singular vectors of X and takes all but its smallest singular values to about 1. It needs
products of matrices alone, of the smaller side, in a dtype that is fast on the device.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Björck & Bowie 1971,
"An iterative algorithm for computing the best estimate of an orthogonal matrix".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # those of Jordan et al.: steep at 0, then in [0.7, 1.2]
STEPS = 5


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About U Vᵀ for each matrix U S Vᵀ [n, m]; zeros for zeros.

    Matrices of one shape are iterated together, those in float32 in bfloat16 unless on a CPU.

    Example:
        >>> import torch
        >>> (x,) = orthogonalize([torch.diag(torch.tensor([3.0, 1.0]))])
        >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.35)
        True
    """
    groups: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(index)
    results: dict[int, Tensor] = {}
    for members in groups.values():
        stacked = torch.stack([matrices[index] for index in members])
        results.update(zip(members, _polar_factor(stacked).unbind(), strict=True))
    return [results[index] for index in range(len(matrices))]


def _polar_factor(matrix: Tensor) -> Tensor:
    """`orthogonalize` of matrices [k, n, m]."""
    is_wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if is_wide else matrix.mT
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norm.clamp(min=torch.finfo(x.dtype).tiny)
    if x.device.type != "cpu" and x.dtype == torch.float32:
        x = x.bfloat16()
    x = _through_gram(x) if x.shape[-1] >= 2 * x.shape[-2] else _iterate(x)
    x = x.to(matrix.dtype)
    return x if is_wide else x.mT


def _iterate(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _through_gram(x: Tensor) -> Tensor:
    """The same for X [k, n, m] with m far larger than n: X is multiplied twice in all.

    Every iterate is P X with P, and the Gram matrix P X Xᵀ P, polynomials of X Xᵀ.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    product: Tensor | None = None
    for index in range(STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if index < STEPS - 1:
            gram = factor @ gram @ factor
    return x if product is None else product @ x
