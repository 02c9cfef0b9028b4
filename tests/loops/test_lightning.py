"""Lightning's Trainer takes the steps of a plain loop, and resumes exactly."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_loop import (
    EPOCHS,
    MAX_NORM,
    OPTIMIZERS,
    STEPS,
    MakeOptimizer,
    N,
    assert_same_weights,
    batches,
    network,
    plain_loop,
    schedule,
    seeded,
)
from torch import Tensor, nn

from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import VIOptimizer

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def trainer(**options: Any) -> Any:
    return lightning.Trainer(**{
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "max_epochs": EPOCHS,
        **options,
    })


class Automatic(lightning.LightningModule):
    """Lightning hands forward and backward pass to the optimizer, as a closure."""

    def __init__(self, net: nn.Module, make: MakeOptimizer) -> None:
        super().__init__()
        self.net, self.make = net, make

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = seeded(self.make, self.net)
        falling = {"scheduler": schedule(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": falling}


class Manual(Automatic):
    """The block of `VIOptimizer` around the passes."""

    def __init__(self, net: nn.Module, make: MakeOptimizer) -> None:
        super().__init__(net, make)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], number: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        with optimizer.optimizer.sampled_params():
            self.manual_backward(F.cross_entropy(self.net(x), y))
            self.clip_gradients(optimizer, MAX_NORM, "norm")
        optimizer.step()
        self.lr_schedulers().step()


class Bayesian(lightning.LightningModule):
    """`NGVI` takes the step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = Classifier(bayesianize(network()), num_data=N)
        self.guide = KFACGuide(self.model)
        torch.manual_seed(3)
        self.ngvi = NGVI(self.model, self.guide)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.ngvi.optimizer

    def training_step(self, batch: list[Tensor], number: int) -> None:
        self.optimizers().step(lambda: self.ngvi.step(*batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ngvi"] = self.ngvi.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ngvi.load_state_dict(checkpoint["ngvi"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_automatic_optimization_is_the_plain_loop(name: str) -> None:
    module, run = Automatic(network(), OPTIMIZERS[name]), trainer(gradient_clip_val=MAX_NORM)
    run.fit(module, batches())
    assert run.global_step == STEPS
    assert_same_weights(module.net, plain_loop(OPTIMIZERS[name]))


def test_manual_optimization_is_the_plain_loop() -> None:
    module, run = Manual(network(), OPTIMIZERS["vi"]), trainer()
    run.fit(module, batches())
    assert run.global_step == STEPS
    assert_same_weights(module.net, plain_loop(OPTIMIZERS["vi"]))


def test_accumulated_batches_are_one_of_the_plain_loop() -> None:
    make = OPTIMIZERS["second-order"]
    module = Automatic(network(), make)
    module.configure_optimizers = lambda: seeded(make, module.net)  # type: ignore[method-assign]
    run = trainer(accumulate_grad_batches=2)
    run.fit(module, batches())
    assert run.global_step == STEPS // 2
    expected = plain_loop(make, 2, clip=False, is_scheduled=False)
    assert_same_weights(module.net, expected)


def test_several_samples_of_a_step_are_several_calls_of_training_step() -> None:
    calls = []

    class Counting(Automatic):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            calls.append(number)
            return super().training_step(batch, number)

    run = trainer(max_epochs=1)
    run.fit(Counting(network(), lambda net: VIOptimizer(net, N, num_samples=2)), batches())
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3] and run.global_step == 4


def test_ngvi_in_manual_optimization_is_the_plain_loop() -> None:
    module, run = Bayesian(), trainer()
    run.fit(module, batches())
    assert run.global_step == STEPS
    other = Bayesian()
    for _ in range(EPOCHS):
        for x, y in batches():
            other.ngvi.step(x, y)
    found, expected = module.guide.median(), other.guide.median()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(module.guide.kl(), other.guide.kl())


@pytest.mark.parametrize("kind", ["vi", "ngvi"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    def make() -> Any:
        return Bayesian() if kind == "ngvi" else Automatic(network(), OPTIMIZERS["vi"])

    whole, first, second = make(), make(), make()
    trainer().fit(whole, batches())
    half = trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=tmp_path)
    half.fit(first, batches())
    path = half.checkpoint_callback.best_model_path
    trainer().fit(second, batches(), ckpt_path=path)
    found, expected = second.state_dict(), whole.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], value) for name, value in expected.items()
        if isinstance(value, Tensor)
    )
