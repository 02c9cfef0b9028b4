"""The covariance of a network's outputs when its weights have a Gaussian distribution.

With J_n [M, P] the Jacobian of example n's outputs in the weights and Λ their precision, it is
S_n = J_n Λ⁻¹ J_nᵀ, exact for the network linearized at the mean. Of the M = R·C outputs, the C of
one place (one pixel, one token) need their covariance with each other: C x C at each of N = B·R
places. J is computed from each layer's inputs and output gradients, a few outputs and examples at a
time, with one backward pass for each output. For layers with one position and a Kronecker
eigenbasis it is not even formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pyrocurv.curvature.collect import by_example
from pyrocurv.curvature.layer_statistics import (
    GradientStatistics,
    LayerStatistics,
    gradient_statistics,
)
from pyrocurv.curvature.likelihood import ExampleSelection
from pyrocurv.curvature.output_gradients import pull
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall, MixedRowsCall, OpCall
from pyrocurv.structures import KroneckerEigen, Rescaled, Structure
from pyrocurv.structures.eigenspaces import squared_projections
from pyrocurv.structures.linalg import eigh_psd
from pyrocurv.structures.rescaled import KroneckerScaling

MAX_ELEMENTS = 2**23  # of a Jacobian that is formed at once
MAX_GRADIENTS = 2**26  # entries of output gradients that are kept at once
PROGRESS_DELAY = 5  # seconds


@dataclass(frozen=True, eq=False)
class BlockCovariance:
    """The covariance matrices [N, C, C] of the outputs at N places."""

    matrix: Tensor

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, places: slice) -> BlockCovariance:
        return BlockCovariance(self.matrix[places])

    def dense(self) -> Tensor:
        """[N, C, C]."""
        return self.matrix

    def diag(self) -> Tensor:
        """The variances [N, C]."""
        return self.matrix.diagonal(dim1=-2, dim2=-1)

    def correlate(self, z: Tensor) -> Tensor:
        """Deviations [N, C, K] with this covariance, from standard normal z [C, K]."""
        matrix = self.matrix.to(z.dtype)
        root, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):  # singular, as with fewer weights than outputs
            values, vectors = eigh_psd(matrix)
            root = vectors * values.sqrt().unsqueeze(-2)
        return root @ z


@dataclass(frozen=True, eq=False)
class SpectralCovariance:
    """R (U diag(w_n) Uᵀ + rest_n (I - U Uᵀ)) R for N places, with R = diag(root).

    Args:
        weights: w [N, s].
        basis: U, orthonormal columns [C, s]; None for the identity.
        rest: [N, 1], the variance orthogonal to U where s < C.
        root: [C]; None for ones.
    """

    weights: Tensor
    basis: Tensor | None = None
    rest: Tensor | None = None
    root: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, places: slice) -> SpectralCovariance:
        rest = None if self.rest is None else self.rest[places]
        return SpectralCovariance(self.weights[places], self.basis, rest, self.root)

    def dense(self) -> Tensor:
        """[N, C, C]."""
        u, weights = self.basis, self.weights
        if u is None:
            matrix = weights.diag_embed()
        elif self.rest is None:
            matrix = (u * weights.unsqueeze(-2)) @ u.mT
        else:
            matrix = (u * (weights - self.rest).unsqueeze(-2)) @ u.mT
            matrix = matrix + self.rest.expand(-1, len(u)).diag_embed()
        return matrix if self.root is None else self.root[:, None] * matrix * self.root

    def diag(self) -> Tensor:
        """The variances [N, C]."""
        diagonal = self.weights
        if self.basis is not None:
            squares = squared_projections(torch.eye(len(self.basis)).to(self.basis), self.basis)
            rest = [] if self.rest is None else [self.rest]
            diagonal = torch.cat([self.weights, *rest], -1) @ squares.mT
        return diagonal if self.root is None else diagonal * self.root.square()

    def correlate(self, z: Tensor) -> Tensor:
        """Deviations [N, C, K] with this covariance, from standard normal z [C, K]."""
        roots = self.weights.to(z.dtype).sqrt().unsqueeze(-1)
        if self.basis is None:
            deviations = roots * z
        else:
            basis = self.basis.to(z.dtype)
            rest = 0.0 if self.rest is None else self.rest.to(z.dtype).sqrt().unsqueeze(-1)
            deviations = basis @ ((roots - rest) * (basis.mT @ z))
            if isinstance(rest, Tensor):
                deviations = deviations.addcmul_(rest, z)
        return deviations if self.root is None else deviations * self.root[:, None]


OutputCovariance = BlockCovariance | SpectralCovariance


def propagate(
    blocks: Sequence[Block], precisions: Sequence[Structure], output: Tensor,
    calls: Sequence[LayerCall], size: int | None = None,
) -> Tensor:
    """S [B, R, C, C] of outputs [B, ...] in groups of C = `size` that follow each other.

    None: all outputs of an example, R = 1. Many backward passes show their progress on a terminal.
    A layer whose rows are not the examples takes a backward pass for each of them.
    """
    batch_size = len(output)
    own = {layer for block in blocks for layer in block.layers}
    calls = by_example([call for call in calls if call.layer in own], batch_size)
    with torch.enable_grad():
        columns = output.reshape(batch_size, -1)
        size = size or columns.shape[1]
        columns = columns.unflatten(1, (-1, size))  # [B, R, C]
    places = columns.shape[1]
    covariance = columns.new_zeros(batch_size, places, size, size).detach()
    step = max(1, MAX_GRADIENTS // (size * sum(map(_gradient_size, calls)) or 1))
    chunks = tqdm(
        torch.arange(places, device=output.device).split(step), "output covariance",
        disable=None, delay=PROGRESS_DELAY, leave=False,
    )
    for chunk in chunks:
        start, stop = int(chunk[0]), int(chunk[-1]) + 1
        with torch.enable_grad():
            scalars = columns[:, start:stop].flatten(1).unbind(1)
            gradients = pull(scalars, calls, batch_size)
        for block, precision in zip(blocks, precisions, strict=True):
            _add_block(covariance[:, start:stop], block, precision, calls, gradients)
    return covariance


def _gradient_size(call: LayerCall) -> int:
    """The number of entries of one output gradient."""
    if isinstance(call, OpCall):
        return call.record.output_shape.numel()
    if isinstance(call, MixedRowsCall):
        return call.batch_size * call.inner.record.output_shape.numel()
    return call.batch_size * call.layer.size


@torch.no_grad()
def _add_block(
    covariance: Tensor, block: Block, precision: Structure, calls: Sequence[LayerCall],
    gradients: Sequence[Tensor],
) -> None:
    """Add one block's term to S [B, r, C, C], a few examples at a time."""
    batch_size, places, size, _ = covariance.shape
    examples = ExampleSelection(batch_size)
    statistics = gradient_statistics(block, calls, gradients, examples)
    chunk = max(1, MAX_ELEMENTS // (places * size * block.size))
    for rows in torch.arange(batch_size, device=covariance.device).split(chunk):
        covariance[rows] += _block_covariance(statistics[rows], precision, places, size)


def _block_covariance(
    statistics: GradientStatistics, precision: Structure, places: int, size: int
) -> Tensor:
    """J Λ⁻¹ Jᵀ [b, r, C, C] of one block."""
    statistics, precision, _ = without_scaling(statistics, precision)
    if isinstance(precision, KroneckerEigen) and precision.spectrum.dim() == 2:
        (layer,) = statistics.layers
        if len(layer) == 1 and layer[0].is_rank_one and len(layer[0].g) == places * size:
            return _rank_one_covariance(layer[0], precision, size)
    jacobian = torch.stack([*statistics.jacobians()])  # [r C, b, P]
    if len(jacobian) < places * size:  # no output depends on these weights
        return jacobian.new_zeros(jacobian.shape[1], places, size, size)
    solved = precision.solve(jacobian)
    left, right = (rows.movedim(0, 1).unflatten(1, (places, size)) for rows in (jacobian, solved))
    covariance = left @ right.mT
    return (covariance + covariance.mT) / 2


def without_scaling(
    statistics: GradientStatistics, precision: Structure
) -> tuple[GradientStatistics, Structure, KroneckerScaling | None]:
    """Statistics and precision of the weights in which a Kronecker prior is isotropic."""
    if not (isinstance(precision, Rescaled) and isinstance(precision.inner, KroneckerEigen)):
        return statistics, precision, None
    root, inner = precision.root.view(precision.inner.shape), precision.inner
    roots = root[..., 0], root[..., 0, :] / root[..., 0, :1]
    scaling = KroneckerScaling(root.new_ones(()), roots)
    return statistics.whiten(scaling), inner, scaling


def _rank_one_covariance(
    statistics: LayerStatistics, precision: KroneckerEigen, size: int
) -> Tensor:
    """For J_m = g_m aᵀ: Σ_ij (u_iᵀ g_m)(u_iᵀ g_n)(v_jᵀ a)² / λ_ij, without forming J."""
    a, g = statistics.a[0, :, 0], statistics.g[:, :, 0].movedim(0, 1)  # [b, I], [b, r C, O]
    g = g.unflatten(1, (-1, size))
    u = precision.output_basis
    weights, rest = output_weights(a, precision)
    leading = g @ u
    covariance = (leading * weights[:, None, None]) @ leading.mT
    if rest is not None:
        outside = g - leading @ u.mT
        covariance = covariance + (outside @ outside.mT) * rest[:, None, None]
    return covariance


def output_weights(a: Tensor, precision: KroneckerEigen) -> tuple[Tensor, Tensor | None]:
    """Σ_j (v_jᵀ a)² / λ_ij for inputs a [N, I]: [N, s], and [N, 1] orthogonal to a truncated U."""
    u, v = precision.output_basis, precision.input_basis
    weights = squared_projections(a, v) @ precision.spectrum.reciprocal().mT
    size = u.shape[1]
    return (weights, None) if size == u.shape[0] else (weights[:, :size], weights[:, size:])
