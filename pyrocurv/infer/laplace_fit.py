"""The curvature of all data at a guide's mean: a pass over a loader, and a second one for EK-FAC.

    Σ_n C_n(M),   log p(D | M) = Σ_n log p(y_n | M)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.full_data import CurvatureSum, accumulate
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.infer.marginal_likelihood import LaplaceBlock
from pyrocurv.infer.model_run import (
    ModelRun,
    auxiliary_medians,
    layer_calls,
    mean_weights,
    run_model,
    setup_guide,
    split_batch,
)
from pyrocurv.posterior.prior import BlockPrior, read_block_prior
from pyrocurv.runtime.inference_mode import without_inference_tensors
from pyrocurv.runtime.module_state import eval_mode


def sum_curvature(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any]
) -> tuple[list[LaplaceBlock], float]:
    """The guide's blocks with their curvature, and the log likelihood of all data, in nats.

    The guide is only read, except for its first call. Raises what `Laplace.fit` raises.
    """
    totals: list[CurvatureSum] = []
    priors: list[BlockPrior] = []
    log_likelihood, count, num_data = 0.0, 0, 0
    for run in _runs(model, guide, spec, loader):
        if not totals:
            blocks = [family.block for family in guide.blocks]
            priors = [read_block_prior(block, run.prior_sites) for block in blocks]
            totals = [CurvatureSum(b, p.scaling) for b, p in zip(blocks, priors, strict=True)]
        terms = sum(site.log_prob.detach().double() for site in run.replay.observed)
        log_likelihood += float(terms) * run.batch / run.num_data
        count, num_data = count + run.batch, run.num_data
        totals = _add(totals, guide, spec, run)
    _check_count(count, num_data)
    incomplete = [total for total in totals if total.needs_second_pass]
    if incomplete:
        second, second_count = [total.second_pass() for total in incomplete], 0
        for run in _runs(model, guide, spec, loader):
            second, second_count = _add(second, guide, spec, run), second_count + run.batch
        _check_second_pass(count, second_count)
        complete = iter(second)
        totals = [next(complete) if total.needs_second_pass else total for total in totals]
    if not torch.isfinite(torch.tensor(log_likelihood)):
        raise FloatingPointError(f"the log likelihood is {log_likelihood}")
    parts = zip(totals, priors, guide.blocks, strict=True)
    return [
        LaplaceBlock(total.block, total.total(spec.kind), prior, family.raw_loc.detach().clone())
        for total, prior, family in parts
    ], log_likelihood


def _runs(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any]
) -> Iterator[ModelRun]:
    """The model at the mean on each batch, with its layers captured."""
    for batch in loader:
        args, kwargs = split_batch(without_inference_tensors(batch))
        setup_guide(guide, args, kwargs)
        if not guide.blocks:
            raise ValueError(guide.no_gaussian_reason)
        yield _run(model, guide, spec, args, kwargs)


def _run(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, args: Any, kwargs: Any
) -> ModelRun:
    twice = twice_differentiable() if spec.kind == "hessian" else nullcontext()
    with eval_mode(modules(model)), torch.enable_grad(), twice:
        medians = auxiliary_medians(guide, *args, **kwargs)
        return run_model(model, guide, mean_weights(guide), args, kwargs, True, medians)


def _add(
    totals: Sequence[CurvatureSum], guide: StructuredGuide, spec: Curvature, run: ModelRun
) -> list[CurvatureSum]:
    """The sums with the data of one more run."""
    run.check_per_example_density(spec.kind)
    rows = run.primary_likelihood.rows
    calls = layer_calls(guide, run.calls, run.weights, rows)
    with torch.enable_grad():
        forward = ForwardPass(run.likelihood_terms, calls, rows)
        return accumulate(spec, totals, forward.with_mixed_rows(), run.batch)


def _check_count(count: int, num_data: int) -> None:
    if not count:
        raise ValueError("the loader gave no batch")
    if count != num_data:
        raise ValueError(
            f"the loader gave {count} data, but the model's plate has size {num_data}: every datum "
            "is needed once (no drop_last, no sampling with replacement)"
        )


def _check_second_pass(first: int, second: int) -> None:
    if second != first:
        raise ValueError(
            f"the loader gave {first} data and then {second}: structure 'ekfac' iterates it twice, "
            "so an iterator will not do"
        )
