"""State of torch that is changed for a while, and checks of numbers."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.replay import ReplayMessenger
from pyrocurv.runtime.module_state import eval_mode, preserve_module_state
from pyrocurv.runtime.rng import RandomStream, device_of, isolated_rng
from pyrocurv.runtime.validation import check_integer, check_positive, is_out_of_memory

CPU = torch.device("cpu")


def test_an_isolated_generator_leaves_the_global_one() -> None:
    state = torch.get_rng_state()
    with isolated_rng(CPU):
        first = torch.rand(3)
    with pytest.raises(KeyError), isolated_rng(CPU):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
    with isolated_rng(CPU), isolated_rng(CPU):
        assert torch.equal(torch.rand(3), first)
    with isolated_rng(CPU, seed=1):
        assert not torch.equal(torch.rand(3), first)


def test_a_stream_goes_on_after_an_error_where_it_was() -> None:
    stream, twin = RandomStream(3), RandomStream(3)
    draws = []
    for one in (stream, twin):
        with one(CPU):
            torch.rand(2)
        if one is twin:
            with pytest.raises(KeyError), one(CPU):
                torch.rand(2)
                raise KeyError
        with one(CPU):
            draws.append(torch.rand(2))
    assert torch.equal(*draws)


def test_the_device_of_values() -> None:
    assert device_of(["x", torch.empty(1, device="meta"), torch.ones(1)]).type == "meta"
    assert device_of([]) == CPU


def test_state_of_modules() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    net[0].weight.requires_grad_(True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(KeyError), preserve_module_state(net.modules()):
        net.requires_grad_(True)
        net(torch.randn(5, 2))
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["0.weight"]
    net[0].eval()
    with eval_mode(modules(poutine.block(net))):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, False, True]


def test_modules_of_a_function_around_two_networks() -> None:
    first, second = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    found = modules(lambda x: first(x) + second(x))
    assert found == [first, first[0], second, second[0]]


def test_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("vmap: data-dependent control flow"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", math.nan, [1]])
def test_what_is_not_an_integer(value: Any) -> None:
    with pytest.raises(ValueError, match="n=.*: an integer of at least 1 is needed"):
        check_integer("n", value, 1)
    with pytest.raises(ValueError, match="an integer of at least 1, 'auto' or None is needed"):
        check_integer("n", value, 1, "auto", None)


@pytest.mark.parametrize("value", [0, -1.5, True, "auto", math.nan, math.inf, None])
def test_what_is_not_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match="x=.*: a positive number is needed"):
        check_positive("x", value)


def test_numbers_that_are_allowed() -> None:
    for value in (1, 10**9, "auto", None):
        check_integer("n", value, 1, "auto", None)
    for number in (1, 0.5, None):
        check_positive("x", number, None)


# ---- a model at given values --------------------------------------------------------------------


def model(y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.deterministic("b", 2 * a)
    with pyro.plate("data", 10, subsample=torch.arange(3)):
        pyro.sample("obs", dist.Normal(b + pyro.sample("c", dist.Normal(0.0, 1.0)), 1.0), obs=y)


def test_replay() -> None:
    values = {"a": torch.tensor(2.0)}
    replay = ReplayMessenger(values, partial=True)
    replay(model)(torch.zeros(3))
    assert [site.name for site in replay.observed] == ["obs"] and list(replay.latents) == ["a", "c"]
    assert replay.latents["a"].value is values["a"] and not replay.latents["a"].in_plate
    site = replay.observed[0]
    assert (site.batch, site.num_data, site.rows, site.in_plate) == (3, 10, 3, True)
    torch.testing.assert_close(site.log_prob, site.fn.log_prob(torch.zeros(3)).sum() * 10 / 3)


def test_replay_needs_all_latents() -> None:
    with pytest.raises(ValueError, match="site 'c' is neither observed .* latents are a"):
        ReplayMessenger({"a": torch.tensor(2.0)})(model)(torch.zeros(3))


def test_replay_refuses_another_subsample() -> None:
    values = {"a": torch.tensor(2.0), "c": torch.zeros(3), "data": torch.tensor([0, 1, 5])}
    with pytest.raises(ValueError, match="subsamples plate 'data' itself"):
        ReplayMessenger(values)(model)(torch.zeros(3))
