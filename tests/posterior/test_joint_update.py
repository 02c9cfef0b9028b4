"""The retraction of a precision towards a Hessian."""

import pytest
import torch

from pyrocurv.posterior.joint_update import retract
from pyrocurv.structures import Dense, Diagonal

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("rate", [0.3, 1.0])
def test_a_precision_stays_positive_and_keeps_its_target(rate: float) -> None:
    root = torch.randn(6, 6)
    precision = Dense(root @ root.mT + 0.1 * torch.eye(6))
    target = torch.randn(6, 6)
    target = target + target.mT  # indefinite
    assert (retract(precision, target, rate).eigenvalues() > 0).all()
    torch.testing.assert_close(
        retract(precision, precision.dense(), rate).dense(), precision.dense()
    )
    diagonal = Diagonal(torch.rand(6) + 0.1)
    moved = retract(diagonal, torch.randn(6), rate)
    assert (moved.diag() > 0).all()
    assert torch.equal(retract(diagonal, diagonal.diag(), rate).diag(), diagonal.diag())


def test_small_steps_of_the_precision_are_linear_with_the_correction() -> None:
    root = torch.randn(5, 5)
    matrix = root @ root.mT + torch.eye(5)
    change = torch.randn(5, 5) / 50
    change = change + change.mT
    wanted = matrix + 0.3 * change + 0.09 / 2 * change @ torch.linalg.solve(matrix, change)
    torch.testing.assert_close(retract(Dense(matrix), matrix + change, 0.3).dense(), wanted)


def test_a_step_of_the_precision_is_bounded() -> None:
    """By 1 + x + x²/2 at |X| = 1, whatever a sample from a heavy tail gives."""
    target = 1e6 * torch.eye(3)[:1].mT @ torch.eye(3)[:1]
    expected = torch.tensor([2.5, 1.0, 1.0])
    found = retract(Dense(torch.eye(3)), target, 1.0).dense()
    torch.testing.assert_close(found, expected.diag(), rtol=0, atol=1e-5)
    found = retract(Diagonal(torch.ones(3)), target.diag(), 1.0).diag()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
