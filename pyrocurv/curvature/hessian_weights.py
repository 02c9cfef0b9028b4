"""Products with the Hessian in the weights: exact for any network, a backward pass for each row.

With g the gradient of a scalar and its graph kept, a vector v gives H v = ∇(gᵀv). Random signs v
give what the rows are too many for (Hutchinson 1990): E[v vᵀ] = 1, so E[(v ∘ H v)_i] = H_ii.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyrocurv.layers.block import Block, BlockIndices
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures import KroneckerEigen

PASSES = 512  # backward passes that an exact answer may take for one layer
Units = tuple[Tensor, Tensor]  # the roots p [*Γ, O] and r [*Γ, I] of a prior


def vector_hessian_products(
    gradient: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], vectors: Tensor
) -> list[Tensor | None]:
    """For each of vectors [N, *gradient.shape] the gradients of its product with `gradient`.

    One batched pass, or a loop where an op on the way has no batched form. None: no path.
    """
    if not gradient.requires_grad:  # L is linear
        return [None] * len(inputs)
    if len(vectors) > 1:
        try:
            return list(torch.autograd.grad(
                gradient, inputs, vectors, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            ))
        except RuntimeError:
            pass  # a true fault comes up again below
    rows = [
        torch.autograd.grad(gradient, inputs, v, retain_graph=True, allow_unused=True)
        for v in vectors
    ]
    return [None if part[0] is None else torch.stack(part) for part in zip(*rows, strict=True)]


def rademacher(*shape: int, like: Tensor) -> Tensor:
    """Independent entries ±1."""
    return torch.randint(2, shape, device=like.device).to(like.dtype) * 2 - 1


@dataclass(frozen=True, eq=False)
class WeightHessian:
    """g in the weights of a block, packed [P], with its graph; the weights are its leaves."""

    block: Block
    gradient: Tensor
    leaves: tuple[Tensor, ...]
    chunk: int  # vectors that go at once
    num_samples: int

    @property
    def is_exact(self) -> bool:
        """Whether the rows are taken one by one."""
        return self.block.size <= PASSES

    def matvec(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, P]."""
        (order,) = BlockIndices((self.block,), self.block.tensors, vectors.device)
        return torch.cat([self._flat(some)[:, order] for some in vectors.split(self.chunk)])

    def _flat(self, vectors: Tensor) -> Tensor:
        """H v [N, P] in the order of the leaves."""
        parts = zip(
            vector_hessian_products(self.gradient, self.leaves, vectors), self.leaves, strict=True
        )
        return torch.cat([
            vectors.new_zeros(len(vectors), leaf.numel()) if part is None
            else part.reshape(len(part), -1) for part, leaf in parts
        ], 1)

    def matrix(self) -> Tensor:
        """H [P, P], with a word where torch's second derivatives are not those of one function."""
        found = self.matvec(identity(self.gradient, self.block.size))
        rounding = 1e-4 * self.gradient.norm()
        # A wrong op shows .5 and more here; bfloat16 in three layers .007.
        if bool((found - found.mT).norm() > 0.1 * found.norm() + rounding):
            warn_user(
                f"the second derivatives that torch gives of {self.block.name} are not symmetric: "
                "an op there has a wrong double backward, as weight norm has, and the Hessian is "
                "wrong with it"
            )
        return symmetric(found)

    def diagonal(self) -> Tensor:
        """diag H [P]; by signs its variance is 2 sum_j≠i H_ij² / num_samples."""
        if self.is_exact:
            return self.matrix().diagonal()
        vectors = rademacher(self.num_samples, self.block.size, like=self.gradient)
        return (vectors * self.matvec(vectors)).mean(0)

    def groups(self) -> Tensor:
        """The blocks of the groups of one layer, [Γ, O·I, O·I]."""
        (layer,) = self.block.layers
        count = layer.lead[0]
        size = self.block.size // count
        if self.is_exact:
            apart = self.matrix().view(count, size, count, size)
            return apart.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        sign = rademacher(self.num_samples, 1, count, 1, like=self.gradient)
        vectors = sign * identity(self.gradient, size)[:, None]  # [N, n, Γ, n]
        found = self.matvec(vectors.reshape(-1, self.block.size)).view(vectors.shape)
        return symmetric((sign * found).mean(0).movedim(0, -1))

    def eigen(self, basis: KroneckerEigen, units: Units | None) -> KroneckerEigen:
        """The mean of one layer's H over the eigenspaces of a basis, in the units of a prior."""
        (layer,) = self.block.layers
        u, v, shape = basis.output_basis, basis.input_basis, layer.matrix_shape
        root = self.gradient.new_ones(shape)
        if units is not None:
            root = units[0].unsqueeze(-1) * units[1].unsqueeze(-2)
        if self.is_exact:
            matrix = self.matrix() / torch.outer(root.flatten(), root.flatten())
            matrix = matrix.view(*shape, *shape)
            if layer.lead:
                matrix = matrix.diagonal(dim1=0, dim2=3).movedim(-1, 0)
            left, right = complete_basis(u), complete_basis(v)
            half = torch.einsum("...oipq,...ok,...pk->...kiq", matrix, left, left)
            return eigenspace_means(
                torch.einsum("...kiq,...ij,...qj->...kj", half, right, right), u, v
            )
        vectors = rademacher(self.num_samples, *shape, like=root)
        leading = rademacher(self.num_samples, *shape[:-2], u.shape[-1], v.shape[-1], like=root)
        vectors = vectors + u @ (leading - u.mT @ vectors @ v) @ v.mT  # signs in the basis
        found = self.matvec((vectors / root).flatten(1)).view(vectors.shape) / root
        left, right = complete_basis(u).mT, complete_basis(v)
        return eigenspace_means(((left @ vectors @ right) * (left @ found @ right)).mean(0), u, v)


def identity(like: Tensor, size: int, *groups: int) -> Tensor:
    """1 [*Γ, n, n]."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*groups, size, size)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return (matrix + matrix.mT) / 2


def complete_basis(basis: Tensor) -> Tensor:
    """The columns of a basis and, where it is truncated, those of the identity beside them."""
    *groups, size, rank = basis.shape
    return basis if size == rank else torch.cat([basis, identity(basis, size, *groups)], -1)


def eigenspace_means(table: Tensor, u: Tensor, v: Tensor) -> KroneckerEigen:
    """Quadratic forms of the columns of `complete_basis` as means over the eigenspaces of u and
    v."""
    return KroneckerEigen(u, v, _means(_means(table, v).mT, u).mT)


def _means(table: Tensor, basis: Tensor) -> Tensor:
    """[..., N] -> the entries of the basis and, where it is truncated, the mean of the rest."""
    size, rank = basis.shape[-2:]
    if size == rank:
        return table
    leading = table[..., :rank]
    rest = table[..., rank:].sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)
    return torch.cat([leading, rest / (size - rank)], -1)
