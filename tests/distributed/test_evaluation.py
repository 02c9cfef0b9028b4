"""What several ranks compute from their parts of the data, against one process that has all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from test_ngvi import GUIDES, net, target
from torch import Tensor

from pyrocurv.infer import NGVI, Laplace, choose_temperature, log_predictive_density
from pyrocurv.nn import Classifier, bayesianize

BATCH = 4


@contextmanager
def double() -> Iterator[None]:
    """Float64, a new param store, the same seed for all."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    try:
        with mock.patch.object(torch.distributions.Categorical, "sample", target):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def data(rank: int | None, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The batches of this rank (None: of all)."""
    x, y = torch.randn(sum(sizes), 2, 4), torch.randint(3, (sum(sizes),))
    parts = [*zip(x.split(sizes), y.split(sizes), strict=True)]
    own = parts if rank is None else [parts[rank]]
    return [batch for a, b in own for batch in zip(a.split(BATCH), b.split(BATCH), strict=True)]


def same(results: list[Any], expected: Any, tolerance: float = 1e-10) -> None:
    for result in results:
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


def raises(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---- Laplace ------------------------------------------------------------------------------------


def fit(rank: int | None, sizes: list[int], guide: str, kind: str) -> Any:
    with double():
        loader = data(rank, sizes)
        model = Classifier(bayesianize(net()), num_data=sum(sizes))
        made = GUIDES[guide](model)
        if rank:
            torch.manual_seed(rank)
        laplace = Laplace(model, made, kind).fit(loader)
        precisions = {f.block.name: f.precision().dense().detach().clone() for f in made.blocks}
        before = laplace.log_marginal_likelihood()
        tuned = laplace.tune_prior()
        after = laplace.log_marginal_likelihood()
        return precisions, torch.tensor([before, after]), tuned


def check_fit(ranks: Any, sizes: list[int], guide: str, kind: str) -> None:
    precisions, evidence, tuned = fit(None, sizes, guide, kind)
    results = ranks(len(sizes)).run(fit, sizes, guide, kind)
    same([one[0] for one in results], precisions)
    same([one[1] for one in results], evidence)
    same([one[2] for one in results], tuned, 1e-6)  # where the search ends


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical", "hessian"])
@pytest.mark.parametrize("guide", ["kfac", "ekfac", "diag", "full", "block"])
def test_laplace_of_two_ranks_is_that_of_one(ranks: Any, guide: str, kind: str) -> None:
    check_fit(ranks, [12, 7], guide, kind)


@pytest.mark.parametrize("guide", ["kfac-rank", "ekfac-rank", "reduce"])
def test_laplace_with_truncated_and_reduced_factors(ranks: Any, guide: str) -> None:
    check_fit(ranks, [12, 7], guide, "ggn")


def test_laplace_of_three_unequal_ranks(ranks: Any) -> None:
    check_fit(ranks, [9, 5, 1], "ekfac", "ggn")


def fit_masked(rank: int | None, guide: str) -> Any:
    """A regression in which all data of rank 1 are masked."""
    with double():
        x, y = torch.randn(10, 2, 4), torch.randn(10, 3)
        is_known = torch.arange(10) < 6
        model = bayesianize(net())

        def masked(x: Tensor, y: Tensor, is_known: Tensor) -> None:
            mean = model(x)
            with pyro.plate("data", 10, subsample=torch.arange(len(x))), pyro.poutine.mask(
                mask=is_known
            ):
                pyro.sample("y", pyro.distributions.Normal(mean, 0.5).to_event(1), obs=y)

        made = GUIDES[guide](masked)
        rows = slice(None) if rank is None else slice(6 * rank, 6 + 4 * rank)
        loader = [(x[rows], y[rows], is_known[rows])]
        laplace = Laplace(masked, made).fit(loader)
        return {f.block.name: f.precision().dense().detach().clone() for f in made.blocks}, \
            torch.tensor(laplace.log_marginal_likelihood())


@pytest.mark.parametrize("guide", ["kfac", "ekfac", "diag", "full"])
def test_a_rank_may_have_only_masked_data(ranks: Any, guide: str) -> None:
    same(ranks(2).run(fit_masked, guide), fit_masked(None, guide))


def fit_wrongly(rank: int) -> list[str]:
    with double():
        loader = data(rank, [8, 8])

        def laplace(num_data: int = 16, group: Any = "auto") -> Laplace:
            torch.manual_seed(0)
            model = Classifier(bayesianize(net()), num_data=num_data)
            return Laplace(model, GUIDES["ekfac"](model), process_group=group)

        messages = [
            raises(ValueError, lambda: laplace(15).fit(loader)),
            raises(ValueError, lambda: laplace(16 + rank).fit(loader)),
            raises(RuntimeError if rank else ValueError, lambda: laplace().fit(
                loader if rank else []
            )),
            raises(ValueError if rank else RuntimeError, lambda: laplace().fit(
                iter(loader) if rank else loader  # the second pass has none
            )),
        ]
        torch.manual_seed(rank)
        model = Classifier(bayesianize(net()), num_data=16)
        other = Laplace(model, GUIDES["kfac"](model))
        messages.append(raises(ValueError, lambda: other.fit(loader)))
        laplace(8, None).fit(loader)  # alone
        return messages


def test_errors_are_those_of_all_ranks(ranks: Any) -> None:
    for rank, (extra, sizes, empty, once, other) in enumerate(ranks(2).run(fit_wrongly)):
        assert "8 + 8 = 16 data" in extra and "DistributedSampler" in extra
        assert "size 16, 17 on ranks 0 to 1" in sizes
        assert ("failed on rank 0: ValueError: the loader gave no batch" in empty) == bool(rank)
        assert "iterates it twice" in once
        assert "the mean of" in other and "2 ranks differ" in other


# ---- predictive densities -----------------------------------------------------------------------


def densities(rank: int | None, sizes: list[int]) -> Any:
    with double():
        loader = data(rank, sizes)
        x, y = torch.randn(16, 2, 4), torch.randint(3, (16,))

        def trained(temperature: float) -> NGVI:
            torch.manual_seed(0)
            model = Classifier(bayesianize(net()), num_data=16)
            ngvi = NGVI(model, GUIDES["ekfac"](model), temperature=temperature, process_group=None)
            ngvi.step(x, y)
            return ngvi

        one = trained(0.1)
        torch.manual_seed(3 + (rank or 0))
        density = log_predictive_density(one.model, one.guide, loader, 4)
        torch.manual_seed(4 + (rank or 0))
        choice = choose_temperature(trained, loader, [2.0, 1.0], 4, progress=False)
        return density, float(choice), choice.densities


@pytest.mark.parametrize("sizes", [[8, 3], [9, 5, 1]])
def test_predictive_densities_are_those_of_one_process(ranks: Any, sizes: list[int]) -> None:
    same(ranks(len(sizes)).run(densities, sizes), densities(None, sizes))
