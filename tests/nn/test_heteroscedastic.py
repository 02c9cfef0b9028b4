"""`Regressor(noise="heteroscedastic")`: its likelihood and curvature, and scales that it finds."""

import math
from typing import Any

import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from toys import NATURAL

from pyrocurv.curvature import Curvature
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.nn import Regressor, bayesianize

HETEROSCEDASTIC: Any = "heteroscedastic"


def model_of(outputs: int = 2, num_data: int = 20) -> Regressor:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return Regressor(bayesianize(net), num_data, HETEROSCEDASTIC)


def data(columns: int = 1, rows: int = 20) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, 3, dtype=torch.float64)
    y = torch.randn(rows, columns, dtype=torch.float64)
    return x, y.squeeze(-1)


def moments(output: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, written out."""
    half = output.shape[-1] // 2
    return output[..., :half], 1e-3 + (1 + (math.e - 1) * output[..., half:].exp()).log()


@pytest.mark.parametrize("columns", [1, 3])
def test_the_likelihood(columns: int) -> None:
    model, (x, y) = model_of(2 * columns), data(columns)
    trace = poutine.trace(model).get_trace(x, y)
    weights = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2 * columns)).double()
    output = functional_call(plain, {n.removeprefix("net."): w for n, w in weights.items()}, x)
    mean, scale = (part.squeeze(-1) for part in moments(output))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], mean)
    torch.testing.assert_close(trace.nodes["scale"]["value"], scale)
    each = dist.Normal(mean, scale).log_prob(y)
    torch.testing.assert_close(trace.nodes["obs"]["fn"].log_prob(y),
                               each.sum(-1) if columns > 1 else each)
    torch.testing.assert_close(trace.log_prob_sum(lambda name, site: name == "obs"), each.sum())
    assert trace.nodes["obs"]["scale"] == 1
    with_axis = poutine.trace(model).get_trace(x, y[:, None] if columns == 1 else y)
    assert with_axis.nodes["obs"]["fn"].batch_shape == (20,)


def test_the_curvature_is_of_means_and_scales_together() -> None:
    """Jᵀ F J with the Fisher information 1/σ² of a mean and 2/σ² of a standard deviation."""
    model, (x, y) = model_of(4), data(2)
    guide = FullGuide(model)
    NGVI(model, guide, lr=1e-9, curvature=Curvature("ggn", every=1, batch=None, initial=0.0),
         damping=0.0, **NATURAL).step(x, y)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    names = [name.removeprefix("net.") for name in guide.sites]
    shapes = [*guide.sites.values()]
    mean = guide.posterior.loc.detach()

    def network(w: Tensor) -> Tensor:
        parts = w.split([math.prod(shape) for shape in shapes])
        values = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return functional_call(plain, dict(zip(names, values, strict=True)), x)

    loc, scale = moments(network(mean))
    rows = jacrev(lambda w: torch.cat(moments(network(w)), -1))(mean)  # [B, 4, P]
    fisher = torch.cat([scale**-2, 2 * scale**-2], -1)
    wanted = torch.einsum("bcp,bc,bcq->pq", rows, fisher, rows)
    prior = torch.cat([
        torch.full((math.prod(shape),), (4.0 if name.startswith("0") else 5.0))
        for name, shape in zip(names, shapes, strict=True)
    ]).double().diag()
    found = guide.posterior.precision.dense() - prior
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_scale_is_recovered() -> None:
    """σ(x) = 0.1 + 0.2 (1 + x) around a line, within a quarter everywhere."""
    torch.manual_seed(0)
    x = torch.rand(1500, 1) * 2 - 1
    sigma = 0.1 + 0.2 * (1 + x)
    y = (0.7 * x + sigma * torch.randn_like(x)).squeeze(-1)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))
    model = Regressor(bayesianize(net), 1500, HETEROSCEDASTIC)
    ngvi = NGVI(model, KFACGuide(model), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(ngvi.optimizer, 250)
    for _ in range(250):
        rows = torch.randint(1500, (250,))
        ngvi.step(x[rows], y[rows])
        schedule.step()
    grid = torch.linspace(-0.8, 0.9, 7)[:, None]
    for kind in (pyro.infer.Predictive, Predictive):
        draws = kind(model, guide=ngvi.guide, num_samples=50)(grid)
        scale = draws["scale"].mean(0).reshape(7)
        wanted = (0.1 + 0.2 * (1 + grid)).squeeze(-1)
        assert ((scale / wanted).log().abs() < 0.25).all(), scale / wanted
    draws = Predictive(model, guide=ngvi.guide, num_samples=2000,
                       return_sites=["obs", "_RETURN"])(grid)
    assert ((draws["obs"].std(0) / wanted).log().abs() < 0.3).all()
    assert ((draws["_RETURN"].mean(0) - 0.7 * grid.squeeze(-1)).abs() < 0.1).all()


@pytest.mark.parametrize("columns", [1, 2])
def test_laplace_linearizes_the_means(columns: int) -> None:
    model, (x, y) = model_of(2 * columns), data(columns)
    laplace = Laplace(model, FullGuide(model)).fit([(x, y)])
    found = laplace.predict(x[:3])
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2 * columns)).double()
    means = {n.removeprefix("net."): w for n, w in laplace.guide.median().items()}
    jacobians = jacrev(lambda w: moments(functional_call(plain, w, x[:3]))[0])(means)
    rows = torch.cat([jacobians[name].flatten(2) for name in means], -1)  # [B, D, P]
    covariance = torch.linalg.inv(laplace.guide.posterior.precision.dense())
    loc, scale = moments(functional_call(plain, means, x[:3]))
    wanted = rows @ covariance @ rows.mT + scale.square().diag_embed()
    torch.testing.assert_close(found.mean, loc.squeeze(-1))
    variance = found.variance if columns == 1 else found.covariance_matrix
    torch.testing.assert_close(variance, wanted.squeeze(-1).squeeze(-1) if columns == 1 else wanted)
    assert math.isfinite(laplace.log_marginal_likelihood())


def test_extreme_outputs_are_finite() -> None:
    net = nn.Linear(1, 2)
    model = Regressor(bayesianize(net), 4, HETEROSCEDASTIC)
    y = torch.zeros(4)
    for size in (-1e4, 1e4):
        bias = torch.tensor([0.0, size], requires_grad=True)
        values = {"net.weight": torch.zeros(2, 1), "net.bias": bias}
        trace = poutine.trace(poutine.condition(model, values)).get_trace(torch.ones(4, 1), y)
        loss = trace.nodes["obs"]["fn"].log_prob(y).sum()
        (gradient,) = torch.autograd.grad(loss, bias)
        assert loss.isfinite() and gradient.isfinite().all()
        assert trace.nodes["scale"]["value"].min() >= 1e-3


def test_what_is_refused() -> None:
    model, (x, y) = model_of(3), data()
    with pytest.raises(ValueError, match=r"outputs \[B, 2 D\] are needed .* returned \(20, 3\)"):
        model(x, y)
    with pytest.raises(ValueError, match="noise='homo': a positive .*, None or 'heter"):
        Regressor(nn.Linear(1, 2), 4, noise="homo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"targets \(20, 2\) do not fit means \(20,\)"):
        model_of(2)(x, torch.zeros(20, 2))
