"""skorch's `fit` takes the steps of a plain loop; `NGVI` as its step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_loop import (
    BATCH,
    EPOCHS,
    OPTIMIZERS,
    N,
    assert_same_weights,
    batches,
    data,
    network,
    plain_loop,
    seeded,
)
from torch import Tensor, nn

from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier, bayesianize

skorch = pytest.importorskip("skorch")

SETTINGS: dict[str, Any] = {
    "criterion": nn.CrossEntropyLoss, "max_epochs": EPOCHS, "batch_size": BATCH,
    "train_split": None, "verbose": 0,
}


class WithCurvature(skorch.NeuralNetClassifier):
    """Gives the optimizer the network, which it follows, in place of its parameters alone."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> WithCurvature:
        self.optimizer_ = seeded(self.optimizer, self.module_)
        return self


class Bayesian(skorch.NeuralNetClassifier):
    """`NGVI` takes the step, and predictions are means over posterior samples."""

    def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Bayesian:
        self.model_ = Classifier(bayesianize(self.module_), num_data=N)
        self.guide_ = KFACGuide(self.model_)
        torch.manual_seed(3)
        self.ngvi_ = NGVI(self.model_, self.guide_)
        self.optimizer_ = self.ngvi_.optimizer
        return self

    def train_step(self, batch: tuple[Tensor, Tensor], **fit_params: Any) -> dict[str, Any]:
        x, y = batch
        return {"loss": torch.tensor(self.ngvi_.step(x, y) / N), "y_pred": None}

    def evaluation_step(self, batch: tuple[Tensor, Tensor], training: bool = False) -> Tensor:
        predictive = Predictive(
            self.model_, guide=self.guide_, num_samples=8, return_sites=["_RETURN"]
        )
        return predictive(batch[0])["_RETURN"].softmax(-1).mean(0).log()


def arrays() -> tuple[Any, Any]:
    x, y = data().tensors
    return x.numpy(), y.numpy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_is_the_plain_loop(name: str) -> None:
    net = WithCurvature(network, optimizer=OPTIMIZERS[name], **SETTINGS).fit(*arrays())
    expected = plain_loop(OPTIMIZERS[name], clip=False, is_scheduled=False)
    assert_same_weights(net.module_, expected)


def test_ngvi_is_the_plain_loop() -> None:
    net = Bayesian(network, **SETTINGS).fit(*arrays())
    model = Classifier(bayesianize(network()), num_data=N)
    guide = KFACGuide(model)
    torch.manual_seed(3)
    ngvi = NGVI(model, guide)
    for _ in range(EPOCHS):
        for x, y in batches():
            ngvi.step(x, y)
    found, expected = net.guide_.median(), guide.median()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    probs = torch.as_tensor(net.predict_proba(arrays()[0]))
    torch.testing.assert_close(probs.sum(-1), torch.ones(N))
    assert 0 <= net.score(*arrays()) <= 1
