"""Samples of a posterior, in antithetic pairs, and the KL divergence estimated at them."""

import pytest
import torch
from test_step import posterior

from pyrocurv.posterior.prior import kl
from pyrocurv.posterior.sampling import Sampler, estimate_kl, mirrors, perturbed_weights
from pyrocurv.posterior.state import Perturbation, Posterior

pytestmark = pytest.mark.usefixtures("double")


def epsilons(perturbations: list[Perturbation]) -> list[torch.Tensor]:
    return [perturbation.epsilon for perturbation in perturbations]


@pytest.mark.parametrize("structure", ["kfac", "diag", "full"])
def test_every_second_sample_mirrors_the_one_before(structure: str) -> None:
    sampler = Sampler(posterior(structure).blocks, antithetic=True)
    first, second, third, fourth = (sampler.draw() for _ in range(4))
    for a, b in ((first, second), (third, fourth)):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x.epsilon, -y.epsilon) and x.squared_norm is y.squared_norm
    assert not torch.equal(first[0].epsilon, third[0].epsilon)


def test_without_pairs_every_sample_is_drawn() -> None:
    blocks = posterior().blocks
    sampler = Sampler(blocks, antithetic=False)
    draws = [epsilons(sampler.draw())[0] for _ in range(4)]
    assert sampler.mirrors is None
    assert len({tuple(draw.abs().tolist()) for draw in draws}) == 4


def test_pairs_go_on_from_step_to_step() -> None:
    before = posterior()
    sampler = Sampler(before.blocks, antithetic=True, mirrors=mirrors(before.blocks))
    first = sampler.draw()
    after = before.with_mirrors(sampler.mirrors)
    state = torch.get_rng_state()
    second = Sampler(after.blocks, antithetic=True, mirrors=mirrors(after.blocks))
    for x, y in zip(epsilons(first), epsilons(second.draw()), strict=True):
        assert torch.equal(x, -y)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert second.mirrors is None and mirrors(after.with_mirrors(None).blocks) is None


def test_a_new_block_has_nothing_to_mirror() -> None:
    before = posterior()
    one = Posterior(3, before.blocks[:1])
    drawn = Sampler(one.blocks, antithetic=True).draw()
    grown = before.with_mirrors(drawn)
    assert grown.blocks[0].mirror is drawn[0] and grown.blocks[1].mirror is None
    assert mirrors(grown.blocks) is None and mirrors(()) is None


def test_weights_are_the_mean_and_the_deviation() -> None:
    blocks = posterior().blocks
    perturbations = Sampler(blocks, antithetic=False).draw()
    weights = perturbed_weights(blocks, perturbations)
    at_mean = perturbed_weights(blocks, None)
    for state, perturbation in zip(blocks, perturbations, strict=True):
        torch.testing.assert_close(state.block.pack(weights), state.mean + perturbation.epsilon)
        assert torch.equal(state.block.pack(at_mean), state.mean)
        for name in state.block.tensors:
            at_mean[name].add_(1)  # copies
        assert torch.equal(state.block.pack(perturbed_weights(blocks, None)), state.mean)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diag", "full"])
def test_the_estimated_kl_averages_to_the_kl(structure: str) -> None:
    blocks, draws = posterior(structure).blocks, 2000
    exact = sum(kl(state.mean, state.precision, state.prior.gaussian) for state in blocks)
    torch.testing.assert_close(estimate_kl(blocks, perturbed_weights(blocks, None), None), exact)
    sampler = Sampler(blocks, antithetic=False)
    estimates = []
    for _ in range(draws):
        perturbations = sampler.draw()
        weights = perturbed_weights(blocks, perturbations)
        estimates.append(estimate_kl(blocks, weights, perturbations))
    values = torch.stack(estimates)
    assert (values.mean() - exact).abs() < 4.5 * values.std() / draws**0.5
