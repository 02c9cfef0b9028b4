"""Notices about the scale of the data, in NGVI and in the optimizers."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

Run = Callable[[nn.Module, Tensor, Tensor], None]
N = 20


def by_ngvi(guide: type) -> Run:
    def run(net: nn.Module, x: Tensor, y: Tensor) -> None:
        model = Classifier(bayesianize(net), N)
        ngvi = NGVI(model, guide(model))
        for _ in range(2):
            ngvi.step(x, y)

    return run


def by_second_order(net: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = SecondOrderOptimizer(net, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def by_vi(net: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = VIOptimizer(net, N)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()


RUNS = {
    "kfac": by_ngvi(KFACGuide), "full": by_ngvi(FullGuide), "diag": by_ngvi(DiagonalGuide),
    "second-order": by_second_order, "vi": by_vi,
}


def mlp(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def notices(run: Run, net: nn.Module, x: Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(net, x, torch.arange(N) % 3)
    return [str(w.message) for w in caught if "unit scale" in str(w.message)]


@pytest.mark.parametrize("name", RUNS)
def test_features_of_another_scale_are_noticed_once(name: str) -> None:
    (notice,) = notices(RUNS[name], mlp(), 1e6 * torch.randn(N, 5))
    assert "0 (1e+06)" in notice and "2 (" not in notice, "the hidden layer is not mentioned"
    assert not notices(RUNS[name], mlp(), torch.randn(N, 5))


FAR = {
    "one feature": lambda x: x * torch.tensor([1.0, 1.0, 1.0, 1.0, 1e3]),
    "an offset": lambda x: x + torch.tensor([0.0, 0.0, 2000.0, 0.0, 0.0]),
    "tiny": lambda x: x * 1e-3,
}
NEAR = {
    "small and large": lambda x: x * torch.tensor([0.01, 0.1, 1.0, 3.0, 10.0]),
    "one hot": lambda x: F.one_hot(torch.arange(len(x)) % 5).float(),
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("change", FAR)
def test_other_ways_to_be_far_from_unit_scale(change: str) -> None:
    assert len(notices(RUNS["kfac"], mlp(), FAR[change](torch.randn(N, 5)))) == 1


@pytest.mark.parametrize("change", NEAR)
def test_what_trains_is_not_mentioned(change: str) -> None:
    assert not notices(RUNS["kfac"], mlp(), NEAR[change](torch.randn(N, 5)))


def test_images() -> None:
    pixels = torch.randint(256, (N, 1, 6, 6)).float()
    assert len(notices(RUNS["kfac"], images(), pixels)) == 1
    assert not notices(RUNS["kfac"], images(), pixels / 255)


def test_normalization_before_the_first_layer() -> None:
    """Its outputs have a unit scale whatever the data have; so do embeddings of indices."""
    assert not notices(RUNS["second-order"], mlp(nn.LayerNorm(5)), 1e6 * torch.randn(N, 5))
    net = nn.Sequential(nn.Embedding(5000, 4), nn.Flatten(), nn.Linear(4, 3))
    assert not notices(RUNS["second-order"], net, torch.randint(1000, 5000, (N, 1)))
