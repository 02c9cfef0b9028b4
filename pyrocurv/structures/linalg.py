"""Linear algebra of dense symmetric matrices that does not fail in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

SMALL = 1000  # rows of a matrix whose eigenvectors one thread is best at


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and eigenvectors [..., n, n] of symmetric matrices.

    A failure in the matrix's own precision, or a device without the kernel, is tried once more in
    float64 on the CPU. Raises `torch.linalg.LinAlgError` when that fails too, as it does for
    entries that are not finite.
    """
    try:
        with _one_thread() if matrix.shape[-1] <= SMALL else nullcontext():
            values, vectors = torch.linalg.eigh(matrix)
    except (torch.linalg.LinAlgError, NotImplementedError):
        values = vectors = matrix.new_full((), torch.nan)
    if not _finite(vectors):  # LAPACK may also fail in silence: float32 of low rank does
        values, vectors = torch.linalg.eigh(matrix.to("cpu", torch.float64))
        if not _finite(vectors):
            raise torch.linalg.LinAlgError("eigh found no finite eigenvectors")
    return values.to(matrix), vectors.to(matrix).contiguous()


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK's threads wait for each other at every column, and for long beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(matrix: Tensor) -> bool:
    return bool(torch.isfinite(matrix).all())


def eigh_blocks(matrix: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """`eigh` of `cut(matrix, num_blocks)`, block by block, at n³/p² the cost for p blocks.

    What eigenvalues of positive semi-definite matrices have below zero by rounding is set to zero.
    Small ones above it stay: of a matrix of many scales they are as real as the others.
    """
    if num_blocks == 1:
        values, vectors = eigh(matrix)
    else:
        vectors, parts = torch.zeros_like(matrix), []
        blocks = zip(_blocks(vectors, num_blocks), _blocks(matrix, num_blocks), strict=True)
        for place, block in blocks:
            found_values, found = eigh(block)
            place.copy_(found)
            parts.append(found_values.flatten(-2))
        values, order = torch.cat(parts, -1).sort(-1)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    size = values.abs().amax(-1, keepdim=True)
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * size
    return torch.where((values < 0) & (values >= -rounding), 0.0, values), vectors


def eigh_psd(matrix: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """`eigh_blocks` of the nearest positive semi-definite matrices: none below zero."""
    values, vectors = eigh_blocks(matrix, num_blocks)
    return values.clamp(min=0), vectors


def cut(matrix: Tensor, num_blocks: int) -> Tensor:
    """matrix [..., n, n] with zeros outside `num_blocks` blocks on the diagonal; n: the diagonal.

    Where they do not divide n, the first blocks have one row more, as in `torch.tensor_split`.
    """
    if num_blocks == 1:
        return matrix
    result = torch.zeros_like(matrix)
    for place, block in zip(_blocks(result, num_blocks), _blocks(matrix, num_blocks), strict=True):
        place.copy_(block)
    return result


def _blocks(matrix: Tensor, num_blocks: int) -> Iterator[Tensor]:
    """Views [..., b, k, k] of the blocks on the diagonal, first the longer ones, if any."""
    count = min(num_blocks, matrix.shape[-1])
    size, longer = divmod(matrix.shape[-1], count)
    start = 0
    for number, side in ((longer, size + 1), (count - longer, size)):
        if number:
            end = start + number * side
            part = matrix[..., start:end, start:end]
            part = part.unflatten(-1, (number, side)).unflatten(-3, (number, side))
            yield part.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            start = end


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a positive definite matrix.

    Where rounding has made it indefinite the factor is taken in float64 on the CPU, of the matrix
    lifted by that rounding, with a warning. Raises `torch.linalg.LinAlgError` when that fails too.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return factor
    remedy = " (float64 would do without)" if matrix.dtype != torch.float64 else ""
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().max())
    warnings.warn(
        f"a matrix of {len(matrix)} rows is indefinite by rounding: {rounding:.1e} is added to its "
        f"diagonal{remedy}", stacklevel=2,
    )
    lifted = matrix.to("cpu", torch.float64, copy=True)
    lifted.diagonal().add_(rounding)
    return torch.linalg.cholesky(lifted).to(matrix)


def scale_tril(precision: Tensor) -> Tensor:
    """Lower Cholesky factor L of the covariance, L Lᵀ = precision⁻¹, without forming the inverse.

    With J the exchange matrix and J Λ J = C Cᵀ, U = J C J is upper triangular, Λ = U Uᵀ, L = U⁻ᵀ.
    """
    upper = cholesky(precision.flip(-2, -1)).flip(-2, -1)
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper.mT, identity, upper=False)
