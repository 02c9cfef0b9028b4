"""The leading part of wide factors, against the exact running averages that it never forms."""

import copy
import io
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrocurv.curvature import EKFAC, KFAC, Curvature
from pyrocurv.curvature.layer_statistics import GradientStatistics, LayerStatistics
from pyrocurv.curvature.running_average import begin_update, finish_updates, zero_curvature
from pyrocurv.curvature.running_curvature import DueBlock, RunningCurvature
from pyrocurv.curvature.truncated_factor import MAX_ROWS, TruncatedFactor, mean_squares
from pyrocurv.guides import EKFACGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.layers import Layer
from pyrocurv.layers.block import Block
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.runtime.workers import ALONE
from pyrocurv.structures import KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import from_state, to_state

OUTPUTS, INPUTS = 9, 12
DECAY = 0.7
structures = pytest.mark.parametrize("structure", ["kfac", "ekfac"])


def same(actual: Tensor, expected: Tensor) -> None:
    """Up to the rounding of a small eigenproblem in float64 of entries of order 1 to 100."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def estimates(count: int, rows: int, positions: int = 1, vectors: int = 1) -> list[Any]:
    """Pairs (a [B, S, I], g [K, B, S, O])."""
    return [
        [(torch.randn(rows, positions, INPUTS).double(),
          torch.randn(vectors, rows, positions, OUTPUTS).double())] for _ in range(count)
    ]


def step(
    running: RunningCurvature | None, structure: str, pairs: Any, rows: int, decay: float,
    refresh: bool, scaling: KroneckerScaling | None = None, rank: int | str = "auto",
) -> RunningCurvature:
    """`update` of one layer; None is before its first estimate."""
    ((a, g),) = pairs
    layer = Layer("w", None, (g.shape[-1], a.shape[-1]))
    block = Block((layer,), {"kfac": KFAC, "ekfac": EKFAC}[structure](rank=rank))
    running = running or zero_curvature(block, a, scaling)
    statistics = GradientStatistics([[LayerStatistics(a[None], g)]])
    due = DueBlock(block, running, scaling)
    begun = begin_update(due, statistics, rows, decay, refresh)
    (updated,) = finish_updates([begun], rows, ALONE)
    return updated


def weights(count: int) -> list[float]:
    return [max(1 - DECAY, 1 / number) for number in range(1, count + 1)]


def exact(stream: list[Any]) -> tuple[Tensor, Tensor]:
    """The running averages of G and A per datum, dense."""
    G, A = torch.zeros(OUTPUTS, OUTPUTS).double(), torch.zeros(INPUTS, INPUTS).double()
    for weight, [(a, g)] in zip(weights(len(stream)), stream, strict=True):
        rows, positions = a.shape[:2]
        A = (1 - weight) * A + weight * torch.einsum("bsi,bsj->ij", a, a) / rows
        G = (1 - weight) * G + weight * torch.einsum("kbsi,kbsj->ij", g, g) / (rows * positions)
    return G, A


def run(
    structure: str, stream: list[Any], rank: int, scaling: KroneckerScaling | None = None
) -> RunningCurvature:
    running = None
    for pairs in stream:
        rows = pairs[0][0].shape[0]
        running = step(running, structure, pairs, rows, DECAY, False, scaling, rank)
    assert running is not None
    return running


def orthonormal(basis: Tensor) -> None:
    same(basis.mT @ basis, torch.eye(basis.shape[1]).double())


def random_scaling() -> KroneckerScaling:
    roots = torch.rand(OUTPUTS).double() + 0.5, torch.rand(INPUTS).double() + 0.5
    return KroneckerScaling(torch.ones(()).double(), roots)


# ---- K-FAC --------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_scaling", [False, True])
@pytest.mark.parametrize(
    ("count", "rows", "positions"), [(1, 2, 1), (3, 2, 1), (1, 2, 3), (2, 1, 3)]
)
def test_exact_while_the_rows_are_fewer_than_the_rank(
    count: int, rows: int, positions: int, with_scaling: bool
) -> None:
    stream = estimates(count, rows, positions)
    scaling = random_scaling() if with_scaling else None
    G, A = exact(stream)
    if scaling is not None:
        p, r = scaling.roots
        G, A = G / torch.outer(p, p), A / torch.outer(r, r)
    running = run("kfac", stream, 6, scaling)
    same(running.curvature.dense(), torch.kron(G, A))
    for side in running.truncated_factors:
        assert side.basis.shape[1] == 6
        orthonormal(side.basis)


def test_a_side_that_fits_the_rank_is_exact_for_ever() -> None:
    """Then the other alone is truncated."""
    stream = estimates(12, 5)
    G, A = exact(stream)
    output, input = run("kfac", stream, OUTPUTS).truncated_factors
    assert input.basis.shape == (INPUTS, OUTPUTS)
    same(output.basis @ torch.diag(output.spectrum) @ output.basis.mT, G)
    same(input.diagonal, A.diag())


@pytest.mark.parametrize("positions", [1, 2 * MAX_ROWS])
def test_what_holds_for_any_rows(positions: int) -> None:
    """The trace and diagonal are exact, also of sampled positions; λ are lower bounds."""
    stream = estimates(8, 3, positions)
    G, A = exact(stream)
    running = run("kfac", stream, 4)
    same(running.curvature.trace(), G.trace() * A.trace())
    for side, factor in zip(running.truncated_factors, (G, A), strict=True):
        orthonormal(side.basis)
        same(side.diagonal, factor.diag())
        same(side.spectrum[:4].sum() + side.spectrum[4] * (len(factor) - 4), factor.trace())
        assert (side.values.diff() <= 0).all()
        if positions == 1:
            rest = factor - side.basis @ torch.diag(side.values) @ side.basis.mT
            assert torch.linalg.eigvalsh(rest)[0] > -1e-9


def test_slowly_decaying_spectrum() -> None:
    """It gathers over estimates what one of them cannot show.

    The exact running average is a weighted sum of all rows so far, its best 16 directions are the
    most that any can have. The last estimate's own best 16 are what a basis without memory has; of
    what those miss this must find more than half, or the memory would not be worth its keep.
    """
    size, rank, rows = 200, 16, 32
    scales = torch.arange(1, size + 1).double() ** -0.5
    average, side = torch.zeros(size, size).double(), None
    for weight in (max(0.05, 1 / n) for n in range(1, 101)):
        x = torch.randn(rows, 1, size).double() * scales
        side = (side or TruncatedFactor.zeros(x, rank)).average(x, 1 / rows, weight)
        average.lerp_(x.squeeze(1).mT @ x.squeeze(1) / rows, weight)

    def energy(basis: Tensor) -> float:
        return float((basis.mT @ average @ basis).trace())

    best = energy(torch.linalg.eigh(average).eigenvectors[:, -rank:])
    last = energy(torch.linalg.svd(x.squeeze(1), full_matrices=False).Vh[:rank].mT)
    assert side is not None and best - energy(side.basis) < (best - last) / 2
    assert energy(side.basis) <= best + 1e-9


def test_sampled_positions_are_right_on_average() -> None:
    """A rank-one estimate from sampled positions, many times over: its mean is that of all rows."""
    x = torch.randn(1, 2 * MAX_ROWS, 3).double()
    expected = torch.einsum("nsi,nsj->ij", x, x)
    draws = []
    for _ in range(400):
        side = TruncatedFactor.zeros(x, 3).average(x, 1.0, 1.0)  # of full rank: the estimate itself
        draws.append(side.basis @ torch.diag(side.values) @ side.basis.mT)
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    bias = expected.trace() / MAX_ROWS  # of the ratio of traces, of the order 1 / rows
    assert ((found.mean(0) - expected).abs() < 5 * error + bias).all()


# ---- EK-FAC -------------------------------------------------------------------------------------


def projectors(basis: Tensor) -> list[Tensor]:
    onto = [torch.outer(column, column) for column in basis.mT]
    rest = torch.eye(len(basis)).double() - sum(onto)
    return onto if basis.shape[0] == basis.shape[1] else [*onto, rest]


def dense_curvature(a: Tensor, g: Tensor) -> Tensor:
    jacobians = torch.einsum("kbso,bsi->kboi", g, a).flatten(0, 1).flatten(1)
    return jacobians.mT @ jacobians


@pytest.mark.parametrize("positions", [1, 3, 12])
@pytest.mark.parametrize("ranks", [(4, 5), (OUTPUTS, 5), (4, INPUTS), (OUTPUTS, INPUTS)])
def test_mean_squares(ranks: tuple[int, int], positions: int) -> None:
    """The mean of the dense curvature over each pair of eigenspaces."""
    ((a, g),) = estimates(1, 3, positions, vectors=2)[0]
    bases = [torch.linalg.qr(torch.randn(n, n).double()).Q[:, :rank].contiguous()
             for n, rank in zip((OUTPUTS, INPUTS), ranks, strict=True)]
    shape = [rank + (rank < n) for n, rank in zip((OUTPUTS, INPUTS), ranks, strict=True)]
    found = mean_squares(a, g, KroneckerEigen(*bases, torch.ones(shape).double()))
    matrix = dense_curvature(a, g)
    for i, output in enumerate(projectors(bases[0])):
        for j, input in enumerate(projectors(bases[1])):
            onto = torch.kron(output, input)
            same(found.spectrum[i, j], (onto * matrix).sum() / onto.trace())


def test_the_eigenvalues_of_ekfac_are_averaged_in_the_turning_basis() -> None:
    """The trace is that of the exact running average, which no turn of the basis changes."""
    stream = estimates(6, 4, positions=2)
    running, expected = run("ekfac", stream, 3), torch.zeros(()).double()
    for weight, [(a, g)] in zip(weights(6), stream, strict=True):
        expected = (1 - weight) * expected + weight * dense_curvature(a, g).trace() / len(a)
    same(running.curvature.trace(), expected)
    assert isinstance(running.curvature, KroneckerEigen)
    for side, basis in zip(
        running.truncated_factors, (
            running.curvature.output_basis, running.curvature.input_basis
        ), strict=True
    ):
        assert side.basis is basis


# ---- the scaling of the prior -------------------------------------------------------------------


@structures
def test_another_scaling_between_two_estimates(structure: str) -> None:
    """What fits the rank is carried over exactly: as if it had been the scaling from the start."""
    stream = estimates(2, 2)
    first, second = random_scaling(), random_scaling()
    for old, new in ((first, second), (None, second), (first, None)):
        before = run(structure, stream[:1], 6, old)
        running = step(before, structure, stream[1], 2, DECAY, False, new, 6)
        expected = run("kfac", stream, 6, new)
        assert running.scaling is new
        for side, other in zip(running.truncated_factors, expected.truncated_factors, strict=True):
            same(side.basis.mul(side.values) @ side.basis.mT,
                 other.basis.mul(other.values) @ other.basis.mT)
            same(side.diagonal, other.diagonal)
        if structure == "kfac":
            same(running.curvature.dense(), expected.curvature.dense())


# ---- a value that is never wide -----------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@structures
def test_no_square_matrix_of_a_wide_side_and_no_whole_weight_is_formed(structure: str) -> None:
    outputs, inputs, running = 700, 900, None
    for _ in range(2):
        pairs = [(torch.randn(4, 9, inputs), torch.randn(1, 4, 9, outputs))]
        with Largest() as seen:
            running = step(running, structure, pairs, 4, DECAY, True)
        assert seen.numel <= 4 * 32 * inputs  # rows turned to one side of the basis


@structures
def test_an_estimate_changes_nothing_of_the_last(structure: str) -> None:
    stream = estimates(2, 4)
    before = run(structure, stream[:1], 3)
    kept = [t.clone() for side in before.truncated_factors for t in vars(side).values()]
    dense = before.curvature.dense()
    after = step(before, structure, stream[1], 4, DECAY, False, None, 3)
    assert after is not before and after.count == 2
    now = [t for side in before.truncated_factors for t in vars(side).values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    assert torch.equal(before.curvature.dense(), dense)


@structures
def test_an_estimate_that_is_not_finite_is_left_out(structure: str) -> None:
    good, bad = estimates(1, 3)[0], [(torch.full((3, 1, INPUTS), torch.nan).double(),
                                      torch.ones(1, 3, 1, OUTPUTS).double())]
    with pytest.raises(FloatingPointError):
        step(None, structure, bad, 3, DECAY, False, None, 4)
    running = step(None, structure, good, 3, DECAY, False, None, 4)
    with pytest.warns(UserWarning, match="not finite"):
        assert step(running, structure, bad, 3, DECAY, False, None, 4) is running


@structures
def test_rows_of_nothing(structure: str) -> None:
    """Dead inputs and gradients give a curvature of zero, and an orthonormal basis all the same."""
    a, g = torch.zeros(3, 2 * MAX_ROWS, INPUTS), torch.zeros(1, 3, 2 * MAX_ROWS, OUTPUTS)
    pairs = [(a.double(), g.double())]
    running = step(None, structure, pairs, 3, DECAY, False, None, 4)
    assert not running.curvature.dense().any()
    for side in running.truncated_factors:
        orthonormal(side.basis)


@structures
def test_a_checkpoint_of_the_sides(structure: str) -> None:
    stream, file = estimates(3, 4), io.BytesIO()
    running = run(structure, stream[:2], 3)
    torch.save(to_state(running), file)
    file.seek(0)
    again = from_state(torch.load(file, weights_only=True))
    ours, theirs = (step(one, structure, stream[2], 4, DECAY, False, None, 3)
                    for one in (running, again))
    assert torch.equal(ours.curvature.dense(), theirs.curvature.dense())


@pytest.mark.parametrize("make", [KFACGuide, EKFACGuide])
def test_a_run_with_sampled_positions_resumes_bit_for_bit(make: Any) -> None:
    """A convolution of 181 inputs at 36 positions: the draws come from the run's own stream."""

    def start() -> tuple[NGVI, Any]:
        torch.manual_seed(0)
        pyro.clear_param_store()
        net = bayesianize(nn.Sequential(nn.Conv2d(20, 4, 3), nn.ReLU(), nn.Flatten(),
                                        nn.Linear(144, 3)))
        model = Classifier(net, num_data=64)
        guide = make(model)
        return NGVI(model, guide, curvature=Curvature("fisher", every=1)), guide

    x, y = torch.randn(64, 20, 8, 8), torch.randint(3, (64,))
    ngvi, guide = start()
    for _ in range(3):
        ngvi.step(x, y)
    assert guide.blocks[0].input_basis.shape == (181, 16)
    state, held = copy.deepcopy((ngvi.state_dict(), guide.state_dict()))
    expected = [ngvi.step(x, y) for _ in range(3)]
    again, other = start()
    other(x, y)
    other.load_state_dict(held)
    again.load_state_dict(state)
    torch.manual_seed(5)
    assert [again.step(x, y) for _ in range(3)] == expected


@structures
def test_masked_examples_are_no_rows(structure: str) -> None:
    """3 of 8 examples are left: the truncated sides have the scale of the whole factors."""
    ((pairs,),) = [estimates(1, 3, positions=2)]
    thin, whole = (
        step(None, structure, pairs, 8, DECAY, False, None, rank) for rank in (8, OUTPUTS + INPUTS)
    )
    assert thin.truncated_factors is not None and whole.truncated_factors is None
    same(thin.curvature.trace(), whole.curvature.trace())
    same(thin.curvature.dense(), whole.curvature.dense())
