"""The precision of a block from its curvature, and the curvature from the gradients at samples."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyrocurv.curvature import KFAC, Curvature, Diagonal
from pyrocurv.curvature.running_curvature import RunningCurvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_spec import StructureSpec
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.precision import (
    init_block,
    refresh_block,
    update_from_sample_gradients,
)
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior, kronecker_scaling
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.structures import Diagonal as DiagonalMatrix

pytestmark = pytest.mark.usefixtures("double")
WEIGHT, DELTA = 50.0 / 0.5, 3.0  # N/T, and δ
NUMBERS = Hyperparameters(0.1, 0.1, 0.9, 1e-3, 1e-3, 50.0, 0.5)


def new_block(spec: Curvature, structure: StructureSpec) -> BlockState:
    """A weight [2, 3] before the first step."""
    block = Block((Layer("w", None, (2, 3)),), structure)
    prior = BlockPrior(GaussianPrior(torch.zeros(()), torch.tensor(DELTA), zero_mean=True))
    return init_block(spec, block, prior, NUMBERS, torch.zeros(6))


@pytest.mark.parametrize("every", [1, 4])
def test_the_gradients_at_samples_have_the_weight_of_an_estimate_in_a_while(every: int) -> None:
    """Each step (1 - decay) / every."""
    spec = Curvature("noise", every=every, decay=0.8, initial=0.3)
    posterior, estimate = Posterior(0, (new_block(spec, Diagonal()),)), torch.rand(6)
    (state,) = update_from_sample_gradients(spec, posterior, {"w": estimate}, 0.0).blocks
    change = (estimate - 0.3) * 0.2 / every
    expected = 0.3 + change + change.square() / (2 * (0.3 + DELTA / WEIGHT))
    torch.testing.assert_close(state.curvature.curvature.diag(), expected)
    torch.testing.assert_close(state.precision.diag(), WEIGHT * expected + DELTA)


def test_negative_curvature_does_not_enter_a_precision() -> None:
    spec, values = Curvature("hessian"), torch.tensor([-1.0, 0.0, 2.0, 1.0, -3.0, 0.5])
    running = RunningCurvature(1, DiagonalMatrix(values))
    state = refresh_block(replace(new_block(spec, Diagonal()), curvature=running), spec, 0.0)
    torch.testing.assert_close(state.precision.diag(), WEIGHT * values.relu() + DELTA)


def test_a_precision_is_kept_until_the_next_estimate_is_scaled_as_the_prior_is() -> None:
    spec, state = Curvature("ggn"), new_block(Curvature("ggn"), KFAC())

    def refreshed(delta: Tensor) -> BlockState:
        prior = GaussianPrior(torch.zeros(()), delta, zero_mean=True)
        scaling = kronecker_scaling(state.block, prior)
        return refresh_block(replace(state, prior=BlockPrior(prior, scaling)), spec, 0.0)

    larger = refreshed(torch.tensor(7.0))  # the scaling is the same, but for δ
    torch.testing.assert_close(larger.precision.diag(), torch.full((6,), 7.0))
    assert refreshed(torch.tensor([1.0, 2, 3, 2, 4, 6])).precision is state.precision
