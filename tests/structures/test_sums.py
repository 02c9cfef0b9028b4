"""Sums with the precision of a correlated prior, against dense matrices."""

import pytest
import torch
from test_structures import FLOAT64, kronecker, positive, spd, truncated
from torch import Tensor

from pyrocurv.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerEigen,
    Rescaled,
    Structure,
)
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.sums import add, relative_error, trace_ratio


def sided() -> tuple[Kronecker, Kronecker]:
    return kronecker(FLOAT64, 4, 3), kronecker(FLOAT64, 4, 3)


def others() -> dict[str, Structure]:
    """Precisions over weights [4, 3]."""
    eigen = kronecker(FLOAT64, 4, 3).eigen().shift(0.3)
    root = outer(positive(4, dtype=FLOAT64), positive(3, dtype=FLOAT64)).flatten()
    return {
        "kronecker": eigen, "rescaled": Rescaled(eigen, root), "dense": Dense(spd(12, FLOAT64)),
        "diagonal": Diagonal(positive(12, dtype=FLOAT64)),
        "blocks": BlockDiagonal((Dense(spd(5, FLOAT64)), Dense(spd(7, FLOAT64)))),
    }


@pytest.mark.parametrize("kind", others())
def test_sums_that_are_exact(kind: str) -> None:
    other = others()[kind]
    dense, diagonal = Dense(spd(12, FLOAT64)), Diagonal(positive(12, dtype=FLOAT64))
    torch.testing.assert_close(add(dense, other).dense(), dense.matrix + other.dense())
    torch.testing.assert_close(add(diagonal, other).diag(), diagonal.entries + other.dense().diag())
    assert relative_error(dense, other) < 1e-14


@pytest.mark.parametrize("kind", others())
def test_a_kronecker_sum_is_the_projection_onto_its_eigenvectors(kind: str) -> None:
    """No other eigenvalues are nearer; `relative_error` is the distance."""
    matrix, other = kronecker(FLOAT64, 4, 3).eigen(), others()[kind]
    total, exact = add(matrix, other), matrix.dense() + other.dense()
    vectors = torch.kron(total.output_basis, total.input_basis)
    expected = (vectors * (vectors.mT @ exact @ vectors).diag()) @ vectors.mT
    torch.testing.assert_close(total.dense(), expected)
    distance = float((expected - exact).norm() / exact.norm())
    assert relative_error(matrix, other) == pytest.approx(distance, abs=1e-7)
    same = add(matrix, Dense(other.dense()))  # by another way
    torch.testing.assert_close(total.dense(), same.dense())


def test_a_kronecker_sum_is_as_near_as_the_nearest_product() -> None:
    for _ in range(20):
        a, b = sided()
        product = a.nearest_kronecker_sum(b).dense()
        exact = a.dense() + b.dense()
        distance = (add(a.eigen(), b.eigen()).dense() - exact).norm()
        assert distance <= (product - exact).norm()


def test_sums_of_matrices_with_common_eigenvectors_are_exact() -> None:
    a, _ = sided()
    eigen = a.eigen()
    other = KroneckerEigen(eigen.output_basis, eigen.input_basis, positive(4, 3, dtype=FLOAT64))
    for first, second in ((eigen, other), (eigen, eigen.shift(2.0)), (eigen.scale(0.0), other)):
        exact = first.dense() + second.dense()
        torch.testing.assert_close(add(first, second).dense(), exact)


@pytest.mark.parametrize("ranks", [(2, 1), (5, 2), (1, 4)])
def test_truncated_sides(ranks: tuple[int, int]) -> None:
    """The sum keeps the ranks and the trace; it is exact where the bases agree."""
    a, b = truncated(FLOAT64, ranks), truncated(FLOAT64, ranks)
    total = add(a, b)
    assert total.spectrum.shape == a.spectrum.shape
    torch.testing.assert_close(total.trace(), a.trace() + b.trace())
    torch.testing.assert_close(add(a, Dense(b.dense())).trace(), total.trace())
    same = KroneckerEigen(a.output_basis, a.input_basis, b.spectrum)
    torch.testing.assert_close(
        add(a.scale(0.0), same).trace(), same.trace()
    )
    descending = truncated(FLOAT64, ranks)
    first = KroneckerEigen(a.output_basis, a.input_basis, ordered(descending.spectrum))
    torch.testing.assert_close(add(first, first).dense(), 2 * first.dense())


def ordered(spectrum: Tensor) -> Tensor:
    """Eigenvalues with those of everything orthogonal to the bases the smallest, as in K-FAC."""
    rows, columns = (torch.arange(n, 0, -1, dtype=FLOAT64) for n in spectrum.shape)
    return outer(rows, columns)


def test_groups() -> None:
    factors = torch.stack([spd(3, FLOAT64) for _ in range(2)]), torch.stack([spd(2, FLOAT64)] * 2)
    matrix = Kronecker(*factors).eigen()
    other = Kronecker(factors[0].flip(0), factors[1]).eigen().shift(0.2)
    total = add(matrix, other)
    torch.testing.assert_close(total.dense(), matrix.dense() + other.dense())
    torch.testing.assert_close(add(matrix, Dense(other.dense())).dense(), total.dense())


@pytest.mark.parametrize("kind", others())
def test_trace_ratio(kind: str) -> None:
    other = others()[kind]
    for matrix in (*others().values(), Dense(spd(12, FLOAT64))):
        expected = torch.linalg.solve(matrix.dense(), other.dense()).trace()
        torch.testing.assert_close(trace_ratio(matrix, other), expected)


def test_a_structure_without_a_sum() -> None:
    blocks = others()["blocks"]
    with pytest.raises(TypeError, match="BlockDiagonal has no sum with the precision"):
        add(blocks, blocks)
