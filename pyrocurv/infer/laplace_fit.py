"""The curvature of all data at a guide's mean: a pass over a loader, and a second one for EK-FAC.

    Σ_n C_n(M),   log p(D | M) = Σ_n log p(y_n | M)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.collect import ForwardPass
from pyrocurv.curvature.full_data import CurvatureSum, accumulate, pool
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.guides import StructuredGuide
from pyrocurv.handlers.modules import module_tensors, modules
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
from pyrocurv.runtime.agreement import check_same, gather, own_stream, raise_together
from pyrocurv.runtime.inference_mode import without_inference_tensors
from pyrocurv.runtime.module_state import eval_mode
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.workers import Workers

Stream = Callable[[torch.device], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class DataPass:
    """What one pass over the loader of this process gives."""

    totals: Sequence[CurvatureSum] = ()
    priors: Sequence[BlockPrior] = ()
    log_likelihood: float = 0.0
    count: int = 0
    num_data: int = 0


def sum_curvature(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any],
    workers: Workers,
) -> tuple[list[LaplaceBlock], float]:
    """The guide's blocks with their curvature, and the log likelihood of all data, in nats.

    The data are those of all workers, which communicate after each pass. The guide is only read,
    except for its first call. Raises what `Laplace.fit` raises.
    """
    stream = own_stream(workers, 0 if workers.is_alone else RandomStream().seed)
    with raise_together(workers, "Laplace.fit"):
        first = _first_pass(model, guide, spec, loader, stream)
    log_likelihood = _check(first, workers)
    check_same(workers, _state(model, guide, first.priors),
               "all of them need the same model and guide, with the parameters of one")
    like = guide.blocks[0].raw_loc
    totals = pool(first.totals, like, workers)
    if any(total.needs_second_pass for total in totals):
        incomplete = [total for total in totals if total.needs_second_pass]
        with raise_together(workers, "Laplace.fit"):
            second, count = [total.second_pass() for total in incomplete], 0
            for run in _runs(model, guide, spec, loader, stream):
                second, count = _add(second, guide, spec, run, stream), count + run.batch
            _check_second_pass(first.count, count)
        complete = iter(pool(second, like, workers))
        totals = [next(complete) if total.needs_second_pass else total for total in totals]
    if not torch.isfinite(torch.tensor(log_likelihood)):
        raise FloatingPointError(f"the log likelihood is {log_likelihood}")
    parts = zip(totals, first.priors, guide.blocks, strict=True)
    return [
        LaplaceBlock(total.block, total.total(spec.kind), prior, family.raw_loc.detach().clone())
        for total, prior, family in parts
    ], log_likelihood


def _first_pass(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any],
    stream: Stream,
) -> DataPass:
    seen = DataPass()
    for run in _runs(model, guide, spec, loader, stream):
        if not seen.totals:
            blocks = [family.block for family in guide.blocks]
            priors = [read_block_prior(block, run.prior_sites) for block in blocks]
            totals = [CurvatureSum(b, p.scaling) for b, p in zip(blocks, priors, strict=True)]
            seen = DataPass(totals, priors)
        terms = sum(site.log_prob.detach().double() for site in run.replay.observed)
        seen = DataPass(
            _add(seen.totals, guide, spec, run, stream), seen.priors,
            seen.log_likelihood + float(terms) * run.batch / run.num_data,
            seen.count + run.batch, run.num_data,
        )
    if not seen.count:
        raise ValueError("the loader gave no batch")
    return seen


def _state(
    model: Callable[..., Any], guide: StructuredGuide, priors: Sequence[BlockPrior]
) -> dict[str, Any]:
    """What the workers have to have in common, by name."""
    state: dict[str, Any] = {}
    for family, prior in zip(guide.blocks, priors, strict=True):
        name = family.block.name
        state[f"the mean of {name}"] = family.raw_loc
        state[f"the prior of {name}"] = prior.gaussian.base.diagonal
    fallback = module_tensors(guide.fallback) if guide.fallback_sites else {}
    return {**state, **fallback, **module_tensors(model)}


def _runs(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, loader: Iterable[Any],
    stream: Stream,
) -> Iterator[ModelRun]:
    """The model at the mean on each batch, with its layers captured."""
    for batch in loader:
        args, kwargs = split_batch(without_inference_tensors(batch))
        setup_guide(guide, args, kwargs)
        if not guide.blocks:
            raise ValueError(guide.no_gaussian_reason)
        with stream(guide.blocks[0].raw_loc.device):
            run = _run(model, guide, spec, args, kwargs)
        yield run


def _run(
    model: Callable[..., Any], guide: StructuredGuide, spec: Curvature, args: Any, kwargs: Any
) -> ModelRun:
    twice = twice_differentiable() if spec.kind == "hessian" else nullcontext()
    with eval_mode(modules(model)), torch.enable_grad(), twice:
        medians = auxiliary_medians(guide, *args, **kwargs)
        return run_model(model, guide, mean_weights(guide), args, kwargs, True, medians)


def _add(
    totals: Sequence[CurvatureSum], guide: StructuredGuide, spec: Curvature, run: ModelRun,
    stream: Stream,
) -> list[CurvatureSum]:
    """The sums with the data of one more run."""
    run.check_per_example_density(spec.kind)
    rows = run.primary_likelihood.rows
    calls = layer_calls(guide, run.calls, run.weights, rows)
    with stream(guide.blocks[0].raw_loc.device), torch.enable_grad():
        forward = ForwardPass(run.likelihood_terms, calls, rows)
        return accumulate(spec, totals, forward.with_mixed_rows(), run.batch)


def _check(seen: DataPass, workers: Workers) -> float:
    """The log likelihood of all data; ValueError unless the workers have each datum once."""
    parts = gather(workers, (seen.count, seen.num_data, seen.log_likelihood))
    counts, sizes, log_likelihoods = zip(*parts, strict=True)
    if len({*sizes}) > 1:
        raise ValueError(
            f"the model's plate has size {', '.join(map(str, sizes))} on ranks 0 to "
            f"{workers.size - 1}: give it the size of the whole data set on all of them"
        )
    count, num_data = sum(counts), sizes[0]
    if count == num_data:
        return sum(log_likelihoods)
    if workers.is_alone:
        raise ValueError(
            f"the loader gave {count} data, but the model's plate has size {num_data}: every datum "
            "is needed once (no drop_last, no sampling with replacement)"
        )
    raise ValueError(
        f"the loaders of {workers.size} ranks gave {' + '.join(map(str, counts))} = {count} data, "
        f"but the model's plate has size {num_data}: every datum is needed once, on one rank. A "
        "DistributedSampler repeats or drops some unless the number of ranks divides that of the "
        "data; Subset(data, range(rank, len(data), world_size)) does not. If each rank has all "
        "data, use process_group=None"
    )


def _check_second_pass(first: int, second: int) -> None:
    if second != first:
        raise ValueError(
            f"the loader gave {first} data and then {second}: structure 'ekfac' iterates it twice, "
            "so an iterator will not do"
        )
