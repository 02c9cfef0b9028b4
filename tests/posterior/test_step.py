"""The step of a posterior: its equations on dense matrices, and that it changes no input."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from snapshots import contents
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.layers import Layer
from pyrocurv.layers.block import make_blocks
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.precision import init_block
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.step import Evaluation, Update, average_weight, commit, step
from pyrocurv.runtime.undo import Undo
from pyrocurv.structures.rescaled import KroneckerScaling
from pyrocurv.structures.serialization import to_state

pytestmark = pytest.mark.usefixtures("double")
LAYERS = (Layer("a.weight", "a.bias", (3, 2)), Layer("b.weight", None, (2, 3)))
NUMBERS = Hyperparameters(
    lr=0.1, base_lr=0.2, momentum=0.8, damping=0.01, kl_clip=None, num_data=40, temperature=0.5
)


def posterior(structure: str = "kfac", step: int = 3, **options: Any) -> Posterior:
    """A posterior with momentum and a precision that no structure has at its start."""
    numbers, states = replace(NUMBERS, **options), []
    for block in make_blocks(LAYERS, structure):
        delta = torch.tensor(2.0)
        prior = BlockPrior(
            GaussianPrior(torch.tensor(0.3), delta),
            KroneckerScaling(delta) if block.structure.is_kronecker else None,
        )
        mean = torch.randn(block.size)
        state = init_block(Curvature("ggn"), block, prior, numbers, mean)
        momentum, shift = torch.randn(block.size), torch.rand(())
        states.append(replace(
            state, momentum=momentum, precision=state.precision.shift(shift),
            preconditioner=state.preconditioner.shift(shift),
        ))
    return Posterior(step, tuple(states))


def gradients(blocks: tuple[BlockState, ...]) -> dict[str, Tensor]:
    """One gradient per datum of every tensor."""
    return {
        name: torch.randn(shape) for state in blocks for name, shape in state.block.tensors.items()
    }


def evaluation(before: Posterior, loss: float = 7.0, **changes: Any) -> Evaluation:
    values = {"gradients": gradients(before.blocks), **changes}
    return Evaluation(before, torch.tensor(loss), **values)


def moved_mean(update: Update, index: int) -> Tensor:
    """The mean of a block after the step."""
    return update.moves[index].moved(update.before.blocks[index].mean.clone())


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diag", "full"])
@pytest.mark.parametrize("kl_clip", [None, 1e-4])
def test_a_step_is_its_equations(structure: str, kl_clip: float | None) -> None:
    before = posterior(structure, kl_clip=kl_clip)
    given = evaluation(before)
    packed = [state.block.pack(given.gradients) for state in before.blocks]
    update = step(before, given)
    beta, correction, share = 0.8, 1 - 0.8**4, 2.0 * 0.5 / 40
    directions, energy = [], torch.zeros(())
    momenta = [
        beta * state.momentum + (1 - beta) * g
        for state, g in zip(before.blocks, packed, strict=True)
    ]
    for state, m in zip(before.blocks, momenta, strict=True):
        h = m / correction + share * (state.mean - 0.3)
        directions.append(torch.linalg.solve(state.preconditioner.dense(), h))
        energy = energy + 0.2**2 * directions[-1] @ h
    nu = 1.0 if kl_clip is None else min(1.0, math.sqrt(kl_clip / energy))
    outlier = 1.0 if kl_clip is None else min(1.0, 10 * math.sqrt(kl_clip / energy))
    for i, (state, d, m) in enumerate(zip(before.blocks, directions, momenta, strict=True)):
        torch.testing.assert_close(moved_mean(update, i), state.mean - 0.1 * nu * d)
        torch.testing.assert_close(update.posterior.blocks[i].momentum, outlier * m)
    assert update.loss == 7.0 and update.posterior.step == 4 and update.before is before
    assert (nu < 1) == (outlier < 1) == (kl_clip is not None)


@pytest.mark.parametrize("structure", ["kfac", "diag", "full"])
@pytest.mark.parametrize("average", [False, True])
def test_a_step_changes_none_of_its_inputs(structure: str, average: bool) -> None:
    before = posterior(structure, kl_clip=1e-4)
    given = evaluation(before, auxiliary=[torch.randn(3), None])
    values = contents(given.gradients)
    kept = dict(given.gradients)
    state = contents(to_state(before))
    update = step(before, given, average)
    assert contents(to_state(before)) == state and contents(kept) == values
    assert given.gradients == {}  # used up, so that they need not be kept until the commit
    for old, new in zip(before.blocks, update.posterior.blocks, strict=True):
        assert new.momentum is not old.momentum
        same = {"block", "prior", "hyperparameters", "curvature", "precision", "preconditioner"}
        assert all(getattr(new, name) is getattr(old, name) for name in same)
        assert (new.mean is old.mean) != average


def test_a_block_without_a_gradient_stays() -> None:
    before = posterior()
    one, two = before.blocks
    update = step(before, evaluation(before, gradients=gradients((two,))))
    assert update.posterior.blocks[0] is one
    assert [move.state for move in update.moves] == [update.posterior.blocks[1]]
    alone = step(Posterior(3, (two,)), evaluation(before, gradients=gradients((two,))))
    assert len(alone.moves) == 1
    none = step(before, evaluation(before, gradients={}))
    assert none.moves == [] and none.posterior.blocks == before.blocks
    assert none.posterior.step == 4


def test_a_tensor_without_a_gradient_has_one_of_zero() -> None:
    before = posterior()
    given = {"a.weight": torch.randn(3, 2)}
    partial = step(before, evaluation(before, gradients=dict(given)))
    full = step(before, evaluation(before, gradients={**given, "a.bias": torch.zeros(3)}))
    torch.testing.assert_close(partial.moves[0].state.momentum, full.moves[0].state.momentum)
    torch.testing.assert_close(moved_mean(partial, 0), moved_mean(full, 0))


@pytest.mark.parametrize("steps", [1, 5])
def test_averages_are_those_of_the_weights(steps: int) -> None:
    """4/(t+4) after step t: the mean is averaged by the store, the precision by the step."""
    state, weights, precisions = posterior("block", step=0), [], []
    for t in range(steps):
        factor = torch.rand(()) + 0.5
        changed = state.map_blocks(lambda b, f=factor: replace(b, precision=b.precision.scale(f)))
        before = [block.mean for block in state.blocks]
        update = step(state, Evaluation(changed, torch.zeros(()), gradients(state.blocks)), True)
        assert average_weight(t) == 4 / (t + 4)
        weights = [w * (1 - average_weight(t)) for w in weights] + [average_weight(t)]
        precisions.append([block.precision.dense() for block in changed.blocks])
        for i, move in enumerate(update.moves):
            torch.testing.assert_close(move.state.mean, move.moved(before[i].clone()))
        state = update.posterior
    for i, block in enumerate(state.blocks):
        expected = sum(w * p[i] for w, p in zip(weights, precisions, strict=True))
        torch.testing.assert_close(block.averaged_precision.dense(), expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss": math.nan}, "step 3: the loss is nan"),
    ({"loss": -math.inf}, "step 3: the loss is -inf"),
    ({"factor": math.inf}, "step 3: a gradient is not finite"),
    ({"auxiliary": [None, torch.tensor([1.0, torch.nan])]}, "step 3: a gradient is not finite"),
])
def test_values_that_are_not_finite(changes: dict[str, Any], message: str) -> None:
    before = posterior()
    state = contents(to_state(before))
    given = gradients(before.blocks)
    given["b.weight"] *= changes.get("factor", 1.0)
    auxiliary, loss = changes.get("auxiliary", ()), torch.tensor(changes.get("loss", 7.0))
    with pytest.raises(FloatingPointError, match=message):
        step(before, Evaluation(before, loss, given, auxiliary))
    assert contents(to_state(before)) == state


# ---- the commit ---------------------------------------------------------------------------------


class Store:
    """A store of one number, which fails or is interrupted a number of times."""

    def __init__(self, interrupts: int = 0, fails: bool = False) -> None:
        self.value, self._interrupts, self._fails = 0, interrupts, fails

    def load(self, posterior: Posterior) -> Posterior:
        return posterior

    def prepare(self, update: Update) -> Any:
        if self._fails:
            raise torch.linalg.LinAlgError

        def write() -> None:
            self.value = 1
            if self._interrupts:
                self._interrupts -= 1
                raise KeyboardInterrupt

        return write


def empty_update() -> Update:
    return step(Posterior(0, ()), Evaluation(Posterior(0, ()), torch.zeros(()), {}))


def test_a_commit_that_cannot_be_prepared_changes_nothing() -> None:
    store, assigned, weight = Store(fails=True), [], torch.zeros(2)
    with pytest.raises(torch.linalg.LinAlgError), Undo() as undo:
        undo.keep_tensors([weight])
        weight.add_(1)
        commit(empty_update(), store, undo, lambda: assigned.append(1))
    assert store.value == 0 and not assigned and not weight.any()


@pytest.mark.parametrize("interrupts", [0, 1, 2])
def test_a_commit_is_completed_once_it_has_begun(interrupts: int) -> None:
    store, assigned, weight = Store(interrupts), set[int](), torch.zeros(2)

    def train() -> None:
        with Undo() as undo:
            undo.keep_tensors([weight])
            weight.add_(1)
            commit(empty_update(), store, undo, lambda: assigned.add(1))

    if interrupts:
        with pytest.raises(KeyboardInterrupt):
            train()
    else:
        train()
    assert store.value == 1 and assigned == {1} and weight.all()


# ---- states -------------------------------------------------------------------------------------


def test_a_state_has_means_only_where_the_store_has_an_average() -> None:
    before = posterior("block")
    assert all(state.mean.shape == (0,) for state in before.without_means().blocks)
    averaging = step(before, evaluation(before), average=True).posterior
    for state, kept in zip(averaging.blocks, averaging.without_means().blocks, strict=True):
        assert torch.equal(state.mean, kept.mean) and kept.averaged_precision is not None
    for state, other in zip(before.blocks, before.without_means().blocks, strict=True):
        assert other.mean.dtype == state.mean.dtype and len(state.mean) == state.block.size
        assert contents(to_state(replace(other, mean=state.mean))) == contents(to_state(state))


def test_a_posterior_moves_to_another_dtype_and_only_if_it_differs() -> None:
    before = posterior("kfac")
    assert before.to(torch.zeros((), dtype=torch.float64)) is before
    single = before.to(torch.zeros((), dtype=torch.float32))
    for state in single.blocks:
        assert {state.mean.dtype, state.momentum.dtype, state.precision.diag().dtype,
                state.curvature.curvature.diag().dtype} == {torch.float32}
