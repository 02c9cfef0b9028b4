"""Several matrices at once give what each gives alone."""

import pytest
import torch

from pyrocurv.structures import Dense, Diagonal, Kronecker, Rescaled, Structure, stack
from pyrocurv.structures.stack import operands, samples_, solutions


def factor(size: int, *groups: int) -> torch.Tensor:
    root = torch.randn(*groups, size, size, dtype=torch.float64)
    return root @ root.mT + torch.eye(size, dtype=torch.float64)


def matrices() -> list[Structure]:
    """Stacks of three and two, of groups of two sizes, of a truncated side, and what has none."""
    def thin(outputs: int, inputs: int, ranks: tuple[int, int]) -> Structure:
        return Kronecker(factor(outputs), factor(inputs)).eigen(ranks)

    grouped = [Kronecker(factor(1, g), factor(2, g)).eigen() for g in (3, 4)]
    complete = [Kronecker(factor(3), factor(4)).eigen() for _ in range(3)]
    truncated = [thin(5, 6, ranks) for ranks in ((2, 3), (2, 3), (5, 2), (5, 2), (2, 6))]
    rescaled = Rescaled(complete[0], 1 + torch.rand(12, dtype=torch.float64))
    others = [Dense(factor(3)), Diagonal(factor(4).diagonal()), rescaled]
    return [complete[0], *grouped, truncated[0], *others, *complete[1:], *truncated[1:]]


@pytest.mark.parametrize("limit", [stack.MAX_STACKED, 12, 0])
def test_solutions_and_samples(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(stack, "MAX_STACKED", limit)
    chosen = matrices()
    stacked = operands(chosen, [torch.randn(matrix.size) for matrix in chosen])
    assert len(stacked) == {12: 10, 0: len(chosen)}.get(limit, 8)
    for _ in range(2):  # the second time with the stacks of the first
        x = [torch.randn(matrix.size, dtype=torch.float64) for matrix in chosen]
        found = solutions(chosen, [value.clone() for value in x])
        drawn = samples_(chosen, [value.clone() for value in x])
        for matrix, value, solution, sample in zip(chosen, x, found, drawn, strict=True):
            expected = torch.linalg.solve(matrix.dense(), value)
            moved = solution.add_to(torch.ones_like(value), -2.0)
            torch.testing.assert_close(moved, 1 - 2 * expected)
            torch.testing.assert_close(solution.dot, value @ expected)
            torch.testing.assert_close(sample, matrix.rsqrt(value))


def test_a_stack_follows_its_matrices() -> None:
    first, second, other = (Kronecker(factor(2), factor(3)).eigen() for _ in range(3))
    x = torch.randn(6, dtype=torch.float64)
    for pair in ([first, second], [first, other]):
        for matrix, sample in zip(pair, samples_(pair, [x, x]), strict=True):
            torch.testing.assert_close(sample, matrix.rsqrt(x))
