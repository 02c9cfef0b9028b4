"""The image application: every method and model on a few batches, resuming, scores, the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import image_classification
from pyrocurv import checkpoint
from vision import evaluation, training
from vision.config import Config, Method
from vision.evaluation import Predictions
from vision.methods.swag import RANK, Moments
from vision.networks import ResNet20, load_pretrained, make_network
from vision.settings import DATASETS, resolve

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Main:
    """Run the program in an empty folder: its exit status, output and errors without the bar."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> tuple[int, str, str]:
        status = image_classification.main([*options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def scores_of(main: Main, *options: str) -> dict[str, Any]:
    status, _, err = main("--smoke", "--ood", "none", "--out", "run.json", *options)
    assert (status, err) == (0, "")
    return json.loads(Path("run.json").read_text())


# ---- methods and models -------------------------------------------------------------------------


@pytest.mark.parametrize("method", get_args(Method))
def test_each_method(method: str, main: Main) -> None:
    if method == "ivon":
        pytest.importorskip("ivon")
    if method == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon")
    found = scores_of(main, "--method", method, "--members", "2")
    assert 0 <= found["scores"]["accuracy"] <= 100 and 0 < found["scores"]["NLL"] < 30
    assert all(math.isfinite(value) for value in found["scores"].values())
    assert {"loss", "nll", "accuracy", "lr"} <= found["curves"][0].keys()
    is_sampled = method in ("ngvi", "ensemble", "mc-dropout", "swag", "ivon")
    assert ("epistemic" in found["scores"]) == is_sampled
    assert ("kl" in found["curves"][0]) == (method == "ngvi")
    assert found["images"] == {"training": 24, "test": 24}
    assert found["curves"][-1]["epoch"] == 1
    decayed = scores_of(main, "--method", method, "--members", "2", "--weight-decay", "5")
    assert decayed["scores"]["NLL"] != found["scores"]["NLL"]


@pytest.mark.parametrize("model, method, weights", [
    ("small-cnn", "laplace", 1_306), ("resnet20", "ngvi", 272_186), ("vit-tiny", "adam", 539_914),
    ("resnet18", "sgd", 11_173_962), ("squeezenet1_1", "adam", 727_626),
])
def test_each_model(model: str, method: str, weights: int, main: Main) -> None:
    options = ["--train-size", "8", "--batch", "4"] if model == "resnet18" else []
    options += ["--image-size", "32"] if model == "squeezenet1_1" else []
    found = scores_of(main, "--model", model, "--method", method, *options)
    assert found["weights"] == weights and math.isfinite(found["scores"]["NLL"])


@pytest.mark.parametrize("options", [
    ["--guide", "ekfac"], ["--guide", "diagonal", "--update", "natural"],
    ["--guide", "full", "--model", "small-cnn", "--curvature", "ggn"],
    ["--guide", "block", "--model", "small-cnn", "--temperature", "0.1", "--prior-scale", "0.5"],
    ["--curvature", "empirical", "--amp"],
    ["--method", "laplace", "--layers", "all", "--model", "small-cnn", "--guide", "block"],
    ["--method", "second-order", "--guide", "ekfac", "--curvature", "hessian"],
])
def test_guides_and_curvatures(options: list[str], main: Main) -> None:
    assert math.isfinite(scores_of(main, *options)["scores"]["NLL"])


def test_a_pretrained_network_keeps_its_own_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, path = ResNet20(3, classes=4), tmp_path / "weights.pt"
    torch.save({"state_dict": trained.state_dict()}, path)
    net = make_network("resnet20", 3, 10, 32, path)
    assert torch.equal(net[0].weight, trained[0].weight)  # type: ignore
    assert "14.weight, 14.bias" in capsys.readouterr().out
    load_pretrained(trained, path)
    assert capsys.readouterr().out == ""


def test_swag_keeps_mean_variance_and_the_last_deviations() -> None:
    weights = torch.randn(RANK + 5, 7)
    moments = Moments(weights[0])
    for row in weights:
        moments.add(row)
    assert torch.allclose(moments.mean, weights.mean(0), atol=1e-6)
    assert torch.allclose(moments.square, weights.square().mean(0), atol=1e-6)
    means = weights.cumsum(0) / torch.arange(1, len(weights) + 1)[:, None]
    expected = (weights - means)[-RANK:]
    assert torch.allclose(torch.stack(moments.deviations), expected, atol=1e-5)
    draws = torch.stack([moments.sample() for _ in range(1000)])
    variance = weights.var(0, correction=0) / 2 + expected.square().sum(0) / (2 * (RANK - 1))
    error = variance * (2 / len(draws)) ** 0.5  # standard errors, of the variance and the mean
    assert bool(((draws.var(0) - variance).abs() < 5 * error).all())
    assert bool(((draws.mean(0) - moments.mean).abs() < 5 * (variance / len(draws)).sqrt()).all())


# ---- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ngvi", "muon", "swag", "ivon", "mc-dropout"])
def test_a_resumed_run_is_that_of_an_uninterrupted_one(
    method: str, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "ivon":
        pytest.importorskip("ivon")
    options = ["--method", method, "--epochs", "3", "--model", "small-cnn"]
    expected = scores_of(main, *options)

    def interrupted(path: Path, objects: dict[str, Any]) -> None:
        save(path, objects)
        if objects["epochs"] == 2:
            raise KeyboardInterrupt

    save = checkpoint.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", interrupted)
        main("--smoke", *options, "--checkpoint", "runs/run.pt")
    status, _, err = main(
        "--smoke", "--ood", "none", *options, "--checkpoint", "runs/run.pt", "--resume", "--out",
        "run.json",
    )
    found = json.loads(Path("run.json").read_text())
    assert status == 0 and "after epoch 2" in err
    assert found["curves"] == expected["curves"]
    times = ("train s", "ms / image")
    for name, value in expected["scores"].items():
        assert name in times or found["scores"][name] == value, name

    status, _, err = main("--smoke", *options, "--checkpoint", "runs/run.pt")
    assert status == 2 and "--resume" in err
    status, _, err = main(
        "--smoke", *options, "--lr", "9", "--checkpoint", "runs/run.pt", "--resume"
    )
    assert status == 2 and "not 9" in err and err.count("\n") == 1


def test_the_learning_rate_rises_and_falls_to_0() -> None:
    factor = training.warmed_up(lambda progress: 1 - progress, 0.1, 100)
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(1 / 11) and values[10] == 1 and values[100] == 0
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)


def test_tensorboard(main: Main) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scores_of(main, "--tensorboard", "logs", "--method", "adam")
    log = events.EventAccumulator("logs").Reload()
    assert {"train/loss", "train/accuracy", "train/lr"} <= {*log.Tags()["scalars"]}
    assert len(log.Scalars("train/loss")) == 3


# ---- settings and refusals ----------------------------------------------------------------------


def test_the_command_line_goes_before_the_tables() -> None:
    settings = resolve(Config(dataset="cifar10", method="sgd", lr=0.5))
    assert (settings.lr, settings.batch, settings.weight_decay) == (0.5, 128, 5e-4)
    assert settings.data == DATASETS["cifar10"]
    assert resolve(Config(smoke=True, epochs=7)).epochs == 7


@pytest.mark.parametrize("options, hint", [
    (["--dataset", "mnist"], "--download"),
    (["--dataset", "imagenet"], "ILSVRC2012_devkit_t12.tar.gz"),
    (["--dataset", "folder"], "--data-root"),
    (["--guide", "full"], "--model small-cnn"),
    (["--method", "laplace", "--layers", "all", "--guide", "block"], "kfac"),
    (["--model", "resnet21"], "torchvision.models"),
    (["--image-size", "20"], "28 or 32"),
    (["--model", "vit-tiny", "--image-size", "31"], "multiple of 7 or 8"),
    (["--epochs", "0"], "1 or more"),
    (["--lr", "-1"], "positive"),
    (["--resume"], "--checkpoint"),
    (["--model", "small-cnn", "--pretrained", "nowhere.pt"], "nowhere.pt"),
])
def test_refusals_are_one_line(options: list[str], hint: str, main: Main, tmp_path: Path) -> None:
    status, out, err = main("--smoke", *options)
    assert (status, out) == (2, "") and err.count("\n") == 1 and hint in err
    assert [*tmp_path.iterdir()] == []


# ---- scores -------------------------------------------------------------------------------------


def predictions(logits: Tensor, labels: Tensor) -> Predictions:
    log_probs = logits.log_softmax(-1)
    return Predictions(log_probs, torch.zeros(len(labels)), labels)


def test_scores_against_their_definitions(double: None) -> None:
    logits, labels = 2 * torch.randn(200, 4), torch.randint(4, (200,))
    found = evaluation.scores(predictions(logits, labels))
    probs = logits.softmax(-1)
    right = (probs.argmax(-1) == labels).double()
    assert found["accuracy"] == pytest.approx(100 * right.mean().item())
    assert found["NLL"] == pytest.approx(-probs[range(200), labels].log().mean().item())
    targets = torch.eye(4)[labels]
    assert found["Brier"] == pytest.approx((probs - targets).square().sum(-1).mean().item())
    order = probs.amax(-1).argsort(descending=True)
    assert found["selective 80"] == pytest.approx(100 * right[order[:160]].mean().item())
    confidence, ece = probs.max(-1).values, 0.0
    for k in range(15):
        rows = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if rows.any():
            ece += rows.double().mean().item() * abs(
                (confidence[rows].mean() - right[rows].mean()).item()
            )
    assert found["ECE"] == pytest.approx(100 * ece, abs=1e-3)


def test_detection_against_all_pairs(double: None) -> None:
    test = predictions(3 * torch.randn(60, 4), torch.randint(4, (60,)))
    unseen = predictions(torch.randn(50, 4), torch.full((50,), -1))
    found = evaluation.detection(test, unseen)
    pairs = unseen.entropy[:, None] > test.entropy
    assert found["AUROC"] == pytest.approx(100 * pairs.double().mean().item(), abs=1e-3)
    threshold = test.entropy.sort().values[math.ceil(0.95 * 60) - 1]
    passed = (unseen.entropy <= threshold).double().mean().item()
    assert found["FPR95"] == pytest.approx(100 * passed, abs=1e-3)
    assert "accuracy" not in found


def test_samples_become_a_mixture() -> None:
    samples = torch.randn(3, 8, 4).log_softmax(-1)
    labels = torch.randint(4, (8,))
    found = evaluation.collect([(samples[:, :5], labels[:5]), (samples[:, 5:], labels[5:])], 8)
    assert torch.allclose(found.log_probs.exp(), samples.exp().mean(0), atol=1e-6)
    aleatoric = -(samples.exp() * samples).sum(-1).mean(0)
    assert torch.allclose(found.aleatoric, aleatoric, atol=1e-6)
    assert bool((found.entropy >= found.aleatoric).all()) and found.num_samples == 3


# ---- the report ---------------------------------------------------------------------------------

SECTIONS = ["scores", "unseen", "calibration", "images", "training", "settings"]
VOID = {"meta", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags are closed, and collects ids, links and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.links: list[str] = []
        self.figures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        self.figures += tag == "svg"
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.links += [values[name] or "" for name in ("src", "href", "xlink:href")
                       if name in values]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_report_is_one_page_without_links(main: Main) -> None:
    status, out, _ = main("--smoke", "--ood", "photographs", "--report", "pages/report.html")
    assert status == 0 and "report: pages/report.html" in out
    text = Path("pages/report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.sections == SECTIONS
    assert page.figures == 10  # two of entropies, two of calibration, six curves
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert sum(link.startswith("data:") for link in page.links) == 24
    assert not re.search(r"https?:|url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for word in ("NLL", "nats", "photographs", "mean gap between confidence and accuracy"):
        assert word in text
    assert len(text) < 1_000_000
