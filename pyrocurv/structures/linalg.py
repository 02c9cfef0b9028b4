"""Linear algebra of dense symmetric matrices that does not fail in silence."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [n], ascending, and eigenvectors [n, n] of a symmetric matrix.

    A failure in the matrix's own precision, or a device without the kernel, is tried once more in
    float64 on the CPU. Raises `torch.linalg.LinAlgError` when that fails too, as it does for
    entries that are not finite.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except (torch.linalg.LinAlgError, NotImplementedError):
        values = vectors = matrix.new_full((), torch.nan)
    if not _finite(vectors):  # LAPACK may also fail in silence: float32 of low rank does
        values, vectors = torch.linalg.eigh(matrix.to("cpu", torch.float64))
        if not _finite(vectors):
            raise torch.linalg.LinAlgError("eigh found no finite eigenvectors")
    return values.to(matrix), vectors.to(matrix).contiguous()


def _finite(matrix: Tensor) -> bool:
    return bool(torch.isfinite(matrix).all())


def eigh_psd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`eigh` of a positive semi-definite matrix: rounding below zero is set to zero."""
    values, vectors = eigh(matrix)
    return values.clamp(min=0), vectors


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a positive definite matrix.

    Where rounding has made it indefinite the factor is taken in float64 on the CPU, of the matrix
    lifted by that rounding, with a warning. Raises `torch.linalg.LinAlgError` when that fails too.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed.any()):
        return factor
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().max())
    warnings.warn(
        f"a matrix of {len(matrix)} rows is indefinite by rounding: {rounding:.1e} is added to its "
        "diagonal (float64 would do without)", stacklevel=2,
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
