"""The equations of a step of `NGVI`, and when it estimates the curvature."""

import math
from functools import partial
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from designs import alternating
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import (
    EXACT,
    GUIDES,
    NATURAL,
    NOISE,
    NUM_DATA,
    PRIORS,
    Line,
    class_data,
    classifier,
    exactly,
    linear,
    mlp,
    plain,
    regression_data,
    regressor,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, block_sharing
from pyrocurv.nn import Classifier, Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)


# ---- momentum and clip --------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, 0.4])
def test_momentum_is_of_the_likelihood_gradient(initial: float) -> None:
    """M ← M - lr d by hand, in a linear model without noise of the samples."""
    x, y = regression_data()
    curvature = Curvature("ggn", every=1, batch=None, initial=initial)
    ngvi = exactly(linear("unequal"), "full", lr=0.1, momentum=0.8, damping=0.05, num_particles=2,
                   curvature=curvature)
    ngvi.guide(x, y)
    loc = ngvi.guide.posterior.loc.clone()
    X, n = oracles.linear_layer_design(x, 2), NUM_DATA
    C = X.T @ X / NOISE**2 / n
    weight, bias = PRIORS["unequal"]
    delta = C.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    m, eye = torch.zeros(8).double(), torch.eye(8).double()
    for t in range(1, 6):
        P = C + torch.diag(delta) / n + (0.05 + initial * 0.95 ** (t - 1)) * eye
        m = 0.8 * m + 0.2 * X.T @ (X @ loc - y.flatten()) / NOISE**2 / n
        loc = loc - 0.1 * torch.linalg.solve(P, m / (1 - 0.8**t) + delta * loc / n)
        ngvi.step(x, y)
        torch.testing.assert_close(ngvi.guide.posterior.loc, loc, rtol=1e-9, atol=1e-9)


def test_the_clip_bounds_a_step() -> None:
    """lr₀² ν² <d, h> <= kl_clip, over all blocks; d and h by hand from the unclipped step."""
    data, model = regression_data(), Regressor(mlp(0.8, 0.8), NUM_DATA, noise=NOISE)
    options = {"lr": 0.5, "curvature": EXACT, "momentum": 0.0, **NATURAL}
    plain = NGVI(model, KFACGuide(model), kl_clip=None, **options)
    start = KFACGuide(model)
    start(*data)
    plain.step(*data)
    clipped = NGVI(model, KFACGuide(model), kl_clip=1e-3, **options)
    clipped.step(*data)
    free, held = ((ngvi.guide.posterior.loc - start.posterior.loc).detach()
                  for ngvi in (plain, clipped))
    precision = clipped.guide.posterior.precision.dense().detach()  # N/T (P - damping)
    inner = held @ precision @ held / NUM_DATA + 3e-3 * held @ held  # lr² ν² <d, P d>
    assert float(inner) == pytest.approx(1e-3, rel=1e-6)
    torch.testing.assert_close(held / held.norm(), free / free.norm())
    assert held.norm() < free.norm()


def test_a_learned_log_scale_does_not_run_away() -> None:
    """Under wide priors: losses of 1e15 at unlucky samples, whose gradients momentum would keep."""
    net = bayesianize(nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 2)), 1.0)

    def model(x: Tensor, y: Tensor) -> None:
        mean, log_scale = net(x).unbind(-1)
        with pyro.plate("data", 300, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(mean, log_scale.exp()), obs=y)

    x = torch.randn(300, 1)
    y = torch.sin(2 * x[:, 0]) + (0.1 + 0.3 * torch.sigmoid(2 * x[:, 0])) * torch.randn(300)
    ngvi, losses = NGVI(model, KFACGuide(model), temperature=0.3), []
    for _ in range(400):
        rows = torch.randint(300, (64,))
        losses.append(ngvi.step(x[rows], y[rows]))
    early, late = (torch.tensor(losses[n : n + 100]).median() for n in (100, 300))
    assert max(losses) > 1e5 and late < 0.8 * early


# ---- when the curvature is estimated ------------------------------------------------------------


@pytest.mark.parametrize(("structure", "every", "eigen_every", "turned"), [
    ("full", 3, 200, [3, 6, 9, 12]), ("diag", 3, 200, [3, 6, 9, 12]),
    ("ekfac", 3, 200, [3, 6, 9, 12]),
    ("kfac", 3, 200, [3, 9]),  # with the eigendecompositions: at the 2nd and 4th estimate
    ("kfac", 2, 5, [2, 6, 10]),  # and at the first estimate from steps 5 and 10 on
    ("kfac", 1, 5, [1, 3, 5, 7, 10]),
])
def test_curvature_is_estimated_every_so_often(
    structure: str, every: int, eigen_every: int, turned: list[int]
) -> None:
    data, model = regression_data(), regressor()
    curvature = Curvature("fisher", every=every, eigen_every=eigen_every, initial=0.0)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature)
    precisions = []
    for _ in range(14):
        ngvi.step(*data)
        precisions.append(ngvi.guide.posterior.precision.dense())
    pairs = zip(precisions, precisions[1:], strict=False)
    assert [t + 1 for t, (a, b) in enumerate(pairs) if not torch.equal(a, b)] == turned


def test_schedule_of_estimates() -> None:
    spec = Curvature("fisher", every="schedule", eigen_every=200)
    due = [step for step in range(1_001) if spec.is_due(step)]
    assert due[:21] == list(range(0, 105, 5)) and due[20:40] == list(range(100, 300, 10))
    assert due[40:] == [*range(300, 600, 20), 600, 700, 800, 900, 1_000]
    assert [step for step in due if spec.is_basis_due(step)] == [0, 200, 400, 600, 800, 1_000]
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    model = Classifier(bayesianize(nn.Linear(3, 2).double()), 8)
    ngvi = NGVI(model, KFACGuide(model), curvature=spec)
    for _ in range(12):  # estimates at 0, 5 and 10
        ngvi.step(x, y)
    assert [count.updates for count in ngvi.update_counts().values()] == [3]
    for wrong in ("often", 0, 2.5):
        with pytest.raises(ValueError, match="every=.* or 'schedule' is needed"):
            Curvature("fisher", every=wrong)


# ---- estimates of the curvature -----------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.95, 0.5, 0.0])
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_curvature_is_averaged_equally_at_first(structure: str, decay: float) -> None:
    """The n-th estimate comes in with weight max(1 - decay, 1/n)."""
    curvature = Curvature("ggn", every=1, batch=None, initial=0.0, decay=decay)
    ngvi = exactly(linear("unequal"), structure, curvature=curvature, lr=0.1)
    weight, bias = PRIORS["unequal"]
    delta = torch.tensor([weight**-2] * 6 + [bias**-2] * 2).double()
    C = torch.zeros(8, 8).double()
    for n in range(1, 6):
        x, y = regression_data()
        ngvi.step(x, y)
        X = oracles.linear_layer_design(x, 2)
        C = C.lerp(X.T @ X / NOISE**2, max(1 - decay, 1 / n))
        expected = C if structure == "full" else torch.diag(C.diag())
        found = ngvi.guide.posterior.precision.dense()
        torch.testing.assert_close(found, expected + torch.diag(delta))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("structure", ["full", "block", "diag", "kfac"])
def test_curvature_is_the_mean_over_the_samples(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a softmax, whose Gauss-Newton matrix depends on the weights."""
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    model = Classifier(bayesianize(nn.Linear(3, 3)), 12)
    guide = KFACGuide(model, structure={"*": structure})
    spec = Curvature("ggn", every=1, eigen_every=1, batch=None, decay=0.7)
    ngvi = NGVI(model, guide, num_particles=4, curvature=spec)
    samples, perturbed_weights = [], block_sharing.perturbed_weights

    def record(*args: Any) -> dict[str, Tensor]:
        samples.append(perturbed_weights(*args))
        return samples[-1]

    monkeypatch.setattr(block_sharing, "perturbed_weights", record)
    mean = torch.zeros(12, 12) if structure != "kfac" else torch.zeros(3, 3)
    a = torch.cat([x, torch.ones(12, 1)], 1)
    for step in range(1, 6):
        samples.clear()
        ngvi.step(x, y)
        found = []
        for weights in samples:
            p = (x @ weights["net.weight"].T + weights["net.bias"]).softmax(-1)
            output = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
            matrix = torch.einsum("noq,ni,nj->oiqj", output, a, a).reshape(12, 12) / 12
            found.append(output.mean(0) if structure == "kfac" else matrix)
        assert len(found) == 4 and (step == 1 or not torch.equal(found[0], found[1]))
        mean = mean.lerp(torch.stack(found).mean(0), max(0.3, 1 / step))
        (average,) = [state.curvature for state in ngvi._posterior.blocks]
        got = average.factors.output if structure == "kfac" else average.curvature.dense()
        expected = mean.diagonal().diag() if structure == "diag" else mean
        torch.testing.assert_close(got, expected)
        assert average.count == step


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_empirical_fisher_is_that_of_the_tempered_likelihood(factor: float) -> None:
    """Λ = scale · sum_n g gᵀ + δ, with g of one example at the mean."""

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=factor):
            plain(mean, y)

    x, y = regression_data(10)
    curvature = Curvature("empirical", every=1, batch=None, initial=0.0)
    ngvi = exactly(Line(observe), "full", curvature=curvature)
    ngvi.guide(x, y)
    start = ngvi.guide.posterior.loc.detach().clone()
    ngvi.step(x, y)
    X = oracles.linear_layer_design(x, 2)
    residuals = (X @ start - y.flatten()) / NOISE**2
    g = (X * residuals[:, None]).view(10, 2, 8).sum(1)
    weight, bias = PRIORS["unequal"]
    delta = g.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    expected = factor * NUM_DATA / 10 * g.T @ g + torch.diag(delta)
    torch.testing.assert_close(ngvi.guide.posterior.precision.dense(), expected)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_sampled_fisher_is_that_of_the_tempered_likelihood(factor: float) -> None:
    """Its mean over K draws is scale · XᵀX/σ², with a standard error from Isserlis' theorem."""

    def observe(mean: Tensor, y: Tensor | None) -> None:
        with poutine.scale(scale=factor):
            plain(mean, y)

    x, y = regression_data()
    curvature = Curvature("fisher", every=1, batch=None, initial=0.0, num_samples=400)
    ngvi = exactly(Line(observe), "full", curvature=curvature)
    ngvi.step(x, y)
    J = oracles.linear_layer_design(x, 2).view(NUM_DATA, 2, 8) / NOISE
    each = torch.einsum("noi,noj->nij", J, J)  # of an example
    diagonals = each.diagonal(dim1=1, dim2=2)
    variance = (diagonals[:, :, None] * diagonals[:, None] + each.square()).sum(0) / 400
    weight, bias = PRIORS["unequal"]
    delta = x.new_tensor([weight**-2] * 6 + [bias**-2] * 2)
    found = (ngvi.guide.posterior.precision.dense() - torch.diag(delta)) / factor
    assert ((found - each.sum(0)).abs() < 5 * variance.sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    ("structure", "kind"), alternating(GUIDES, ["ggn", "fisher", "empirical"])
)
def test_a_network_learns(structure: str, kind: str) -> None:
    model, data = classifier(), class_data()
    ngvi = NGVI(model, GUIDES[structure](model), lr=0.1, temperature=0.1, curvature=kind)
    losses = [ngvi.step(*data) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]


# ---- layers that some runs do not use -----------------------------------------------------------


class Dropping(PyroModule):
    """A residual network whose middle layer is left out of some runs."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width), nn.Linear(width, 2)])
        self.net = bayesianize(layers.double())
        self.drops = False

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        hidden = self.net[0](x).tanh()
        if not self.drops:
            hidden = hidden + self.net[1](hidden).tanh()
        mean = self.net[2](hidden)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            plain(mean, y)


@pytest.mark.parametrize(("structure", "every", "first", "kind"), [  # all pairs of two
    (structure, every, ("dropped", "there")[(i // 2 + j) % 2], ("fisher", "hessian")[(i + j) % 2])
    for i, structure in enumerate(GUIDES) for j, every in enumerate([1, 3, "auto"])
])
def test_a_layer_left_out_of_some_runs(structure: str, first: str, every: Any, kind: str) -> None:
    model, data = Dropping(), regression_data()
    guide = GUIDES[structure](model)
    guide(*data)
    ngvi = NGVI(model, guide, curvature=Curvature(kind, every=every), lr=0.1, momentum=0.0)
    prior = partial(guide.get_posterior, "net.1.weight")
    losses = []
    for step in range(12):
        model.drops = (step % 2 == 0) == (first == "dropped")
        losses.append(ngvi.step(*data))
        if model.drops and step == 0:  # the prior and the initial curvature are all there is
            precision = 5 + 0.1 * NUM_DATA / guide.temperature
            scale = torch.full((4, 4), precision**-0.5).double()
            torch.testing.assert_close(prior().base_dist.scale, scale)
        assert math.isfinite(losses[-1]) and math.isfinite(ngvi.evaluate_loss(*data))
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(count.updates > 0 for count in ngvi.update_counts().values())


def test_a_wide_layer_left_out_at_first() -> None:
    model, data = Dropping(170), regression_data()
    guide = KFACGuide(model)
    guide(*data)
    ngvi = NGVI(model, guide, lr=0.1)
    for model.drops in (True, False, True):
        assert math.isfinite(ngvi.step(*data))
    assert [count.updates for count in ngvi.update_counts().values()] == [1, 1, 1]


def test_a_layer_left_out_moves_by_its_prior_alone() -> None:
    model, data = Dropping(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), momentum=0.0, damping=0.0, kl_clip=None, lr=0.5)
    ngvi.step(*data)
    model.drops = True
    before = ngvi.guide.median()["net.1.weight"]
    ngvi.step(*data)
    after = ngvi.guide.median()["net.1.weight"]
    assert after.norm() < before.norm()
