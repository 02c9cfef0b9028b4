"""Products with the Hessian in the weights: exact for any network, one backward pass for each row.

With g the gradient of a scalar and its graph kept, a vector v gives H v = ∇(gᵀv). Random signs v
replace the rows where there are too many (Hutchinson 1990): E[v vᵀ] = 1, so E[(v ∘ H v)_i] = H_ii.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from pyrocurv.layers.block import Block, BlockIndices
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.structures import Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling

MAX_PASSES = 512  # backward passes that an exact result may take for one layer


def vector_hessian_products(
    gradient: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge], vectors: Tensor
) -> list[Tensor | None]:
    """The gradients of gᵀv with respect to the inputs, for vectors v [N, *gradient.shape].

    One batched pass, or a loop if an op in the graph does not support it. None: no path.
    """
    if not gradient.requires_grad:  # the scalar is linear
        return [None] * len(inputs)
    if len(vectors) > 1:
        try:
            return list(torch.autograd.grad(
                gradient, inputs, vectors, retain_graph=True, allow_unused=True,
                is_grads_batched=True,
            ))
        except RuntimeError:
            pass  # a genuine error is raised again below
    products = [
        torch.autograd.grad(gradient, inputs, v, retain_graph=True, allow_unused=True)
        for v in vectors
    ]
    return [
        None if rows[0] is None else torch.stack(rows) for rows in zip(*products, strict=True)
    ]


def rademacher(*shape: int, like: Tensor) -> Tensor:
    """Independent entries ±1."""
    return torch.randint(2, shape, device=like.device).to(like.dtype) * 2 - 1


@dataclass(frozen=True, eq=False)
class WeightHessian:
    """The gradient g in the weights of a block, with its graph; `leaves` are these weights."""

    block: Block
    gradient: Tensor  # [P]
    leaves: tuple[Tensor, ...]
    chunk: int  # vectors of one batched pass
    num_samples: int

    @property
    def is_exact(self) -> bool:
        """Whether the rows are computed one by one."""
        return self.block.size <= MAX_PASSES

    def matvec(self, vectors: Tensor) -> Tensor:
        """H v for vectors [N, P]."""
        (order,) = BlockIndices((self.block,), self.block.tensors, vectors.device)
        return torch.cat([self._flat(chunk)[:, order] for chunk in vectors.split(self.chunk)])

    def _flat(self, vectors: Tensor) -> Tensor:
        """H v [N, P] in the order of the leaves."""
        products = vector_hessian_products(self.gradient, self.leaves, vectors)
        return torch.cat([
            vectors.new_zeros(len(vectors), leaf.numel()) if product is None
            else product.reshape(len(product), -1)
            for product, leaf in zip(products, self.leaves, strict=True)
        ], 1)

    def matrix(self) -> Tensor:
        """H [P, P]; warns where torch's second derivatives are not those of one function."""
        rows = self.matvec(identity(self.gradient, self.block.size))
        rounding = 1e-4 * self.gradient.norm()
        # A wrong op gives 0.5 and more here; bfloat16 in three layers gives 0.007.
        if bool((rows - rows.mT).norm() > 0.1 * rows.norm() + rounding):
            warn_user(
                f"the second derivatives that torch computes for {self.block.name} are not "
                "symmetric: an op there has a wrong double backward, as weight norm has, so the "
                "Hessian is wrong too"
            )
        return symmetric(rows)

    def diagonal(self) -> Tensor:
        """diag H [P]; with random signs its variance is 2 sum_j≠i H_ij² / num_samples."""
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
            blocks = self.matrix().view(count, size, count, size)
            return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        sign = rademacher(self.num_samples, 1, count, 1, like=self.gradient)
        vectors = sign * identity(self.gradient, size)[:, None]  # [N, n, Γ, n]
        products = self.matvec(vectors.reshape(-1, self.block.size)).view(vectors.shape)
        return symmetric((sign * products).mean(0).movedim(0, -1))

    def kronecker(self, batch_size: int) -> Kronecker:
        """The blocks of a layer with one output for each group, each as 1 ⊗ itself."""
        groups = self.groups()
        output = groups.new_ones(len(groups), 1, 1) * batch_size
        return Kronecker(output, groups / batch_size)

    def eigenvalues(
        self, basis: KroneckerEigen, scaling: KroneckerScaling | None
    ) -> KroneckerEigen:
        """The mean of one layer's H, scaled by a prior, over the eigenspaces of a basis."""
        (layer,) = self.block.layers
        u, v, shape = basis.output_basis, basis.input_basis, layer.matrix_shape
        root = None if scaling is None else scaling.root
        root = self.gradient.new_ones(shape) if root is None else root.view(shape)
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
        products = self.matvec((vectors / root).flatten(1)).view(vectors.shape) / root
        left, right = complete_basis(u).mT, complete_basis(v)
        return eigenspace_means(
            ((left @ vectors @ right) * (left @ products @ right)).mean(0), u, v
        )


def identity(like: Tensor, size: int, *groups: int) -> Tensor:
    """1 [*Γ, n, n]."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(*groups, size, size)


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part."""
    return (matrix + matrix.mT) / 2


def complete_basis(basis: Tensor) -> Tensor:
    """The columns of a basis, followed by those of the identity if it is truncated."""
    *groups, size, rank = basis.shape
    return basis if size == rank else torch.cat([basis, identity(basis, size, *groups)], -1)


def eigenspace_means(table: Tensor, u: Tensor, v: Tensor) -> KroneckerEigen:
    """Means over the eigenspaces of u and v, from quadratic forms of the complete bases."""
    return KroneckerEigen(u, v, _means(_means(table, v).mT, u).mT)


def _means(table: Tensor, basis: Tensor) -> Tensor:
    """[..., N] -> the entries of the basis and, where it is truncated, the mean of the rest."""
    size, rank = basis.shape[-2:]
    if size == rank:
        return table
    leading = table[..., :rank]
    rest = table[..., rank:].sum(-1, keepdim=True) - leading.sum(-1, keepdim=True)
    return torch.cat([leading, rest / (size - rank)], -1)
