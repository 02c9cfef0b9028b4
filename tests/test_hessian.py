"""The Hessian in every structure, against the dense oracles on the table of small nets."""

from functools import cache

import oracles
import pytest
import torch
from test_estimate import (
    MODELS,
    assert_same,
    case,
    estimated,
    every_case,
    true_blocks,
    true_matrix,
)
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
PIECEWISE_LINEAR = [name for name in MODELS if name.startswith(("relu", "conv", "deep"))
                    and name != "conv-image"]


def hessian(model: str, likelihood: str, structure: str, batch: int = 4) -> Tensor:
    return estimated(model, likelihood, batch, curvature="hessian", structure=structure)


@cache
def kronecker(model: str, likelihood: str, structure: str) -> Tensor:
    oracle = getattr(oracles, f"hessian_{structure}_dense")
    return oracle(*case(model, likelihood), likelihood)


# --- against the oracles ----------------------------------------------------------------------


@every_case
def test_full(model: str, likelihood: str) -> None:
    assert_same(hessian(model, likelihood, "full"), true_matrix(model, likelihood, "hessian"))


@every_case
def test_block(model: str, likelihood: str) -> None:
    assert_same(hessian(model, likelihood, "block"), true_blocks(model, likelihood, "hessian"))


@every_case
def test_diag(model: str, likelihood: str) -> None:
    true = torch.diag(true_matrix(model, likelihood, "hessian").diag())
    assert_same(hessian(model, likelihood, "diag"), true)


@every_case
def test_kfac(model: str, likelihood: str) -> None:
    assert_same(hessian(model, likelihood, "kfac"), kronecker(model, likelihood, "kfac"))


@every_case
def test_ekfac(model: str, likelihood: str) -> None:
    expected = kronecker(model, likelihood, "ekfac")
    assert_same(hessian(model, likelihood, "ekfac"), expected, rtol=1e-7)
