"""The rule of the automatic temperature: γ and r on dense matrices, and a run without progress."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.running_curvature import RunningCurvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import make_blocks
from pyrocurv.layers.structure_spec import KFAC
from pyrocurv.posterior.correlated_prior import CorrelatedPrior
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.precision import (
    init_block,
    initial_curvature,
    measure_determined,
    refresh_block,
)
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior, Prior, kronecker_scaling
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.temperature import (
    REFERENCE,
    TemperatureRule,
    TemperatureState,
    warn_at_chance,
)
from pyrocurv.structures import Dense, Diagonal, Kronecker, Structure
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import from_state, to_state

LAYERS = (Layer("a.weight", "a.bias", (3, 2)), Layer("b.weight", None, (2, 3)))
NUM_DATA, TEMPERATURE = 40, 0.3
WEIGHT = NUM_DATA / TEMPERATURE
NUMBERS = Hyperparameters(0.1, 0.1, 0.9, 1e-3, None, NUM_DATA, TEMPERATURE)


def positive(size: int) -> Tensor:
    """Of a low rank and eigenvalues of several orders, as a curvature has them."""
    root = torch.randn(size, (size + 1) // 2)
    return root @ root.mT / 30 + 1e-4 * torch.eye(size)


def random_curvature(structure: str, sizes: list[int]) -> Structure:
    size = math.prod(sizes)
    if structure == "diag":
        return Diagonal(10 ** (-4 * torch.rand(size)))
    if structure in ("block", "full"):
        return Dense(positive(size))
    ranks = (1, 1) if structure == "truncated" else None
    basis = Kronecker(*(10 * positive(size) for size in sizes)).eigen(ranks)
    if structure == "ekfac":
        return basis.map_eigenvalues(lambda values: values * torch.rand_like(values))
    return basis


def states(
    structure: str, prior: str, initial: float
) -> list[tuple[BlockState, Tensor, Tensor, Tensor]]:
    """Blocks, with their curvature C, the precision of their prior and e S, [P, P]."""
    spec, result = Curvature("ggn"), []
    for block in make_blocks(LAYERS, KFAC(rank=1) if structure == "truncated" else structure):
        is_kronecker = block.structure.is_kronecker
        sizes = [*block.layers[0].matrix_shape] if is_kronecker else [block.size]
        loc, delta, scaling = torch.zeros(()), torch.tensor(2.0), None
        if prior == "scales" and is_kronecker:
            delta = torch.outer(*(torch.rand(size) * 5 + 0.1 for size in sizes)).flatten()
        elif prior == "scales":
            delta = torch.rand(block.size) * 5 + 0.1
        if prior == "mean":
            loc = torch.randn(block.size)
        gaussian: Prior = GaussianPrior(loc, delta, zero_mean=prior != "mean")
        dense = torch.diag(delta.expand(block.size))
        if prior == "correlated":
            dense = 20 * positive(block.size)
            gaussian = CorrelatedPrior(torch.randn(block.size), Dense(dense))
        elif is_kronecker:
            scaling = kronecker_scaling(block, gaussian)
        mean = torch.randn(block.size)
        state = init_block(spec, block, BlockPrior(gaussian, scaling), NUMBERS, mean)
        matrix = random_curvature(structure, sizes)
        running = RunningCurvature(3, matrix, scaling=scaling)
        state = refresh_block(replace(state, curvature=running), spec, initial)
        root = torch.ones(block.size) if running.root is None else running.root
        curvature = root * matrix.dense() * root.unsqueeze(-1)
        faint = curvature + initial * torch.diag(root.square())
        torch.testing.assert_close(state.precision.dense(), WEIGHT * faint + dense)
        result.append((state, curvature, dense, faint - curvature))
    return result


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("structure", "prior"), [
    *((structure, prior) for structure in ("diag", "kfac", "truncated", "ekfac", "block", "full")
      for prior in ("equal", "scales", "mean")),
    ("block", "correlated"), ("full", "correlated"),
])
@pytest.mark.parametrize("step", [0, 7, 1000])
def test_the_weights_that_the_data_determine(structure: str, prior: str, step: int) -> None:
    """γ = tr D and r = dᵀ Λ₀ D d / γ with D = Λ⁻¹ (N/T₁) C, and of the others the share of e."""
    spec, fraction = Curvature("ggn"), 0.04
    initial = initial_curvature(spec, step, fraction)
    blocks = states(structure, prior, initial)
    means = [state.mean.clone() for state, *_ in blocks]
    found = measure_determined(spec, Posterior(step, tuple(s for s, *_ in blocks)), fraction)
    assert all(map(torch.equal, (state.mean for state, *_ in blocks), means))
    weight, number, squares = NUM_DATA / REFERENCE, 0.0, 0.0
    for state, curvature, delta, faint in blocks:
        own = torch.linalg.solve(weight * (curvature + faint) + delta, weight * curvature)
        deviation = state.mean - state.prior.gaussian.loc
        number += float(own.trace())
        square = deviation @ delta @ own @ deviation
        if prior == "correlated":  # an earlier task's posterior is taken to fit
            square = own.trace()
        squares += float(square)
    assert 0.5 < number < 14.9 and squares > 0.1
    number += 0.96**step * (15 - number)
    seen = found.temperature
    assert seen.determined == pytest.approx(number / NUM_DATA, rel=1e-9)
    assert seen.mean_square == pytest.approx(squares / number, rel=1e-9)
    expected = TemperatureState(is_informed=prior in ("correlated", "mean"))
    assert replace(seen, determined=0.0, mean_square=0.0) == expected


@pytest.mark.parametrize(("mean", "is_informed"), [
    ([0.0, 0.0, 0.0], False), ([1.0, 1.0, 0.0], False), ([1.0, 0.9, 0.0], True),
])
def test_a_mean_of_each_weight_is_informed(mean: list[float], is_informed: bool) -> None:
    """But not one for all weights of a tensor, as the scales of a norm have it, nor zeros."""
    (block,) = make_blocks((Layer("scale", "bias", (1, 2)),), "diag")
    assert [*block.views(torch.arange(3.0))] == ["scale", "bias"]
    prior = BlockPrior(GaussianPrior(torch.tensor(mean), torch.tensor(1.0)))
    state = init_block(Curvature("ggn"), block, prior, NUMBERS, torch.zeros(3))
    found = measure_determined(Curvature("ggn"), Posterior(0, (state,)), 0.1)
    assert found.temperature.is_informed == is_informed


@pytest.mark.usefixtures("double")
def test_weights_at_a_random_start_do_not_count() -> None:
    """Of two weights the data determine one: far from its prior, the other one is not seen."""
    spec = Curvature("ggn")
    (block,) = make_blocks((Layer("w", None, (1, 2)),), "diag")
    gaussian = GaussianPrior(torch.zeros(()), torch.tensor(4.0), zero_mean=True)
    state = init_block(spec, block, BlockPrior(gaussian), NUMBERS, torch.tensor([3.0, 50.0]))
    running = RunningCurvature(1, Diagonal(torch.tensor([1e3, 0.0])))
    state = refresh_block(replace(state, curvature=running), spec, 0.0)
    seen = measure_determined(spec, Posterior(10**6, (state,)), 0.04).temperature
    assert seen.determined == pytest.approx(1 / NUM_DATA, rel=1e-4)
    assert seen.mean_square == pytest.approx(4 * 3**2, rel=1e-4)


@pytest.mark.usefixtures("double")
def test_a_block_whose_scaling_has_changed_is_measured_as_it_is() -> None:
    """Until its next estimate it keeps the precision at the T of the run."""
    spec = Curvature("ggn")
    blocks = states("kfac", "scales", 0.0)
    before = Posterior(10**6, tuple(state for state, *_ in blocks))

    def rescaled(state: BlockState) -> BlockState:
        scaling = state.prior.scaling
        assert scaling is not None and scaling.roots is not None
        changed = KroneckerScaling(scaling.delta, (1.01 * scaling.roots[0], scaling.roots[1]))
        return replace(state, prior=replace(state.prior, scaling=changed))

    found = measure_determined(spec, before.map_blocks(rescaled), 0.04).temperature
    number = sum(
        torch.linalg.solve(WEIGHT * curvature + delta, WEIGHT * curvature).trace()
        for _, curvature, delta, _ in blocks
    )
    assert found.determined == pytest.approx(float(number) / NUM_DATA, rel=1e-9)


def test_without_blocks_nothing_is_measured() -> None:
    empty = Posterior(0, ())
    assert measure_determined(Curvature("ggn"), empty, 0.1) is empty


# ---- the rule -----------------------------------------------------------------------------------


def rule(given: float | str, warmup: int = 0) -> TemperatureRule:
    return TemperatureRule(given, warmup)


def seen(mean_square: float, loss: float = 0.1, factor: float = 1.0) -> TemperatureState:
    """After the first pass, with a loss that started at 2.4."""
    return TemperatureState(
        mean_square=mean_square, factor=factor, start=2.4, loss=loss, finished=1
    )


@pytest.mark.parametrize(("state", "expected"), [
    (seen(0.0), 0.1), (seen(2.49), 0.1), (seen(5.0), 0.1 / 8), (seen(4.0), 0.1 * (2.5 / 4) ** 3),
    (seen(9.0), 0.003), (seen(1e9), 0.003),  # the lowest
    (seen(9.0, loss=0.21), 0.02), (seen(9.0, loss=0.19), 0.003),  # 1/12 of 2.4
    (seen(3.0, loss=0.21), 0.1 * (2.5 / 3) ** 3),
    (seen(1.0, factor=0.1), 0.01), (seen(9.0, factor=0.1), 0.003), (seen(1.0, factor=1e-5), 1e-3),
    (replace(seen(1.0), is_stalled=True), 0.02),
    (replace(seen(1.0, factor=0.1), is_stalled=True), 0.002),
    (replace(seen(9.0), is_stalled=True), 0.003),
    (TemperatureState(is_informed=True), 0.1),
    (replace(seen(9.0, factor=0.1), is_informed=True), 0.01),
    (TemperatureState(mean_square=99.0), 0.02),  # the first pass
    (replace(seen(1.0), finished=0), 0.02),
    (replace(seen(1.0), ceiling=0.01), 0.01), (replace(seen(9.0), ceiling=0.01), 0.003),
    (replace(seen(1.0, loss=1.0), ceiling=0.01), 0.01),
    (replace(seen(1.0, factor=0.1), ceiling=0.01), 0.001),
    (TemperatureState(mean_square=0.1, start=2.4), 0.02),
])
def test_the_automatic_temperature(state: TemperatureState, expected: float) -> None:
    assert rule("auto").is_automatic
    assert rule("auto")(state, 3) == pytest.approx(expected, rel=1e-12)


def test_a_negative_loss_is_fitted_far_below_its_start() -> None:
    """The log density of a regression: below -1 by 11/12."""
    below, above = (replace(seen(9.0), start=-1.0, loss=-1.0 - x / 12) for x in (11.1, 10.9))
    assert rule("auto")(below, 3) == 0.003 and rule("auto")(above, 3) == 0.02


def test_a_given_temperature_is_independent_of_the_run() -> None:
    assert not rule(0.7).is_automatic
    assert rule(0.7)(seen(3.0, factor=1e-3), 5) == 0.7


@pytest.mark.parametrize("given", [0.5, "auto"])
@pytest.mark.parametrize("state", [TemperatureState(), seen(4.0)])
def test_the_temperature_rises_linearly(given: float | str, state: TemperatureState) -> None:
    full = rule(given)(state, 0)
    found = [rule(given, 4)(state, step) for step in range(6)]
    assert found == pytest.approx([full / 4, full / 2, full * 3 / 4, full, full, full])


# ---- a run without progress ---------------------------------------------------------------------


def run(losses: list[float], fraction: float, determined: float = 7.0) -> list[TemperatureState]:
    """The states after each step; the samples cost 0.05 nats for each determined weight."""
    state, result = TemperatureState(determined=determined), []
    for loss in losses:
        state = state.after(0.1, loss, fraction)
        result.append(state)
    return result


@pytest.mark.parametrize(("fraction", "steps"), [(0.01, 100), (1 / 64, 64), (0.2, 50), (1.0, 50)])
@pytest.mark.parametrize("loss", [2.3, -0.8])
def test_the_factor_falls_by_ten_once_in_a_pass_without_progress(
    fraction: float, steps: int, loss: float
) -> None:
    """A pass has at least 50 steps; the first step, at the mean, is none of them."""
    factors = [state.factor for state in run([loss] * (1 + 3 * steps), fraction)]
    expected = [1.0] + [1.0] * steps + [0.1] * steps + [0.01] * steps
    assert factors == pytest.approx([*expected[1:], 0.001])


@pytest.mark.parametrize("start", [2.3, -0.8])
@pytest.mark.parametrize(("fall", "factor"), [(0.03, 1.0), (0.01, 0.1), (-0.4, 0.1), (-0.6, 1.0)])
def test_the_mean_loss_of_a_pass_is_compared_with_the_first(
    start: float, fall: float, factor: float
) -> None:
    """Below by a fiftieth of the first, or above by half: of a network that was trained before."""
    noise = torch.linspace(-5, 5, 50).tolist()
    losses = [start, *(start - fall * abs(start) + value for value in noise)]
    assert run(losses, 0.05)[-1].factor == pytest.approx(factor)


def test_progress_after_the_first_pass_keeps_the_factor() -> None:
    states = run([2.3] * 51 + [1.9] * 100, 0.1)
    assert [states[50].factor, states[100].factor, states[150].factor] == [0.1] * 3
    assert states[-1].determined == 7.0 and states[-1].value == 0.1


def test_the_loss_is_the_mean_of_the_last_pass() -> None:
    states = run([2.3, *range(100), 7.0], 0.02)
    assert [states[index].loss for index in (49, 50, 99)] == pytest.approx([None, 24.5, 24.5])
    assert states[-1].loss == 74.5 and not states[-1].is_first_pass
    assert [states[index].finished for index in (49, 50, 99, 100)] == [0, 1, 1, 2]


@pytest.mark.parametrize(("losses", "ceiling"), [
    ((1.0, 0.11, 1.0, 1.0, 1.0), 0.11 / 2.4 / 4),  # below 1/20 of 2.4 in the second pass
    ((1.0, 0.13, 0.3, 0.3, 1.0), 0.02), ((1.0, 0.21, 0.3, 0.3, 1.0), 0.1),
    ((0.1, 1.0, 0.1, 1.0, 0.1), 0.1),
    ((1.0, 1e-6, 1.0, 1.0, 1.0), 0.003), ((1.0, -1.0, 1.0, -1.0, 1.0), 0.1),
    ((1.0, 1.0, 1.0, 0.24, 1.0), 0.02), ((1.0, 1.0, 1.0, 0.26, 1.0), 0.1),  # less 0.05
    ((1.0, 0.11, 1.0, 0.24, 1.0), 0.11 / 2.4 / 4),
    ((1.0, 0.5, 1.0, 0.76, 1.0), 0.02), ((1.0, 0.5, 1.0, 0.74, 1.0), 0.1),  # risen by half
    ((1.0, 0.5, 0.5, 0.5, 2.0), 0.1), ((0.3, 1.0, 2.0, 1.0, 1.0), 0.1),
])
def test_the_ceiling_is_that_of_two_early_passes(
    losses: tuple[float, ...], ceiling: float
) -> None:
    """The samples cost 0.05 nats."""
    every = [loss for loss in losses for _ in range(50)]
    assert run([2.4, *every], 0.1, determined=1.0)[-1].ceiling == pytest.approx(ceiling)


def test_a_log_density_below_zero_has_no_ceiling() -> None:
    every = [loss for loss in (-2.0, -9.0, -9.0, -9.0) for _ in range(50)]
    assert run([-1.0, *every], 0.1)[-1].ceiling == 0.1


def test_a_run_that_loses_its_progress_is_noticed() -> None:
    assert run([2.3] + [1.9] * 50 + [2.3] * 50, 0.1)[-1].factor == 0.1


def test_the_state_is_saved() -> None:
    for state in (TemperatureState(), *run([2.3] * 60, 0.1)[-5:]):
        assert from_state(to_state(state)) == state


@pytest.mark.parametrize(("is_automatic", "remedy"), [
    (True, "the temperature is reduced"), (False, 'try temperature="auto"'),
])
def test_a_run_at_chance_warns_once(is_automatic: bool, remedy: str) -> None:
    states = run([2.3] * 151, 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for before, after in zip(states, states[1:], strict=False):
            warn_at_chance(before, after, is_automatic)
    (warning,) = caught
    assert "after one pass over the data the loss" in str(warning.message)
    assert remedy in str(warning.message)


def test_noise_that_costs_little_is_not_reduced() -> None:
    """0.05 and 0.045 nats, and 2 % of the loss are 0.046."""
    assert run([2.3] * 51, 0.1, 1.0)[-1].factor == 0.1
    states = run([2.3] * 51, 0.1, 0.9)
    assert states[-1].factor == 1 and states[-1].is_stalled
    with pytest.warns(UserWarning, match="where it started: unless .* try another learning rate"):
        warn_at_chance(states[-2], states[-1], True)


def test_a_run_that_learns_does_not_warn() -> None:
    states = run([2.3, *(2.0 for _ in range(100))], 0.1)
    for before, after in zip(states, states[1:], strict=False):
        warn_at_chance(before, after, True)
