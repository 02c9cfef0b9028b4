"""What `summary` and `update_counts` report of guides and optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.layers.block import Block
from pyrocurv.posterior.correlated_prior import CorrelatedPrior
from pyrocurv.posterior.mean_update import MeanUpdate
from pyrocurv.posterior.precision import uses_sample_gradients
from pyrocurv.posterior.state import Posterior
from pyrocurv.runtime.workers import assign
from pyrocurv.structures.eigenbases import eigh_cost
from pyrocurv.structures.sums import relative_error


class UpdateCount(NamedTuple):
    """How often a block's curvature was estimated, and its present interval in steps."""

    updates: int
    interval: int


def update_counts(spec: Curvature, posterior: Posterior) -> dict[str, UpdateCount]:
    """{block name: its count}."""
    counts = {}
    for state in posterior.blocks:
        interval = spec.interval(posterior.step, state.curvature.interval)
        if uses_sample_gradients(spec, state.block):
            interval = 1
        counts[state.block.name] = UpdateCount(state.curvature.count, interval)
    return counts


def prior_errors(spec: Curvature, posterior: Posterior) -> dict[str, float]:
    """{block name: relative error of the sum of curvature and prior}, of correlated priors."""
    return {
        state.block.name: relative_error(
            state.curvature.semidefinite(spec.kind).scale(state.hyperparameters.likelihood_weight),
            state.prior.gaussian.precision,
        )
        for state in posterior.blocks if isinstance(state.prior.gaussian, CorrelatedPrior)
    }


def work_assignment(
    update: MeanUpdate, posterior: Posterior, num_ranks: int
) -> dict[str, dict[str, int]]:
    """{"eigendecompositions" or "update": {what: the rank that computes it for all}}.

    Eigendecompositions are those of the factors of all blocks that are complete, in one step.
    """
    sides: dict[str, float] = {}
    for state in posterior.blocks:
        if state.curvature.factors is not None:
            for side in ("output", "input"):
                factor: Tensor = getattr(state.curvature.factors, side)
                sides[f"{state.block.name} {side}"] = eigh_cost(factor.shape)
    work = {"eigendecompositions": sides, "update": update.costs(posterior.blocks)}
    return {
        name: dict(zip(costs, assign([*costs.values()], num_ranks), strict=True))
        for name, costs in work.items()
    }


def guide_summary(
    latents: Mapping[str, Tensor], blocks: Sequence[Block], excluded: Mapping[str, str],
    fallback: str, modules: Mapping[str, nn.Module], temperature: float | None,
) -> str:
    """A table of every latent of a guide, and of every parameter of the model's modules."""
    structure = {name: block.label for block in blocks for name in block.tensors} | {**excluded}
    rows = [(name, value, structure.get(name, fallback)) for name, value in latents.items()]
    rows += [
        (f"{owner}.{name}".lstrip("."), p, "point" if p.requires_grad else "frozen")
        for owner, module in modules.items() for name, p in module.named_parameters(recurse=False)
    ]
    size = sum(block.size for block in blocks)
    return format_table(rows, size, "site", "a posterior") + at_temperature(temperature)


def at_temperature(*temperatures: float | None) -> str:
    """The end of a summary."""
    known = [f"{value:.3g}" for value in temperatures if value is not None]
    return f", at temperature {' and '.join(known)}" if known else ""


def format_table(
    rows: Iterable[tuple[str, Tensor, str]], size: int, row_name: str, what: str
) -> str:
    """A line for each (name, tensor, structure), and that `size` of the parameters have `what`."""
    rows = list(rows)
    cells = [(row_name, "shape", "structure", "parameters")]
    cells += [(name, str(tuple(x.shape)), how, str(x.numel())) for name, x, how in rows]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], width, strict=False)),
                   row[3].rjust(width[3])])
        for row in cells
    ]
    total = sum(x.numel() for _, x, _ in rows)
    return "\n".join([*lines, f"{size:,} of {total:,} parameters have {what}"])
