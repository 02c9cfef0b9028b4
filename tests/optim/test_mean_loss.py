"""The loss of a step, which `VIOptimizer` reads off its gradient in the output."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from pyrocurv.optim.loss_targets import LossLikelihood

Loss = Callable[[Tensor], Tensor]
pytestmark = pytest.mark.usefixtures("double")
Y, Z = torch.arange(8) % 3, (torch.arange(8) % 3 == 2).double()
bits = F.binary_cross_entropy_with_logits
# likelihood, shape of the output, the loss, and its mean over the entries that count
READ: dict[str, tuple[str, tuple[int, ...], Loss, Loss]] = {
    "classes": ("categorical", (8, 3), lambda f: F.cross_entropy(f, Y),
                lambda f: F.cross_entropy(f, Y)),
    "two classes": ("categorical", (8, 2), lambda f: F.cross_entropy(f, Y % 2),
                    lambda f: F.cross_entropy(f, Y % 2)),
    "weighted classes": (
        "categorical", (8, 3), lambda f: F.cross_entropy(f, Y, torch.tensor([1.0, 5.0, 2.0])),
        lambda f: F.cross_entropy(f, Y)),
    "summed": ("categorical", (8, 3), lambda f: F.cross_entropy(f, Y, reduction="sum"),
               lambda f: F.cross_entropy(f, Y)),
    "ignored": ("categorical", (8, 3), lambda f: F.cross_entropy(f, Y, ignore_index=1),
                lambda f: F.cross_entropy(f[Y != 1], Y[Y != 1])),
    "pixels": ("categorical", (4, 3, 2), lambda f: F.cross_entropy(f, Y.view(4, 2)),
               lambda f: F.cross_entropy(f, Y.view(4, 2))),
    "bits": ("bernoulli", (8,), lambda f: bits(f, Z), lambda f: bits(f, Z)),
    "scaled bits": ("bernoulli", (8,), lambda f: 2**16 * bits(f, Z), lambda f: bits(f, Z)),
    "squares": ("normal", (8, 3), lambda f: F.mse_loss(f, torch.ones(8, 3)) / 2,
                lambda f: -Normal(f, 1.0).log_prob(torch.ones(8, 3)).mean()),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_the_loss_is_read_off_its_gradient(name: str, size: float) -> None:
    """Also where a softmax is all but saturated."""
    likelihood, shape, loss, truth = READ[name]
    output = (size * torch.randn(shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output), output)
    found = LossLikelihood(likelihood, "fisher").mean_loss(output, gradient)
    torch.testing.assert_close(found.value, truth(output).detach(), rtol=1e-9, atol=1e-9)
    assert found.entries == (24 if likelihood == "normal" else 8)
