"""Eigenspaces of orthonormal columns [..., n, r]; if r < n, what is left is one more eigenspace."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 512  # unit vectors that are projected at once, to bound the memory


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ [..., n, m] of vectors [..., n] and [..., m]."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def squared_projections(rows: Tensor, basis: Tensor) -> Tensor:
    """(xᵀv)² for rows x [..., n] and each column v of a basis [n, r]; if r < n, then what is left.

    That is computed as a square itself: a difference of squares might be negative by rounding.
    """
    projections = rows @ basis
    if basis.shape[-1] == basis.shape[-2]:
        return projections.square()
    rest = (rows - projections @ basis.mT).square().sum(-1, keepdim=True)
    return torch.cat([projections.square(), rest], -1)


def squared_basis(basis: Tensor) -> Tensor:
    """The `squared_projections` of all unit vectors, `MAX_ROWS` at once."""
    size = basis.shape[-2]
    if basis.shape[-1] == size:
        return basis.square()
    chunks = []
    for start in range(0, size, MAX_ROWS):
        rows = basis.new_zeros(min(MAX_ROWS, size - start), size)
        rows.diagonal(start).fill_(1)
        chunks.append(squared_projections(rows, basis))
    return torch.cat(chunks, -2)


def multiplicities(basis: Tensor) -> Tensor:
    """Dimensions of the eigenspaces: 1 for each column and, if r < n, n - r for the rest."""
    rows, columns = basis.shape[-2:]
    counts = basis.new_ones(columns + (columns < rows))
    if columns < rows:
        counts[-1] = rows - columns
    return counts


def eigenspace_norms(basis: Tensor, root: Tensor | None) -> Tensor:
    """The squared norms of the eigenspaces times a diagonal matrix, or `multiplicities`."""
    if root is None:
        return multiplicities(basis)
    norms = (root.unsqueeze(-1) * basis).square().sum(-2)
    if basis.shape[-2] == basis.shape[-1]:
        return norms
    rest = root.square().sum(-1, keepdim=True) - norms.sum(-1, keepdim=True)
    return torch.cat([norms, rest], -1)


def squared_overlap(old: Tensor, new: Tensor, root: Tensor | None) -> Tensor:
    """The mean squared projection onto each old eigenspace (row) over each new one (column).

    The new vectors are multiplied by `root` [..., n] first.
    """
    scaled = new if root is None else root.unsqueeze(-1) * new
    overlap = (old.mT @ scaled).square()  # of the columns
    if old.shape[-2] > old.shape[-1]:
        left = scaled.square().sum(-2, keepdim=True) - overlap.sum(-2, keepdim=True)
        overlap = torch.cat([overlap, left], -2)
    if (rest := new.shape[-2] - new.shape[-1]) == 0:
        return overlap
    rest_overlap = (eigenspace_norms(old, root) - overlap.sum(-1)) / rest
    return torch.cat([overlap, rest_overlap.unsqueeze(-1)], -1)
