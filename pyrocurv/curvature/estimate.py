"""The curvature of a network's negative log likelihood as a matrix, on given data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.utils._pytree import tree_map

from pyrocurv.blocks import Block, Positions, partition
from pyrocurv.capture import Capture
from pyrocurv.choice import Choice, choose
from pyrocurv.curvature import hessian
from pyrocurv.curvature.hessian import Seen, hessians, twice_differentiable
from pyrocurv.curvature.pullback import Observation, Opaque, pullback
from pyrocurv.curvature.reduce import gather
from pyrocurv.curvature.spec import NOISE, Curvature, as_curvature
from pyrocurv.layers import Layer
from pyrocurv.precision import full_precision
from pyrocurv.rows import misread, said_by, summed
from pyrocurv.specs import EKFAC
from pyrocurv.structures import BlockDiagonal, Kronecker, Structure, cut
from pyrocurv.uses import Call

Likelihood = str | Callable[[Tensor], Distribution]


def _independent(likelihood: Distribution) -> Distribution:
    """All axes but the first belong to one example."""
    return Independent(likelihood, max(len(likelihood.batch_shape) - 1, 0))


def _categorical(logits: Tensor) -> Distribution:
    """Of two classes or more: one alone is certain, whatever the network says."""
    if logits.shape[-1:] == (1,):
        raise ValueError(
            f"likelihood='categorical': an output {tuple(logits.shape)} has one class alone; "
            "'bernoulli' takes one logit for two, 'normal' a mean"
        )
    return _independent(Categorical(logits=logits))


LIKELIHOODS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": _categorical,
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


def _reduce(block: Block, seen: Seen) -> Structure:
    spec, plain = block.structure, hessian.plain(block, seen)
    if isinstance(spec, str):
        return plain
    ranks = None if spec.rank == "auto" else block.ranks
    if isinstance(spec, EKFAC):
        return hessian.eigen(seen, plain.eigen(ranks))
    if ranks is not None:
        return plain.eigen(ranks, spec.cuts)
    factors = zip((plain.output, plain.input), spec.cuts, strict=True)
    return Kronecker(*(cut(factor, blocks) for factor, blocks in factors))


def estimate(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    likelihood: Likelihood = "categorical",
    curvature: str | Curvature = "fisher",
    structure: Choice = "kfac",
) -> Structure:
    """The curvature of -sum_n log p(y_n | net(x_n)) in the weights, as a structured matrix.

    Args:
        net: any network; parameters with `requires_grad=False` are left out. What no supported op
            consumes (recurrent layers, say) takes a backward pass for each example, and is diagonal
            where Kronecker factors are asked for, with a warning.
        x: inputs [B, ...], the batch first, as in all layers inside. A layer with other rows, or
            with rows that reach several examples, is taken as what no supported op consumes; two
            backward passes find out. Where batch norm in training mode joins the examples, rows
            are only counted.
        y: targets, of the likelihood's own shape: none is broadcast against the output. "ggn" and
            "fisher" do not look at them; classes must be all there, or none.
        likelihood: "categorical" (logits, classes last), "bernoulli" (logits), "normal" (unit
            variance) or a callable from the output, whatever the network returns, to a
            `torch.distributions.Distribution` whose batch shape starts with the batch.
        curvature: "hessian", "ggn", "fisher", "empirical", or a `Curvature`, of which `kind` and
            `num_samples` count; all of the batch is used.
        structure: "full" (one dense matrix), "block" (dense for each layer), "diag", "kfac",
            "ekfac", "kfac-block", a `KFAC` or an `EKFAC`; or a mapping {module type, or name with
            * and ?: structure} or a rule (name, module) -> structure, by which "full" is one matrix
            of the layers that have it. `rank="auto"` is all, here.

    Returns:
        A `Structure` [P, P], the SUM over the B examples; rows in the order of
        `net.named_parameters()`, each flattened row-major. full, block and diag are exact as long
        as no example reaches another's output, as it does through batch norm in training mode
        (which also moves its statistics here: use `net.eval()`); "kfac" is exact besides for one
        datum at one position with one output vector, and for deep linear networks with a normal
        likelihood; "ekfac" is never farther from the block than "kfac" (Frobenius).

        The Hessian is as it is, which may be indefinite: `psd()` is the nearest matrix that is not.
        "full" and "block" are exact whatever they cost, a double backward pass for each weight,
        and whatever examples share. For Kronecker factors G is the mean Hessian in a layer's output
        and A as for the others.
        Random signs replace what takes more than 512 passes for one layer: diagonals of layers with
        more weights than that, and more outputs times positions; positions in G; and the
        eigenvalues of "ekfac". For a layer of more weights that runs several times those leave out
        that its later inputs move with its weights.

    Raises:
        ValueError: unknown names; targets of another shape than the likelihood's, or some that are
            no classes; a likelihood whose first axis is not the batch; no example; a parameter that
            takes no part, or none at all; a likelihood without closed form under "ggn".

    Reference: Martens 2020, arXiv:1412.1193, for the kinds; `KFAC` and `EKFAC` for the factors.

    Example:
        >>> import torch
        >>> from pyrocurv.curvature import estimate
        >>> net = torch.nn.Linear(3, 2)
        >>> matrix = estimate(net, torch.randn(5, 3), torch.randint(2, (5,)), structure="kfac")
        >>> matrix.dense().shape
        torch.Size([8, 8])
    """
    curvature, density = as_curvature(curvature), as_likelihood(likelihood)
    if curvature.kind == NOISE:
        raise ValueError("curvature='noise' is known from a posterior's samples, not from data")
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("no parameter of the network has requires_grad")
    if y.shape[:1] == (0,):
        raise ValueError("the batch has no examples")
    twice = twice_differentiable if curvature.kind == "hessian" else nullcontext
    with twice(), torch.enable_grad(), Capture(dict(named)) as capture:
        output = net(x)
    device = next(iter(named.values())).device
    with torch.enable_grad(), full_precision(device):
        term = _term(density(tree_map(_widened, output)), y, output)
        terms, count = [term], len(term.value)
        whole = curvature.kind == "hessian" and structure in ("full", "block")  # whatever is shared
        each = said_by(output, count)
        if callable(likelihood):  # which may arrange and reuse the output in its own way
            log_prob = term.likelihood.log_prob(term.value)
            each = log_prob.reshape(count, -1).sum(1) if log_prob.dim() else None
        said = None if whole or capture.coupled else each
        capture.note_hidden(summed(output) if each is None else each.sum())
        capture.missed |= misread(capture.calls, count, said)
        layers, calls = _with_opaque(capture, named, count)
        chosen = choose(structure, "kfac", layers, dict(net.named_modules()))
        blocks = partition(layers, chosen.__getitem__)
        seen: Iterable[Seen]
        if curvature.kind == "hessian":
            seen = hessians(blocks, terms, calls, count, curvature.num_samples)
        else:
            gradients = pullback(curvature.kind, terms, calls, count, curvature.num_samples)
            seen = (gather(block, calls, gradients, count) for block in blocks)
        found = tuple(_reduce(block, one) for block, one in zip(blocks, seen, strict=True))
    order = {name: tuple(parameter.shape) for name, parameter in named.items()}
    return BlockDiagonal(found, Positions(blocks, order, device))


def _widened(output: Any) -> Any:
    """In single precision at least: the densities of half of it are too coarse."""
    if not isinstance(output, Tensor):
        return output
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _term(likelihood: Distribution, y: Tensor, output: Any) -> Observation:
    shape = likelihood.batch_shape + likelihood.event_shape
    count = len(output) if isinstance(output, Tensor) and output.dim() else y.shape[:1].numel()
    if y.shape != shape:
        raise ValueError(
            f"targets {tuple(y.shape)} do not fit the network's output: the likelihood has "
            f"{tuple(shape)}"
        )
    if shape[:1] != (count,):
        raise ValueError(
            f"the likelihood has {tuple(shape)}, its first axis is not that of {count} examples"
        )
    base = likelihood
    while isinstance(base, Independent):
        base = base.base_dist
    if isinstance(base, Categorical):
        are = base.support.check(y)
        if bool(are.any() & ~are.all()):
            raise ValueError(
                f"targets from {int(y.min())} to {int(y.max())}, the classes are 0 to "
                f"{base.param_shape[-1] - 1}: leave such examples out, or mask them in a Pyro model"
            )
    if isinstance(base, Bernoulli) and not y.is_floating_point():
        y = y.to(base.logits.dtype)
    return Observation(likelihood, y)


def _with_opaque(
    capture: Capture, named: dict[str, nn.Parameter], batch: int
) -> tuple[list[Layer], list[Call | Opaque]]:
    """The layers and calls of a forward pass, with those that no supported op consumes."""
    layers, calls = capture.resolve()
    found = {name for layer in layers for name in layer.tensors}
    left = [name for name in named if name not in found]
    if unused := [name for name in left if name not in capture.missed]:
        raise ValueError(
            f"{', '.join(unused)} took no part in the forward pass, or none with a gradient: set "
            "requires_grad=False to leave it out"
        )
    if left:
        warnings.warn(
            f"no supported op consumes {', '.join(f'{n} ({capture.missed[n]})' for n in left)}: "
            "a backward pass for each example, and no Kronecker factors (the diagonal instead)",
            stacklevel=3,
        )
    more = [Layer(name, None, tuple(named[name].shape), "opaque") for name in left]
    opaque = [Opaque(layer, named[layer.weight], batch) for layer in more]
    return [*layers, *more], [*calls, *opaque]
