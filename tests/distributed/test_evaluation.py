"""What several ranks compute from their parts of the data, against one process that has all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from test_ngvi_ranks import GUIDES, net, target
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import MixtureGuide
from pyrocurv.infer import (
    NGVI,
    Laplace,
    Predictive,
    choose_temperature,
    log_predictive_density,
    train_mixture,
)
from pyrocurv.nn import Classifier, bayesianize
from pyrocurv.optim import VIOptimizer

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


# ---- samples of predictions ---------------------------------------------------------------------


def trained(make: str = "kfac", **options: Any) -> NGVI:
    """A trained posterior, the same on all ranks."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 2, 4), torch.randint(3, (16,))
    model = Classifier(bayesianize(net()), num_data=16)
    ngvi = NGVI(model, GUIDES[make](model), process_group=None, **options)
    ngvi.step(x, y)
    model.eval()
    return ngvi


def predict(rank: int | None, count: int, group: str | None = "auto") -> Any:
    """Of a guide (in small groups of draws), of samples, of Pyro's guide, and of a mixture."""
    with double(), mock.patch("pyrocurv.infer.predictive.MAX_ELEMENTS", 1000):
        ngvi, x = trained(), torch.randn(5, 2, 4)
        mixture = MixtureGuide([ngvi.guide, trained(temperature=1.0).guide])
        autoguide = AutoNormal(ngvi.model)
        autoguide(x, torch.zeros(5, dtype=torch.long))
        samples = ngvi.guide.sample_posterior(count)
        found = []
        for posterior in (
            {"guide": ngvi.guide, "num_samples": count}, {"posterior_samples": samples},
            {"guide": autoguide, "num_samples": count}, {"guide": mixture, "num_samples": count},
        ):
            torch.manual_seed(5)
            outputs = Predictive(
                ngvi.model, **posterior, return_sites=["_RETURN"], process_group=group
            )(x)
            found.append(outputs["_RETURN"])
        return found


@pytest.mark.parametrize("count", [1, 7])
def test_shared_predictions_are_those_of_one_process(ranks: Any, count: int) -> None:
    same(ranks(2).run(predict, count), predict(None, count))


def observe(rank: int) -> Any:
    """Draws of labels, in two calls; and the errors for other inputs."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    ngvi, x = trained(), torch.randn(5, 2, 4)
    samples = ngvi.guide.sample_posterior(1)
    repeated = {name: value.expand(400, *value.shape[1:]) for name, value in samples.items()}
    shared = Predictive(ngvi.model, repeated, return_sites=["obs"], process_group="auto")
    first, second = shared(x)["obs"], shared(x)["obs"]
    by_guide = Predictive(ngvi.model, guide=ngvi.guide, num_samples=4, process_group="auto")
    messages = [
        raises(ValueError, lambda: by_guide(x[rank:])),
        raises(ValueError, lambda: by_guide(x + rank)),
    ]
    if rank:
        with torch.no_grad():
            ngvi.guide.blocks[0].raw_loc.add_(1)
    messages.append(raises(ValueError, lambda: by_guide(x)))
    return first, second, messages


def test_draws_of_the_model_differ_by_rank(ranks: Any) -> None:
    results = ranks(2).run(observe)
    for first, second, messages in results:
        assert first.shape == (400, 5) and torch.equal(first, results[0][0])
        halves = [*first.split(200), *second.split(200)]
        assert not any(torch.equal(halves[0], other) for other in halves[1:])
        assert all("2 ranks differ" in message for message in messages)
        assert "the inputs" in messages[0] and "the inputs" in messages[1]
        assert "the guide's" in messages[2]


def predict_linearized(rank: int | None) -> Any:
    """Of more outputs than draws, which takes draws of the weights."""
    with double():
        ngvi, x = trained(num_particles=0), torch.randn(5, 2, 4)
        laplace = Laplace(ngvi.model, ngvi.guide, process_group=None)
        few, many = (
            laplace.predict(x, num_samples=count, process_group="auto").logits
            for count in (4, 64)
        )
        return few, many


def test_shared_draws_of_a_linearized_network(ranks: Any) -> None:
    same(ranks(2).run(predict_linearized), predict_linearized(None))


def predict_with_optimizer(rank: int | None, count: int) -> Any:
    with double():
        network, x, y = net(), torch.randn(16, 2, 4), torch.randint(3, (16,))
        optimizer = VIOptimizer(network, num_data=16)
        for _ in range(2):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
        outputs = optimizer.predict(x, num_samples=count, process_group="auto")
        if rank is not None:
            raises(ValueError, lambda: optimizer.predict(x + rank, process_group="auto"))
        return outputs


@pytest.mark.parametrize("count", [1, 5])
def test_shared_predictions_of_an_optimizer(ranks: Any, count: int) -> None:
    same(ranks(2).run(predict_with_optimizer, count), predict_with_optimizer(None, count))


# ---- mixtures and sequential tasks --------------------------------------------------------------


def mix(rank: int | None) -> Any:
    """Two components; and what is refused."""
    with double():
        x, y = torch.randn(2, 32, 5), torch.randint(3, (2, 32))
        rows = slice(None) if rank is None else slice(16 * rank, 16 * rank + 16)
        loader = [(a[rows], b[rows]) for a, b in zip(x, y, strict=True)]

        def make(seed: int) -> NGVI:
            model = Classifier(bayesianize(nn.Linear(5, 3)), num_data=64)
            curvature = Curvature("ggn", every=1, batch=None)
            return NGVI(model, GUIDES["kfac"](model), curvature=curvature)

        mixture = train_mixture(make, loader, 2, 2, progress=False)
        if rank is not None:
            shorter = raises(ValueError, lambda: train_mixture(make, loader[rank:], 1, 1))
            others = raises(ValueError, lambda: train_mixture(make, loader, 1, [rank]))
            assert "batches of 2 ranks differ" in shorter and "seeds" in others
        return [[f.raw_loc.detach() for f in guide.blocks] for guide in mixture]


def test_a_mixture_of_two_ranks_is_that_of_one_process(ranks: Any) -> None:
    same(ranks(2).run(mix), mix(None))


def in_sequence(rank: int | None, make: str) -> Any:
    """The posterior of one task as the prior of the next."""
    with double():
        x, y = torch.randn(2, 32, 2, 4), torch.randint(3, (2, 32))
        rows = slice(None) if rank is None else slice(16 * rank, 16 * rank + 16)
        prior: Any = "fan_in"
        states: list[Any] = []
        for a, b in zip(x, y, strict=True):
            torch.manual_seed(1)
            model = Classifier(bayesianize(net(), prior=prior), num_data=32)
            prior = GUIDES[make](model)
            ngvi = NGVI(model, prior, curvature=Curvature("ggn", every=1, batch=None))
            for _ in range(2):
                ngvi.step(a[rows], b[rows])
            states += [(f.raw_loc.detach(), f.precision().dense().detach()) for f in prior.blocks]
            states.append(torch.tensor(list(ngvi.prior_errors().values())))
        laplace = Laplace(model, prior).fit([(a[rows], b[rows])])
        return states, laplace.log_marginal_likelihood()


@pytest.mark.parametrize("make", ["kfac", "ekfac", "diag", "full"])
def test_sequential_tasks_of_two_ranks(ranks: Any, make: str) -> None:
    same(ranks(2).run(in_sequence, make), in_sequence(None, make), 1e-9)
