"""NGVI of networks that fully_shard had sharded, against one process that has everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from test_ngvi_ranks import target
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves

from pyrocurv import checkpoint
from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, Predictive, fit
from pyrocurv.layers.structure_spec import KFAC, Diagonal
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer

N, STEPS, ROWS, SIZE = 96, 3, 16, 2  # rows of a rank, ranks
GUIDES: dict[str, Any] = {"kfac": KFACGuide, "ekfac": EKFACGuide, "diag": DiagonalGuide}
EXACT = Curvature("fisher", every=1, batch=None, eigen_every=1)


class Scale(nn.Module):
    """A weight that no supported op consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((5,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.rate.exp()


def net(is_traced: bool) -> nn.Module:
    """With point estimates in the norm layers, one of which has statistics."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.Tanh(), nn.Flatten(), nn.LayerNorm(9),
        nn.Linear(9, 5), nn.Tanh(), *([] if is_traced else [Scale()]), nn.Linear(5, 3, bias=False),
    )


def make(rank: int | None, is_traced: bool = True) -> Classifier:
    torch.manual_seed(0)
    network = net(is_traced)
    if rank is not None:
        for index in (0, 5):
            fully_shard(network[index])
        fully_shard(network)
    layers = nn.Conv1d, nn.Linear, Scale
    return Classifier(bayesianize(network, layers=layers), num_data=N)


def loop(ngvi: NGVI, steps: range, rank: int | None) -> list[float]:
    """The losses of steps on this rank's half of batches that the number of a step determines."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS * SIZE, 2, 4, generator=generator)
        y = torch.randint(3, (ROWS * SIZE,), generator=generator)
        rows = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
        losses.append(ngvi.step(x[rows], y[rows]))
    return losses


def train(rank: int | None, kind: str, options: dict[str, Any], is_traced: bool) -> Any:
    """Losses, means and point estimates, and the blocks that are here, after some steps."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    try:
        model = make(rank, is_traced)
        model.net[1].eval()  # statistics of a batch are those of each rank's rows
        guide = GUIDES[kind](model)
        ngvi = NGVI(model, guide, **options)
        if rank is not None:
            torch.manual_seed(rank + 1)
        with mock.patch.object(torch.distributions.Categorical, "sample", target):
            losses = loop(ngvi, range(STEPS), rank)
    finally:
        torch.set_default_dtype(torch.float32)
    values = {**guide.median(), **dict(model.named_parameters())}
    states = {
        s.block.name: (s.precision.dense(), s.momentum.clone()) for s in ngvi._posterior.blocks
    }
    return losses, {name: x.detach().clone() for name, x in values.items()}, states


def check(ranks: Any, kind: str, is_traced: bool = True, **options: Any) -> None:
    options.setdefault("curvature", EXACT)
    with mock.patch.object(Diagonal, "group", lambda self, layer: layer):  # a block for each
        expected, values, states = train(None, kind, options, is_traced)
    found: dict[str, Any] = {}
    for losses, own_values, own in ranks(SIZE).run(train, kind, options, is_traced):
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
        assert own_values.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(own_values[name], value, rtol=1e-10, atol=1e-10)
        assert own and not own.keys() & found.keys()
        found |= own
    assert found.keys() == states.keys()
    for name, (precision, momentum) in states.items():
        torch.testing.assert_close(found[name][0], precision, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name][1], momentum, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", GUIDES)
def test_structures(ranks: Any, kind: str) -> None:
    """With the default step of the mean."""
    check(ranks, kind)


@pytest.mark.parametrize("update", ["natural", "muon", "soap", torch.optim.Adam])
def test_updates(ranks: Any, update: Any) -> None:
    check(ranks, "kfac", update=update)


def test_several_samples_and_their_average(ranks: Any) -> None:
    curvature = Curvature("ggn", every=2, batch=None)
    check(ranks, "ekfac", curvature=curvature, num_particles=3, average=True, update="natural")


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize("kind", ["kfac", "diag"])
def test_a_weight_without_a_layer(ranks: Any, kind: str) -> None:
    check(ranks, kind, is_traced=False, num_particles=2)


def test_noise_and_the_mean(ranks: Any) -> None:
    check(ranks, "diag", curvature="noise")
    check(ranks, "kfac", num_particles=0)


# ---- what ranks have ----------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"curvature": Curvature("ggn", every=1, batch=None), "update": "soap"}


def start(rank: int | None, **options: Any) -> tuple[Classifier, KFACGuide, NGVI]:
    pyro.clear_param_store()
    model = make(rank)
    guide = EKFACGuide(model)
    return model, guide, NGVI(model, guide, **{**OPTIONS, **options})


def numbers(*objects: Any) -> int:
    """How many numbers the states of some objects have here."""
    leaves = tree_leaves([{**x.state_dict(), "stream": None} for x in objects])
    return sum(x.numel() for x in leaves if isinstance(x, torch.Tensor) and x.dim())


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def keep(rank: int | None) -> Any:
    """Numbers kept, the complete posterior, predictions, and what a part of it refuses."""
    model, guide, ngvi = start(rank)
    model.net[1].eval().running_var.fill_(1.5)
    loop(ngvi, range(2), rank)
    kept = numbers(guide, ngvi)
    x = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(7, dtype=torch.long)
    whole = guide.gathered()
    assert Predictive(model, guide=whole, num_samples=3)(x)["obs"].shape == (3, 7)
    torch.manual_seed(3)
    samples = torch.cat([x.flatten(1) for x in whole.sample_posterior(2).values()], 1)
    results = {
        "kl": whole.kl().detach(), "precision": whole.posterior.precision.dense().detach(),
        "loc": whole.posterior.loc.detach(), 
        "at the mean": guide.to_module()(x).detach(),
    }
    guide.summary(), repr(guide), repr(ngvi), ngvi.update_counts()
    refused = {
        "posterior": lambda: guide.posterior, "sample": lambda: guide.sample_posterior(1),
        "quantiles": lambda: guide.quantiles(0.5), "call": lambda: guide(x, y),
        "kl": guide.kl, "Predictive": lambda: Predictive(model, guide=guide, num_samples=1)(x),
        "Laplace": lambda: Laplace(model, guide).fit([(x, y)]),
        "prior": lambda: bayesianize(model.net, prior=guide),
        "marginal": lambda: guide.get_posterior("net.0.weight"),
        "fit": lambda: fit(ngvi, [(x, y)], 1, held_out=[(x, y)]),
    }
    messages = {} if rank is None else {name: message(run) for name, run in refused.items()}
    return kept, results, messages, ngvi.work_assignment(), samples


def test_what_ranks_have(ranks: Any) -> None:
    everything, expected, *_ = keep(None)
    found = ranks(SIZE).run(keep)
    for kept, results, messages, owners, samples in found:
        assert torch.equal(samples, found[0][4])  # one process has eigenvectors of other signs
        assert kept < 0.75 * everything
        assert {*owners["blocks"].values()} == {0, 1}
        for name, value in results.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
        for name, text in messages.items():
            assert "gathered()" in text, (name, text)
