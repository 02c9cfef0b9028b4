"""What is drawn is what was computed: the artists' data against dense references."""

import math

import matplotlib
import pytest
import torch
from torch import nn

import pyrocurv
from pyrocurv.curvature import estimate
from pyrocurv.guides import KFACGuide
from pyrocurv.plots import (
    entropy_histogram,
    heat_map,
    predictive_band,
    reliability,
    risk_coverage,
    spectrum,
    uncertain_images,
    weight_noise,
)
from pyrocurv.structures import Dense, Diagonal

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def probabilities(rows: int = 40, classes: int = 4) -> torch.Tensor:
    return torch.randn(rows, classes, dtype=torch.double).mul(2).softmax(-1)


def test_risk_coverage_is_the_error_rate_of_the_most_confident() -> None:
    probs, labels = probabilities(), torch.randint(4, (40,))
    ax = risk_coverage(probs, labels, label="net")
    confidence = probs.max(-1).values
    risks = []
    for kept in range(1, 41):
        rows = sorted(range(40), key=lambda i: -confidence[i])[:kept]
        risks.append(sum(int(probs[i].argmax() != labels[i]) for i in rows) / kept)
    assert ax.lines[0].get_ydata() == pytest.approx(risks)
    assert ax.lines[0].get_xdata() == pytest.approx([kept / 40 for kept in range(1, 41)])
    assert ax.get_legend().get_texts()[0].get_text() == f"net, AURC {sum(risks) / 40:.4f}"
    assert risk_coverage(probs, labels, ax) is ax and len(ax.lines) == 2


def test_entropy_histogram_counts_shares() -> None:
    probs, unseen = probabilities(), torch.full((7, 4), 0.25, dtype=torch.double)
    ax = entropy_histogram(probs, unseen, bins=10)
    known, other = ax.containers
    assert sum(bar.get_height() for bar in known) == pytest.approx(1)
    assert [bar.get_height() for bar in other][-1] == pytest.approx(1)  # uniform: log 4
    assert ax.get_xlim() == pytest.approx((0, math.log(4)))
    with pytest.raises(ValueError, match="unseen has 3 classes, probs has 4"):
        entropy_histogram(probs, unseen[:, :3] / 0.75)


def test_entropy_histogram_of_several_kinds_of_data() -> None:
    probs = probabilities()
    ax = entropy_histogram(probs, {"noise": probs[:5], "letters": probs[5:9]})
    assert len(ax.containers) == 3
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["data of the trained kind", "noise", "letters"]
    with pytest.raises(ValueError, match=r"unseen\['noise'\] has 2 classes, probs has 4"):
        entropy_histogram(probs, {"noise": torch.full((3, 2), 0.5)})


def test_colors_are_those_of_the_style() -> None:
    with matplotlib.rc_context({"text.color": "#010203", "axes.prop_cycle": "cycler(color=['r'])"}):
        ax = reliability(probabilities(), torch.zeros(40, dtype=torch.long))
    assert ax.lines[0].get_color() == "#010203"
    assert ax.patches[0].get_facecolor() == (1, 0, 0, 1)


def test_heat_map_shows_every_entry() -> None:
    net = nn.Linear(3, 2)
    matrix = estimate(net, torch.randn(20, 3), torch.randint(2, (20,)), structure="block")
    ax = heat_map(matrix)
    dense = matrix.dense().double()
    drawn = torch.as_tensor(ax.images[0].get_array())
    torch.testing.assert_close(drawn * drawn.abs() * dense.abs().max(), dense)
    assert heat_map(torch.zeros(2, 2)).images[0].get_array().max() == 0
    with pytest.raises(ValueError, match=r"\[2, 3\]: \[P, P\]"):
        heat_map(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="5,000 rows: at most 4,000"):
        heat_map(Diagonal(torch.ones(5_000)))
    with pytest.raises(ValueError, match="not finite"):
        heat_map(torch.full((2, 2), math.nan))


def test_spectrum_draws_eigenvalues_by_size() -> None:
    root = torch.randn(6, 6, dtype=torch.double)
    symmetric = root + root.T
    ax = spectrum({"tensor": symmetric, "dense": Dense(symmetric), "null": torch.zeros(2, 2)})
    values = torch.linalg.eigvalsh(symmetric)
    positive = values[values > 0].flip(0).tolist()
    negative = (-values[values < 0]).tolist()
    assert ax.lines[0].get_ydata() == pytest.approx(positive)
    assert ax.lines[1].get_ydata() == pytest.approx(negative)
    assert ax.lines[2].get_ydata() == pytest.approx(positive)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels[:2] == ["tensor", "tensor, negative"]
    with pytest.raises(ValueError, match="at least one"):
        spectrum({})


def test_predictive_band_of_samples_and_of_a_normal() -> None:
    x = torch.tensor([1.0, -1.0, 0.0])
    samples = torch.randn(500, 3, 1, dtype=torch.double) + torch.tensor([[3.0], [1.0], [2.0]])
    ax = predictive_band(x.unsqueeze(1), samples, mass=0.8)
    assert ax.lines[0].get_xdata() == pytest.approx([-1, 0, 1])
    middle = samples.squeeze(-1).quantile(0.5, 0)[[1, 2, 0]]
    assert ax.lines[0].get_ydata() == pytest.approx(middle.tolist())
    normal = torch.distributions.Normal(x.double(), 0.5)
    vertices = predictive_band(x, normal, mass=0.9).collections[0].get_paths()[0].vertices
    assert vertices[:, 1].max() == pytest.approx(1 + 0.5 * 1.6448536, abs=1e-6)
    assert vertices[:, 1].min() == pytest.approx(-1 - 0.5 * 1.6448536, abs=1e-6)
    with pytest.raises(ValueError, match="for 3 inputs, x has 2"):
        predictive_band(x[:2], normal)


def test_weight_noise_has_a_row_for_each_tensor() -> None:
    net = pyrocurv.nn.bayesianize(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    model = pyrocurv.nn.Classifier(net, num_data=10)
    guide = KFACGuide(model)
    guide(torch.randn(10, 3), torch.randint(2, (10,)))
    ax = weight_noise(guide)
    assert [label.get_text() for label in ax.get_yticklabels()] == [*guide.sites]
    scale = guide.posterior.precision.inverse_diag().double().sqrt()
    medians = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"]
    sizes = [math.prod(shape) for shape in guide.sites.values()]
    expected = [part.quantile(0.5).item() for part in scale.split(sizes)]
    assert medians == pytest.approx(expected)


@pytest.mark.parametrize("draw", [
    lambda ax: reliability(probabilities(), torch.zeros(40, dtype=torch.long), ax),
    lambda ax: risk_coverage(probabilities(), torch.zeros(40, dtype=torch.long), ax),
    lambda ax: entropy_histogram(probabilities(), ax=ax),
    lambda ax: heat_map(torch.eye(3), ax),
    lambda ax: spectrum(torch.eye(3), ax),
    lambda ax: predictive_band(torch.zeros(2), torch.zeros(4, 2), ax),
])
def test_draws_on_given_axes(draw) -> None:
    ax = plt.figure().add_subplot()
    assert draw(ax) is ax
    with pytest.raises(TypeError, match="an Axes of matplotlib"):
        draw("axes")


def test_uncertain_images_come_first() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
    captions = [ax.get_xlabel() for ax in uncertain_images(torch.rand(3, 4, 4), probs, n=3)]
    assert captions == ["0 (50 %)", "0 (70 %)", "0 (90 %)"]


def test_a_band_of_another_distribution_needs_samples() -> None:
    poisson = torch.distributions.Poisson(torch.ones(3))
    with pytest.raises(TypeError, match="predictive: samples .S, N. or a Normal is needed"):
        predictive_band(torch.zeros(3), poisson)
