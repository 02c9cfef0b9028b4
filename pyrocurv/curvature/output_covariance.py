"""The covariance of a network's outputs when its weights have a Gaussian one.

With J_n [M, P] the Jacobian of example n's outputs in the weights and Λ their precision it is
S_n = J_n Λ⁻¹ J_nᵀ, exact for the network that is linearised at the mean. J is rebuilt from each
layer's inputs and output gradients, a few examples at a time, one backward pass for each output;
at one position and in a Kronecker eigenbasis not even that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrocurv.curvature.collect import check_batch
from pyrocurv.curvature.layer_statistics import (
    LayerStatistics,
    Pairs,
    collect,
    is_rank_one,
    jacobians,
    select_examples,
    whiten,
)
from pyrocurv.curvature.output_gradients import pull
from pyrocurv.layers.block import Block
from pyrocurv.layers.calls import LayerCall
from pyrocurv.structures import KroneckerEigen, Rescaled, Structure
from pyrocurv.structures.kronecker_eigen import squared_projections

NUMBERS = 2**23  # of a Jacobian that is formed at once


def propagate(
    blocks: Sequence[Block], precisions: Sequence[Structure], output: Tensor,
    calls: Sequence[LayerCall],
) -> Tensor:
    """S [B, M, M] of outputs [B, ...] with M numbers for each example.

    Raises ValueError for a layer that does not see the batch as its first axis.
    """
    rows = len(output)
    check_batch(calls, rows)
    with torch.enable_grad():
        columns = output.reshape(rows, -1)
        gradients = pull(columns.unbind(1), calls, rows)
    covariance = columns.new_zeros(rows, columns.shape[1], columns.shape[1]).detach()
    with torch.no_grad():
        for block, precision in zip(blocks, precisions, strict=True):
            pairs = collect(block, calls, gradients, rows)
            size = max(1, NUMBERS // (columns.shape[1] * block.size))
            for some in torch.arange(rows, device=output.device).split(size):
                covariance[some] += _propagated(
                    select_examples(pairs, some), precision, columns.shape[1]
                )
    return covariance


def _propagated(pairs: Pairs, precision: Structure, outputs: int) -> Tensor:
    if isinstance(precision, Rescaled) and isinstance(precision.inner, KroneckerEigen):
        matrix, precision = precision.root.view(precision.inner.shape), precision.inner
        pairs = whiten(pairs, (matrix[..., 0], matrix[..., 0, :] / matrix[..., 0, :1]))
    if isinstance(precision, KroneckerEigen) and precision.spectrum.dim() == 2:
        (uses,) = pairs
        if is_rank_one(uses):
            return _product(uses[0], precision)
    jacobian = torch.stack([*jacobians(pairs)])  # [M, b, P]
    if len(jacobian) < outputs:  # no output goes back to these weights
        return jacobian.new_zeros(jacobian.shape[1], outputs, outputs)
    solved = precision.solve(jacobian)
    covariance = jacobian.movedim(0, 1) @ solved.movedim(0, 1).mT
    return (covariance + covariance.mT) / 2


def _product(pair: LayerStatistics, precision: KroneckerEigen) -> Tensor:
    """Where J_m = g_m aᵀ: Σ_ij (u_iᵀ g_m)(u_iᵀ g_n)(v_jᵀ a)² / λ_ij, and no J is formed."""
    a, g = pair.a[0, :, 0], pair.g[:, :, 0].movedim(0, 1)  # [b, I], [b, M, O]
    u, v = precision.output_basis, precision.input_basis
    inputs, size = squared_projections(a, v), u.shape[1]
    weights = inputs @ precision.spectrum.reciprocal().mT  # [b, s']
    leading = g @ u
    covariance = (leading * weights[:, None, :size]) @ leading.mT
    if size < u.shape[0]:
        rest = g - leading @ u.mT
        covariance = covariance + (rest @ rest.mT) * weights[:, size:, None]
    return covariance
