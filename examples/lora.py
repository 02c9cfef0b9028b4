"""A posterior over the LoRA adapters of a transformer, by the Trainer of Hugging Face.

    python examples/lora.py                            # a small BERT, a minute or two
    python examples/lora.py --model distilbert-base-uncased --epochs 3 --batch 32

Tells docstrings of Python's standard library from its comments by 400 labeled sentences. Without
--model the base is a small BERT of words, which is trained here to fill in masked words of other
files, then frozen. `peft` puts adapters of low rank into its attention, and they are
trained, with the new head, by AdamW and by `VIOptimizer`, from the same first weights: one value
for each weight, and a Gaussian posterior. Prints accuracy and NLL on sentences of other files; the
learning rates are not tuned.
Needs `pip install transformers accelerate peft tyro`.
"""

from __future__ import annotations

import copy
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers.pytorch_utils import Conv1D

from language.sentences import CLASSES, Sentence, sentences
from pyrocurv.optim import VIOptimizer
from resuming import Refusal

PAD, START, MASK, RARE, FIRST_WORD = range(5)  # tokens of the small base
WORDS, LENGTH = 1000, 20  # its vocabulary, and the tokens of a sentence
MASKED = 0.15  # share of the words that it has to fill in
Row = dict[str, Any]  # input_ids, attention_mask, labels


@dataclass(frozen=True)
class Config:
    """What to adapt, and how."""

    model: str | None = None
    """Folder of a transformer, or its name in the hub of Hugging Face; None: a small one."""
    rank: int = 4
    """Of the adapters."""
    target_modules: tuple[str, ...] = ()
    """Names of the layers that get adapters; by default those that peft knows for the model."""
    train_size: int = 400
    """Labeled sentences."""
    test_size: int = 1000
    """Sentences of other files."""
    epochs: int = 15
    """Passes over the labeled sentences."""
    batch: int = 20
    """Sentences in a step."""
    lr: float = 0.03
    """Learning rate of VIOptimizer; it falls to 0 as a cosine."""
    adam_lr: float = 3e-3
    """Learning rate of AdamW, likewise."""
    temperature: float | None = None
    """T of the KL term; None: chosen by the run."""
    samples: int = 16
    """Samples of the posterior for a prediction."""
    base_steps: int = 600
    """Training steps of the base on masked words, without --model."""
    seed: int = 0
    """Of weights, batches and samples."""
    smoke: bool = False
    """A few steps of everything, to check the set-up."""

    def resolved(self) -> Config:
        """With the sizes of a smoke run, if it is one."""
        if not self.smoke:
            return self
        return replace(
            self, train_size=16, test_size=16, epochs=1, batch=8, samples=2, base_steps=2
        )


# ---- the base -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """A frozen transformer with a new head, and how a sentence becomes its input."""

    net: nn.Module
    tokenize: Callable[[str], Row]


def words(text: str) -> list[str]:
    """Words and single signs."""
    return re.findall(r"\w+|[^\w\s]", text)


def word_tokenizer(texts: Sequence[str]) -> Callable[[str], Row]:
    """Each of the words that are frequent in the texts is a token; sentences are padded."""
    counts = Counter(word for text in texts for word in words(text))
    number = {word: k for k, (word, _) in enumerate(counts.most_common(WORDS), start=FIRST_WORD)}

    def tokenize(text: str) -> Row:
        numbers = [START, *(number.get(word, RARE) for word in words(text))][:LENGTH]
        rest = LENGTH - len(numbers)
        return {
            "input_ids": numbers + [PAD] * rest,
            "attention_mask": [1] * len(numbers) + [0] * rest,
        }

    return tokenize


def small_base(config: Config, texts: Sequence[str]) -> Base:
    """A BERT of words, which has learned to fill in masked ones."""
    width, tokenize = 16 if config.smoke else 64, word_tokenizer(texts)
    shape = transformers.BertConfig(
        vocab_size=FIRST_WORD + WORDS, hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH,
        num_labels=len(CLASSES), pad_token_id=PAD, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    filler = transformers.BertForMaskedLM(shape)
    optimizer = torch.optim.AdamW(filler.parameters(), 3e-3)
    schedule = CosineAnnealingLR(optimizer, config.base_steps)
    rows = [tokenize(text) for text in texts]
    tokens = torch.tensor([row["input_ids"] for row in rows])
    attended = torch.tensor([row["attention_mask"] for row in rows])
    for _ in range(config.base_steps):
        chosen = torch.randint(len(tokens), (32,))
        x = tokens[chosen]
        is_masked = (torch.rand(x.shape) < MASKED) & (x >= FIRST_WORD)
        labels = x.masked_fill(~is_masked, -100)
        optimizer.zero_grad()
        filler(
            input_ids=x.masked_fill(is_masked, MASK), attention_mask=attended[chosen],
            labels=labels,
        ).loss.backward()
        optimizer.step()
        schedule.step()
    net = transformers.BertForSequenceClassification(shape)
    net.bert.load_state_dict(filler.bert.state_dict(), strict=False)  # all but the pooler
    return Base(net, tokenize)


def named_base(name: str) -> Base:
    """A transformer of a folder or of the hub, with its tokenizer."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        net = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=len(CLASSES)
        )
    except (OSError, ValueError) as error:
        raise Refusal(
            f"--model {name}: neither a folder with a transformer and its tokenizer, nor in the "
            f"cache or the hub of Hugging Face ({type(error).__name__})"
        ) from error
    if tokenizer.pad_token is None:  # as of GPT-2
        tokenizer.pad_token = tokenizer.eos_token
        net.config.pad_token_id = tokenizer.pad_token_id

    def tokenize(text: str) -> Row:
        found = tokenizer(text, padding="max_length", max_length=48, truncation=True)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return Base(net, tokenize)


def with_adapters(base: nn.Module, config: Config) -> nn.Module:
    """The base, frozen, with adapters in its attention and a head that are trained."""
    options: dict[str, Any] = {"fan_in_fan_out": any(isinstance(m, Conv1D) for m in base.modules())}
    if config.target_modules:
        options["target_modules"] = list(config.target_modules)
    try:
        return peft.get_peft_model(base, peft.LoraConfig(
            task_type=peft.TaskType.SEQ_CLS, r=config.rank, lora_alpha=2 * config.rank, **options
        ))
    except ValueError as error:
        raise Refusal(f"--target-modules: {str(error).splitlines()[0]}") from error


# ---- training -----------------------------------------------------------------------------------


class VITrainer(transformers.Trainer):
    """The passes of each batch at a sample of the posterior."""

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        with self.optimizer.optimizer.sampled_params():  # under accelerate's wrapper
            return super().training_step(*args, **options)


def train(
    net: nn.Module, rows: list[Row], config: Config, kind: type[transformers.Trainer],
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """By `Trainer`; returns the optimizer."""
    steps = config.epochs * math.ceil(len(rows) / config.batch)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, num_train_epochs=config.epochs, per_device_train_batch_size=config.batch,
            report_to=[], save_strategy="no", logging_strategy="no", seed=config.seed,
            disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=False,
        )
        optimizer = make(net.to(arguments.device))
        trainer = kind(
            net, arguments, train_dataset=rows,
            optimizers=(optimizer, CosineAnnealingLR(optimizer, steps)),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return optimizer


# ---- results ------------------------------------------------------------------------------------


def batches(rows: list[Row], device: torch.device) -> list[dict[str, Tensor]]:
    names = ("input_ids", "attention_mask")
    return [
        {name: torch.tensor([row[name] for row in rows[start : start + 100]]).to(device)
         for name in names}
        for start in range(0, len(rows), 100)
    ]


@torch.no_grad()
def log_probabilities(predict: Callable[..., Any], net: nn.Module, rows: list[Row]) -> Tensor:
    """[N, classes], the mean over samples where there are some."""
    net.eval()
    device = next(net.parameters()).device
    found = []
    for batch in batches(rows, device):
        log_probs = predict(**batch).logits.log_softmax(-1)
        if log_probs.dim() == 3:
            log_probs = log_probs.logsumexp(0) - math.log(len(log_probs))
        found.append(log_probs.cpu())
    return torch.cat(found)


def line(name: str, log_probs: Tensor, labels: Tensor) -> str:
    accuracy = (log_probs.argmax(-1) == labels).float().mean()
    losses = F.nll_loss(log_probs, labels, reduction="none")
    error = losses.std() / math.sqrt(len(losses))
    return f"{name:<24}{100 * accuracy:>12.1f}{losses.mean():>10.4f}{error:>9.4f}"


def run(config: Config) -> None:
    torch.manual_seed(config.seed)
    parts = sentences(config.train_size, config.test_size, 16 if config.smoke else 2500)
    train_text, test_text, other = parts
    base = (
        small_base(config, [sentence.text for sentence in other]) if config.model is None
        else named_base(config.model)
    )

    def rows(part: list[Sentence]) -> list[Row]:
        return [{**base.tokenize(one.text), "labels": one.label} for one in part]

    labels = torch.tensor([one.label for one in test_text])
    train_rows, test_rows = rows(train_text), rows(test_text)
    net = with_adapters(base.net, config)
    first = copy.deepcopy(net)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"{sum(p.numel() for p in net.parameters()) - trained:,} frozen weights, {trained:,} "
          f"trained; {len(train_rows)} sentences, {len(test_rows)} of other files")
    print(f"{'':<24}{'accuracy %':>12}{'NLL nats':>10}{'+-':>9}")

    adam = copy.deepcopy(first)
    train(adam, train_rows, config, transformers.Trainer, lambda net: torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], config.adam_lr
    ))
    print(line("AdamW", log_probabilities(adam, adam, test_rows), labels))

    optimizer = train(net, train_rows, config, VITrainer, lambda net: VIOptimizer(
        net, len(train_rows), config.lr,
        params=[p for p in net.parameters() if p.requires_grad],
        temperature="auto" if config.temperature is None else config.temperature,
    ))
    assert isinstance(optimizer, VIOptimizer)
    print(line("VIOptimizer, mean", log_probabilities(net, net, test_rows), labels))

    def sampled(**inputs: Tensor) -> Any:
        return optimizer.predict(**inputs, num_samples=config.samples)

    name = f"VIOptimizer, {config.samples} samples"
    print(line(name, log_probabilities(sampled, net, test_rows), labels))
    print(f"KL to the prior: {optimizer.kl():,.0f} nats")


def main(argv: list[str] | None = None) -> int:
    config = tyro.cli(
        Config, args=argv, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    ).resolved()
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        run(config)
    except Refusal as refusal:
        print(f"lora.py: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
