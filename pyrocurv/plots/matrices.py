"""What a structure of a curvature keeps: the matrix as a picture, and its eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrocurv.plots.arguments import axes
from pyrocurv.runtime.validation import check_is, check_positive, check_tensor
from pyrocurv.structures import Structure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST = 4_000  # rows of a matrix that is made dense for a picture


def heat_map(
    matrix: Structure | Tensor, ax: Axes | None = None, limit: float | None = None
) -> Axes:
    """Draw a symmetric matrix: blue for negative entries, red for positive ones.

    Colors follow the square root of an entry's size, which shows small blocks beside large ones.

    Args:
        matrix: a structure, as `pyrocurv.curvature.estimate` returns it, or a tensor [P, P], with
            at most 4,000 rows.
        ax: the axes to draw on; None for a new figure.
        limit: the size of an entry of full color; None for the largest. Give the same to pictures
            that are to be compared.

    Returns:
        The axes drawn on, with a color bar.

    Raises:
        TypeError: `matrix` is neither a structure nor a tensor.
        ValueError: it is not square, too large or not finite, or `limit` is not positive.

    Example:
        >>> import torch
        >>> from pyrocurv.curvature import estimate
        >>> net = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
        >>> matrix = estimate(net, x, y, likelihood="categorical", structure="kfac")
        >>> ax = heat_map(matrix)
        >>> ax.get_title()
        'BlockDiagonal, 8 x 8'
    """
    if limit is not None:
        check_positive("limit", limit)
    entries = _dense("matrix", matrix)
    size = float(entries.abs().max()) if limit is None else limit
    ax = axes(ax)
    scaled = entries.sign() * (entries.abs() / (size or 1.0)).sqrt()
    image = ax.imshow(scaled.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    ticks = [-1.0, -0.5, 0.0, 0.5, 1.0]  # of the square roots
    bar = ax.figure.colorbar(image, ax=ax, ticks=ticks, shrink=0.8)
    bar.ax.set_yticklabels([f"{tick * abs(tick) * size:.2g}" for tick in ticks])
    kind = type(matrix).__name__ if isinstance(matrix, Structure) else "Matrix"
    ax.set_title(f"{kind}, {len(entries)} x {len(entries)}")
    ax.set(xticks=[], yticks=[])
    return ax


def spectrum(
    matrices: Structure | Tensor | Mapping[str, Structure | Tensor], ax: Axes | None = None
) -> Axes:
    """Draw the eigenvalues of matrices, the largest first, on a logarithmic axis.

    Eigenvalues of 0 are left out, negative ones, of a Hessian, are drawn by their size, dashed.

    Args:
        matrices: a structure or a symmetric tensor [P, P], or several by name.
        ax: the axes to draw on; None for a new figure.

    Returns:
        The axes drawn on.

    Raises:
        TypeError: a matrix is neither a structure nor a tensor.
        ValueError: there is none, or one is not square, too large (tensors) or not finite.

    Example:
        >>> import torch
        >>> ax = spectrum({"diagonal": torch.diag(torch.tensor([3.0, 1.0, 0.0]))})
        >>> ax.get_ylabel()
        'eigenvalue'
    """
    named = matrices if isinstance(matrices, Mapping) else {"": matrices}
    if not named:
        raise ValueError("matrices is empty: at least one is needed")
    found = {name: _eigenvalues("matrices", matrix) for name, matrix in named.items()}
    ax = axes(ax)
    for name, values in found.items():
        tiny = 1e-12 * float(values.abs().max())
        positive, negative = values[values > tiny], -values[values < -tiny]
        ranks = range(1, len(positive) + 1)
        (line,) = ax.plot(ranks, positive.tolist(), ".-", markersize=3, label=name or None)
        if len(negative):
            ordered = negative.sort(descending=True).values
            label = f"{name}, negative".lstrip(", ")
            ax.plot(
                range(1, len(ordered) + 1), ordered.tolist(), "--", color=line.get_color(),
                label=label,
            )
    ax.set_yscale("log")
    ax.set(xlabel="rank", ylabel="eigenvalue")
    if any(found):
        ax.legend(fontsize="small")
    return ax


def _dense(name: str, matrix: Structure | Tensor) -> Tensor:
    """[P, P] in float64 on the CPU."""
    check_is(name, matrix, (Structure, Tensor), "a Structure or a tensor [P, P]")
    if isinstance(matrix, Structure):
        _check_size(name, matrix.size)
        entries = matrix.dense()
    else:
        check_tensor(name, matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ValueError(f"{name} has shape {list(matrix.shape)}: [P, P] is needed")
        _check_size(name, len(matrix))
        entries = matrix
    return _finite(name, entries)


def _check_size(name: str, size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} rows: at most {LARGEST:,} can be drawn")


def _eigenvalues(name: str, matrix: Structure | Tensor) -> Tensor:
    """[P], the largest first; a structure knows its own, at any size."""
    if isinstance(matrix, Structure):
        return _finite(name, matrix.eigenvalues()).flip(0)
    return torch.linalg.eigvalsh(_dense(name, matrix)).flip(0)


def _finite(name: str, values: Tensor) -> Tensor:
    """In float64 on the CPU."""
    values = values.detach().cpu().double()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} has entries that are not finite")
    return values
