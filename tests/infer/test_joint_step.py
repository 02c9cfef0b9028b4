"""Models without a network: all latents in one Gaussian, by the Hessian of the log joint."""

import io
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from designs import alternating
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Regressor, bayesianize

pytestmark = pytest.mark.usefixtures("double")
SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def linear(x: Tensor, y: Tensor) -> None:
    """Whose posterior is Gaussian."""
    w = pyro.sample("w", dist.Normal(0.5, 2.0).expand([3]).to_event(1))
    b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x * w).sum(-1) + b, 0.7), obs=y)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and precision of (w, b), and -log evidence."""
    rows = torch.cat([x, torch.ones(len(x), 1)], 1)
    prior = torch.tensor([2.0, 2, 2, 1.5]) ** -2
    start = torch.tensor([0.5, 0.5, 0.5, 0])
    precision = rows.mT @ rows / 0.7**2 + prior.diag()
    mean = torch.linalg.solve(precision, rows.mT @ y / 0.7**2 + prior * start)
    covariance = 0.7**2 * torch.eye(len(x)) + rows @ (1 / prior).diag() @ rows.mT
    evidence = torch.distributions.MultivariateNormal(rows @ start, covariance).log_prob(y)
    return mean, precision, -float(evidence)


def eight_schools(errors: Tensor, y: Tensor | None = None) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * theta, errors), obs=y)


# ---- exact answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
def test_a_gaussian_posterior_is_found(structure: type[Any]) -> None:
    x, y = torch.randn(20, 3), torch.randn(20)
    mean, precision, evidence = exact(x, y)
    guide = structure(linear)
    ngvi = NGVI(linear, guide, curvature="hessian", average=False)
    for _ in range(60):
        ngvi.step(x, y)
    posterior = guide.posterior
    torch.testing.assert_close(posterior.loc.detach(), mean, rtol=1e-6, atol=1e-6)
    if structure is FullGuide:
        torch.testing.assert_close(posterior.precision.dense(), precision, rtol=1e-6, atol=1e-6)
        assert ngvi.evaluate_loss(x, y) == pytest.approx(evidence, abs=1e-6)  # without noise
    else:
        torch.testing.assert_close(posterior.precision.diag(), precision.diag())


def test_a_temperature_scales_the_kl() -> None:
    x, y = torch.randn(20, 3), torch.randn(20)
    _, precision, _ = exact(x, y)
    prior = torch.tensor([2.0, 2, 2, 1.5]).square().reciprocal().diag()
    guide = FullGuide(linear)
    ngvi = NGVI(linear, guide, curvature="hessian", temperature=0.25, average=False)
    for _ in range(60):
        ngvi.step(x, y)
    wanted = (precision - prior) / 0.25 + prior
    torch.testing.assert_close(guide.posterior.precision.dense(), wanted, rtol=1e-6, atol=1e-6)


def test_eight_schools_are_at_the_best_gaussian() -> None:
    """Where E ∇E = 0 and E ∇²E = Λ, asked of a log joint that is written out here."""
    guide = FullGuide(eight_schools)
    ngvi = NGVI(eight_schools, guide, curvature="hessian")
    for _ in range(200):
        ngvi.step(ERRORS, SCHOOLS)
    assert list(guide.sites) == ["mu", "tau", "theta"]

    def energy(u: Tensor) -> Tensor:
        mu, log_tau, theta = u[0], u[1], u[2:]
        prior = -(mu / 5).square() / 2 - theta.square().sum() / 2
        prior = prior - torch.log1p((log_tau.exp() / 5).square()) + log_tau
        return -prior + ((SCHOOLS - mu - log_tau.exp() * theta) / ERRORS).square().sum() / 2

    loc = guide.posterior.loc.detach()
    covariance = guide.posterior.precision.dense().inverse().detach()
    root = torch.linalg.cholesky(covariance)
    u = loc + torch.randn(20_000, 10) @ root.mT
    slopes = torch.func.vmap(torch.func.grad(energy))(u) @ root  # in units of the posterior
    error = slopes.std(0) / len(u) ** 0.5
    step = slopes.mean(0)  # how far a Newton step would move, in standard deviations
    assert (step.abs() < 0.1 + 4 * error).all()
    hessians = torch.func.vmap(torch.func.jacrev(torch.func.grad(energy)))(u)
    ratio = (root.mT @ hessians @ root).diagonal(dim1=1, dim2=2)
    error = ratio.std(0) / len(u) ** 0.5
    assert ((ratio.mean(0) - 1).abs() < 0.2 + 4 * error).all()
    assert covariance[1, 1].sqrt().item() == pytest.approx(0.73, abs=0.05)  # NUTS has 1.17


# ---- models of all shapes -----------------------------------------------------------------------


def poisson(x: Tensor, y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Poisson(rate * (w * x[:, 0]).exp()), obs=y.abs().round())


def student(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    df = pyro.sample("df", dist.LogNormal(1.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.StudentT(2 + df, x[:, 0], scale), obs=y)


def negative_binomial(x: Tensor, y: Tensor) -> None:
    count = pyro.sample("count", dist.Gamma(3.0, 1.0))
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.NegativeBinomial(count, p), obs=y.abs().round())


def ordered(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    base = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
    cuts = pyro.sample("cuts", dist.TransformedDistribution(
        base, dist.transforms.OrderedTransform()))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.OrderedLogistic(w * x[:, 0], cuts), obs=(y > 0).long())


def mixed(x: Tensor, y: Tensor) -> None:
    """A simplex, a plate of scales, two observed sites, a mask, a scale and a factor."""
    shares = pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with pyro.plate("groups", 2):
        scales = pyro.sample("scales", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        mean = x @ shares
        with poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("a", dist.Normal(mean, scales[0]), obs=y)
        with poutine.scale(scale=0.5):
            pyro.sample("b", dist.Normal(-mean, scales[1]), obs=y)
    pyro.factor("penalty", -shares.square().sum())


def hierarchical(x: Tensor, y: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    w = pyro.sample("w", dist.Normal(0.0, tau).expand([3]).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, noise * (1 + x[:, 0].abs())), obs=y)


def subsampled(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", 3 * len(x), subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x[:, 0], scale), obs=y)


class Module(pyro.nn.PyroModule):
    """With parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(()))
        self.scale = pyro.nn.PyroSample(dist.HalfNormal(1.0))

    def forward(self, x: Tensor, y: Tensor) -> None:
        scale, shift = self.scale, pyro.param("shift", torch.ones(()))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(self.offset + shift + x[:, 0], scale), obs=y)


MODELS: dict[str, Callable[[], Callable[..., None]]] = {
    "linear": lambda: linear, "poisson": lambda: poisson, "student": lambda: student,
    "negative binomial": lambda: negative_binomial, "ordered": lambda: ordered,
    "mixed": lambda: mixed, "hierarchical": lambda: hierarchical,
    "subsampled": lambda: subsampled, "module": Module,
}


NAMES = {
    "linear": {"w", "b"}, "poisson": {"rate", "w"}, "student": {"scale", "df"},
    "negative binomial": {"count", "p"}, "ordered": {"w", "cuts"}, "mixed": {"shares", "scales"},
    "hierarchical": {"tau", "w", "noise"}, "subsampled": {"scale"}, "module": {"scale"},
}


@pytest.mark.parametrize(("name", "structure"), [
    *alternating(MODELS, [FullGuide, DiagonalGuide]),
    ("hierarchical", DiagonalGuide), ("poisson", FullGuide),
])
def test_the_loss_is_that_of_pyro_and_falls(name: str, structure: type[Any]) -> None:
    model, (x, y) = MODELS[name](), (torch.randn(12, 3), torch.randn(12))
    guide = structure(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    losses = [ngvi.step(x, y) for _ in range(20)]
    assert all(map(math.isfinite, losses)) and min(losses[-12:]) < losses[0]
    assert guide.is_one_block
    assert {*guide.sites} == {*guide.median()} == NAMES[name]
    ours = torch.tensor([ngvi.evaluate_loss(x, y) for _ in range(8)])
    theirs = torch.tensor([Trace_ELBO().loss(model, guide, x, y) for _ in range(60)])
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 4.5 * error + 1e-6
    draws = guide.sample_posterior(50)
    for site, value in guide.median(x, y).items():
        assert draws[site].shape == (50, *value.shape)
        assert guide.quantiles([0.1, 0.5, 0.9])[site].shape == (3, *value.shape)
        marginal = guide.get_posterior(site)
        assert marginal.sample().shape == value.shape


def test_parameters_of_the_model_are_trained_too() -> None:
    model, x = Module(), torch.randn(40, 3)
    y = x[:, 0] + 3
    ngvi = NGVI(
        model, FullGuide(model), curvature="hessian", optim=lambda p: torch.optim.Adam(p, 0.1)
    )
    for _ in range(100):
        ngvi.step(x, y)
    assert (model.offset + pyro.param("shift")).item() == pytest.approx(3, abs=0.2)


def test_prediction_through_pyro() -> None:
    guide = FullGuide(eight_schools)
    ngvi = NGVI(eight_schools, guide, curvature="hessian")
    for _ in range(20):
        ngvi.step(ERRORS, SCHOOLS)
    draws = Predictive(eight_schools, guide=guide, num_samples=7)(ERRORS)
    assert draws["obs"].shape == (7, 8) and (draws["tau"] > 0).all()


def branching(x: Tensor, y: Tensor) -> None:
    """That looks at its numbers, and so has no vectorized form."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(0.0, scale if scale > 0.5 else scale + 0.1), obs=y)


def test_models_that_branch_go_one_sample_at_a_time() -> None:
    x, y = torch.randn(12, 3), torch.randn(12)
    ngvi = NGVI(branching, FullGuide(branching), curvature="hessian")
    losses = [ngvi.step(x, y) for _ in range(20)]
    assert not ngvi._rule._can_vectorize and losses[-1] < losses[0]


def test_samples_at_once_or_one_by_one_are_the_same_step() -> None:
    def run(vectorized: bool) -> Tensor:
        torch.manual_seed(0)
        guide = FullGuide(hierarchical)
        ngvi = NGVI(hierarchical, guide, curvature="hessian")
        x, y = torch.randn(12, 3), torch.randn(12)
        for _ in range(5):  # the first step is never vectorized
            ngvi.step(x, y)
            ngvi._rule._can_vectorize = vectorized
        return guide.posterior.loc.detach()

    torch.testing.assert_close(run(True), run(False))


def test_a_network_with_a_latent_noise_is_one_gaussian_too() -> None:
    model = Regressor(bayesianize(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))), 20)
    guide = FullGuide(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    x, y = torch.randn(20, 2), torch.randn(20)
    losses = [ngvi.step(x, y) for _ in range(40)]
    assert "sigma" in guide.sites and guide.is_one_block
    assert losses[-1] < losses[0]


# ---- saving and refusing ------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
@pytest.mark.parametrize("average", ["auto", False])
def test_a_resumed_run_is_the_uninterrupted_one(structure: type[Any], average: Any) -> None:
    def made() -> tuple[Any, NGVI]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = structure(hierarchical)
        return guide, NGVI(hierarchical, guide, curvature="hessian", average=average)

    x, y = torch.randn(12, 3), torch.randn(12)
    whole = made()
    for _ in range(8):
        whole[1].step(x, y)
    wanted = {n: v.clone() for n, v in whole[0].state_dict().items() if isinstance(v, Tensor)}
    first = made()
    for _ in range(5):
        first[1].step(x, y)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = made()
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    with pytest.raises(RuntimeError, match="call it once"):
        second[0].median()
    for _ in range(3):
        second[1].step(x, y)
    for name, value in second[0].state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, wanted[name]), name


def test_other_kinds_are_of_layers() -> None:
    guide = FullGuide(eight_schools)
    with pytest.raises(ValueError, match="use 'hessian'"):
        NGVI(eight_schools, guide, curvature="fisher").step(ERRORS, SCHOOLS)
    ngvi = NGVI(eight_schools, guide, curvature=Curvature("hessian", decay=0.9), num_particles=4)
    ngvi.step(ERRORS, SCHOOLS)


@pytest.mark.parametrize("name", ["momentum", "damping"])
def test_numbers_that_would_play_no_part_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        NGVI(linear, FullGuide(linear), curvature="hessian", **{name: 0.5})
    NGVI(linear, FullGuide(linear), curvature="hessian", **{name: 0.0})


def test_local_latents_of_a_subsample_are_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", 30, subsample=torch.arange(len(y))):
            scale = pyro.sample("scale", dist.HalfNormal(1.0))
            pyro.sample("obs", dist.Normal(0.0, scale), obs=y)

    with pytest.raises(ValueError, match="subsampled plate"):
        NGVI(model, FullGuide(model), curvature="hessian").step(torch.randn(5))


def test_what_is_not_finite_changes_nothing() -> None:
    guide = FullGuide(linear)
    ngvi = NGVI(linear, guide, curvature="hessian")
    x, y = torch.randn(12, 3), torch.randn(12)
    for _ in range(3):
        ngvi.step(x, y)
    before = {n: v.clone() for n, v in guide.state_dict().items() if isinstance(v, Tensor)}
    with pytest.raises((FloatingPointError, ValueError)):
        ngvi.step(x * torch.nan, y)
    for name, value in guide.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, before[name])
    ngvi.step(x, y)


def test_no_closed_form_of_the_kl() -> None:
    guide = FullGuide(eight_schools)
    guide(ERRORS, SCHOOLS)
    with pytest.raises(RuntimeError, match="evaluate_loss"):
        guide.kl()


def test_a_kronecker_guide_leaves_such_latents_to_the_fallback() -> None:
    guide = KFACGuide(hierarchical)
    with pytest.warns(UserWarning, match="from gradients"):
        guide(torch.randn(12, 3), torch.randn(12))
    assert {"tau", "noise"} <= {*guide.fallback_sites}


# ---- a noise scale, by quadrature ---------------------------------------------------------------


def test_a_noise_scale_by_quadrature() -> None:
    """The posterior of ln σ, and the Gaussian nearest to it, on a fine grid of one dimension."""
    pyro.set_rng_seed(0)
    y = 0.3 * torch.randn(12, dtype=torch.float64)
    grid = torch.linspace(-4, 2, 20001, dtype=torch.float64)
    scale = grid.exp().unsqueeze(-1)
    joint = dist.Normal(0.0, scale).log_prob(y).sum(-1) + dist.LogNormal(0.0, 1.0).log_prob(
        scale.squeeze(-1)) + grid
    exact = joint.softmax(0)
    mean = (exact * grid).sum()
    sd = (exact * (grid - mean).square()).sum().sqrt()
    free = torch.stack([mean, sd.log()]).requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=100, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        optimizer.zero_grad()
        density = dist.Normal(free[0], free[1].exp()).log_prob(grid)
        q = density.exp() / density.exp().sum()
        loss = (q * (density - joint)).sum()
        loss.backward()
        return loss

    optimizer.step(divergence)
    best = torch.stack([free[0], free[1].exp()]).detach()

    def model() -> None:
        sigma = pyro.sample("sigma", dist.LogNormal(y.new_zeros(()), y.new_ones(())))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(0.0, sigma), obs=y)

    found = []
    for seed in range(4):
        pyro.set_rng_seed(seed)
        guide = FullGuide(model)
        ngvi = NGVI(model, guide, curvature="hessian")
        for _ in range(100):
            ngvi.step()
        variance = guide.posterior.precision.inverse_diag()
        found.append(torch.cat([guide.posterior.loc, variance.sqrt()]).detach())
    runs = torch.stack(found).double()
    error = runs.std(0) / len(runs) ** 0.5
    assert (error < 0.02 * sd).all()
    assert ((runs.mean(0) - best).abs() < 4 * error + 1e-3 * sd).all(), (runs.mean(0), best, error)
    assert (best[0] - mean).abs() < 0.1 * sd and (best[1] / sd - 1).abs() < 0.1


def test_a_kind_is_short_for_its_curvature() -> None:
    """Also for a network; a decay is a rate, other numbers are of running estimates."""
    torch.manual_seed(0)
    net = bayesianize(nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)))
    model = Regressor(net, num_data=6, noise=0.1)
    x = torch.randn(6, 1)
    found = []
    for curvature in ("hessian", Curvature("hessian"), Curvature("hessian", decay=0.7)):
        torch.manual_seed(1)
        guide = FullGuide(model)
        ngvi = NGVI(model, guide, curvature=curvature)
        losses = [ngvi.step(x, x.squeeze(-1)) for _ in range(3)]
        assert ngvi._rule.is_joint
        found.append((losses, guide.posterior.precision.dense()))
    for losses, precision in found[1:]:  # 1 - 0.7 is the rate of the others
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(precision, found[0][1], rtol=1e-4, atol=1e-4)
    ngvi = NGVI(model, FullGuide(model), curvature=Curvature("hessian", every=5))
    ngvi.step(x, x.squeeze(-1))
    assert not ngvi._rule.is_joint and ngvi.optimizer.param_groups[0]["lr"] == 0.03


def test_at_the_mean_it_is_newton_and_ends_in_a_laplace_approximation() -> None:
    """`num_particles=0`: mode and Hessian of the log joint in unconstrained space."""
    x, y = torch.linspace(-2, 2, 20).double(), (torch.arange(20) % 3 > 0).double()

    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(x.new_tensor(3.0), x.new_tensor(2.0)))
        slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("data", 20):
            pyro.sample("obs", dist.Bernoulli(logits=slope * x + scale), obs=y)

    def energy(u: Tensor) -> Tensor:
        scale, slope = u[0].exp(), u[1]
        likelihood = dist.Bernoulli(logits=slope * x + scale).log_prob(y).sum()
        prior = dist.Gamma(3.0, 2.0).log_prob(scale) + u[0] + dist.Normal(0.0, 1.0).log_prob(slope)
        return -likelihood - prior

    guide = FullGuide(model)
    ngvi = NGVI(model, guide, curvature="hessian", num_particles=0, lr=1.0, average=False)
    ngvi.step()
    start = guide.posterior.loc.detach().clone()
    for _ in range(160):  # the precision moves by 0.1
        ngvi.step()
    loc = guide.posterior.loc.detach()
    assert energy(loc) < energy(start)
    assert torch.func.grad(energy)(loc).norm() < 1e-8
    hessian = torch.autograd.functional.hessian(energy, loc)
    assert torch.allclose(guide.posterior.precision.dense(), hessian, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:a matrix of")
def test_without_a_network_every_hessian_is_of_the_whole_and_says_where_there_is_no_mode() -> None:
    def funnel() -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, tau).expand([8]).to_event(1))
        with pyro.plate("data", 8):
            pyro.sample("obs", dist.Normal(theta, 1.0), obs=torch.linspace(-0.1, 0.1, 8))

    torch.set_default_dtype(torch.float32)  # a precision that falls sooner out of range
    guide = FullGuide(funnel)
    ngvi = NGVI(funnel, guide, curvature=Curvature("hessian", every=1), num_particles=0)
    ngvi.step()
    assert ngvi._rule.is_joint
    with pytest.raises(FloatingPointError, match="no mode.*num_particles"):
        for _ in range(500):
            before = guide.posterior.loc.clone()
            ngvi.step()
    assert torch.equal(guide.posterior.loc, before)


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
def test_a_factor_may_be_all_there_is(structure: type[Any]) -> None:
    """In a plate or not; the same as an observed site."""
    x, y = torch.randn(20, 3), torch.randn(20)

    def observed(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.5, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 0.7), obs=y)

    def each(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.5, 2.0).expand([3]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.factor("obs", dist.Normal((x * w).sum(-1), 0.7).log_prob(y))

    def all_at_once(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.5, 2.0).expand([3]).to_event(1))
        pyro.factor("obs", dist.Normal((x * w).sum(-1), 0.7).log_prob(y).sum())

    posteriors = []
    for model in (observed, each, all_at_once):
        guide = structure(model)
        ngvi = NGVI(model, guide, curvature="hessian", average=False)
        for _ in range(60):
            ngvi.step(x, y)
        posteriors.append((guide.posterior.loc.detach(), guide.posterior.precision.dense()))
    for loc, precision in posteriors[1:]:
        torch.testing.assert_close(loc, posteriors[0][0])
        torch.testing.assert_close(precision, posteriors[0][1])


def test_a_failed_attempt_at_all_samples_at_once_moves_no_buffer() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = Regressor(bayesianize(net), 12)
    ngvi = NGVI(model, FullGuide(model), curvature="hessian", num_particles=4)
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    for _ in range(5):
        ngvi.step(x, y)
    assert int(net[1].num_batches_tracked) == 5 * 4


def test_an_interrupt_in_a_step_changes_nothing() -> None:
    """The run goes on as one that was not interrupted."""
    x, y, stop = torch.randn(12, 3), torch.randn(12), [False]

    def model(x: Tensor, y: Tensor) -> None:
        linear(x, y)
        if stop[0]:
            raise KeyboardInterrupt

    def run(interrupted: bool) -> list[float]:
        torch.manual_seed(0)
        ngvi = NGVI(model, FullGuide(model), curvature="hessian")
        losses = [ngvi.step(x, y) for _ in range(3)]
        if interrupted:
            stop[0] = True
            with pytest.raises(KeyboardInterrupt):
                ngvi.step(x, y)
            stop[0] = False
        return losses + [ngvi.step(x, y) for _ in range(3)]

    assert run(True) == run(False)


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
def test_hidden_units_do_not_start_all_the_same(structure: type[Any]) -> None:
    """At the medians, all zero, the gradient is zero by symmetry."""
    x = torch.randn(40, 3)
    y = (2 * x[:, 0]).sin()

    def model(x: Tensor, y: Tensor) -> None:
        inner = pyro.sample("inner", dist.Normal(0.0, 1.0).expand([3, 8]).to_event(2))
        outer = pyro.sample("outer", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x @ inner).tanh() @ outer, 0.3), obs=y)

    guide = structure(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    for _ in range(100):
        ngvi.step(x, y)
    fitted = (x @ guide.median()["inner"]).tanh() @ guide.median()["outer"]
    assert (fitted - y).square().mean() < 0.3 * y.square().mean()


@pytest.mark.parametrize("structure", [FullGuide, DiagonalGuide])
def test_particles_beside_the_plates_of_latents(structure: type[Any]) -> None:
    """A model of independent latents: its loss has no noise, in a loop or vectorised."""
    y = torch.randn(4)

    def model(y: Tensor | None = None) -> Tensor:
        with pyro.plate("groups", 4):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            return pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    guide = structure(model)
    ngvi = NGVI(model, guide, curvature="hessian")
    for _ in range(50):
        ngvi.step(y)
    evidence = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y).sum()
    for vectorised in (False, True):
        elbo = Trace_ELBO(50, max_plate_nesting=1, vectorize_particles=vectorised)
        assert elbo.loss(model, guide, y) == pytest.approx(-float(evidence), rel=1e-3)
    assert pyro.infer.Predictive(model, guide=guide, num_samples=7, parallel=True)()[
        "obs"].shape == (7, 4)


def test_a_guide_that_met_its_model_before() -> None:
    """Its layers have Gaussians and the scale has the fallback: the steps are those of layers."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    model, x = Regressor(bayesianize(net), 20), torch.randn(20, 3)
    guide = FullGuide(model)
    guide(x, x[:, 0])
    ngvi = NGVI(model, guide, curvature="hessian")
    assert math.isfinite(ngvi.step(x, x[:, 0]))
    assert guide.fallback_sites == ("sigma",) and ngvi.num_particles == 1


def test_the_marginal_of_a_real_latent_is_a_normal() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean.sum(), scale), obs=y)

    guide = FullGuide(model)
    NGVI(model, guide, curvature="hessian").step(torch.tensor([1.0, 2.0, 4.0]))
    assert guide.get_posterior("mean").stddev.shape == (2,)
    assert bool((guide.get_posterior("scale").sample((20,)) > 0).all())
