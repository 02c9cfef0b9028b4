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
from pyrocurv.posterior.prior import BlockPrior
from pyrocurv.runtime.module_state import eval_mode


def sum_curvature(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any]
) -> tuple[list[LaplaceBlock], float]:
    """The guide's blocks with their curvature, and the log likelihood of all data, in nats.

    The guide is only read, but for its first call. Raises as `Laplace.fit` says.
    """
    totals: list[CurvatureSum] = []
    priors: list[BlockPrior] = []
    log_likelihood, counted, num_data = 0.0, 0, 0
    for run in _runs(model, guide, spec, loader):
        if not totals:
            blocks = [family.block for family in guide.blocks]
            priors = [BlockPrior.read(block, run.prior_sites) for block in blocks]
            totals = [CurvatureSum(b, p.units) for b, p in zip(blocks, priors, strict=True)]
        terms = sum(site.log_prob.detach().double() for site in run.replay.observed)
        log_likelihood += float(terms) * run.batch / run.num_data
        counted, num_data = counted + run.batch, run.num_data
        totals = _plus(totals, guide, spec, run)
    _check_count(counted, num_data)
    unfinished = [total for total in totals if total.needs_second_pass]
    if unfinished:
        again, seen = [total.second_pass() for total in unfinished], 0
        for run in _runs(model, guide, spec, loader):
            again, seen = _plus(again, guide, spec, run), seen + run.batch
        _check_again(counted, seen)
        finished = iter(again)
        totals = [next(finished) if one.needs_second_pass else one for one in totals]
    if not torch.isfinite(torch.tensor(log_likelihood)):
        raise FloatingPointError(f"the log likelihood is {log_likelihood}")
    parts = zip(totals, priors, guide.blocks, strict=True)
    return [
        LaplaceBlock(total.block, total.total(), prior, family.raw_loc.detach().clone())
        for total, prior, family in parts
    ], log_likelihood


def _runs(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any]
) -> Iterator[ModelRun]:
    """The model at the mean on each batch, with its ops watched."""
    for batch in loader:
        args, kwargs = split_batch(batch)
        setup_guide(guide, args, kwargs)
        if not guide.blocks:
            raise ValueError(guide.no_gaussian_reason)
        yield _run(model, guide, spec, args, kwargs)


def _run(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, args: Any, kwargs: Any
) -> ModelRun:
    twice = twice_differentiable() if spec.kind == "hessian" else nullcontext()
    with eval_mode(modules(model)), torch.enable_grad(), twice:
        rest = auxiliary_medians(guide, *args, **kwargs)
        return run_model(model, guide, mean_weights(guide), args, kwargs, True, rest)


def _plus(
    totals: Sequence[CurvatureSum], guide: StructuredGuide, spec: Curvature, run: ModelRun
) -> list[CurvatureSum]:
    """The totals with the data of one more run."""
    run.check_apart(spec.kind)
    rows = run.primary_likelihood.rows
    calls = layer_calls(guide, run.capture, run.weights, rows)
    with torch.enable_grad():
        return accumulate(spec, totals, ForwardPass(run.observations, calls, rows), run.batch)


def _check_count(counted: int, num_data: int) -> None:
    if not counted:
        raise ValueError("the loader gave no batch")
    if counted != num_data:
        raise ValueError(
            f"the loader gave {counted} data, the model's plate says there are {num_data}: every "
            "datum is needed once (no drop_last, no sampling with replacement)"
        )


def _check_again(counted: int, seen: int) -> None:
    if seen != counted:
        raise ValueError(
            f"the loader gave {counted} data and then {seen}: structure 'ekfac' reads it "
            "twice, so an iterator will not do"
        )
