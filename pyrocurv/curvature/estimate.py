"""The curvature of a network's negative log likelihood on given data, as a matrix."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pyrocurv.curvature.collect import (
    BlockStatistics,
    ForwardPass,
    assemble,
    collect,
    nearest_product,
)
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.likelihood import (
    Likelihood,
    as_likelihood,
    likelihood_term,
    to_single_precision,
)
from pyrocurv.curvature.spec import Curvature, as_curvature
from pyrocurv.layers import Layer, structure_spec
from pyrocurv.layers.batch_axis import mark_wrong_batch_axis, per_example_scalar, total_output
from pyrocurv.layers.block import Block, BlockIndices, make_blocks
from pyrocurv.layers.calls import LayerCall, UntracedWeight
from pyrocurv.layers.capture import Capture
from pyrocurv.layers.structure_selection import (
    StructureChoice,
    check_structure,
    select_structures,
)
from pyrocurv.layers.structure_spec import EKFAC, KFAC, KroneckerSpec, StructureSpec
from pyrocurv.layers.trace import Trace
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.choices import CurvatureKind
from pyrocurv.runtime.inference_mode import check_differentiable, outside_inference_mode
from pyrocurv.runtime.sharding import check_unsharded
from pyrocurv.runtime.validation import check_inputs, check_module, check_tensor
from pyrocurv.structures import BlockDiagonal, Kronecker, Structure, cut


@singledispatch
def _matrix(structure: StructureSpec, block: Block, statistics: BlockStatistics) -> Structure:
    """The curvature of a block in its structure."""
    return assemble(structure, statistics)


@_matrix.register
def _(structure: KFAC, block: Block, statistics: BlockStatistics) -> Structure:
    factors = _factors(structure, statistics)
    if structure.rank != "auto":
        return factors.eigen(block.ranks, structure.cuts)
    return Kronecker(*map(cut, (factors.output, factors.input), structure.cuts))


@_matrix.register
def _(structure: EKFAC, block: Block, statistics: BlockStatistics) -> Structure:
    ranks = None if structure.rank == "auto" else block.ranks
    return statistics.eigenvalues(_factors(structure, statistics).eigen(ranks))


def _factors(structure: KroneckerSpec, statistics: BlockStatistics) -> Kronecker:
    return nearest_product(statistics.kronecker(structure.sharing))


@outside_inference_mode
def estimate(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    likelihood: Likelihood = "categorical",
    curvature: CurvatureKind | Curvature = "fisher",
    structure: StructureChoice = "kfac",
) -> Structure:
    """The curvature of -sum_n log p(y_n | net(x_n)) in the weights, as a structured matrix.

    Args:
        net: any network; parameters with `requires_grad=False` are left out. Parameters that no
            supported op consumes (those of recurrent layers, for instance) take a backward pass for
            each example, and are diagonal where Kronecker factors are asked for, with a warning.
        x: inputs [B, ...], with the batch first, also inside the network. A layer whose input has
            other rows, or rows that affect several examples, is treated like one that no supported
            op consumes; two backward passes check this. If batch norm in training mode couples the
            examples, only the number of rows is checked.
        y: targets, in the shape of the likelihood, without broadcasting. "ggn" and "fisher" do not
            use their values; either all of them are valid classes or none.
        likelihood: "categorical" (logits, classes last), "bernoulli" (logits), "normal" (unit
            variance) or a function from the network's output, of any type, to a
            `torch.distributions.Distribution` whose batch shape starts with the batch.
        curvature: "hessian", "ggn", "fisher", "empirical", or a `Curvature`, of which only `kind`
            and `num_samples` are used: the whole batch is read.
        structure: "full" (one dense matrix), "block" (one dense matrix for each layer), "diag",
            "kfac", "ekfac", "kfac-block", a `KFAC` or an `EKFAC`; or a mapping {module type, or
            name with * and ?: structure} or a function (name, module) -> structure, where "full" is
            one matrix over all layers that have it. `rank="auto"` means no truncation here.

    Returns:
        A `Structure` [P, P], the SUM over the B examples; its rows are in the order of
        `net.named_parameters()`, each flattened row-major. "full", "block" and "diag" are exact if
        no example affects the output of another, as in batch norm in training mode (which also
        updates its running statistics here: use `net.eval()`). "kfac" is exact moreover only for
        one example at one position with one output vector, and for deep linear networks with a
        normal likelihood; "ekfac" is never farther from the block than "kfac" (Frobenius norm).

        The Hessian may be indefinite; `psd()` is the nearest positive semi-definite matrix. "full"
        and "block" are exact at any cost, a double backward pass for each weight, even if examples
        affect each other. For Kronecker factors, G is the mean Hessian in a layer's output and A is
        the same as for the other kinds. Random signs are used where more than 512 passes would be
        needed for one layer: for the diagonal of a layer that has more weights than that, and more
        outputs times positions; for the positions in G; and for the eigenvalues of "ekfac". If such
        a layer runs several times, its eigenvalues ignore that later inputs depend on its weights.

    Raises:
        ValueError: unknown names; targets in another shape than the likelihood's, or only some of
            which are valid classes; a likelihood whose first axis is not the batch; an empty batch;
            a parameter without a gradient, or no parameter; a likelihood without a closed form for
            "ggn".
        TypeError: an argument of another kind than above.
        FloatingPointError: an output of the network is not finite.

    Reference: Martens 2020, arXiv:1412.1193, for the kinds; `KFAC` and `EKFAC` for the factors.

    Example:
        >>> import torch
        >>> from pyrocurv.curvature import estimate
        >>> net = torch.nn.Linear(3, 2)
        >>> matrix = estimate(net, torch.randn(5, 3), torch.randint(2, (5,)), structure="kfac")
        >>> matrix.dense().shape
        torch.Size([8, 8])
    """
    check_module("net", net)
    check_inputs("x", x)
    check_tensor("y", y)
    check_structure(structure)
    curvature, distribution = as_curvature(curvature), as_likelihood(likelihood)
    if curvature.uses_sample_gradients:
        raise ValueError(
            "curvature='noise' is computed from the samples of a posterior, not from data"
        )
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("net: no parameter of the network has requires_grad")
    check_unsharded("net", net.modules())
    check_differentiable(net.modules())
    for name, value in (("x", x), ("y", y)):
        if isinstance(value, Tensor) and value.shape[:1] == (0,):
            raise ValueError(f"{name}: the batch has no examples")
    twice = twice_differentiable if curvature.kind == "hessian" else nullcontext
    with twice(), torch.enable_grad(), Capture(dict(parameters)) as capture:
        output = net(x)
    tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
    if not all(bool(part.isfinite().all()) for part in tensors):
        raise FloatingPointError("the network's output at x is not finite")
    device = next(iter(parameters.values())).device
    with torch.enable_grad(), disable_autocast(device):
        term = likelihood_term(distribution(tree_map(to_single_precision, output)), y, output)
        count = len(term.value)
        scalar = per_example_scalar(output, count)
        if callable(likelihood):  # it may combine the rows of the output
            log_prob = term.likelihood.log_prob(term.value)
            scalar = log_prob.reshape(count, -1).sum(1) if log_prob.dim() else None
        total = total_output(output) if scalar is None else scalar.sum()
        trace = capture.trace().mark_untracked(total)
        dense = ("full", "block", structure_spec.Full(), structure_spec.Block())
        is_exact = curvature.kind == "hessian" and structure in dense  # for any dependence
        checked = None if is_exact or trace.has_batch_coupling else scalar
        trace = mark_wrong_batch_axis(trace, count, checked)
        layers, calls = _with_untraced(trace, parameters, count)
        chosen = select_structures(structure, "kfac", layers, dict(net.named_modules()))
        blocks = make_blocks(layers, chosen.__getitem__, dense_untraced=True)
        _, collected = collect(curvature, blocks, ForwardPass([term], calls, count), count)
        matrices = tuple(
            _matrix(block.structure, block, statistics)
            for block, statistics in zip(blocks, collected, strict=True)
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return BlockDiagonal(matrices, BlockIndices(blocks, shapes, device))


def _with_untraced(
    trace: Trace, parameters: dict[str, nn.Parameter], batch_size: int
) -> tuple[list[Layer], list[LayerCall]]:
    """The layers and calls of a forward pass, with parameters that no supported op consumes."""
    traced = {name for layer in trace.layers for name in layer.tensors}
    names = [name for name in parameters if name not in traced]
    if unused := [name for name in names if name not in trace.unsupported]:
        raise ValueError(
            f"the output has no gradient with respect to {', '.join(unused)}: set "
            "requires_grad=False to leave it out"
        )
    if names:
        warnings.warn(
            "no supported op consumes "
            f"{', '.join(f'{name} ({trace.unsupported[name]})' for name in names)}: "
            "one backward pass for each example, and the diagonal in place of Kronecker factors",
            stacklevel=3,
        )
    untraced = [Layer(name, None, tuple(parameters[name].shape), "untraced") for name in names]
    more = [UntracedWeight(layer, parameters[layer.weight], batch_size) for layer in untraced]
    return [*trace.layers, *untraced], [*trace.calls, *more]
