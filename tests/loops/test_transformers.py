"""The `Trainer` of Hugging Face takes the steps of a plain loop, and resumes exactly."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import MAX_NORM, MakeOptimizer, schedule, seeded
from torch import Tensor, nn

from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
N, STEPS = 32, 4
Batch = dict[str, Tensor]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "second-order": lambda net: SecondOrderOptimizer(net), "vi": lambda net: VIOptimizer(net, N),
}


class Trainer(transformers.Trainer):
    """The passes of a `VIOptimizer` at a sample of its own for each batch; keeps the batches."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[Batch] = []
        self.model_accepts_loss_kwargs = False  # its loss is the mean over a batch, not a share

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **options: Any) -> Tensor:
        self.seen.append(inputs)
        optimizer = self.optimizer.optimizer  # under accelerate's
        is_sampled = isinstance(optimizer, VIOptimizer)
        with optimizer.sampled_params() if is_sampled else nullcontext():
            return super().training_step(model, inputs, *args, **options)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if isinstance(self.optimizer.optimizer, VIOptimizer):  # takes the mean over them itself
            loss = loss * self.args.gradient_accumulation_steps
        return loss


def bert() -> nn.Module:
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=10, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))


def rows() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(20, (6,), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(N)
    ]


def fit(
    make: MakeOptimizer, folder: Path, accumulate: int = 1, resume: str | None = None,
    **options: Any,
) -> tuple[nn.Module, list[Batch]]:
    """The trained network, and the batches that it has seen."""
    net = bert()
    optimizer = seeded(make, net)
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulate, "max_grad_norm": MAX_NORM, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, **options,
    })
    trainer = Trainer(
        net, arguments, train_dataset=rows(), optimizers=(optimizer, schedule(optimizer, STEPS))
    )
    trainer.train(resume_from_checkpoint=resume)
    return net, trainer.seen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_trainer_is_the_plain_loop(name: str, accumulate: int, tmp_path: Path) -> None:
    found, seen = fit(OPTIMIZERS[name], tmp_path, accumulate)
    net = bert()
    optimizer = seeded(OPTIMIZERS[name], net)
    falling = schedule(optimizer, STEPS)
    net.train()
    is_sampled = isinstance(optimizer, VIOptimizer)
    for number, batch in enumerate(seen, start=1):
        with optimizer.sampled_params() if is_sampled else nullcontext():
            loss = net(**batch).loss
            (loss if is_sampled else loss / accumulate).backward()
        if number % accumulate == 0:
            nn.utils.clip_grad_norm_(net.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
            falling.step()
    assert len(seen) == STEPS * accumulate
    for p, q in zip(found.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, _ = fit(OPTIMIZERS["vi"], tmp_path, save_strategy="steps", save_steps=2)
    resumed, seen = fit(OPTIMIZERS["vi"], tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert len(seen) == STEPS - 2
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
