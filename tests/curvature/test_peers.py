"""Agreement with curvlinops, which knows nothing of this library.

It multiplies with the curvature of a torch loss. `reduction="mean"` divides by the number of loss
terms, and `MSELoss` is twice the negative log likelihood of unit variance: so Hessian and
Gauss-Newton matrix double, what is quadratic in gradients is fourfold.
"""

from functools import cache
from typing import Any

import pytest
import torch
from test_estimate import assert_same, case
from torch import Tensor, nn

from pyrocurv.curvature import KFAC, estimate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]  # theirs
LOSSES = {
    "categorical": nn.CrossEntropyLoss, "bernoulli": nn.BCEWithLogitsLoss, "normal": nn.MSELoss,
}
OPERATORS = {
    "hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator", "empirical": "EFLinearOperator",
}
TYPES = {"ggn": "type-2", "empirical": "empirical"}
CASES = [
    ("tanh", "categorical"), ("tanh", "normal"), ("tanh", "bernoulli"), ("no-bias", "normal"),
    ("relu-inplace", "categorical"), ("conv-stride", "categorical"), ("conv-stride", "normal"),
    ("conv-dilated", "bernoulli"), ("sequence", "categorical"), ("sequence", "normal"),
]
every_case = pytest.mark.parametrize(("model", "likelihood"), CASES)
each_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


class Flat(nn.Module):
    """With the positions of a sequence as rows of the output, as torch losses want them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(0, -2)


def operator(
    name: str, model: str, likelihood: str, reduction: str, **options: Any
) -> Tensor:
    """Their operator, written out."""
    curvlinops = pytest.importorskip("curvlinops")
    net, x, y = case(model, likelihood)
    targets = y.flatten() if likelihood == "categorical" else y.flatten(0, -2)
    if model == "sequence":
        net, y = Flat(net), targets
    loss = LOSSES[likelihood](reduction=reduction)
    found = getattr(curvlinops, name)(net, loss, list(net.parameters()), [(x, y)], **options)
    return found @ torch.eye(found.shape[1], dtype=torch.float64)


@cache
def ours(model: str, likelihood: str, curvature: str, structure: Any) -> Tensor:
    args = case(model, likelihood)
    matrix = estimate(*args, likelihood=likelihood, curvature=curvature, structure=structure)
    return matrix.dense()


def scale(model: str, likelihood: str, curvature: str, reduction: str) -> float:
    """Theirs over ours."""
    _, _, y = case(model, likelihood)
    terms = 1 if reduction == "sum" else y.numel()
    double = {"empirical": 4}.get(curvature, 2) if likelihood == "normal" else 1
    return double / terms


@every_case
@each_reduction
@pytest.mark.parametrize("curvature", OPERATORS)
def test_dense_matrices(model: str, likelihood: str, reduction: str, curvature: str) -> None:
    if (model, curvature) == ("sequence", "empirical"):
        pytest.skip("there each token is an example of its own")
    theirs = operator(OPERATORS[curvature], model, likelihood, reduction)
    factor = scale(model, likelihood, curvature, reduction)
    assert_same(theirs, factor * ours(model, likelihood, curvature, "full"))


@every_case
@each_reduction
@pytest.mark.parametrize("curvature", TYPES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kfac(model, likelihood, reduction, curvature, sharing) -> None:
    if (model, curvature, sharing) == ("sequence", "ggn", "reduce"):
        pytest.skip("there one vector has a column of the root at all tokens, here at one")
    theirs = operator(
        "KFACLinearOperator", model, likelihood, reduction, fisher_type=TYPES[curvature],
        kfac_approx=sharing, separate_weight_and_bias=False,
    )
    factor = scale(model, likelihood, curvature, reduction)
    assert_same(theirs, factor * ours(model, likelihood, curvature, KFAC(sharing=sharing)))


@pytest.mark.parametrize(("model", "likelihood"), [case for case in CASES if case[0] != "no-bias"])
@pytest.mark.parametrize("curvature", TYPES)
def test_kfac_with_weight_and_bias_apart(model: str, likelihood: str, curvature: str) -> None:
    """Their default: ours without the entries between a weight and its bias."""
    theirs = operator(
        "KFACLinearOperator", model, likelihood, "sum", fisher_type=TYPES[curvature]
    )
    sizes = [p.numel() for p in case(model, likelihood)[0].parameters()]
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    matrix = ours(model, likelihood, curvature, "kfac")
    apart = torch.where(label[:, None] == label, matrix, 0.0)
    assert_same(theirs, scale(model, likelihood, curvature, "sum") * apart)


@pytest.mark.parametrize(
    ("model", "likelihood"), [case for case in CASES if case[0] != "sequence"]
)
@pytest.mark.parametrize("curvature", TYPES)
def test_ekfac(model: str, likelihood: str, curvature: str) -> None:
    theirs = operator(
        "EKFACLinearOperator", model, likelihood, "sum", fisher_type=TYPES[curvature],
        separate_weight_and_bias=False,
    )
    factor = scale(model, likelihood, curvature, "sum")
    # eigenvectors answer to rounding divided by the gaps between eigenvalues
    assert_same(theirs, factor * ours(model, likelihood, curvature, "ekfac"), rtol=1e-7)
