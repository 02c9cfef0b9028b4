"""NGVI of networks sharded by fully_shard, against one process that has everything."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_ngvi_ranks import target
from test_sharded import Scale
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from pyrocurv import checkpoint
from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, Predictive, fit
from pyrocurv.layers.structure_spec import KFAC, Diagonal
from pyrocurv.nn import Classifier, bayesianize

N, STEPS, ROWS, SIZE = 96, 3, 16, 2  # rows of a rank, ranks
GUIDES: dict[str, Any] = {"kfac": KFACGuide, "ekfac": EKFACGuide, "diag": DiagonalGuide}
EXACT = Curvature("fisher", every=1, batch=None, eigen_every=1)


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


def tasks(rank: int, is_sharded: bool, path: str) -> Any:
    """A model of one's own, a latent of the fallback guide, the posterior of a task as a prior."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    bayesianize(fully_shard(network) if is_sharded else network)
    x, y = torch.randn(SIZE, ROWS, 2, 4)[rank], torch.randint(3, (SIZE, ROWS))[rank]

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        logits = network(x) * scale
        with pyro.plate("data", SIZE * ROWS, subsample=x):
            pyro.sample("obs", dist.Categorical(logits=logits), obs=y)

    curvature = Curvature("ggn", every=1, batch=None)
    try:
        first = DiagonalGuide(model)
        fit(NGVI(model, first, curvature=curvature), [(x, y)], 3, checkpoint=path)
        assert (first.ownership is not None) == is_sharded
        bayesianize(network, prior=first.gathered())
        second = KFACGuide(model)
        ngvi = NGVI(model, second, curvature=curvature)
        losses = [ngvi.step(x, y) for _ in range(2)]
        fit(NGVI(model, first, curvature=curvature), [(x, y)], 3, checkpoint=path)  # which is there
    finally:
        torch.set_default_dtype(torch.float32)
    assert (second.ownership is not None) == is_sharded
    medians = {f"{n} {number}": value for number, guide in enumerate((first, second))
               for n, value in guide.median(x).items()}
    return losses, medians


def test_tasks(ranks: Any, tmp_path: Any) -> None:
    """As ranks do each of which has the whole posterior."""
    expected = ranks(SIZE).run(tasks, False, str(tmp_path / "whole"))[0]
    for losses, medians in ranks(SIZE).run(tasks, True, str(tmp_path / "parts")):
        torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=1e-9)
        for name, value in medians.items():
            torch.testing.assert_close(value, expected[1][name], rtol=1e-8, atol=1e-8)


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
    samples = torch.cat([samples.flatten(), torch.tensor([ngvi.evaluate_loss(x, y)])])
    guide.summary(), repr(guide), repr(ngvi), ngvi.update_counts()
    refused = {
        "posterior": lambda: guide.posterior, "sample": lambda: guide.sample_posterior(1),
        "quantiles": lambda: guide.quantiles(0.5), "call": lambda: guide(x, y),
        "kl": guide.kl, "Predictive": lambda: Predictive(model, guide=guide, num_samples=1)(x),
        "Laplace": lambda: Laplace(model, guide).fit([(x, y)]),
        "prior": lambda: bayesianize(model.net, prior=guide),
        "marginal": lambda: guide.get_posterior("net.0.weight"),
        "unpickled": pickle.loads(pickle.dumps(guide)).gathered,
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


# ---- states -------------------------------------------------------------------------------------


def state(model: Classifier, guide: KFACGuide, ngvi: NGVI) -> list[Any]:
    return copy.deepcopy([model.state_dict(), guide.state_dict(), ngvi.state_dict()])


def values(model: Classifier, guide: KFACGuide) -> dict[str, torch.Tensor]:
    """What all ranks have: means, point estimates, statistics of batch norm."""
    return {n: x.detach().clone() for n, x in {**guide.median(), **model.state_dict()}.items()}


def resume(rank: int, path: str) -> Any:
    """A run, the same resumed from the part of each rank, from all of it, and from a file."""
    options = {"update": "auto", "temperature": "auto"}
    model, guide, ngvi = start(rank, **options)
    loop(ngvi, range(2), rank)
    part = state(model, guide, ngvi)
    full = copy.deepcopy([model.state_dict(), guide.full_state_dict(), ngvi.full_state_dict()])
    assert [bool(x) for x in full] == [True, rank == 0, rank == 0]
    checkpoint.save(path, {"model": model, "guide": guide, "ngvi": ngvi})
    losses, after = loop(ngvi, range(2, 4), rank), values(model, guide)
    everything = [full]
    torch.distributed.broadcast_object_list(everything)
    for saved in (part, everything[0], None):
        others = start(rank, **options)
        if saved is None:
            names = "model", "guide", "ngvi"
            checkpoint.load(path, dict(zip(names, others, strict=True)))
        else:
            for owner, one in zip(others, saved, strict=True):
                owner.load_state_dict(one)
        assert loop(others[2], range(2, 4), rank) == losses
        assert all(torch.equal(x, after[n]) for n, x in values(*others[:2]).items())
    return part, everything[0], losses, after


def test_states_resume(ranks: Any, tmp_path: Any) -> None:
    """On the same ranks bit for bit, and in one process from the state of all."""
    results = ranks(SIZE).run(resume, str(tmp_path / "run"))
    part, full, losses, after = results[0]
    for name, value in results[1][3].items():
        assert torch.equal(value, after[name]), name
    model, guide, ngvi = start(None, update="auto", temperature="auto")
    for owner, one in zip((guide, ngvi), part[1:], strict=True):
        with pytest.raises(ValueError, match=r"of rank 0 of 2, this is one process.*full_state"):
            owner.load_state_dict(one)
    for owner, one in zip((model, guide, ngvi), full, strict=True):
        owner.load_state_dict(one)
    assert loop(ngvi, range(2, 4), None) == pytest.approx(losses, rel=0.05)


# ---- refusals -----------------------------------------------------------------------------------


def refuse(rank: int) -> Any:
    """An error of one rank alone, and settings that are refused before anything has changed."""
    x, y = torch.randn(ROWS, 2, 4), torch.randint(3, (ROWS,))
    model, guide, ngvi = start(rank, on_nonfinite="skip")
    loop(ngvi, range(2), rank)
    before = values(model, guide)
    ngvi.step(x / (1 - rank), y)  # infinite on one rank
    assert all(torch.equal(x, before[n]) for n, x in values(model, guide).items())
    skipped = ngvi.skipped
    model = make(rank)

    def step(guide: Any, **options: Any) -> Callable[[], Any]:
        return lambda: NGVI(model, guide(model), **options).step(x, y)

    alone = DiagonalGuide(make(None))
    alone(x, y)
    small = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    small = Classifier(bayesianize(fully_shard(small)), num_data=N)
    network = fully_shard(net(True))
    found = {
        "less than the 2 ranks": lambda: NGVI(small, KFACGuide(small)).step(x, y),
        "structure='full'": step(FullGuide),
        "truncated factors": step(partial(KFACGuide, structure={"*": KFAC(rank=2)})),
        "curvature='hessian'": step(KFACGuide, curvature="hessian"),
        "sample_parallel=True": step(KFACGuide, sample_parallel=True),
        "leave process_group out": step(KFACGuide, process_group=None),
        "the blocks of a sharded one are layers":
            lambda: DiagonalGuide(model).load_state_dict(alone.state_dict()),
        "no module 'none'": lambda: bayesianize(network, layers="none"),
    }
    messages = {expected: message(run) for expected, run in found.items()}
    network(x).sum().backward()  # which is sharded still
    assert all(isinstance(p, DTensor) for p in network.parameters())
    copied = copy.deepcopy(bayesianize(network))
    assert type(network[0]).__mro__[1] is nn.Conv1d and not network.state_dict().keys() & {"0.bias"}
    assert KFACGuide(Classifier(copied, num_data=N)).is_shared_out
    tied = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    tied[2].weight = tied[1].weight
    fully_shard(tied)
    with torch.no_grad():
        tied(x)  # whole from here on, until a backward pass
    tied = Classifier(bayesianize(tied), num_data=N)
    guide = DiagonalGuide(tied)
    NGVI(tied, guide).step(x, y)
    assert {*guide.sites} == {"net.1.weight", "net.1.bias", "net.2.bias"}, guide.sites
    with mock.patch("torch.distributed.is_initialized", lambda: False):
        with mock.patch("torch.distributed.get_process_group_ranks", side_effect=KeyError):
            assert not KFACGuide(Classifier(copied, num_data=N)).is_shared_out
    return skipped, messages


def test_refusals(ranks: Any) -> None:
    for skipped, messages in ranks(SIZE).run(refuse):
        assert skipped == 1
        for expected, text in messages.items():
            assert expected in text, (expected, text)
