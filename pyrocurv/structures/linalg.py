"""Linear algebra of dense symmetric matrices that does not fail silently."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from pyrocurv.structures.operands import check_count, check_square

MAX_SINGLE_THREAD = 1000  # rows of a matrix whose eigendecomposition is fastest on one thread
MAX_SOLVE = 1000  # rows of a triangular matrix that is inverted at once
EXTRA, KRYLOV_POWERS, MAX_RESTARTS = 16, 7, 20  # of the Krylov space for leading eigenvectors


def at_least_single(tensor: Tensor) -> Tensor:
    """A tensor of half precision, which LAPACK does not have, in single precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., n], ascending, and eigenvectors [..., n, n] of symmetric matrices.

    After a failure, or on a device without the kernel, they are computed in float64 on the CPU.
    Raises `torch.linalg.LinAlgError` when that fails too, as for entries that are not finite.
    """
    try:
        with _single_thread() if matrix.shape[-1] <= MAX_SINGLE_THREAD else nullcontext():
            values, vectors = torch.linalg.eigh(at_least_single(matrix))
    except (torch.linalg.LinAlgError, NotImplementedError):
        values = vectors = matrix.new_full((), torch.nan)
    if not bool(vectors.isfinite().all()):  # LAPACK also fails silently, in float32 at low rank
        values, vectors = torch.linalg.eigh(matrix.to("cpu", torch.float64))
        if not bool(vectors.isfinite().all()):
            raise torch.linalg.LinAlgError("eigh found no finite eigenvectors")
    return values.to(matrix), vectors.to(matrix).contiguous()


@contextmanager
def _single_thread() -> Iterator[None]:
    """LAPACK's threads wait for each other at every column, for long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def eigh_blocks(matrix: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """`eigh` of `cut(matrix, num_blocks)`, block by block: p blocks cost n³/p² operations.

    Eigenvalues that are negative by rounding are set to zero. Small positive ones are kept: in a
    matrix with entries of many scales they are significant.
    """
    if num_blocks == 1:
        values, vectors = eigh(matrix)
    else:
        pairs = [eigh(block) for block in _blocks(matrix, num_blocks)]
        vectors = torch.zeros_like(matrix)
        for target, (_, block_vectors) in zip(_blocks(vectors, num_blocks), pairs, strict=True):
            target.copy_(block_vectors)
        values, order = torch.cat([values.flatten(-2) for values, _ in pairs], -1).sort(-1)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    return without_rounding(values, values.shape[-1], values.abs().amax(-1, keepdim=True)), vectors


def without_rounding(values: Tensor, rows: int, largest: Tensor) -> Tensor:
    """Eigenvalues of a matrix of this many rows, zero where they are negative by rounding."""
    rounding = rows * torch.finfo(values.dtype).eps * largest
    return torch.where((values < 0) & (values >= -rounding), 0.0, values)


def leading_eigh(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues [rank], ascending, and eigenvectors [n, rank] of [n, n].

    A block Krylov space, restarted from its Ritz vectors, takes a few hundred products with a
    vector, where all eigenvectors of a wide matrix take minutes. It starts from fixed random
    numbers. `eigh` is the fallback if the residuals do not become small.

    Musco & Musco 2015, arXiv:1504.05477.
    """
    narrow, matrix = matrix, at_least_single(matrix)
    size, tolerance = len(matrix), max(torch.finfo(matrix.dtype).eps**0.75, 1e-9)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, rank + EXTRA, dtype=torch.float64, generator=generator).to(matrix)
    for _ in range(MAX_RESTARTS):
        blocks = [torch.linalg.qr(start).Q]
        for _ in range(KRYLOV_POWERS):
            blocks.append(torch.linalg.qr(matrix @ blocks[-1]).Q)
        basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
        values, vectors = eigh(basis.mT @ matrix @ basis)
        start = basis @ vectors[:, -rank - EXTRA:]
        found, top = start[:, -rank:], values[-rank:]
        residual = torch.linalg.vector_norm(matrix @ found - found * top, dim=0).amax()
        if bool(residual <= tolerance * top.abs().amax()):
            return top.to(narrow), found.to(narrow).contiguous()
    values, vectors = eigh(narrow)
    return values[-rank:], vectors[:, -rank:].contiguous()


def eigh_psd(matrix: Tensor, num_blocks: int = 1) -> tuple[Tensor, Tensor]:
    """`eigh_blocks` of the nearest positive semi-definite matrices: no negative eigenvalues."""
    values, vectors = eigh_blocks(matrix, num_blocks)
    return values.clamp(min=0), vectors


def cut(matrix: Tensor, num_blocks: int) -> Tensor:
    """The matrices with zeros outside of diagonal blocks.

    Args:
        matrix: square matrices [..., n, n].
        num_blocks: how many blocks; n or more leave the diagonal. If it does not divide n, the
            first blocks have one row more, as in `torch.tensor_split`.

    Example:
        >>> import torch
        >>> from pyrocurv.structures import cut
        >>> cut(torch.ones(3, 3), 2)
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 1.]])
    """
    check_count("num_blocks", num_blocks)
    check_square("matrix", matrix)
    if num_blocks == 1:
        return matrix
    result = torch.zeros_like(matrix)
    for target, block in zip(_blocks(result, num_blocks), _blocks(matrix, num_blocks), strict=True):
        target.copy_(block)
    return result


def _blocks(matrix: Tensor, num_blocks: int) -> Iterator[Tensor]:
    """Views [..., b, k, k] of the diagonal blocks: of the larger ones, then of the smaller ones."""
    count = min(num_blocks, matrix.shape[-1])
    size, num_larger = divmod(matrix.shape[-1], count)
    start = 0
    for number, side in ((num_larger, size + 1), (count - num_larger, size)):
        if number:
            end = start + number * side
            square = matrix[..., start:end, start:end]
            square = square.unflatten(-1, (number, side)).unflatten(-3, (number, side))
            yield square.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
            start = end


def cholesky(matrix: Tensor) -> Tensor:
    """The lower Cholesky factor of a positive definite matrix [n, n], in float32 or more.

    If it is indefinite by rounding, the rounding error is added to its diagonal, with a warning.
    Raises `torch.linalg.LinAlgError` when that fails too, in float64 on the CPU.
    """
    matrix = at_least_single(matrix)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return factor
    remedy = " (float64 would avoid that)" if matrix.dtype != torch.float64 else ""
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().max())
    warnings.warn(
        f"a matrix of {len(matrix)} rows is indefinite by rounding: {rounding:.1e} is added to its "
        f"diagonal{remedy}", stacklevel=2,
    )
    shifted = matrix.to("cpu", torch.float64, copy=True)
    shifted.diagonal().add_(rounding)
    return torch.linalg.cholesky(shifted).to(matrix)


def scale_tril(precision: Tensor) -> Tensor:
    """The lower Cholesky factor L of the covariance, L Lᵀ = precision⁻¹, without the inverse.

    With J the exchange matrix and J Λ J = C Cᵀ, U = J C J is upper triangular, Λ = U Uᵀ, L = U⁻ᵀ.
    """
    upper = cholesky(precision.flip(-2, -1)).flip(-2, -1)
    return _inverse_lower(upper.mT).to(precision.dtype)


def _inverse_lower(matrix: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n], of a large one by halves:

    [[A, 0], [B, C]]⁻¹ = [[A⁻¹, 0], [-C⁻¹ B A⁻¹, C⁻¹]], a third of the operations of a solve.
    """
    size = len(matrix)
    if size <= MAX_SOLVE:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, identity, upper=False)
    half, result = size // 2, torch.zeros_like(matrix)
    first, last = _inverse_lower(matrix[:half, :half]), _inverse_lower(matrix[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    result[half:, :half] = -last @ (matrix[half:, :half] @ first)
    return result
