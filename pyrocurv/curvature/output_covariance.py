"""The covariance of a network's outputs when its weights have a Gaussian distribution.

With J_n [M, P] the Jacobian of example n's outputs in the weights and Λ their precision, it is
S_n = J_n Λ⁻¹ J_nᵀ, exact for the network linearized at the mean. J is computed from each layer's
inputs and output gradients, a few examples at a time, with one backward pass for each output. For
layers with one position and a Kronecker eigenbasis it is not even formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrocurv.curvature.collect import check_batch
from pyrocurv.curvature.layer_statistics import (
    GradientStatistics,
    LayerStatistics,
    gradient_statistics,
)
from pyrocurv.curvature.likelihood import ExampleSelection
from pyrocurv.curvature.output_gradients import pull
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.structures import KroneckerEigen, Rescaled, Structure
from pyrocurv.structures.kronecker_eigen import squared_projections
from pyrocurv.structures.rescaled import KroneckerScaling

MAX_ELEMENTS = 2**23  # of a Jacobian that is formed at once


def propagate(
    blocks: Sequence[Block], precisions: Sequence[Structure], output: Tensor,
    calls: Sequence[LayerCall],
) -> Tensor:
    """S [B, M, M] of outputs [B, ...], for M outputs of each example.

    Raises ValueError for a layer that does not read the batch as its first axis.
    """
    batch_size = len(output)
    check_batch(calls, batch_size)
    with torch.enable_grad():
        columns = output.reshape(batch_size, -1)  # [B, M]
        gradients = pull(columns.unbind(1), calls, batch_size)
    outputs = columns.shape[1]
    covariance = columns.new_zeros(batch_size, outputs, outputs).detach()
    with torch.no_grad():
        for block, precision in zip(blocks, precisions, strict=True):
            statistics = gradient_statistics(
                block, calls, gradients, ExampleSelection(batch_size)
            )
            chunk = max(1, MAX_ELEMENTS // (outputs * block.size))
            for examples in torch.arange(batch_size, device=output.device).split(chunk):
                covariance[examples] += _block_covariance(
                    statistics[examples], precision, outputs
                )
    return covariance


def _block_covariance(
    statistics: GradientStatistics, precision: Structure, outputs: int
) -> Tensor:
    """J Λ⁻¹ Jᵀ [b, M, M] of one block."""
    if isinstance(precision, Rescaled) and isinstance(precision.inner, KroneckerEigen):
        root, precision = precision.root.view(precision.inner.shape), precision.inner
        roots = root[..., 0], root[..., 0, :] / root[..., 0, :1]
        statistics = statistics.whiten(KroneckerScaling(root.new_ones(()), roots))
    if isinstance(precision, KroneckerEigen) and precision.spectrum.dim() == 2:
        (layer,) = statistics.layers
        if len(layer) == 1 and layer[0].is_rank_one:
            return _rank_one_covariance(layer[0], precision)
    jacobian = torch.stack([*statistics.jacobians()])  # [M, b, P]
    if len(jacobian) < outputs:  # no output depends on these weights
        return jacobian.new_zeros(jacobian.shape[1], outputs, outputs)
    solved = precision.solve(jacobian)
    covariance = jacobian.movedim(0, 1) @ solved.movedim(0, 1).mT
    return (covariance + covariance.mT) / 2


def _rank_one_covariance(statistics: LayerStatistics, precision: KroneckerEigen) -> Tensor:
    """For J_m = g_m aᵀ: Σ_ij (u_iᵀ g_m)(u_iᵀ g_n)(v_jᵀ a)² / λ_ij, without forming J."""
    a, g = statistics.a[0, :, 0], statistics.g[:, :, 0].movedim(0, 1)  # [b, I], [b, M, O]
    u, v = precision.output_basis, precision.input_basis
    inputs, size = squared_projections(a, v), u.shape[1]
    weights = inputs @ precision.spectrum.reciprocal().mT  # [b, s']
    leading = g @ u
    covariance = (leading * weights[:, None, :size]) @ leading.mT
    if size < u.shape[0]:
        rest = g - leading @ u.mT
        covariance = covariance + (rest @ rest.mT) * weights[:, size:, None]
    return covariance
