"""The directions of the mean, on dense float64 matrices."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_step import LAYERS, NUMBERS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.running_curvature import RunningCurvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import make_blocks
from pyrocurv.posterior.adam import DECAY, EPSILON, SoapUpdate
from pyrocurv.posterior.mean_update import Direction, MeanUpdate, Push, gradients, last_gradients
from pyrocurv.posterior.muon import (
    ADAM_SHARE,
    MAX_SIDE,
    MuonUpdate,
    WhitenedMuonUpdate,
    muon_scale,
)
from pyrocurv.posterior.orthogonalization import (
    COEFFICIENTS,
    _Factored,
    _iterate,
    orthogonalize,
)
from pyrocurv.posterior.precision import init_block
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior
from pyrocurv.posterior.state import BlockState
from pyrocurv.structures import Kronecker, KroneckerEigen
from pyrocurv.structures.rescaled import KroneckerScaling

pytestmark = pytest.mark.usefixtures("double")
ROOTS = (torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, 3.0, 0.7]).double())


def positive(size: int) -> Tensor:
    root = torch.randn(size, size)
    return root @ root.mT + 0.1 * torch.eye(size)


def polar(matrix: Tensor) -> Tensor:
    """The iteration's scalar polynomial on the singular values."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = polar_values(s / s.square().norm(dim=-1, keepdim=True).sqrt())
    return (u * s.unsqueeze(-2)) @ v


def polar_values(s: Tensor) -> Tensor:
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return s


class Counter(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def push(layer: Layer, structure: str = "kfac", roots: bool = False, step: int = 3) -> Push:
    """A layer with a curvature, a momentum and a prior that is not centered."""
    (block,) = make_blocks([layer], structure)
    delta = torch.tensor(2.0)
    scaling = None
    precision = delta
    if block.structure.is_kronecker:
        scaling = KroneckerScaling(delta, ROOTS if roots else None)
        precision = delta if scaling.root is None else delta * scaling.root.square()
    prior = BlockPrior(GaussianPrior(torch.tensor(0.3), precision), scaling)
    state = init_block(Curvature("ggn"), block, prior, NUMBERS, torch.randn(block.size))
    if block.structure.is_kronecker:
        *lead, outputs, inputs = layer.matrix_shape
        factors = Kronecker(
            torch.stack([positive(outputs) for _ in range(*lead)]) if lead else positive(outputs),
            torch.stack([positive(inputs) for _ in range(*lead)]) if lead else positive(inputs),
        )
        curvature = RunningCurvature(4, factors.eigen(), scaling=scaling)
        state = replace(state, curvature=curvature)
    before, state = state.momentum, replace(state, momentum=torch.randn(block.size))
    return Push(state, before + torch.randn(block.size), step)


def dense_gradients(push: Push) -> tuple[Tensor, Tensor]:
    """h and g of a block [P]."""
    state, numbers = push.state, push.state.hyperparameters
    ratio = numbers.temperature / numbers.num_data
    prior = ratio * state.prior.gaussian.precision * (state.mean - 0.3)
    beta = numbers.momentum
    h = state.momentum / (1 - beta ** (push.step + 1)) + prior
    return h, (state.momentum - beta * push.last_momentum) / (1 - beta) + prior


def dense_nesterov(push: Push) -> Tensor:
    """h [P] of β m + (1-β) g, where g is the gradient of the data in this step."""
    state, numbers = push.state, push.state.hyperparameters
    beta, ratio = numbers.momentum, numbers.temperature / numbers.num_data
    g = (state.momentum - beta * push.last_momentum) / (1 - beta)
    mean = (beta * state.momentum + (1 - beta) * g) / (1 - beta ** (push.step + 2))
    return mean + ratio * state.prior.gaussian.precision * (state.mean - 0.3)


def vector(direction: Direction) -> Tensor:
    return direction.solution.add_to(torch.zeros(direction.state.block.size), 1.0)


# ---- gradients ----------------------------------------------------------------------------------


def test_gradients_are_those_of_the_tempered_objective() -> None:
    pushed = push(LAYERS[0])
    h, g = dense_gradients(pushed)
    expected = [h, dense_nesterov(pushed)]
    found = gradients([pushed, pushed.ahead()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last_gradients([pushed]), [g], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_constant_gradient_is_the_mean_of_itself(is_ahead: bool) -> None:
    """From the first step on."""
    g, pushed = torch.randn(9), push(LAYERS[0])
    prior = GaussianPrior(torch.zeros(()), torch.tensor(0.0))
    state = replace(pushed.state, prior=BlockPrior(prior, None), momentum=torch.zeros(9))
    beta = NUMBERS.momentum
    for step in range(4):
        last, momentum = state.momentum, state.momentum.lerp(g, 1 - beta)
        state = replace(state, momentum=momentum)
        found = Push(state, last, step, is_ahead)
        torch.testing.assert_close(gradients([found]), [g], rtol=1e-12, atol=1e-12)
        assert found.bias_correction == pytest.approx(1 - beta ** (step + 1 + is_ahead))


# ---- orthogonalization --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (5, 4), (3, 9), (9, 3), (1, 4), (4, 1)])
def test_singular_vectors_are_kept_and_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    (result,) = orthogonalize([matrix])
    torch.testing.assert_close(result, polar(matrix), rtol=1e-10, atol=1e-10)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.25


def test_matrices_of_several_shapes_come_back_in_their_order() -> None:
    shapes = (3, 4), (2, 2), (80, 90), (2, 3, 4), (4, 70, 60), (4, 3), (2, 300, 300)
    matrices = [torch.randn(shape) for shape in shapes]
    for result, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        torch.testing.assert_close(result, polar(matrix), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 200)])
def test_ill_conditioned_matrices_in_single_precision(
    shape: tuple[int, int], smallest: float
) -> None:
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    for values in (torch.logspace(0, -6, 24), torch.tensor([1.0] + 23 * [smallest])):
        matrix = 1e-12 * (u * values) @ v
        (result,) = orthogonalize([matrix.float()])
        error = torch.linalg.matrix_norm(result.double() - polar(matrix), 2)
        assert error < 2e-3


def test_matrices_of_half_precision_are_iterated_in_single_precision() -> None:
    matrix = torch.randn(6, 30, dtype=torch.bfloat16)
    (result,) = orthogonalize([matrix])
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), polar(matrix.double()), rtol=2**-7, atol=1e-3)


def test_iterates_in_half_precision_stay_bounded() -> None:
    u, _, v = torch.linalg.svd(torch.randn(64, 256), full_matrices=False)
    for smallest in (1e-3, 0.0):
        values = torch.tensor([1.0] + 63 * [smallest])
        result = _iterate((u * (values / values.norm()) @ v).bfloat16())
        assert torch.linalg.matrix_norm(result.double(), 2) < 1.3


def test_singular_values_end_in_a_band() -> None:
    values = torch.cat([torch.logspace(-6, 0, 2000), torch.tensor([0.011, 1.0])])
    result = polar_values(values)
    assert 0.70 < result[values >= 0.011].min() and result.max() < 1.20
    assert bool((result > 63 * values)[values < 0.011].all())


def test_launches_do_not_grow_with_the_number_of_matrices() -> None:
    counts = []
    for number in (2, 12):
        with Counter() as counter:
            orthogonalize([torch.randn(number, 6, 9), torch.randn(number, 5, 30)])
        counts.append(counter.count)
    assert counts[0] == counts[1]


def test_a_zero_matrix_stays_zero() -> None:
    (result,) = orthogonalize([torch.zeros(3, 4)])
    assert bool((result == 0).all())


@pytest.mark.parametrize("ranks", [(3, 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (6, 4), (1, 4), (2, 3, 4), (2, 6, 4)])
def test_orthogonalized_in_whitened_coordinates(
    shape: tuple[int, ...], ranks: tuple[int, int]
) -> None:
    groups = shape[:-2]
    bases = [Kronecker(positive(3), positive(4)).eigen(ranks) for _ in range(*groups or (1,))]
    parts = zip(*((b.output_basis, b.input_basis, b.spectrum) for b in bases), strict=True)
    basis = KroneckerEigen(*map(torch.stack, parts)) if groups else bases[0]
    whitening = partial(basis.whiten_input, ridge=0.7)
    root = whitening(torch.eye(4).expand(*groups, 4, 4), 1)
    h, other = torch.randn(shape), torch.randn(5, 7)
    moved, plain = orthogonalize([h, other], [whitening, None])
    torch.testing.assert_close(moved, polar(h @ root) @ root, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(plain, polar(other), rtol=1e-9, atol=1e-10)
    u, _, v = torch.linalg.svd(h @ root, full_matrices=False)
    half = _Factored(h, whitening, True).iterated()  # as a GPU does with large matrices
    assert (half - u @ v @ root).norm() < 0.35 * (u @ v @ root).norm()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (3, 24, 40)])
def test_whitened_by_bases_of_half_precision(shape: tuple[int, ...]) -> None:
    """Where the square of a rounded root is not a rounded square."""
    bases = [Kronecker(positive(shape[-2]), positive(shape[-1])).eigen() for _ in range(3)]
    parts = [*zip(*((b.output_basis, b.input_basis, b.spectrum) for b in bases), strict=True)]
    basis = KroneckerEigen(*(
        (torch.stack(part) if len(shape) == 3 else part[0]).bfloat16() for part in parts
    ))
    whitening = partial(basis.whiten_input, ridge=1.0)
    h = torch.randn(shape).bfloat16()
    (moved,) = orthogonalize([h], [whitening])
    root = whitening(torch.eye(shape[-1]).expand(*shape[:-2], shape[-1], shape[-1]))
    expected = polar(h.double() @ root) @ root
    assert moved.dtype == torch.bfloat16
    assert (moved.double() - expected).norm() < 0.004 * expected.norm()


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-10, 1e15, 1e36])
def test_matrices_of_any_scale(scale: float) -> None:
    for shape in ((3, 5), (5, 3), (2, 3, 5)):
        matrix = torch.randn(shape)
        matrix = torch.where(matrix > 0, scale, -scale).float()
        (result,) = orthogonalize([matrix])
        expected = polar(matrix.double() / scale)
        torch.testing.assert_close(result.double(), expected, rtol=0.02, atol=0.02)


def test_nothing_to_orthogonalize() -> None:
    assert orthogonalize([]) == []


# ---- eigenbases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3, 4), (2, 4), (3, 2), (1, 2)])
def test_mean_squares_of_projections(ranks: tuple[int, int]) -> None:
    basis = Kronecker(positive(3), positive(4)).eigen(ranks)
    x = torch.randn(12)
    result = basis.mean_squares(x)
    eigenspaces = basis.map_eigenvalues(  # every eigenspace with an eigenvalue of its own
        lambda s: torch.arange(1.0, 1 + s.numel()).view_as(s)
    )
    values, vectors = torch.linalg.eigh(eigenspaces.dense())
    for index, value in enumerate(result.spectrum.flatten(), start=1):
        inside = vectors[:, (values - index).abs() < 1e-6]
        expected = (inside.mT @ x).square().mean()
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 4), (2, 2), (3, 1)])
def test_inputs_are_whitened(ranks: tuple[int, int]) -> None:
    basis = Kronecker(positive(3), positive(4)).eigen(ranks)
    trace = basis.dense().view(3, 4, 3, 4).diagonal(dim1=0, dim2=2).sum(-1)  # over the outputs
    factor = 4 * trace / trace.trace()
    values, vectors = torch.linalg.eigh(factor + 0.7 * torch.eye(4))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    x = torch.randn(3, 4)
    result, expected = basis.whiten_input(x, ridge=0.7), x @ root  # equal up to a factor
    torch.testing.assert_close(
        result / result.norm(), expected / expected.norm(), rtol=1e-9, atol=1e-10
    )
    assert bool((result * expected).sum() > 0)


def test_nothing_is_known_of_the_inputs_before_an_estimate() -> None:
    zero = KroneckerEigen(torch.eye(3), torch.eye(4), torch.zeros(3, 4))
    x = torch.randn(3, 4)
    torch.testing.assert_close(zero.whiten_input(x, ridge=1.0), x / 2**0.5)


# ---- Muon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "diag", "full"])
def test_muon_orthogonalizes_weights_and_leaves_biases_to_adam(structure: str) -> None:
    pushed = push(LAYERS[0], structure)
    h, g = dense_gradients(pushed)
    (direction,) = MuonUpdate().directions([pushed])
    expected = pushed.state.block.views(vector(direction))
    gradients, last = pushed.state.block.views(h), pushed.state.block.views(g)
    ahead = pushed.state.block.views(dense_nesterov(pushed))
    weight = (3 / 2) ** 0.5 * polar(ahead["a.weight"])
    torch.testing.assert_close(expected["a.weight"], weight, rtol=1e-9, atol=1e-9)
    bias = ADAM_SHARE * gradients["a.bias"] / (last["a.bias"].abs() + EPSILON)
    torch.testing.assert_close(expected["a.bias"], bias, rtol=1e-9, atol=1e-9)
    assert direction.rate == NUMBERS.lr and direction.energy_rate is None


def test_tall_matrices_move_further() -> None:
    assert [muon_scale(8, 2), muon_scale(4, 4), muon_scale(2, 8)] == [2.0, 1.0, 1.0]


def test_muon_takes_a_convolution_as_one_matrix() -> None:
    pushed = push(Layer("c.weight", None, (4, 2, 3, 3)))
    (direction,) = MuonUpdate().directions([pushed])
    expected = polar(dense_nesterov(pushed).view(4, 18)).view(-1)
    torch.testing.assert_close(vector(direction), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("roots", [False, True])
def test_whitened_muon(roots: bool) -> None:
    pushed = push(LAYERS[0], roots=roots)
    h = dense_nesterov(pushed)
    root = torch.outer(*ROOTS).flatten() if roots else torch.ones(9)
    basis = pushed.state.curvature.curvature
    trace = basis.dense().view(3, 3, 3, 3).diagonal(dim1=0, dim2=2).sum(-1)
    values, vectors = torch.linalg.eigh(3 * trace / trace.trace() + torch.eye(3))
    whitener = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    matrix = polar((h / root).view(3, 3) @ whitener) @ whitener
    expected = (3**0.5 * matrix / matrix.norm()).flatten() / root
    (direction,) = WhitenedMuonUpdate().directions([pushed])
    torch.testing.assert_close(vector(direction), expected, rtol=1e-9, atol=1e-9)
    assert direction.solution.dot > 0 and direction.energy_rate is None


def test_whitened_muon_takes_the_positive_part_of_a_hessian() -> None:
    pushed = push(LAYERS[0])
    curvature = pushed.state.curvature
    basis = curvature.curvature.map_eigenvalues(lambda values: values - 2 * values.mean())

    def direction(basis: KroneckerEigen) -> Tensor:
        state = replace(pushed.state, curvature=replace(curvature, curvature=basis))
        (found,) = WhitenedMuonUpdate().directions([replace(pushed, state=state)])
        return vector(found)

    assert basis.spectrum.sum() < 0 < basis.spectrum.max()
    torch.testing.assert_close(direction(basis), direction(basis.psd()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("layer", [LAYERS[0], Layer("c.weight", None, (6, 2, 3), groups=2)])
def test_whitened_muon_of_blocks_of_equal_shape(layer: Layer) -> None:
    pushes = [push(layer), push(LAYERS[0], roots=True), push(layer), push(layer, "diag")]
    together = WhitenedMuonUpdate().directions(pushes)
    for one, found in zip(pushes, together, strict=True):
        (alone,) = WhitenedMuonUpdate().directions([one])
        torch.testing.assert_close(vector(found), vector(alone), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found.solution.dot, alone.solution.dot)
        assert found.state is alone.state


def test_whitened_muon_takes_the_groups_of_a_convolution_one_by_one() -> None:
    layer = Layer("c.weight", None, (6, 2, 3), groups=2)
    pushed = push(layer)
    (direction,) = WhitenedMuonUpdate().directions([pushed])
    matrices = vector(direction).view(2, 3, 6)
    norms = torch.linalg.matrix_norm(matrices)
    torch.testing.assert_close(norms, torch.full((2,), 3**0.5))
    halves = []
    for index in range(2):
        part = push(Layer("c.weight", None, (3, 2, 3)))
        curvature, h = pushed.state.curvature, pushed.state.momentum.view(2, 18)[index]
        last = pushed.last_momentum.view(2, 18)[index]
        basis = curvature.curvature.map(lambda t, index=index: t[index])
        state = replace(
            part.state, momentum=h, mean=pushed.state.mean.view(2, 18)[index],
            curvature=replace(curvature, curvature=basis),
        )
        half_push = replace(part, state=state, last_momentum=last)
        (half,) = WhitenedMuonUpdate().directions([half_push])
        halves.append(vector(half))
    torch.testing.assert_close(torch.cat(halves), vector(direction), rtol=1e-9, atol=1e-9)


def test_scales_and_embeddings_are_adams() -> None:
    for layer in (
        Layer("n.weight", "n.bias", (4,), "per_unit"), Layer("e.weight", None, (4, 3), "lookup"),
    ):
        pushed = push(layer)
        h, g = dense_gradients(pushed)
        expected = ADAM_SHARE * h / (g.abs() + EPSILON)
        for rule in (WhitenedMuonUpdate(), MuonUpdate()):
            (direction,) = rule.directions([pushed])
            torch.testing.assert_close(vector(direction), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "structure"), [(WhitenedMuonUpdate(), "kfac"), (SoapUpdate(), "diag")]
)
def test_adam_of_many_blocks_is_one_step(rule: MeanUpdate, structure: str) -> None:
    """But for what is checked of each direction, <h, d>."""
    layer = Layer("n.weight", "n.bias", (4,), "per_unit")
    counts = []
    for number in (1, 2, 12):
        pushes = [push(layer, structure) for _ in range(number)]
        with Counter() as counter:
            rule.directions(pushes)
        counts.append(counter.count - number)
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_whitened_muon_is_natural_without_an_input_factor(structure: str) -> None:
    pushed = push(LAYERS[0], structure)
    (direction,) = WhitenedMuonUpdate().directions([pushed])
    h, _ = dense_gradients(pushed)
    expected = torch.linalg.solve(pushed.state.preconditioner.dense(), h)
    scaled = direction.rate / NUMBERS.lr * vector(direction)
    torch.testing.assert_close(scaled, expected, rtol=1e-9, atol=1e-9)
    assert direction.energy_rate is not None


def test_a_wide_matrix_is_whitened_only_if_a_batch_has_many_rows() -> None:
    pushed = push(Layer("w.weight", None, (MAX_SIDE + 1, MAX_SIDE + 1)))
    (natural,) = WhitenedMuonUpdate().directions([pushed])
    assert natural.energy_rate is not None
    curvature = replace(pushed.state.curvature, positions=2)
    pushed = replace(pushed, state=replace(pushed.state, curvature=curvature))
    (whitened,) = WhitenedMuonUpdate().directions([pushed])
    assert whitened.energy_rate is None


# ---- SOAP ---------------------------------------------------------------------------------------


def dense_adam(h: Tensor, squares: list[Tensor]) -> Tensor:
    """Adam from the squares of all gradients so far."""
    average = squares[0]
    for count, square in enumerate(squares[1:], start=2):
        weight = max(1 - DECAY, 1 / count)
        average = (1 - weight) * average + weight * square
    return h / (average.sqrt() + EPSILON)


def following(direction: Direction, pushed: Push) -> Push:
    """The next push of a block, with its new moments and another momentum."""
    state: BlockState = direction.state
    momentum = torch.randn_like(state.momentum)
    return Push(replace(state, momentum=momentum), state.momentum, pushed.step + 1)


@pytest.mark.parametrize("roots", [False, True])
def test_soap_is_adam_in_the_eigenbasis(roots: bool) -> None:
    pushed = push(LAYERS[0], roots=roots)
    root = torch.outer(*ROOTS).flatten() if roots else torch.ones(9)
    basis = pushed.state.curvature.curvature
    assert isinstance(basis, KroneckerEigen)
    vectors = torch.kron(basis.output_basis, basis.input_basis)
    squares = []
    for _ in range(3):
        h, g = dense_gradients(pushed)
        squares.append((vectors.mT @ (g / root)).square())
        expected = vectors @ dense_adam(vectors.mT @ (h / root), squares) / root
        (direction,) = SoapUpdate().directions([pushed])
        torch.testing.assert_close(vector(direction), expected, rtol=1e-8, atol=1e-9)
        pushed = following(direction, pushed)


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_soap_is_adam_without_an_eigenbasis(structure: str) -> None:
    pushed = push(LAYERS[0], structure)
    squares = []
    for _ in range(3):
        h, g = dense_gradients(pushed)
        squares.append(g.square())
        (direction,) = SoapUpdate().directions([pushed])
        expected = dense_adam(h, squares)
        torch.testing.assert_close(vector(direction), expected, rtol=1e-9, atol=1e-9)
        pushed = following(direction, pushed)


def test_second_moments_follow_a_change_of_the_basis() -> None:
    """An isotropic second moment is the same in any basis."""
    pushed = push(LAYERS[0])
    (direction,) = SoapUpdate().directions([pushed])
    moment = direction.state.second_moment
    assert moment is not None
    constant = moment.mean.map_eigenvalues(torch.ones_like)
    other = Kronecker(positive(3), positive(3)).eigen()
    average = constant.lerp(other.map_eigenvalues(torch.ones_like), 0.1)
    torch.testing.assert_close(average.dense(), torch.eye(9), rtol=1e-9, atol=1e-9)


# ---- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [MuonUpdate(), WhitenedMuonUpdate(), SoapUpdate()])
@pytest.mark.parametrize("structure", ["kfac", "diag"])
def test_directions_descend_and_change_nothing(
    rule: MuonUpdate, structure: str
) -> None:
    pushed = push(LAYERS[0], structure)
    before = pushed.state.momentum.clone(), pushed.state.mean.clone()
    (direction,) = rule.directions([replace(pushed)])
    assert torch.equal(pushed.state.momentum, before[0])
    assert torch.equal(pushed.state.mean, before[1])
    assert float(torch.dot(vector(direction), dense_gradients(pushed)[0])) > 0
