"""What `Undo` restores when its body raises, also if it is interrupted itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from snapshots import contents
from torch import Tensor, nn

from pyrocurv.runtime.undo import Undo, complete


class Owner:
    def __init__(self) -> None:
        self.number, self.items, self.names = 1, [1, 2], {"a": 1}


def test_nothing_is_restored_without_an_exception() -> None:
    weight = torch.zeros(2)
    with Undo() as undo:
        undo.keep_tensors([weight])
        weight.add_(1)
    assert torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_tensors_are_restored_in_place(error: type[BaseException]) -> None:
    weight = nn.Parameter(torch.tensor([0.1, -0.0, torch.nan]))
    before, pointer = contents(weight), weight.data_ptr()
    with pytest.raises(error), Undo() as undo:
        undo.keep_tensors([weight])
        with torch.no_grad():
            weight.add_(1)
        raise error
    assert contents(weight) == before and weight.data_ptr() == pointer
    assert weight.requires_grad and weight.grad_fn is None


def test_attributes_are_restored_with_the_items_of_containers() -> None:
    owner, tensor = Owner(), torch.zeros(1)
    owner.names["b"] = tensor
    with pytest.raises(ValueError), Undo() as undo:
        undo.keep_attributes(owner)
        owner.number, owner.new = 2, 3
        owner.items.append(3)
        owner.names["c"] = owner.names.pop("a")
        del owner.items[0]
        raise ValueError
    assert vars(owner) == {"number": 1, "items": [1, 2], "names": {"a": 1, "b": tensor}}
    assert owner.names["b"] is tensor


@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(steps: int) -> None:
    def run(fails: bool) -> Any:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        optimizer = torch.optim.Adam(net.parameters(), 0.1)

        def step(inputs: Tensor) -> None:
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            optimizer.step()

        for _ in range(steps):
            step(torch.ones(3))
        if fails:
            with pytest.raises(KeyboardInterrupt), Undo() as undo:
                undo.keep_optimizer(optimizer)
                undo.keep_tensors(net.parameters())
                step(-torch.ones(3))
                optimizer.param_groups[0]["lr"] = 1.0
                optimizer.add_param_group({"params": [torch.zeros(1)]})
                raise KeyboardInterrupt
        step(torch.ones(3))
        return contents([net.state_dict(), optimizer.state_dict()])

    assert run(True) == run(False)


def test_a_module_is_restored() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    before = contents(net.state_dict())
    with pytest.raises(ValueError), Undo() as undo:
        undo.keep_module(net)
        net(torch.randn(4, 3))
        net.append(nn.Linear(2, 1))
        net[0].weight = nn.Parameter(torch.zeros(2, 3))
        net.eval()
        raise ValueError
    assert contents(net.state_dict()) == before and len(net) == 2 and net.training


def interrupts(times: int, done: list[int]) -> Callable[[], None]:
    """A function that is interrupted in its first calls."""
    errors: Iterator[type[BaseException]] = iter([KeyboardInterrupt] * times)

    def function() -> None:
        for error in errors:
            raise error
        done.append(1)

    return function


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_a_function_is_called_until_it_is_complete(times: int) -> None:
    """Three times at most: a genuine error is not repeated for ever."""
    done: list[int] = []
    if times:
        with pytest.raises(KeyboardInterrupt):
            complete(interrupts(times, done))
    else:
        complete(interrupts(times, done))
    assert done == ([] if times == 3 else [1])


@pytest.mark.parametrize("position", [0, 1, 2])
def test_everything_is_restored_if_one_restore_is_interrupted(position: int) -> None:
    weight, owner, done = torch.zeros(2), Owner(), list[int]()
    with pytest.raises(KeyboardInterrupt), Undo() as undo:
        steps: list[Callable[[], Any]] = [
            lambda: undo.keep_tensors([weight]), lambda: undo.keep_attributes(owner)
        ]
        steps.insert(position, lambda: undo.keep(interrupts(1, done)))
        for keep in steps:
            keep()
        weight.add_(1)
        owner.number = 2
        raise ValueError
    assert not weight.any() and owner.number == 1 and done == [1]


def test_what_has_been_forgotten_stays() -> None:
    weight = torch.zeros(2)
    with pytest.raises(ValueError), Undo() as undo:
        undo.keep_tensors([weight])
        weight.add_(1)
        undo.forget()
        raise ValueError
    assert weight.all()
