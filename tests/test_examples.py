"""The examples as a person runs them: from another folder, interrupted, without its data."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import classification
import data

ROOT = Path(__file__).parents[1]
COLUMNS = ["method", "accuracy", "NLL", "ECE", "Brier", "OOD AUROC", "train s"]


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


def test_smoke(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / "classification.py", "--smoke"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    header, adam, ngvi = done.stdout.splitlines()
    assert header.split("  ")[0] == "method" and all(column in header for column in COLUMNS)
    assert adam.startswith("Adam") and ngvi.startswith("NGVI kfac")
    assert (tmp_path / "classification.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("name", "options", "first"), [
    ("second_order", [], "optimizer"),
    *(("vi_torch_loop", ["--method", method], "  kept") for method in (
        "noisy-kfac", "noisy-ekfac", "vogn", "ivon")),
    ("any_pyro_model", [], "guide"),
])
def test_smoke_of_the_others(name: str, options: list[str], first: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / f"{name}.py", "--smoke", *options],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(first) and len(done.stdout.splitlines()) >= 3
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_smoke_of_regression_and_laplace(tmp_path: Path) -> None:
    for name, first in (("regression", "path"), ("laplace", "method")):
        done = subprocess.run(
            [sys.executable, "-W", "error", ROOT / "examples" / f"{name}.py", "--smoke"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(first) and len(done.stdout.splitlines()) > 2
    assert (tmp_path / "regression.png").read_bytes().startswith(b"\x89PNG")


def test_second_order_without_its_data(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "second_order.py", "--dataset", "cifar10",
         "--data-root", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )
    assert done.returncode == 2 and "cifar10 is not in the folder" in done.stderr


@pytest.mark.parametrize(
    "guide, epochs_before", [("kfac", 1), *((guide, 3) for guide in classification.GUIDES)]
)  # 1: interrupted in Adam, 3: in NGVI
def test_resume_gives_the_numbers_of_an_uninterrupted_run(
    guide: str,
    epochs_before: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smoke = ["--smoke", "--samples", "2", "--guide", guide, "--plot", str(tmp_path / "plot.png")]
    file = str(tmp_path / "checkpoint.pt")
    assert classification.main(smoke) == 0
    expected = without_seconds(capsys.readouterr().out)

    def interrupted(path: Path, jobs: list[classification.Job], settings: dict) -> None:
        save_checkpoint(path, jobs, settings)
        if sum(job.epoch for job in jobs) == epochs_before:
            raise KeyboardInterrupt

    save_checkpoint = classification.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classification, "save_checkpoint", interrupted)
        classification.main([*smoke, "--save", file])
    assert classification.main([*smoke, "--resume", file]) == 0
    assert without_seconds(capsys.readouterr().out) == expected
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint.pt"]

    assert classification.main([*smoke, "--resume", file, "--seed", "1"]) == 2
    assert "seed=0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["--dataset", "mnist"], "--download"),
        (["--dataset", "cifar10"], "--download"),
        (["--dataset", "mnist", "--guide", "full"], "use kfac"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    arguments: list[str],
    hint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert classification.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and hint in err
    assert list(tmp_path.iterdir()) == []


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


def test_unseen_images_are_the_other_mnist_where_it_is_at_hand(tmp_path: Path) -> None:
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
