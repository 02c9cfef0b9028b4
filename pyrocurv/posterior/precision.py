"""How a step updates curvature and precision of each block, one record after the other.

Three rules: an average over estimates, one over the step's own samples (Price's theorem), and for
the joint Gaussian of a whole model a retraction, see `joint_update`. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature, running_average
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.data_checks import check_input_scale
from pyrocurv.curvature.particle import SINGLE_PARTICLE, Particle
from pyrocurv.curvature.running_average import has_statistics, zero_curvature
from pyrocurv.curvature.running_curvature import DueBlock, RunningCurvature
from pyrocurv.layers.block import Block
from pyrocurv.posterior.correlated_prior import CorrelatedPrior
from pyrocurv.posterior.hyperparameters import Hyperparameters
from pyrocurv.posterior.natural_gradient import posterior_precision, price_hessian_update
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.posterior.state import BlockState, Posterior
from pyrocurv.posterior.temperature import REFERENCE
from pyrocurv.runtime.workers import ALONE, Workers
from pyrocurv.structures import Diagonal

Average = Callable[
    [Curvature, int, Sequence[DueBlock], ForwardPass, Particle], list[RunningCurvature]
]


def uses_sample_gradients(spec: Curvature, block: Block) -> bool:
    """Whether a block's curvature is estimated from the gradients at its samples alone."""
    return block.is_untraced or spec.uses_sample_gradients


def init_block(
    spec: Curvature, block: Block, prior: BlockPrior, hyperparameters: Hyperparameters,
    mean: Tensor, batch_fraction: float = 0.0,
) -> BlockState:
    """A block before any estimate: its curvature is `Curvature.initial` alone.

    Raises ValueError for a structure that the kind of curvature cannot have.
    """
    if spec.uses_sample_gradients and block.kind != "diag":
        raise ValueError(f"curvature='noise' wants structure='diag', {block.name} is {block.label}")
    like = prior.gaussian.loc
    curvature = zero_curvature(block, like, prior.scaling)
    if spec.uses_sample_gradients:  # whose average starts there, and does not decay
        curvature = RunningCurvature(0, Diagonal(like.new_full((block.size,), spec.initial)))
    momentum = torch.zeros_like(mean)
    placeholder = curvature.curvature
    state = BlockState(
        block, prior, hyperparameters, mean, curvature, placeholder, placeholder, momentum
    )
    return refresh_block(state, spec, initial_curvature(spec, 0, batch_fraction))


def is_due(spec: Curvature, step: int, state: BlockState) -> bool:
    """Whether `step` takes an estimate of a block."""
    if uses_sample_gradients(spec, state.block) and (
        spec.every == "auto" or spec.uses_sample_gradients
    ):
        return False  # every step gives one
    if state.curvature.count == 0 and not state.block.is_untraced:
        return True  # no forward pass has used it yet
    return spec.is_due(step, state.curvature.interval)


def is_any_due(spec: Curvature, posterior: Posterior) -> bool:
    """Whether the next step takes an estimate of a block."""
    return any(is_due(spec, posterior.step, state) for state in posterior.blocks)


def update_curvature(
    spec: Curvature, posterior: Posterior, forward: ForwardPass, batch_fraction: float,
    particle: Particle = SINGLE_PARTICLE, average: Average = running_average.update_curvature,
) -> Posterior:
    """Average one more estimate into the blocks that are due and were used in the forward pass.

    The initial curvature decays in all blocks, due or not; `batch_fraction` is B/N. Of several
    samples in a step each is a `particle`. Where processes have blocks of their own, `average` sums
    over them. Raises FloatingPointError for a precision that is not finite.
    """
    due = {
        state.block: DueBlock(state.block, state.curvature, state.prior.scaling)
        for state in posterior.blocks
        if not uses_sample_gradients(spec, state.block) and is_due(spec, posterior.step, state)
        and has_statistics(spec, state.block, forward.calls)
    }
    new = {layer for block, state in due.items() if not state.average.count
           for layer in block.layers}
    check_input_scale(call for call in forward.calls if call.layer in new)
    averages = average(spec, posterior.step, [*due.values()], forward, particle)
    updated = dict(zip(due, averages, strict=True))
    posterior = refresh(spec, posterior.map_blocks(
        lambda state: replace(state, curvature=updated.get(state.block, state.curvature))
    ), batch_fraction)
    traces = [state.precision.trace() for state in posterior.blocks if state.block in updated]
    if traces and not bool(torch.isfinite(torch.stack(traces)).all()):
        raise FloatingPointError(f"step {posterior.step}: the precision overflows")
    return posterior


def update_from_sample_gradients(
    spec: Curvature, posterior: Posterior, estimates: Mapping[str, Tensor], batch_fraction: float
) -> Posterior:
    """Average in the means {block name: Λ ε ∘ g [P]} over the step's samples.

    Every step counts, by as much less as an estimate every `spec.every` steps would count.
    """
    every = spec.every if isinstance(spec.every, int) else 20
    initial = initial_curvature(spec, posterior.step, batch_fraction)

    def update(state: BlockState) -> BlockState:
        estimate = estimates.get(state.block.name)
        if estimate is None:
            return state
        values = price_hessian_update(
            state.curvature.curvature, estimate, (1 - spec.decay) / every, state.prior.gaussian,
            state.hyperparameters.likelihood_weight,
        )
        curvature = RunningCurvature(state.curvature.count + 1, values)
        return refresh_block(replace(state, curvature=curvature), spec, initial)

    return posterior.map_blocks(update) if estimates else posterior


def refresh(spec: Curvature, posterior: Posterior, batch_fraction: float) -> Posterior:
    """The precisions with the initial curvature as it is at this step."""
    initial = initial_curvature(spec, posterior.step, batch_fraction)
    return posterior.map_blocks(lambda state: refresh_block(state, spec, initial))


def refresh_block(state: BlockState, spec: Curvature, initial: float) -> BlockState:
    """A block's precision and preconditioner from its curvature.

    A block whose prior has another Kronecker scaling than its curvature keeps them until its next
    estimate.
    """
    if not state.curvature.is_in(state.prior.scaling):
        return state
    numbers = state.hyperparameters
    precision, preconditioner = posterior_precision(
        state.curvature.semidefinite(spec.kind), initial, state.prior, numbers.likelihood_weight,
        numbers.damping,
    )
    return replace(state, precision=precision, preconditioner=preconditioner)


def initial_curvature(spec: Curvature, step: int, batch_fraction: float) -> float:
    """e = initial · (1 - ρ)^step with ρ = B/N, the `batch_fraction`, but within [0.01, 0.05].

    It bridges the first hundreds of steps, in which the network changes faster than the average
    follows; with many data an epoch would be far too long for that. The average over sample
    gradients starts from `initial` itself and needs no bridge.
    """
    if spec.uses_sample_gradients:
        return 0.0
    return spec.initial * (1 - min(0.05, max(0.01, batch_fraction))) ** step


@torch.no_grad()
def measure_determined(
    spec: Curvature, posterior: Posterior, batch_fraction: float, owners: Workers = ALONE
) -> Posterior:
    """The posterior with γ/N, the weights that each of its data determines, and their mean square.

    Both at T₁, see `pyrocurv.posterior.temperature`. Of the other weights a share counts as well,
    with a square of 0: as much as is left of the initial curvature. Of `owners` each has blocks of
    its own. Synchronizes with the device.
    """
    if not posterior.blocks:
        return posterior
    initial = initial_curvature(spec, posterior.step, batch_fraction)
    share = initial / spec.initial if spec.initial else 0.0
    blocks = [_at_reference(state, spec, initial) for state in posterior.blocks]
    found = torch.stack([torch.stack(_determined(state, initial)) for state in blocks]).sum(0)
    like = blocks[0].mean
    size, number, squares = (
        owners.sum(value, like)
        for value in (sum(state.block.size for state in blocks), *found.tolist())
    )
    number = max(1.0, number + share * (size - number))
    is_informed = any(_is_informed(state) for state in blocks)
    seen = replace(
        posterior.temperature, mean_square=max(0.0, squares) / number,
        determined=number / blocks[0].hyperparameters.num_data,
        is_informed=owners.any(is_informed, like),
    )
    return replace(posterior, temperature=seen)


def _at_reference(state: BlockState, spec: Curvature, initial: float) -> BlockState:
    """The precision of a block at T₁; that of the run if `refresh_block` keeps it."""
    if not state.curvature.is_in(state.prior.scaling):
        return state
    numbers = replace(state.hyperparameters, temperature=REFERENCE)
    return refresh_block(replace(state, hyperparameters=numbers), spec, initial)


def _determined(state: BlockState, initial: float) -> tuple[Tensor, Tensor]:
    """γ = tr D and dᵀ Λ₀ D d with D = Λ⁻¹ (N/T) C and the deviation d from the prior's mean.

    As (N/T) C = Λ - R with R = Λ₀ + e N/T, γ = P - tr(R Λ⁻¹) and D d = d - Λ⁻¹ R d. A correlated
    prior is taken to fit, whatever the deviation.
    """
    prior, precision, root = state.prior.gaussian, state.precision, state.curvature.root
    size, deviation = state.block.size, prior.deviation(state.mean)
    shift = initial * state.hyperparameters.likelihood_weight * (1 if root is None else root**2)
    if isinstance(prior, CorrelatedPrior):
        number = size - prior.trace_over(precision) - (shift * precision.inverse_diag()).sum()
        return number, number
    remainder = prior.precision + shift
    if not remainder.dim():
        by_prior = remainder * precision.solution(deviation.clone()).dot
        determined = prior.precision * (torch.dot(deviation, deviation) - by_prior)
        return size - remainder * precision.inverse_trace(), determined
    determined = deviation - precision.solve(remainder * deviation)
    number = size - torch.dot(remainder, precision.inverse_diag())
    return number, torch.dot(prior.precision * deviation, determined)


def _is_informed(state: BlockState) -> bool:
    """Whether weights have prior means of their own, as from the posterior of an earlier task."""
    prior = state.prior.gaussian
    if isinstance(prior, CorrelatedPrior):
        return True
    if prior.zero_mean or not prior.loc.dim():
        return False
    means = [mean.flatten() for mean in state.block.views(prior.loc).values()]
    return bool(torch.stack([(mean != mean[:1]).any() for mean in means]).any())


def price_estimates(
    spec: Curvature, blocks: Iterable[BlockState], epsilons: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """{block name: Λ ε ∘ g [P]} of the blocks that are estimated from sample gradients.

    `epsilons` are {block name: deviation [P]}, `gradients` {tensor name: gradient [*shape]}.
    """
    return {
        state.block.name:
            state.precision.diag() * epsilons[state.block.name] * state.block.pack(gradients)
        for state in blocks if uses_sample_gradients(spec, state.block)
    }
