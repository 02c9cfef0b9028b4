"""`examples/lora.py` in a few steps: what is trained, what is not, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

for package in ("tyro", "peft", "transformers", "accelerate"):
    pytest.importorskip(package)

import lora  # noqa: E402
from language.sentences import CLASSES, Sentence, sentences  # noqa: E402
from pyrocurv.optim import VIOptimizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
SMOKE = lora.Config(smoke=True).resolved()


def test_the_smoke_run_prints_three_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora.main(["--smoke"]) == 0
    sizes, header, *lines, kl = capsys.readouterr().out.splitlines()
    assert "frozen weights" in sizes and header.split()[:2] == ["accuracy", "%"]
    names = [line[:24].strip() for line in lines]
    assert names == ["AdamW", "VIOptimizer, mean", "VIOptimizer, 2 samples"]
    for line in lines:
        accuracy, nll, error = map(float, line[24:].split())
        assert 0 <= accuracy <= 100 and 0 < nll < 5 and 0 <= error < 5
    assert kl.startswith("KL to the prior: ")


def test_only_adapters_and_head_have_a_posterior() -> None:
    base = lora.small_base(SMOKE, [sentence.text for sentence in written()])
    net = lora.with_adapters(base.net, SMOKE)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trained)
    rows = [{**base.tokenize(one.text), "labels": one.label} for one in written()]
    optimizer = lora.train(net, rows, SMOKE, lora.VITrainer, lambda net: VIOptimizer(
        net, len(rows), params=[p for p in net.parameters() if p.requires_grad]
    ))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained
    with optimizer.sampled_params():
        sampled = {
            name for name, p in net.named_parameters() if not torch.equal(p, before[name])
        }
    assert sampled == trained
    blocks = optimizer.update_counts()
    assert any("lora_A" in name for name in blocks) and any("lora_B" in name for name in blocks)


def test_a_model_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "sentences", lambda *sizes: [written()] * len(sizes))
    assert lora.main(["--smoke", "--model", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(f"lora.py: --model {tmp_path / 'absent'}: neither")


def test_a_model_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_pretrained` writes it, with its tokenizer: a GPT-2, which has no padding token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = sorted({word for one in written() for word in one.text.split()})
    numbers = {word: number for number, word in enumerate(["<end>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(tmp_path)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(numbers), n_positions=48, n_embd=8, n_layer=1, n_head=2,
    )).save_pretrained(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(lora, "sentences", lambda *sizes: [written()] * len(sizes))
    assert lora.main(["--smoke", "--model", str(tmp_path)]) == 0
    assert "VIOptimizer, 2 samples" in capsys.readouterr().out


def written() -> list[Sentence]:
    return [
        Sentence(f"{'Return the' if label else 'this is where'} value of number {number}", label)
        for number in range(8) for label in range(2)
    ]


def test_sentences_are_balanced_and_no_file_is_in_two_parts() -> None:
    first, second = sentences(32, 32)
    for part in (first, second):
        assert len(part) == 32 and {one.label for one in part} == set(range(len(CLASSES)))
    assert not {one.text for one in first} & {one.text for one in second}
