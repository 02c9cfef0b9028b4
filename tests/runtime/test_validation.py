"""Checks of arguments: what passes, and an error that names the argument for all else."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyrocurv.runtime import validation as v

META = torch.ones((), device="meta")
NO_NUMBERS = ("1", None, True, 1j, [1], Fraction(1, 2), math.nan, math.inf, 10**400, torch.ones(2))


@pytest.mark.parametrize(("check", "right", "wrong"), [
    (v.check_positive, (1, 0.5, np.float32(2)), (0, -1.0)),
    (v.check_nonnegative, (0, 0.0, 3.5), (-1e-9, -1)),
    (v.check_fraction, (0, 0.999), (1, 1.5, -0.1)),
])
def test_numbers(check: Any, right: tuple[Any, ...], wrong: tuple[Any, ...]) -> None:
    for value in right:
        check("rate", value)
    check("rate", None, None), check("rate", "auto", "auto", None)
    for value in (*wrong, *NO_NUMBERS):
        with pytest.raises(ValueError, match=r"^rate=.*: a .*number .*needed$"):
            check("rate", value)


def test_numbers_in_tensors() -> None:
    assert v.as_number(torch.tensor(0.5)) == 0.5 and v.as_number(np.int64(3)) == 3
    assert v.as_number(META) is META and v.as_number("a") == "a" and v.as_number(True) is True
    assert not v.is_number(v.as_number(torch.tensor(True)))


def test_integers_of_more_than_64_bits() -> None:
    v.check_integer("n", 2**63 - 1, 1)
    with pytest.raises(ValueError, match="n="):
        v.check_integer("n", 2**63, 1)


def test_names() -> None:
    v.check_choice("kind", "a", ("a", "b"))
    for value in ("c", None, ["a"], 1):
        with pytest.raises(ValueError, match="kind=.*: choose 'a' or 'b'"):
            v.check_choice("kind", value, ("a", "b"))
    with pytest.raises(ValueError, match="choose one of a, b, c, or your own"):
        v.check_choice("kind", "d", ("a", "b", "c"), ", or your own")


def test_messages_are_short() -> None:
    for value in ("x" * 10**6, [*range(10**4)], torch.zeros(1000, 1000), nn.Linear(9, 9), 10**400):
        with pytest.raises(ValueError) as caught:
            v.check_positive("rate", value)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


OBJECTS: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {
    "flag": (v.check_flag, (True, False), (1, "yes", None)),
    "callable": (lambda n, x: v.check_callable(n, x, "a function"), (len, nn.Linear), (None, 3)),
    "module": (v.check_module, (nn.Linear(1, 1),), (nn.Linear, len, None, {})),
    "distribution": (v.check_distribution, (dist.Normal(0, 1),), (dist.Normal, 1.0, None)),
    "tensor": (v.check_tensor, (torch.ones(2),), ([1.0], None, "x", np.ones(2), META)),
    "inputs": (v.check_inputs, (torch.ones(2), {"x": 1}, [1]), (None, "x", 3, 0.5, b"x", META)),
    "loader": (v.check_loader, (
        [], [(torch.ones(1), 2)], iter([]), (b for b in ()), torch.ones(2, 2),
        DataLoader(TensorDataset(torch.ones(2))), TensorDataset(torch.ones(2)),
    ), (
        None, 3, "data.csv", b"x", {"x": 1}, DataLoader, nn.ModuleList(), torch.ones(()), META,
        (torch.ones(2), torch.ones(2)), np.float32(1),
    )),
    "state_dict": (
        lambda n, x: v.check_state_dict(x, "NGVI"), ({}, nn.Linear(1, 1).state_dict()),
        (None, [], "x", {1: 2}),
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects(name: str) -> None:
    check, right, wrong = OBJECTS[name]
    for value in right:
        check(name, value)
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}.*(needed|values|keys)"):
            check(name, value)


def test_meta_tensors_among_arguments() -> None:
    v.check_values([torch.ones(2), None, "train"], "the model")
    with pytest.raises(ValueError, match="argument 1 of the model: .* on the meta device"):
        v.check_values([torch.ones(2), META], "the model")
