"""The curvature of a network's negative log likelihood as a matrix, on given data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from pyrocurv.blocks import Block, check_structure, partition, positions
from pyrocurv.capture import Capture
from pyrocurv.curvature import reduce
from pyrocurv.curvature.hessian import BlockHessian, hessians
from pyrocurv.curvature.pullback import Observation, pullback
from pyrocurv.curvature.reduce import Pairs, check_batch, gather
from pyrocurv.curvature.spec import Curvature, as_curvature
from pyrocurv.structures import BlockDiagonal, Structure

Likelihood = str | Callable[[Tensor], Distribution]


def _independent(likelihood: Distribution) -> Distribution:
    """All axes but the first belong to one example."""
    return Independent(likelihood, max(len(likelihood.batch_shape) - 1, 0))


LIKELIHOODS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": lambda logits: _independent(Categorical(logits=logits)),
    "bernoulli": lambda logits: _independent(Bernoulli(logits=logits)),
    "normal": lambda mean: _independent(Normal(mean, torch.ones_like(mean))),
}


def as_likelihood(likelihood: Likelihood) -> Callable[[Tensor], Distribution]:
    """A name from the table, or a callable that gives a `Distribution` for an output."""
    if callable(likelihood):
        return lambda output: _independent(likelihood(output))
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood={likelihood!r}: choose one of {', '.join(LIKELIHOODS)}, "
            "or give a callable output -> Distribution"
        )
    return LIKELIHOODS[likelihood]


def _reduce(block: Block, pairs: Pairs | BlockHessian) -> Structure:
    if isinstance(pairs, BlockHessian):
        return pairs.eigen(pairs.plain.eigen()) if block.structure == "ekfac" else pairs.plain
    plain = reduce.PLAIN[block.structure](pairs)
    if block.structure == "ekfac":
        return reduce.kronecker_eigen(pairs, plain.eigen())
    return plain


def estimate(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    likelihood: Likelihood = "categorical",
    curvature: str | Curvature = "fisher",
    structure: str = "kfac",
) -> Structure:
    """The curvature of -sum_n log p(y_n | net(x_n)) in the weights, as a structured matrix.

    Args:
        net: of `Linear` and `Conv1d` to `Conv3d` layers; parameters with `requires_grad=False` are
            left out.
        x: inputs [B, ...], the batch first.
        y: targets, as the likelihood takes them.
        likelihood: "categorical" (logits, classes last), "bernoulli" (logits), "normal" (unit
            variance) or a callable from the output to a `torch.distributions.Distribution`.
        curvature: "ggn", "fisher", "empirical", or a `Curvature`, of which `kind` and `num_samples`
            count; all of the batch is used.
        structure: "full" (one dense matrix), "block" (dense for each layer), "diag", "kfac" or
            "ekfac".

    Returns:
        A `Structure` [P, P], the SUM over the B examples; rows in the order of
        `net.named_parameters()`, each flattened row-major. full, block and diag are exact; "kfac"
        is exact for one datum at one position with one output vector, and for deep linear networks
        with a normal likelihood; "ekfac" is never farther from the block than "kfac" (Frobenius).

    Raises:
        ValueError: unknown names; a parameter that no supported op consumes; a layer that does not
            see the batch as its first axis; a likelihood without closed form under "ggn".

    Example:
        >>> import torch
        >>> from pyrocurv.curvature import estimate
        >>> net = torch.nn.Linear(3, 2)
        >>> matrix = estimate(net, torch.randn(5, 3), torch.randint(2, (5,)), structure="kfac")
        >>> matrix.dense().shape
        torch.Size([8, 8])
    """
    curvature, density = as_curvature(curvature), as_likelihood(likelihood)
    check_structure(structure)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    with torch.enable_grad(), Capture(dict(named)) as capture:
        output = net(x)
    layers = capture.layers()
    left = [name for name in named if not any(name in layer.tensors for layer in layers)]
    if left:
        why = ", ".join(f"{name} ({capture.missed.get(name, 'not used')})" for name in left)
        raise ValueError(f"no supported op consumes {why}: set requires_grad=False to leave it out")
    calls, count = capture.calls, output.shape[0]
    check_batch(calls, count)
    blocks = partition(layers, structure)
    seen: Sequence[Pairs | BlockHessian]
    with torch.enable_grad():
        terms = [Observation(density(output), y)]
        if curvature.kind == "hessian":
            seen = hessians(blocks, terms, calls, count, curvature.num_samples)
        else:
            gradients = pullback(curvature.kind, terms, calls, count, curvature.num_samples)
            seen = [gather(block, calls, gradients, count) for block in blocks]
    order = {name: tuple(parameter.shape) for name, parameter in named.items()}
    index = tuple(rows.to(output.device) for rows in positions(blocks, order))
    return BlockDiagonal(
        tuple(_reduce(block, one) for block, one in zip(blocks, seen, strict=True)), index
    )
