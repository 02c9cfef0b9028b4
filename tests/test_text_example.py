"""`examples/text.py` in a few steps: each method, an interrupted run, and the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

for package in ("tyro", "matplotlib", "torchvision"):
    pytest.importorskip(package)

import text  # noqa: E402
from language import corpus as corpora  # noqa: E402
from language.corpus import ALPHABET, decode, encode  # noqa: E402
from language.prediction import read, write  # noqa: E402
from pyrocurv import checkpoint  # noqa: E402
from pyrocurv.nn.networks import GPT  # noqa: E402


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 200)
    return path


def run(book: Path, *options: str) -> int:
    return text.main(["--smoke", "--text", str(book), *options])


@pytest.mark.parametrize("method", [
    "adam", "second-order", "ngvi", pytest.param("muon", marks=pytest.mark.skipif(
        not hasattr(torch.optim, "Muon"), reason="torch has no Muon")),
])
def test_each_method_writes_and_scores(
    method: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(book, "--method", method) == 0
    out = capsys.readouterr().out
    assert "---- step 4 ----\ndef " in out and "---- step 8 ----\ndef " in out
    rows = [line.split() for line in out.splitlines() if re.match(r"(network|mean)", line)]
    assert len(rows) == (2 if method == "ngvi" else 1)
    for *_, nll, error, accuracy in rows:
        assert 0 < float(nll) < 10 and float(error) >= 0 and 0 <= float(accuracy) <= 100


def test_a_resumed_run_is_the_uninterrupted_one(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def numbers(out: str) -> list[str]:
        *_, blank, first, second, _, uncertainty = out.splitlines()
        return [first, second, uncertainty]

    assert run(book) == 0
    expected = numbers(capsys.readouterr().out)
    path, save = str(tmp_path / "run.pt"), checkpoint.save

    def interrupted(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(book, "--checkpoint", path)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run(book, "--checkpoint", path) == 2
    assert "pass --resume" in capsys.readouterr().err
    assert run(book, "--checkpoint", path, "--resume", "--kl-temperature", "0.5") == 2
    assert "other settings" in capsys.readouterr().err
    assert run(book, "--checkpoint", path, "--resume") == 0
    assert numbers(capsys.readouterr().out) == expected


def test_the_report_has_each_character_once_and_needs_no_other_file(
    book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / "report.html"
    assert run(book, "--report", str(path), "--prompt", "<b>&") == 0
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "http" not in page
    assert "<b>&" not in page and "nats or more" in page
    found = re.search(r'id="readings">(.*?)</script>', page)
    assert found is not None
    readings = json.loads(found[1])
    spans = re.findall(r'data-at="(\d+),(\d+)"', page)
    assert len(spans) == sum(map(len, readings)) == len(set(spans))
    one = readings[0][0]
    assert one["total"] >= one["epistemic"] and len(one["likely"]) == 5


def test_a_reading_is_the_network_at_each_place() -> None:
    torch.manual_seed(0)
    nets = [GPT(len(ALPHABET), 8, 8, 2, 1).double() for _ in range(2)]
    passage = "print(numbers[1:])\n"
    reading = read(nets, "", passage, context=8)
    numbers = encode(passage)
    for place in range(len(numbers) - 1):
        start = max(0, (place - 4) // 4 * 4)  # windows begin every four characters
        x = numbers[None, start : place + 1]
        probs = torch.stack([net(x)[0, -1].float().softmax(-1) for net in nets]).mean(0)
        torch.testing.assert_close(reading.log_probs[place].exp(), probs)
        entropy = torch.special.entr(probs).sum()
        torch.testing.assert_close(reading.uncertainty.total[place], entropy)
    assert reading.surprise().shape == (len(numbers) - 1,)


def test_temperature_0_takes_the_likeliest_character() -> None:
    torch.manual_seed(0)
    net = GPT(len(ALPHABET), 8, 8, 2, 1)
    found = write([net], "ab", 12, 0.0, 8, seed=1)
    assert found.startswith("ab") and len(found) == 14
    assert found == write([net], "ab", 12, 0.0, 8, seed=2)
    numbers = encode(found)
    assert int(net(numbers[None, 5:13])[0, -1].argmax()) == int(numbers[13])


def test_characters_and_batches() -> None:
    assert decode(encode("a\tb é\n")) == "a b ?\n"
    numbers = torch.arange(50)
    whole = [*corpora.batches(numbers, 4, 0, 3, 8)]
    rest = [*corpora.batches(numbers, 4, 0, 3, 8, start=2)]
    assert all(torch.equal(x, y + 1) for y, x in whole)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))
