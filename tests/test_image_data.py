"""Each data set of the image application is read from small files in its own format."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets as torchvision_datasets
from torchvision.datasets import imagenet

from resuming import Refusal
from vision import datasets
from vision.settings import DATASETS, DataSettings
from vision.transforms import Pipeline, pipelines, to_pixels
from vision.unseen import corruptions, unseen_images

SIZE = DataSettings(16, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), "crop-flip", 1, 4, "photographs")
WNIDS = ("n01440764", "n01443537", "n99999999")  # the last is no leaf of the hierarchy


def plain(name: str) -> tuple[Pipeline, Pipeline]:
    data = DATASETS[name]
    return pipelines(data, len(data.mean))


def load(name: str, root: Path, **options: Any) -> datasets.ImageData:
    return datasets.load(name, root, plain(name), **options)


# ---- files --------------------------------------------------------------------------------------


def write_idx(folder: Path, images: int, packed: bool) -> None:
    """The four files of an MNIST; the image n is of class n % 10 and all its pixels are n."""
    raw = folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(images, dtype=np.uint8), 28 * 28)
    classes = (np.arange(images) % 10).astype(np.uint8)
    for part in ("train", "t10k"):
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, images, 28, 28)
            + pixels.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">4BI", 0, 0, 8, 1, images)
            + classes.tobytes(),
        }
        for name, content in contents.items():
            path = raw / (f"{name}.gz" if packed else name)
            path.write_bytes(gzip.compress(content) if packed else content)


def write_cifar(root: Path, kind: Any, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a CIFAR, and their checksums in torchvision's tables.

    The red plane of an image is its class, green 51 and blue 255.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    is_fine = kind is torchvision_datasets.CIFAR100
    labels = [(7 * n) % (100 if is_fine else 10) for n in range(images)]
    pixels = np.array([[[y] * 1024, [51] * 1024, [255] * 1024] for y in labels], dtype=np.uint8)
    batch = {
        "data": pixels.reshape(images, -1), "fine_labels" if is_fine else "labels": labels,
    }
    names = [f"class {n}" for n in range(100 if is_fine else 10)]

    def written(name: str, value: Any) -> list[str]:
        content = pickle.dumps(value, protocol=2)
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    for table in ("train_list", "test_list"):
        files = [written(name, batch) for name, _ in getattr(kind, table)]
        monkeypatch.setattr(kind, table, files)
    name, md5 = written(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})


def jpeg(shade: int, size: tuple[int, int] = (40, 30)) -> bytes:
    Image.new("RGB", size, (shade, 0, 0)).save(file := io.BytesIO(), format="JPEG")
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as archive:  # type: ignore
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def write_imagenet_archives(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three archives of ImageNet 2012 with two classes, and their checksums."""
    synsets = np.empty(len(WNIDS), dtype=[
        (field, object) for field in ("ID", "WNID", "words", "gloss", "num_children")
    ])
    synsets["ID"], synsets["WNID"] = range(1, 4), WNIDS
    synsets["words"] = ["tench, Tinca tinca", "goldfish, Carassius auratus", "fish, fishes"]
    synsets["gloss"], synsets["num_children"] = "", [0, 0, 2]
    savemat(meta := io.BytesIO(), {"synsets": synsets})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n2\n",
    }
    train = {
        f"{wnid}.tar": tar({f"{wnid}_{n}.JPEG": jpeg(200 * k) for n in range(4)})
        for k, wnid in enumerate(WNIDS[:2])
    }
    val = {f"ILSVRC2012_val_{n:08}.JPEG": jpeg(200 * k) for n, k in enumerate((1, 0, 1), start=1)}
    archives = {"train": tar(train), "val": tar(val), "devkit": tar(devkit, "w:gz")}
    table = {}
    for part, content in archives.items():
        name = imagenet.ARCHIVE_META[part][0]
        (root / name).write_bytes(content)
        table[part] = (name, hashlib.md5(content).hexdigest())
    monkeypatch.setattr(imagenet, "ARCHIVE_META", table)


def write_folder(root: Path, counts: dict[str, int]) -> None:
    """Images of a shade for each class."""
    for shade, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.jpg").write_bytes(jpeg(100 * shade))


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(name: str, folder: str, packed: bool, tmp_path: Path) -> None:
    write_idx(tmp_path / folder, 30, packed)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    data = load(name, tmp_path)
    assert len(data.train) == len(data.test) == 30 and len(data.classes) == 10
    image, label = data.train[17]
    assert image.shape == (1, 28, 28) and label == 7
    expected = (17 / 255 - DATASETS[name].mean[0]) / DATASETS[name].std[0]
    assert torch.allclose(image, torch.tensor(expected), atol=1e-5)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = datasets.IN_MEMORY[name]
    parts = len(kind.train_list)
    write_cifar(tmp_path, kind, 4, monkeypatch)
    data = load(name, tmp_path)
    assert (len(data.train), len(data.test)) == (4 * parts, 4)
    assert len(data.classes) == (100 if name == "cifar100" else 10)
    image, label = data.plain[2]
    red, green, blue = to_pixels(image, data.plain.pipeline).mean((1, 2)).tolist()
    assert label == 14 % len(data.classes)
    assert [red, green, blue] == pytest.approx([label / 255, 0.2, 1], abs=1e-5)


@pytest.mark.filterwarnings("ignore:Python 3.14 will")  # torchvision's, on Python 3.12 and 3.13
def test_imagenet_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reading unpacks them, the second one finds the folders."""
    write_imagenet_archives(tmp_path, monkeypatch)
    for _ in range(2):
        data = load("imagenet", tmp_path)
        assert data.classes == ("tench", "goldfish")
        assert (len(data.train), len(data.test)) == (8, 3)
        labels = [data.test[n][1] for n in range(3)]
        assert labels == [0, 1, 1]
        for number, label in enumerate(labels):  # the red of an image says its class
            image = to_pixels(data.test[number][0], data.test.pipeline)
            assert image.shape == (3, 224, 224)
            assert float(image[0].mean()) == pytest.approx(200 / 255 * label, abs=0.02)


def test_imagenet_folders_without_the_devkit(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / split, {WNIDS[0]: 2, WNIDS[1]: 1})
    data = load("imagenet", tmp_path)
    assert data.classes == WNIDS[:2] and len(data.train) == 3


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_with_train_and_val(held_out: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folder(tmp_path / held_out, {"cat": 1, "dog": 2})
    data = load("folder", tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (5, 3, ("cat", "dog"))
    assert data.train[4][0].shape == (3, 224, 224)


def test_one_folder_is_split_alike_every_time(tmp_path: Path) -> None:
    write_folder(tmp_path, {"cat": 6, "dog": 4})
    first, second = load("folder", tmp_path), load("folder", tmp_path)
    assert (len(first.train), len(first.test)) == (8, 2)
    assert torch.equal(first.test.rows, second.test.rows)
    assert sorted(first.train.rows.tolist() + first.test.rows.tolist()) == list(range(10))


def test_digits() -> None:
    data = load("digits", Path("nowhere"))
    assert (len(data.train), len(data.test)) == (797, 1000)
    pixels = torch.stack([data.train[n][0] for n in range(100)])
    assert pixels.shape[1:] == (1, 28, 28) and abs(float(pixels.mean())) < 0.2


# ---- what is made of them -----------------------------------------------------------------------


def test_validation_images_are_training_images_that_are_held_out() -> None:
    data = load("digits", Path("nowhere"), validation=True, train_size=200)
    whole = load("digits", Path("nowhere"))
    rows = set(data.train.rows.tolist()), set(data.test.rows.tolist())
    assert not rows[0] & rows[1] and rows[0] | rows[1] <= set(whole.train.rows.tolist())
    assert (len(data.train), len(data.plain), len(data.test)) == (200, 200, 79)


def test_augmentation_changes_training_images_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = torchvision_datasets.CIFAR10
    write_cifar(tmp_path, kind, 2, monkeypatch)
    data = datasets.load("cifar10", tmp_path, pipelines(SIZE, 3))
    rows = [0] * 40
    augmented = torch.stack([image for image, _ in data.train.__getitems__(rows)])
    same = torch.stack([image for image, _ in data.plain.__getitems__(rows)])
    assert augmented.shape == same.shape == (40, 3, 16, 16)
    assert len(augmented.unique(dim=0)) > 5 and len(same.unique(dim=0)) == 1


@pytest.mark.parametrize("channels, source", [(3, 1), (1, 3)])
def test_gray_and_color_images_become_each_other(channels: int, source: int) -> None:
    settings = DATASETS["mnist" if source == 1 else "cifar10"]
    _, pipeline = pipelines(settings, channels)
    pixels = torch.randint(256, (2, source, 20, 20), dtype=torch.uint8)
    assert pipeline.batch(pixels).shape == (2, channels, settings.size, settings.size)


def test_batches_and_single_images_are_prepared_alike() -> None:
    _, pipeline = pipelines(SIZE, 3)
    pixels = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.allclose(pipeline.one(image), pipeline.batch(pixels[None])[0])


@pytest.mark.parametrize("name", corruptions(28))
def test_corruptions(name: str) -> None:
    """They change an image, keep it in [0, 1] up to the clamp, and do the same each time."""
    _, pipeline = plain("mnist")
    corrupted = pipeline.corrupted(corruptions(28)[name])
    pixels = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    x, original = corrupted.batch(pixels), pipeline.batch(pixels)
    assert torch.equal(x, corrupted.batch(pixels)) and not torch.allclose(x, original)
    low, high = pipeline.normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)).flatten().tolist()
    assert low - 1e-5 <= float(x.min()) and float(x.max()) <= high + 1e-5


def test_unseen_images_are_another_data_set_or_photographs(tmp_path: Path) -> None:
    data = load("digits", tmp_path)
    kinds = unseen_images(data, "mnist", tmp_path, 28, limit=50)
    assert [*kinds] == ["photographs", *corruptions(28)]
    assert all(0 < len(images) <= 50 for images in kinds.values())
    assert kinds["photographs"][0][0].shape == (1, 28, 28) and kinds["photographs"][0][1] == -1
    write_idx(tmp_path / "MNIST", 20, packed=False)
    assert [*unseen_images(data, "mnist", tmp_path, 28, limit=50)][0] == "mnist"
    assert unseen_images(data, "none", tmp_path, 28, limit=50) == {}


@pytest.mark.parametrize("name, hint", [
    ("mnist", "--download"), ("fashion-mnist", "--download"), ("cifar10", "--download"),
    ("cifar100", "--download"), ("imagenet", "ILSVRC2012_devkit_t12.tar.gz"),
    ("folder", "a folder for each class"),
])
def test_absent_data_are_refused_in_one_line(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal) as caught:
        load(name, tmp_path)
    message = str(caught.value)
    assert hint in message and str(tmp_path) in message and "\n" not in message
    assert [*tmp_path.iterdir()] == []


def test_damaged_data_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST", 3, packed=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip file")
    with pytest.raises(Refusal, match="mnist is not in the folder"):
        load("mnist", tmp_path)


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"cat": 1, "dog": 1})
    write_folder(tmp_path / "val", {"cat": 1, "cow": 1})
    with pytest.raises(Refusal, match="cat, dog and cat, cow"):
        load("folder", tmp_path)
