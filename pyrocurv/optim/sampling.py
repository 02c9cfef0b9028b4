"""Samples of a network's weights between two steps: set them, and sum what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.optim.loss_scale import LEAST_SCALE, is_scale
from pyrocurv.optim.loss_targets import LossLikelihood
from pyrocurv.optim.parameter_blocks import ParameterBlocks
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.optim.recorded_pass import MeanLoss, RecordedPass, mean_loss
from pyrocurv.posterior.precision import price_estimates, uses_sample_gradients
from pyrocurv.posterior.sampling import Sampler, perturbed_weights
from pyrocurv.posterior.state import BlockState, Perturbation, Posterior
from pyrocurv.posterior.step import Update
from pyrocurv.runtime.agreement import (
    SAME_INPUTS,
    SharedSamples,
    check_same,
    raise_together,
)
from pyrocurv.runtime.outputs import named_outputs, replaced, stacked
from pyrocurv.runtime.rng import rewind_rng_on_error
from pyrocurv.runtime.sharding import whole
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_is
from pyrocurv.runtime.workers import ALONE, Workers


@dataclass(eq=False)
class Sample:
    """A sample of the weights that the parameters are set to for a while."""

    spec: Curvature
    sampler: Sampler
    store: ParameterStore
    perturbations: list[Perturbation] | None
    means: Sequence[BlockState] = ()  # while the parameters are the sample
    gradients: Mapping[str, Tensor] = field(default_factory=dict)  # at its start

    @staticmethod
    def draw(
        spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore, antithetic: bool,
        mirrors: list[Perturbation] | None, workers: Workers = ALONE,
    ) -> Sample:
        """From torch's global generator, one for each of the workers; the mean without a block."""
        sampler = Sampler(blocks, antithetic, mirrors, store.noise)
        return Sample(spec, sampler, store, sampler.draw_of(workers) if blocks else None)

    @contextmanager
    def in_parameters(self) -> Iterator[None]:
        """With the sample in the parameters, and the means again afterwards."""
        blocks = self.sampler.blocks
        with at_sample(blocks, self.perturbations, self.store) as self.means:
            self.gradients = sample_gradients(self.spec, blocks, self.store)
            yield

    @contextmanager
    def use_mean(self) -> Iterator[None]:
        """With the means in the parameters, and the sample again afterwards."""
        with self.store.restoring(self.store.with_means(self.means)):
            self.store.write({n: x for state in self.means for n, x in state.mean_views.items()})
            torch.clear_autocast_cache()
            yield

    def price_estimates(self) -> dict[str, Tensor]:
        """{block: Λ ε ∘ g}, with g the growth of the gradients since the start."""
        perturbed = zip(self.sampler.blocks, self.perturbations or (), strict=True)
        pairs = [
            (state, perturbation.epsilon) for state, perturbation in perturbed
            if uses_sample_gradients(self.spec, state.block)
        ]
        grown: dict[str, Tensor] = {}
        for name in _names(self.spec, self.sampler.blocks, self.store):
            param, before = self.store.named[name][0], self.gradients.get(name)
            now = torch.zeros_like(param) if param.grad is None else param.grad
            grown[name] = now if before is None else now - before
        grown = self.store.gathered(grown)
        epsilons = {state.block.name: epsilon for state, epsilon in pairs}
        return price_estimates(self.spec, [state for state, _ in pairs], epsilons, grown)


@dataclass(frozen=True, eq=False)
class EvaluationSum:
    """The samples since the last step: their number, examples, curvature and mirrored noise."""

    count: int
    batch_size: int  # of the first sample
    undo: Undo  # what the samples have changed since before the first
    layout: ParameterBlocks
    posterior: Posterior  # with the curvature of the samples
    mirrors: list[Perturbation] | None  # for the next sample
    price: Mapping[str, Tensor]  # {block: sum of Λ ε ∘ g}
    is_estimate: bool = False  # whether a sample has given one of the curvature
    gradient_norm: Tensor | None = None  # of the last sample, if the curvature relies on it
    losses: tuple[MeanLoss, ...] = ()  # of all passes, as far as they are known

    def add(
        self, sample: Sample, passes: Iterable[RecordedPass], total_weight: float
    ) -> EvaluationSum:
        """With one more sample, whose weights and gradients the parameters have."""
        price = sample.price_estimates()
        sums = {
            name: self.price[name] + value if name in self.price else value
            for name, value in price.items()
        }
        return replace(
            self, count=self.count + 1, mirrors=sample.sampler.mirrors,
            price={**self.price, **sums},
            gradient_norm=gradient_norm(
                sample.spec, sample.sampler.blocks, sample.store, self._total_weight(total_weight)
            ),
            losses=(*self.losses, *(one.loss for one in passes if one.loss is not None)),
        )

    def with_loss(
        self, value: Tensor | None, store: ParameterStore, workers: Workers
    ) -> EvaluationSum:
        """With the mean loss of a closure, if none is known, and that of all workers."""
        losses = self.losses
        if not losses and value is not None:
            entries = self.batch_size * self.count // workers.size
            losses = (MeanLoss(value.to(store.device), entries),)
        if not workers.is_alone:
            losses = _pooled(losses, store.like, workers)
        return replace(self, losses=losses)

    @property
    def mean_loss(self) -> Tensor | None:
        """The mean negative log likelihood [], if it is known."""
        return mean_loss(self.losses).value if self.losses else None

    def after(self, update: Update) -> Posterior:
        """The posterior after a step, whose temperature follows the loss."""
        posterior = update.posterior
        if not (self.losses and posterior.blocks):
            return posterior
        num_data = posterior.blocks[0].hyperparameters.num_data
        temperature = max(state.hyperparameters.temperature for state in posterior.blocks)
        fraction = sum(loss.entries for loss in self.losses) / (self.count * num_data)
        seen = posterior.temperature.after(temperature, update.nll, fraction)
        return replace(posterior, temperature=seen)

    def check_scale(
        self, spec: Curvature, store: ParameterStore, likelihood: LossLikelihood
    ) -> None:
        """Raise RuntimeError if gradients were unscaled after a curvature was computed from them.

        Gradients that have shrunk by another factor than a power of 2 are taken for clipped, unless
        there is a scale in the loss's weights.
        """
        before, blocks = self.gradient_norm, self.posterior.blocks
        now = gradient_norm(spec, blocks, store, self._total_weight(likelihood.total_weight))
        ratio = 1.0 if before is None or now is None else float(before / now)
        if ratio > 0.99 * LEAST_SCALE and self._has_lost_scale(
            ratio, likelihood, bool(_names(spec, blocks, store))
        ):
            raise RuntimeError(
                f"the gradients were {ratio:.0f} times larger at the end of the sample than at "
                "step(), so the curvature from them is too large: with a GradScaler, call "
                "scaler.unscale_(optimizer) inside `with optimizer.sampled_params():`"
            )

    def _has_lost_scale(
        self, ratio: float, likelihood: LossLikelihood, has_sample_gradients: bool
    ) -> bool:
        """Whether gradients have lost a scale that a curvature has."""
        if not self.is_estimate:
            return is_scale(ratio)
        if likelihood.late_scale > 1:
            return has_sample_gradients or ratio < 0.99 * likelihood.late_scale
        return likelihood.scale_lost(ratio) > 1

    def _total_weight(self, last: float) -> float:
        """That of the loss, if the samples have given an estimate; that of a mean otherwise."""
        return last if self.is_estimate else 1.0

    @property
    def mean_price(self) -> dict[str, Tensor]:
        """{block: mean of Λ ε ∘ g}."""
        return {name: total / self.count for name, total in self.price.items()}


def _pooled(
    losses: tuple[MeanLoss, ...], like: Tensor, workers: Workers
) -> tuple[MeanLoss, ...]:
    """The mean loss of all workers; none if it is not known to all."""
    value, entries = mean_loss(losses) if losses else (like.new_zeros(()), 0)
    numbers = like.new_tensor([float(bool(losses)), entries])
    total, (known, count) = workers.sums([value.detach().to(like) * entries, numbers])
    return (MeanLoss(total / count, int(count)),) if known == workers.size and count else ()


@contextmanager
def at_sample(
    blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None,
    store: ParameterStore,
) -> Iterator[Sequence[BlockState]]:
    """With a sample in the parameters, and the means again afterwards, bit for bit.

    Gives the blocks that moved, with their means.
    """
    if not perturbations:
        yield ()
        return
    moved = store.with_means(blocks)
    with store.restoring(moved):
        store.write(perturbed_weights(moved, perturbations))
        torch.clear_autocast_cache()
        yield moved


def predict_at_samples(
    sampler: Sampler, count: int, store: ParameterStore, network: Callable[..., Any],
    args: Any, kwargs: Any, workers: Workers,
) -> Any:
    """The network's outputs at `count` samples, stacked; at the mean without a block.

    The workers share the samples out. Raises ValueError if they have other inputs or parameters.
    """
    parameters = {name: p for name, (p, _) in store.named.items()}
    check_same(workers, {"the inputs": (args, kwargs), **parameters}, SAME_INPUTS)
    outputs = []
    with rewind_rng_on_error(store.device), raise_together(workers, "predict"):
        samples = SharedSamples.of(workers, count)
        for number in range(count):
            perturbations = sampler.draw() if sampler.blocks else None
            if number in samples.evaluated:
                with at_sample(sampler.blocks, perturbations, store), samples.noise(store.device):
                    outputs.append(network(*args, **kwargs))
    result = stacked(outputs)
    if workers.is_alone:
        return result
    return replaced(result, samples.gather(named_outputs(result)))


def sample_gradients(
    spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore
) -> dict[str, Tensor]:
    """Copies of the gradients of blocks that are estimated from sample gradients."""
    gradients = {name: store.named[name][0].grad for name in _names(spec, blocks, store)}
    return {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def _names(
    spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore
) -> list[str]:
    return [
        name for block in store.blocks_of(blocks) if uses_sample_gradients(spec, block)
        for name in block.tensors
    ]


def gradient_norm(
    spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore, total_weight: float
) -> Tensor | None:
    """The norm of the gradients of such blocks, if there are any.

    It is that of all gradients if the weights of the loss add up to what a GradScaler may explain.
    """
    gradients: list[Tensor] = [*sample_gradients(spec, blocks, store).values()]
    if total_weight >= LEAST_SCALE:
        gradients = [p.grad for p, _ in store.named.values() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)) if gradients else None


def sum_gradients(
    closure: Callable[[], Any], count: int, store: ParameterStore,
    sample: Callable[[], AbstractContextManager[None]], clear: Callable[[], None],
    has_samples: Callable[[], bool],
) -> Any:
    """The mean of the losses at `count` samples; leaves the sum of their gradients in `.grad`.

    The closure may clear gradients itself. Without samples `.grad` is as it was.
    """
    losses, sums = [], dict[str, Tensor]()
    before = {name: p.grad for name, (p, _) in store.named.items()}
    try:
        clear()
        for _ in range(count):
            with sample(), torch.enable_grad():
                losses.append(_loss(closure()))
            for name, (p, _) in store.named.items():
                if p.grad is not None:
                    sums[name] = sums[name] + p.grad if name in sums else p.grad.clone()
            clear()
    finally:
        gradients = sums if has_samples() else before
        for name, (p, _) in store.named.items():
            p.grad = gradients.get(name)
    known = [loss for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None


def _loss(value: Any) -> Tensor | None:
    """What a closure returned as a tensor; TypeError if it is no loss."""
    if value is None:
        return None
    check_is("the value of closure", value, (Tensor, int, float), "a loss, or None,")
    loss = torch.as_tensor(value).detach()
    return loss if loss.is_floating_point() else loss.float()
