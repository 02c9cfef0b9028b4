"""The curvature of a network's negative log likelihood as a matrix, on given data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyrocurv.curvature import hessian
from pyrocurv.curvature.hessian import BlockStatistics, hessians, twice_differentiable
from pyrocurv.curvature.layer_statistics import collect
from pyrocurv.curvature.likelihood import (
    Likelihood,
    _term,
    _widened,
    as_likelihood,
)
from pyrocurv.curvature.output_gradients import pullback
from pyrocurv.curvature.spec import Curvature, as_curvature
from pyrocurv.layers import Layer, structure_spec
from pyrocurv.layers.batch_axis import mark_wrong_batch_axis, per_example_scalar, total_output
from pyrocurv.layers.block import Block, BlockIndices, make_blocks
from pyrocurv.layers.calls import LayerCall, UntracedWeight
from pyrocurv.layers.capture import Capture
from pyrocurv.layers.structure_selection import StructureChoice, select_structures
from pyrocurv.layers.structure_spec import EKFAC, KroneckerSpec
from pyrocurv.layers.trace import Trace
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.structures import BlockDiagonal, Kronecker, Structure, cut


def _reduce(block: Block, seen: BlockStatistics) -> Structure:
    spec, assemble = block.structure, hessian.assemble(block, seen)
    if not isinstance(spec, KroneckerSpec):
        return assemble
    ranks = None if spec.rank == "auto" else block.ranks
    if isinstance(spec, EKFAC):
        return hessian.eigen(seen, assemble.eigen(ranks))
    if ranks is not None:
        return assemble.eigen(ranks, spec.cuts)
    factors = zip((assemble.output, assemble.input), spec.cuts, strict=True)
    return Kronecker(*(cut(factor, blocks) for factor, blocks in factors))


def estimate(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    likelihood: Likelihood = "categorical",
    curvature: str | Curvature = "fisher",
    structure: StructureChoice = "kfac",
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
    if curvature.uses_sample_gradients:
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
    with torch.enable_grad(), disable_autocast(device):
        term = _term(density(tree_map(_widened, output)), y, output)
        terms, count = [term], len(term.value)
        dense = ("full", "block", structure_spec.Full(), structure_spec.Block())
        whole = curvature.kind == "hessian" and structure in dense  # whatever is shared
        each = per_example_scalar(output, count)
        if callable(likelihood):  # which may arrange and reuse the output in its own way
            log_prob = term.likelihood.log_prob(term.value)
            each = log_prob.reshape(count, -1).sum(1) if log_prob.dim() else None
        trace = capture.trace().mark_untracked(total_output(output) if each is None else each.sum())
        said = None if whole or trace.has_batch_coupling else each
        trace = mark_wrong_batch_axis(trace, count, said)
        layers, calls = _with_opaque(trace, named, count)
        chosen = select_structures(structure, "kfac", layers, dict(net.named_modules()))
        blocks = make_blocks(layers, chosen.__getitem__, dense_untraced=True)
        seen: Iterable[BlockStatistics]
        if curvature.kind == "hessian":
            seen = hessians(blocks, terms, calls, count, curvature.num_samples)
        else:
            gradients = pullback(curvature.kind, terms, calls, count, curvature.num_samples)
            seen = (collect(block, calls, gradients, count) for block in blocks)
        found = tuple(_reduce(block, one) for block, one in zip(blocks, seen, strict=True))
    order = {name: tuple(parameter.shape) for name, parameter in named.items()}
    return BlockDiagonal(found, BlockIndices(blocks, order, device))


def _with_opaque(
    trace: Trace, named: dict[str, nn.Parameter], batch: int
) -> tuple[list[Layer], list[LayerCall]]:
    """The layers and calls of a forward pass, with those that no supported op consumes."""
    found = {name for layer in trace.layers for name in layer.tensors}
    left = [name for name in named if name not in found]
    if unused := [name for name in left if name not in trace.unsupported]:
        raise ValueError(
            f"{', '.join(unused)} took no part in the forward pass, or none with a gradient: set "
            "requires_grad=False to leave it out"
        )
    if left:
        warnings.warn(
            "no supported op consumes "
            f"{', '.join(f'{name} ({trace.unsupported[name]})' for name in left)}: "
            "a backward pass for each example, and no Kronecker factors (the diagonal instead)",
            stacklevel=3,
        )
    more = [Layer(name, None, tuple(named[name].shape), "untraced") for name in left]
    opaque = [UntracedWeight(layer, named[layer.weight], batch) for layer in more]
    return [*trace.layers, *more], [*trace.calls, *opaque]
