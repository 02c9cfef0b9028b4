"""The functions of a natural-gradient update, each against its equation."""

import pytest
import torch

from pyrocurv.posterior.natural_gradient import clip_momentum, price_hessian_update
from pyrocurv.posterior.prior import GaussianPrior
from pyrocurv.structures import Diagonal


def test_weight_noise_finds_the_diagonal_of_the_hessian() -> None:
    """Price's theorem on a quadratic, within the standard error of the mean of the estimates."""
    H = torch.randn(5, 5).double()
    H = H @ H.T - torch.eye(5)
    precision = Diagonal(torch.rand(5).double() + 1)
    epsilon = precision.rsqrt(torch.randn(40_000, 5).double())
    products = epsilon * (epsilon @ H)  # g = H ε around a mean of no gradient
    prior = GaussianPrior(torch.tensor(0.0), torch.tensor(1e12))
    zero, estimate = Diagonal(torch.zeros(200_000).double()), precision.diag() * products
    estimates = price_hessian_update(  # at rate 1; under so strong a prior the correction vanishes
        zero, estimate.flatten(), 1.0, prior, 1.0
    ).diag().view(-1, 5)
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - H.diag()).abs() < 4.5 * error).all()


def test_the_correction_keeps_the_precision_positive() -> None:
    prior, ratio = GaussianPrior(torch.tensor(0.0), torch.tensor(0.1)), 10.0
    curvature = Diagonal(torch.full((200,), 0.3))
    for _ in range(500):
        curvature = price_hessian_update(curvature, torch.randn(200) * 30, 0.3, prior, ratio)
        assert (curvature.diag() + prior.precision / ratio > 0).all()


def test_a_diagonal_that_the_prior_no_longer_outweighs_starts_again() -> None:
    """Where S + δT/N is negative, because δ has become smaller since the last step."""
    old, estimate = torch.tensor([-0.5, -0.2, 1.0]), torch.tensor([0.3, -0.1, 2.0])
    prior = GaussianPrior(torch.zeros(()), torch.tensor(4.0), zero_mean=True)
    found = price_hessian_update(Diagonal(old), estimate, 0.1, prior, 10.0)
    start, share = torch.tensor([0.0, -0.2, 1.0]), 0.4
    change = 0.1 * (estimate - start)
    expected = start + change + change.square() / (2 * (start + share))
    torch.testing.assert_close(found.diag(), expected)


@pytest.mark.parametrize("energy", [1e-3, 0.09, 0.11, 40.0])
def test_momentum_is_at_most_ten_radii_of_the_trust_region(energy: float) -> None:
    """The energy is quadratic in the momentum: 100 κ is left of it."""
    momentum = torch.tensor([3.0, -4.0])
    clip_momentum([momentum], energy, 1e-3)
    assert energy * float(momentum.norm() / 5) ** 2 == pytest.approx(min(energy, 0.1))
