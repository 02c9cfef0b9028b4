"""Operands of structures: what does not fit is an error that names it; half precision works."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_structures import FLOAT64, MAKERS, make
from torch import Tensor

from pyrocurv.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    Structure,
    automatic_ranks,
    cut,
)
from pyrocurv.structures.sums import add

each = pytest.mark.parametrize("name", MAKERS)
VECTORS = ["__matmul__", "solve", "rsqrt", "solution", "rsqrt_"]


@pytest.mark.parametrize("verb", VECTORS)
@each
def test_vectors(name: str, verb: str) -> None:
    structure, _ = make(name)
    size, apply = structure.size, getattr(structure, verb)
    wrong: list[tuple[Any, type[Exception]]] = [
        (torch.randn(size + 1).double(), ValueError), (torch.randn(1).double(), ValueError),
        (torch.tensor(1.0).double(), ValueError), (torch.randn(size, size + 1), ValueError),
        ([1.0] * size, TypeError), (None, TypeError), ("x", TypeError), (3.0, TypeError),
        (structure, TypeError),
    ]
    if verb in ("solution", "rsqrt_"):
        wrong.append((torch.randn(2, size).double(), ValueError))
    for x, error in wrong:
        with pytest.raises(error, match=r"^x: "):
            apply(x)
    assert apply(torch.randn(size).double()) is not None


@pytest.mark.parametrize("verb", VECTORS[:3])
@each
def test_vectors_of_another_dtype(name: str, verb: str) -> None:
    """An error that says so, or the result in the wider one."""
    structure, _ = make(name)
    x = torch.randn(structure.size)
    try:
        found = getattr(structure, verb)(x)
    except ValueError as error:
        assert "dtype torch.float64 is needed, got torch.float32" in str(error)
    else:
        torch.testing.assert_close(found.double(), getattr(structure, verb)(x.double()))


@each
def test_scalars(name: str) -> None:
    structure, _ = make(name)
    for factor in (None, "2", True, [2.0], structure):
        with pytest.raises(TypeError, match=r"^factor: "):
            structure.scale(factor)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^delta: "):
            structure.shift(factor)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^weight: "):
            structure.lerp(structure, factor)  # type: ignore[arg-type]
    wrong = torch.ones(structure.size + 1).double()
    with pytest.raises(ValueError, match=r"^factor: "):
        structure.scale(wrong)
    with pytest.raises(ValueError, match=r"^delta: "):
        structure.shift(wrong)
    with pytest.raises(ValueError, match=r"^weight: "):
        structure.lerp(structure, wrong)  # type: ignore[arg-type]


@each
def test_other_structures(name: str) -> None:
    structure, _ = make(name)
    for other in (None, 1.0, torch.eye(structure.size).double(), Alien()):
        with pytest.raises(TypeError, match=r"^other: a \w+ is needed, got \w+"):
            structure.lerp(other, 0.5)  # type: ignore[arg-type]
    others = {n: m(FLOAT64) for n, m in MAKERS.items()}
    for other in others.values():
        if type(other) is not type(structure):
            with pytest.raises(TypeError, match=r"^other: "):
                structure.lerp(other, 0.5)
        elif other.size != structure.size:
            with pytest.raises(ValueError, match=r"^other: "):
                structure.lerp(other, 0.5)


@dataclass(frozen=True, eq=False)
class Alien:
    """No structure."""

    size: int = 5


def test_equal_sizes_of_other_shapes() -> None:
    """A product of 2 x 3 weights is none of 3 x 2, and blocks have their own rows."""
    eyes = torch.eye(2), torch.eye(3)
    first, second = Kronecker(*eyes), Kronecker(*reversed(eyes))
    for one, other in ((first, second), (first.eigen(), second.eigen())):
        with pytest.raises(ValueError, match=r"weights \[2, 3\] is needed, got one over \[3, 2\]"):
            one.lerp(other, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^other: "):
        first.nearest_kronecker_sum(second)
    with pytest.raises(TypeError, match=r"^other: "):
        first.nearest_kronecker_sum(None)  # type: ignore[arg-type]
    parts = Diagonal(torch.ones(1)), Diagonal(torch.ones(2))
    blocks = BlockDiagonal(parts)
    rows = torch.tensor([0]), torch.tensor([1, 2])
    for other in (
        BlockDiagonal(tuple(reversed(parts))), BlockDiagonal((Diagonal(torch.ones(3)),)),
        BlockDiagonal(parts, rows),
    ):
        with pytest.raises(ValueError, match=r"^other: blocks of sizes \[1, 2\]"):
            blocks.lerp(other, 0.5)
    turned = BlockDiagonal(parts, (torch.tensor([2]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"on the same rows"):
        BlockDiagonal(parts, rows).lerp(turned, 0.5)


@pytest.mark.parametrize("make_matrix", [
    lambda: Dense(torch.eye(4)), lambda: Diagonal(torch.ones(4)),
    lambda: Kronecker(torch.eye(2), torch.eye(2)).eigen(),
])
def test_sums(make_matrix: Callable[[], Structure]) -> None:
    matrix = make_matrix()
    with pytest.raises(ValueError, match="other: a matrix of 4 rows is needed, got 5"):
        add(matrix, Diagonal(torch.ones(5)))
    for other in (None, torch.eye(4), 2.0):
        with pytest.raises(TypeError, match="other: a Structure is needed"):
            add(matrix, other)  # type: ignore[arg-type]


def test_counts() -> None:
    matrix = Kronecker(torch.eye(3), torch.eye(2))
    for ranks in ((0, 1), (4, 2), (3, 3), (1.0, 1), (True, 1), (1,), 2, "ab"):
        with pytest.raises(ValueError, match=r"^ranks="):
            matrix.eigen(ranks)  # type: ignore[arg-type]
    for blocks in ((0, 1), (1.5, 1), (1,), 2):
        with pytest.raises(ValueError, match=r"^num_blocks="):
            matrix.eigen(None, blocks)  # type: ignore[arg-type]
    for count in (0, -1, 1.0, True, None, "2"):
        with pytest.raises(ValueError, match=r"^num_blocks="):
            cut(torch.eye(3), count)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^outputs="):
            automatic_ranks(count, 3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^inputs="):
            automatic_ranks(3, count)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"^rank="):
            automatic_ranks(3, 3, count)  # type: ignore[arg-type]
    for wrong in (torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="^matrix: a square matrix is needed"):
            cut(wrong, 2)
    with pytest.raises(TypeError, match="^matrix: a tensor is needed"):
        cut([[1.0]], 2)  # type: ignore[arg-type]
    for root in (torch.ones(2), None):
        with pytest.raises(ValueError, match="^output_root: "):
            matrix.rescaled(root, torch.ones(2))  # type: ignore[arg-type]


def test_a_structure_of_ones_own_is_checked_too() -> None:
    @dataclass(frozen=True, eq=False)
    class Mine(Diagonal):
        def solve(self, x: Tensor) -> Tensor:
            return x / self.entries

    with pytest.raises(ValueError, match=r"^x: .* 3 entries of a row of the Mine"):
        Mine(torch.ones(3)).solve(torch.ones(4))


# ---- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@each
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As in double precision, to the precision of the numbers."""
    structure, _ = make(name)
    narrow = structure.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    exact = narrow.map(lambda t: t.double() if t.is_floating_point() else t)
    x = torch.randn(structure.size).to(dtype)
    loose = {"rtol": 0.1, "atol": 0.25 if dtype == torch.bfloat16 else 0.05}
    for verb in ("__matmul__", "solve"):
        found = getattr(narrow, verb)(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), getattr(exact, verb)(x.double()), **loose)
    for verb in ("logdet", "trace", "diag", "inverse_diag", "inverse_trace", "eigenvalues"):
        found = getattr(narrow, verb)()
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), getattr(exact, verb)(), **loose)
    assert narrow.rsqrt(x).dtype == narrow.psd().dense().dtype == dtype
