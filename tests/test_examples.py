"""The examples, and the benchmark of classification: interrupted, and without its data."""

from __future__ import annotations

import io
import os
import pickle
import runpy
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import classification
import compare
import data
import digits
import optimizers

ROOT = Path(__file__).parents[1]
COLUMNS = "method seed accuracy NLL ECE Brier AUROC train s"


def without_seconds(table: str) -> list[list[str]]:
    return [line.split()[:-1] for line in table.splitlines()[1:]]


def write_idx(folder: Path, images: int) -> None:
    """The four files of an MNIST, all of class `image number % 10`, in their own format."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(images * 28 * 28, dtype=np.uint8)
    classes = (np.arange(images) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">4B3I", 0, 0, 8, 3, images, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + classes.tobytes())


def write_cifar10(folder: Path, images: int) -> None:
    """Six batches and their meta file; each image's red, green and blue planes are 0, 51, 255."""
    folder.mkdir()
    pixels = np.repeat(np.array([[0, 51, 255]], dtype=np.uint8), 32 * 32, axis=1)
    batch = {"data": np.repeat(pixels, images, axis=0), "labels": [n % 10 for n in range(images)]}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Run one from another folder; the lines that it prints.

    In this process, as importing takes longer than the examples do.
    """
    def run(name: str, options: list[str]) -> list[str]:
        path = ROOT / "examples" / f"{name}.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), "--smoke", *options])
        runpy.run_path(str(path), run_name="__main__")
        out, err = capsys.readouterr()
        assert err == ""
        return out.splitlines()

    return run


def test_classification(tmp_path: Path, example: Callable[..., list[str]]) -> None:
    header, adam, ngvi = example("classification", ["--plot", "picture.png"])
    assert header.split() == ["method", "accuracy", "%", "NLL", "ECE", "%", "AUROC", "%"]
    for line, method in ((adam, "Adam"), (ngvi, "NGVI")):
        name, *scores = line.split()
        accuracy, nll, ece, auroc = map(float, scores[::3])  # each is followed by ± and 0.000
        assert name == method and 0 < nll < 5
        assert all(0 <= percent <= 100 for percent in (accuracy, ece, auroc))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "options", "first"), [
    ("second_order", [], "optimizer"),
    *(("vi_torch_loop", ["--method", method], "kept") for method in (
        "noisy-kfac", "noisy-ekfac", "vogn", "ivon")),
    ("any_pyro_model", [], "guide"),
    ("regression", [], "method"),
])
def test_examples_with_a_picture(
    name: str, options: list[str], first: str, tmp_path: Path, example: Callable[..., list[str]]
) -> None:
    lines = example(name, options)
    assert lines[0].split()[0] == first and len(lines) >= 3
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_laplace(example: Callable[..., list[str]]) -> None:
    header, *lines = example("laplace", [])
    assert header.startswith("method") and len(lines) == 5


def test_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all methods that need no other library; a second call only reads the runs."""
    monkeypatch.setattr(compare, "ENSEMBLES", {"adam": (2,)})
    for method, known in compare.METHODS.items():  # half the grid
        monkeypatch.setitem(compare.METHODS, method, replace(known, settings=known.settings[:2]))
    methods = ["adam", "muon", "mc-dropout", "swag", "auto-normal", "kfac", "kfac-ggn"]
    options = ["--problem", "smoke", "--seeds", "1", "--out", str(tmp_path), "--methods", *methods]
    compare.main(options)
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if "|" in line]
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}
    assert names[0] == "| method" and len(files) == 7 * 2 + 7 + 1
    compare.main([*options, "--no-ensembles"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split()[1] for line in table[2:]] == methods
    assert files == {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")}


@pytest.mark.parametrize("method", ["ngvi", "second-order", "vi"])
def test_distributed_as_a_plain_program(
    method: str, tmp_path: Path, example: Callable[..., list[str]]
) -> None:
    options = ["--method", method, "--checkpoint", str(tmp_path / "run.pt")]
    first, header, *lines = example("distributed", options)
    assert first == f"{method}, 1 process, from epoch 1"
    assert header.split() == ["epoch", "accuracy", "NLL"] and len(lines) == 2
    first, _, *lines = example("distributed", options)
    assert first == f"{method}, 1 process, from epoch 3" and not lines


def test_the_digits_of_the_examples_are_those_of_the_benchmark() -> None:
    """So that settings chosen on the validation images of the one hold for the other."""
    ours, theirs = digits.load(), data.load("digits")
    for (x, y), (its_x, its_y) in ((ours.train, theirs.train), (ours.test, theirs.test)):
        assert torch.equal(y, its_y) and torch.allclose(x, its_x)
    assert torch.allclose(ours.unseen, theirs.unseen)


@pytest.mark.parametrize(
    "guide, epochs_before", [("kfac", 1), *((guide, 3) for guide in classification.GUIDES)]
)  # 1: interrupted in Adam, 3: in NGVI
def test_resume_gives_the_scores_of_an_uninterrupted_run(
    guide: str,
    epochs_before: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smoke = ["--smoke", "--samples", "2", "--guide", guide]
    file = str(tmp_path / "checkpoint.pt")
    assert classification.main(smoke) == 0
    table = capsys.readouterr().out
    assert " ".join(table.splitlines()[0].split()) == COLUMNS
    expected = without_seconds(table)
    assert [line[:2] for line in expected] == [["adam", "0"], [guide, "0"]]

    def interrupted(path: Path, jobs: list[classification.Job], settings: dict) -> None:
        save_checkpoint(path, jobs, settings)
        if sum(job.epoch for job in jobs) == epochs_before:
            raise KeyboardInterrupt

    save_checkpoint = classification.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classification, "save_checkpoint", interrupted)
        classification.main([*smoke, "--save", file])
    capsys.readouterr()
    assert classification.main([*smoke, "--resume", file]) == 0
    assert without_seconds(capsys.readouterr().out) == expected
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint.pt"]

    assert classification.main([*smoke, "--resume", file, "--seed", "1"]) == 2
    assert "seed=0, not 1" in capsys.readouterr().err


def pickled(value: object) -> bytes:
    torch.save(value, file := io.BytesIO())
    return file.getvalue()


SETTINGS = {"lr": 0.1, "seed": 0}
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "truncated": pickled({"settings": SETTINGS, "jobs": {"tiny": torch.zeros(500)}})[:900],
    "text": b"epoch,loss\n1,0.5\n",
    "pickle": pickle.dumps([1, 2]),
    "state of a network": pickled(torch.nn.Linear(2, 2).state_dict()),
    "list": pickled([1, 2]),
    "other program": pickled({"settings": None, "jobs": 3}),
    "job without parts": pickled({"settings": SETTINGS, "jobs": {"tiny": {"epoch": 3}}}),
    "job that is no mapping": pickled({"settings": SETTINGS, "jobs": {"tiny": 1.0}}),
    "other network": pickled({"settings": SETTINGS, "jobs": {"tiny": {
        "parts": {"net": torch.nn.Linear(3, 2).state_dict()}, "epoch": 1,
    }}}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(DAMAGED[name])
    job = classification.Job(
        "tiny", max, abs, {"net": torch.nn.Linear(2, 2)}, torch.Generator()  # type: ignore
    )
    with pytest.raises(data.Refusal) as caught:
        classification.load_checkpoint(path, [job], SETTINGS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert job.epoch == 0


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is on disk before it takes the old one's place."""
    path, synced = tmp_path / "checkpoint.pt", []
    fsync = os.fsync

    def full_disk(descriptor: int) -> None:
        synced.append(path.exists())
        if path.exists():
            raise OSError("no space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    classification.save_checkpoint(path, [], SETTINGS)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        classification.save_checkpoint(path, [], {"seed": 1})
    assert synced == [False, True] and path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--dataset", "mnist"], "--download"),
        (["--dataset", "cifar10"], "--download"),
        (["--dataset", "mnist", "--guide", "full"], "use kfac"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
        (["--resume", "empty.pt"], "empty, truncated or not a checkpoint of this program"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_in_one_line(
    arguments: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.pt").touch()
    assert classification.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and hint in err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.pt"]


def test_fashion_mnist_from_its_own_files(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST", images=30)
    x, y = data.from_folder("fashion-mnist", str(tmp_path), train=True)
    assert x.shape == (30, 1, 28, 28) and y.tolist() == [n % 10 for n in range(30)]
    assert torch.equal(x.flatten()[:300] * 255, torch.arange(300.0) % 256)

    loaded = data.load("fashion-mnist", str(tmp_path), train_size=20)
    sizes = [len(y) for _, y in (loaded.train, loaded.val, loaded.test)]
    assert sizes == [20, 5, 30]
    assert abs(float(loaded.train[0].mean())) < 1e-5
    assert abs(float(loaded.train[0].std()) - 1) < 1e-5


def test_unseen_images_are_the_other_mnist_if_its_files_are_there(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST", images=30)
    photos = data.load("fashion-mnist", str(tmp_path)).unseen
    write_idx(tmp_path / "MNIST", images=12)
    assert len(photos) > 500 and photos.shape[1:] == (1, 28, 28)
    assert data.load("fashion-mnist", str(tmp_path)).unseen.shape == (12, 1, 28, 28)


def test_cifar10_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar10(tmp_path / "cifar-10-batches-py", images=4)
    x, y = data.from_folder("cifar10", str(tmp_path), train=True)
    assert x.shape == (20, 3, 32, 32) and y.tolist() == 5 * [0, 1, 2, 3]
    assert torch.allclose(x[7].mean((1, 2)), torch.tensor([0, 0.2, 1]))


def test_digits_are_split_alike_every_time_and_unseen_ones_have_their_range() -> None:
    first, second = data.load("digits"), data.load("digits", train_size=100)
    assert torch.equal(first.test[1], second.test[1])
    assert torch.equal(first.train[1][:100], second.train[1])
    assert first.unseen.shape[1:] == first.train[0].shape[1:]
    x = first.train[0]
    assert x.min() - 1e-5 <= first.unseen.min() and first.unseen.max() <= x.max() + 1e-5


def test_the_comparison_of_optimizers_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    monkeypatch.setattr(optimizers, "TEST_SEEDS", (1,))
    smoke = ["--smoke", "--out", str(file), "--tasks"]
    optimizers.main([*smoke, "gpt-500", "--methods", "ngvi"])
    first = file.read_text()
    optimizers.main([*smoke, "mlp", "gpt-500", "--methods", "adamw"])
    optimizers.main([*smoke, "gpt-500", "--methods", "ngvi"])
    assert file.read_text().startswith(first)
    records = optimizers.read(file)
    assert [(record["task"], record["method"], record["kind"]) for record in records] == [
        ("gpt-500", "ngvi", "grid"), ("gpt-500", "ngvi", "test"), ("gpt", "ngvi", "cost"),
        ("mlp", "adamw", "grid"), ("mlp", "adamw", "test"), ("mlp", "adamw", "cost"),
        ("gpt-500", "adamw", "grid"), ("gpt-500", "adamw", "test"), ("gpt", "adamw", "cost"),
    ]
    capsys.readouterr()
    optimizers.main(["--report", "--out", str(file)])
    tables = capsys.readouterr().out
    nll = records[0]["val"]["end"]["samples"]["NLL"]
    assert "| ngvi, samples | 0.03 |" in tables and f"{nll:.4f}" in tables


def test_muon_sees_a_convolution_as_a_matrix() -> None:
    """torch's Muon, on a matrix of its own, gives the same weights up to its bfloat16."""
    layer = torch.nn.Conv2d(4, 3, 2)
    matrix = torch.nn.Parameter(layer.weight.detach().flatten(1).clone())
    ours = optimizers.MatrixMuon([layer.weight], lr=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.1)
    start = matrix.detach().clone()
    for _ in range(2):
        layer.weight.grad = torch.randn(3, 4, 2, 2)
        matrix.grad = layer.weight.grad.flatten(1)
        ours.step()
        theirs.step()
    moved = layer.weight.detach().flatten(1) - start
    assert torch.dist(moved, matrix.detach() - start) < 0.02 * moved.norm()
