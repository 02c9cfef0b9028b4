"""Networks that fully_shard has sharded: the optimizers, and refusals elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_ngvi_ranks import target
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.utils._pytree import tree_leaves

from pyrocurv import checkpoint
from pyrocurv.curvature import Curvature, estimate
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.layers.structure_spec import KFAC, Diagonal
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

STEPS, ROWS, SIZE = 3, 16, 2  # rows of a rank, ranks


class Scale(nn.Module):
    """A weight that no supported op consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.full((5,), 0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.rate.exp()


def net(is_traced: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 5), nn.Tanh(),
        *([] if is_traced else [Scale()]), nn.Linear(5, 3, bias=False),
    )


def make(network: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    if kind == "vi":
        return VIOptimizer(network, num_data=96, **options)
    # without a prior, Adam divides the rounding errors of a direction without a gradient by theirs
    options = {"weight_decay": 0.01, **options}
    return SecondOrderOptimizer(network, **options)


def whole(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for n, p in network.named_parameters()
    }


def train(rank: int | None, kind: str, options: dict[str, Any], is_traced: bool) -> Any:
    """The parameters after some steps with γ/N and r, and what is kept of each block."""
    torch.set_default_dtype(torch.float64)
    try:
        return run(rank, kind, options, is_traced)
    finally:
        torch.set_default_dtype(torch.float32)


def backward(network: Any, x: torch.Tensor, y: torch.Tensor, parts: int) -> None:
    """The gradient of a batch, in parts of which the last sends the gradients of all."""
    for number, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(number == parts)
        (F.cross_entropy(network(a), b) / parts).backward()


def run(rank: int | None, kind: str, options: dict[str, Any], is_traced: bool) -> Any:
    torch.manual_seed(0)
    options = {**options}
    steps, parts = options.pop("steps", STEPS), options.pop("parts", 1)
    x = torch.randn(steps, ROWS * SIZE, 2, 4)
    y = torch.randint(3, (steps, ROWS * SIZE))
    network = net(is_traced)
    if rank is not None:
        for index in (0, 4):
            fully_shard(network[index])
        fully_shard(network)
    optimizer = make(network, kind, options)
    rows = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    if rank is not None:
        torch.manual_seed(rank + 1)
    before = torch.get_rng_state()
    sampled = optimizer.sampled_params if kind == "vi" else nullcontext
    with mock.patch.object(torch.distributions.Categorical, "sample", target):
        for a, b in zip(x, y, strict=True):
            optimizer.zero_grad()
            with sampled():
                backward(network, a[rows], b[rows], parts)
            optimizer.step()
            with torch.no_grad():
                network(a[rows])  # which leaves the parameters of the root gathered
    assert torch.equal(torch.get_rng_state(), before)
    optimizer.summary()
    if rank is not None:
        network.reshard()
    states = {
        s.block.name: (s.precision.dense(), s.momentum.clone()) for s in optimizer._posterior.blocks
    }
    seen = optimizer._posterior.temperature
    determined = {"γ/N and r": torch.tensor([seen.determined, seen.mean_square])}
    return {**whole(network), **determined}, states


def check(ranks: Any, kind: str, is_traced: bool = True, **options: Any) -> None:
    options.setdefault("curvature", Curvature("fisher", every=1, batch=None, eigen_every=1))
    with mock.patch.object(Diagonal, "group", lambda self, layer: layer):  # a block for each
        expected, states = train(None, kind, options, is_traced)
    results = ranks(SIZE).run(train, kind, options, is_traced)
    found: dict[str, Any] = {}
    for parameters, own in results:
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-10, atol=1e-10)
        assert own and not own.keys() & found.keys()
        found |= own
    assert found.keys() == states.keys()
    for name, (precision, momentum) in states.items():
        torch.testing.assert_close(found[name][0], precision, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[name][1], momentum, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["second-order", "vi"])
@pytest.mark.parametrize("structure", ["diag", "kfac", "ekfac"])
def test_structures(ranks: Any, kind: str, structure: str) -> None:
    check(ranks, kind, structure=structure)


@pytest.mark.parametrize("kind", ["second-order", "vi"])
@pytest.mark.parametrize("curvature", ["ggn", "empirical"])
def test_kinds(ranks: Any, kind: str, curvature: str) -> None:
    check(ranks, kind, curvature=Curvature(curvature, every=1, batch=None))


@pytest.mark.parametrize("kind", ["second-order", "vi"])
@pytest.mark.parametrize("update", ["natural", "whitened-muon", "soap", torch.optim.Adam])
def test_updates(ranks: Any, kind: str, update: Any) -> None:
    curvature = Curvature("fisher", every=1, batch=None)
    check(ranks, kind, update=update, curvature=curvature, structure="ekfac")


@pytest.mark.parametrize("kind", ["second-order", "vi"])
def test_decoupled_decay(ranks: Any, kind: str) -> None:
    check(ranks, kind, decoupled_weight_decay=0.3)


def padding(rank: int, index: int) -> None:
    """On either rank's rows of an embedding."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 4, padding_idx=index), nn.Flatten(), nn.Linear(12, 3))
    with torch.no_grad():
        network[0].weight[index] = torch.arange(4.0)
    for module in (network[0], network):
        fully_shard(module)
    optimizer = VIOptimizer(network, num_data=96)
    x, y = torch.randint(5, (8, 3)), torch.randint(3, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            row = network[0].weight.full_tensor()[index]
            F.cross_entropy(network(x), y).backward()
        assert row.tolist() == [0, 1, 2, 3]
        optimizer.step()
    assert network[0].weight.full_tensor()[index].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [1, 4])
def test_the_row_of_a_padding_index_stays(ranks: Any, index: int) -> None:
    ranks(SIZE).run(padding, index)


def test_intervals_by_the_drift_of_each_block(ranks: Any) -> None:
    curvature = Curvature("ggn", every="auto", batch=None)
    check(ranks, "vi", curvature=curvature, update="natural", steps=22)


@pytest.mark.parametrize("kind", ["second-order", "vi"])
def test_accumulation(ranks: Any, kind: str) -> None:
    check(ranks, kind, parts=2)


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize("kind", ["second-order", "vi"])
def test_a_weight_without_a_layer(ranks: Any, kind: str) -> None:
    check(ranks, kind, is_traced=False)


def test_noise(ranks: Any) -> None:
    check(ranks, "vi", curvature="noise", structure="diag")


def sharded_net() -> nn.Module:
    torch.manual_seed(0)
    network = net(is_traced=False)
    for index in (0, 4):
        fully_shard(network[index])
    return fully_shard(network)


def loop(network: nn.Module, optimizer: Any, steps: range, rank: int, size: int) -> None:
    """Steps on this rank's part of batches that the number of a step determines."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS * SIZE, 2, 4, generator=generator)
        y = torch.randint(3, (ROWS * SIZE,), generator=generator)
        half = len(x) // size
        rows = slice(half * rank, half * (rank + 1))
        optimizer.zero_grad()
        with getattr(optimizer, "sampled_params", nullcontext)():
            F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()


OPTIONS: dict[str, Any] = {
    "curvature": Curvature("ggn", every=1, batch=None), "structure": "ekfac", "update": "soap",
}


def resume(rank: int, kind: str, path: str) -> Any:
    """A run, the same resumed by each rank, and by what rank 0 has of all."""
    network = sharded_net()
    optimizer = make(network, kind, OPTIONS)
    loop(network, optimizer, range(2), rank, SIZE)
    state = copy.deepcopy(optimizer.state_dict())
    full = copy.deepcopy(optimizer.full_state_dict())
    assert bool(full) == (rank == 0)
    weights = whole(network)
    checkpoint.save(path, {"net": network, "optimizer": optimizer}, sharded=True)
    loop(network, optimizer, range(2, 4), rank, SIZE)
    after = whole(network)
    everything = [full]
    torch.distributed.broadcast_object_list(everything)
    for saved in (state, everything[0], None):
        other = sharded_net()
        resumed = make(other, kind, OPTIONS)
        if saved is None:
            checkpoint.load(path, {"net": other, "optimizer": resumed})
        else:
            with torch.no_grad():
                for name, p in other.named_parameters():
                    p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements))
            resumed.load_state_dict(saved)
        loop(other, resumed, range(2, 4), rank, SIZE)
        found = whole(other)
        exact = {"rtol": 0.0, "atol": 0.0}  # but matrices come from a folder in another layout
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if saved is None else exact
        for name, value in after.items():
            torch.testing.assert_close(found[name], value, **tolerance)
    return weights, everything[0], after, state


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize("kind", ["second-order", "vi"])
def test_states_resume(ranks: Any, kind: str, tmp_path: Any) -> None:
    """On the same ranks bit for bit, and in one process from the state of all."""
    (weights, full, after, own), _ = ranks(SIZE).run(resume, kind, str(tmp_path / "run"))
    network = net(is_traced=False)
    network.load_state_dict(weights)
    optimizer = make(network, kind, OPTIONS)
    with pytest.raises(ValueError, match="state is of rank 0 of the 2"):
        optimizer.load_state_dict(own)
    optimizer.load_state_dict(full)
    loop(network, optimizer, range(2, 4), 0, 1)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=2e-4, atol=2e-5)


def numbers(optimizer: Any) -> int:
    """How many numbers the state of an optimizer has here."""
    state = optimizer.state_dict()
    leaves = tree_leaves({key: value for key, value in state.items() if key != "stream"})
    return sum(getattr(x, "to_local", lambda x=x: x)().numel() for x in leaves
               if isinstance(x, torch.Tensor) and x.dim())


def keep(rank: int) -> Any:
    """Numbers kept, predictions, an error of one rank alone, and settings that are refused."""
    network = sharded_net()
    optimizer = make(network, "vi", OPTIONS)
    loop(network, optimizer, range(2), rank, SIZE)
    x = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0))
    mean = whole(network)
    torch.manual_seed(5 + rank)  # each has noise of its own, of its own blocks
    draws = optimizer.predict(x, num_samples=64)
    with optimizer.sampled_params():
        sample = whole(network)
        with optimizer.use_mean():
            inside = whole(network)
    unchanged = [
        all(torch.equal(found[n], mean[n]) for n in mean) for found in (whole(network), inside)
    ]
    moved = any(not torch.equal(sample[n], mean[n]) for n in mean)
    kept, kl = numbers(optimizer), float(optimizer.kl())
    optimizer.zero_grad()
    with optimizer.sampled_params():
        F.cross_entropy(network(x), torch.zeros(7, dtype=torch.long)).backward()
    bias = network[4].bias.grad.to_local()
    if rank:
        bias.fill_(torch.nan)
    error = ""
    try:
        optimizer.step()
    except FloatingPointError as caught:
        error = str(caught)
    after = whole(network)
    unchanged.append(all(torch.equal(after[n], mean[n]) for n in mean))
    refused = {
        "hessian": lambda: SecondOrderOptimizer(network, curvature="hessian"),
        "sample_parallel": lambda: VIOptimizer(network, 96, sample_parallel=True),
        "prior": lambda: VIOptimizer(network, 96, prior=optimizer),
        "weight_gaussians": optimizer.weight_gaussians,
    }
    for structure in ("full", "block", KFAC(rank=2)):
        def step(structure: Any = structure) -> None:
            loop(network, SecondOrderOptimizer(network, structure=structure), range(1), rank, SIZE)

        refused[f"structure {structure}"] = step
    messages = {name: message(run) for name, run in refused.items()}
    return kept, kl, draws, unchanged, moved, error, messages


@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
def test_what_ranks_keep(ranks: Any) -> None:
    results = ranks(SIZE).run(keep)
    torch.manual_seed(0)
    alone = net(is_traced=False)
    optimizer = make(alone, "vi", OPTIONS)
    loop(alone, optimizer, range(2), 0, 1)
    everything = numbers(optimizer)
    for kept, kl, draws, unchanged, moved, error, messages in results:
        assert kept < 0.75 * everything
        assert kl == pytest.approx(float(optimizer.kl()), rel=1e-3)
        torch.testing.assert_close(draws, results[0][2])
        assert draws.std(0).min() > 1e-3
        assert unchanged == [True, True, True] and moved
        assert "a gradient is not finite" in error
        assert all(messages.values()), messages
        assert all("DistributedDataParallel" in text for name, text in messages.items()
                   if "KFAC" not in name)


def message(run: Callable[[], Any]) -> str:
    try:
        run()
    except ValueError as error:
        return str(error)
    return ""


def refuse(rank: int) -> dict[str, str]:
    """What a sharded network is told where it is not supported."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fully_shard(net)
    x, y = torch.randn(5, 4), torch.randint(2, (5,))

    def model(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return net(x)

    latent = Classifier(bayesianize(nn.Linear(4, 2)), num_data=5)
    guide = KFACGuide(latent)
    guide(x, y)
    latent.add_module("features", net)
    distributed = nn.Linear(4, 2)
    distributed.weight = nn.Parameter(
        distribute_tensor(torch.randn(2, 4), init_device_mesh("cpu", (2,)))
    )
    found = {
        "estimate": lambda: estimate(net, x, y),
        "guide": lambda: KFACGuide(model)(x, y),
        "NGVI": lambda: NGVI(latent, guide),
        "Laplace": lambda: Laplace(latent, guide),
        "DTensor": lambda: SecondOrderOptimizer(distributed),
        "DTensor in VI": lambda: VIOptimizer(distributed, num_data=5),
        "DTensor in estimate": lambda: estimate(distributed, x, y),
    }
    return {name: message(run) for name, run in found.items()}


def test_refusals(ranks: Any) -> None:
    for messages in ranks(2).run(refuse):
        for name, text in messages.items():
            expected = "DTensor" if "DTensor" in name else "sharded by fully_shard"
            assert expected in text and "DistributedDataParallel" in text, (name, text)
