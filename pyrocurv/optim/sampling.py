"""Samples of a network's weights between two steps: set them, and sum what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocurv.curvature import Curvature
from pyrocurv.optim.parameter_blocks import ParameterBlocks
from pyrocurv.optim.parameter_store import ParameterStore
from pyrocurv.posterior.precision import price_estimates, uses_sample_gradients
from pyrocurv.posterior.sampling import perturbed_weights
from pyrocurv.posterior.state import BlockState, Perturbation, Posterior


@dataclass(frozen=True, eq=False)
class EvaluationSum:
    """The samples since the last step: their number, examples, curvature and mirrored noise."""

    count: int
    batch_size: int  # of the first sample
    layout: ParameterBlocks
    posterior: Posterior  # with the curvature of the samples
    mirrors: list[Perturbation] | None  # for the next sample
    price: Mapping[str, Tensor]  # {block: sum of Λ ε ∘ g}
    gradient_norm: Tensor | None = None  # of the blocks of `price`

    def add(
        self, mirrors: list[Perturbation] | None, price: Mapping[str, Tensor],
        gradient_norm: Tensor | None,
    ) -> EvaluationSum:
        """With one more sample."""
        sums = {
            name: self.price[name] + value if name in self.price else value
            for name, value in price.items()
        }
        return replace(
            self, count=self.count + 1, mirrors=mirrors, price={**self.price, **sums},
            gradient_norm=gradient_norm,
        )

    @property
    def mean_price(self) -> dict[str, Tensor]:
        """{block: mean of Λ ε ∘ g}."""
        return {name: total / self.count for name, total in self.price.items()}


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
    moved = [replace(state, mean=store.read(state.block)) for state in blocks]
    with store.restoring(moved):
        store.write(perturbed_weights(moved, perturbations))
        torch.clear_autocast_cache()
        yield moved


def sample_gradients(
    spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore
) -> dict[str, Tensor]:
    """Copies of the gradients of blocks that are estimated from sample gradients."""
    names = [
        name for state in blocks if uses_sample_gradients(spec, state.block)
        for name in state.block.tensors
    ]
    gradients = {name: store.named[name][0].grad for name in names}
    return {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def gradient_norm(
    spec: Curvature, blocks: Sequence[BlockState], store: ParameterStore
) -> Tensor | None:
    """The norm of the gradients of such blocks, if there are any."""
    gradients = [*sample_gradients(spec, blocks, store).values()]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def check_grad_scale(before: Tensor | None, now: Tensor | None) -> None:
    """Raise RuntimeError if gradients were unscaled after a curvature was computed from them."""
    if before is not None and now is not None and bool(256 * now < before):
        raise RuntimeError(
            f"the gradients were {float(before / now):.0f} times larger at the end of the sample "
            "than at step(), so the curvature from them is too large: with a GradScaler, call "
            "scaler.unscale_(optimizer) inside `with optimizer.sampled_params():`"
        )


def sample_price_estimates(
    spec: Curvature, blocks: Sequence[BlockState], perturbations: Sequence[Perturbation] | None,
    before: Mapping[str, Tensor], store: ParameterStore,
) -> dict[str, Tensor]:
    """{block: Λ ε ∘ g}, with g the growth of the gradients since `before`."""
    if perturbations is None:
        return {}
    pairs = [
        (state, perturbation) for state, perturbation in zip(blocks, perturbations, strict=True)
        if uses_sample_gradients(spec, state.block)
    ]
    grown: dict[str, Tensor] = {}
    for state, _ in pairs:
        for name in state.block.tensors:
            param = store.named[name][0]
            now = torch.zeros_like(param) if param.grad is None else param.grad
            grown[name] = now - before[name] if name in before else now
    epsilons = {state.block.name: perturbation.epsilon for state, perturbation in pairs}
    return price_estimates(spec, [state for state, _ in pairs], epsilons, grown)


def sum_gradients(
    closure: Callable[[], Any], count: int, clear: Callable[[], None], store: ParameterStore
) -> Any:
    """The mean of the losses of `count` calls; leaves the sum of their gradients in `.grad`.

    The closure may clear gradients itself.
    """
    losses, sums = [], dict[str, Tensor]()
    clear()
    for _ in range(count):
        losses.append(closure())
        for name, (p, _) in store.named.items():
            if p.grad is not None:
                sums[name] = sums[name] + p.grad if name in sums else p.grad.clone()
        clear()
    for name, (p, _) in store.named.items():
        p.grad = sums.get(name)
    known = [torch.as_tensor(loss).detach() for loss in losses if loss is not None]
    return torch.stack(known).mean() if known else None
