"""Layers whose rows are not the examples, in `Laplace`: one backward pass for each example."""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import GUIDES, normal_prior

from pyrocurv.curvature import Curvature
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.infer.linearized_predictive import predictive
from pyrocurv.nn import bayesianize

NUM_DATA = 9
pytestmark = pytest.mark.filterwarnings("ignore:.*(no supported op|not the examples)")


def layers() -> nn.Module:
    net = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3)}).double()
    return bayesianize(net, normal_prior(0.8, 0.8))


class Graphs(PyroModule):
    """Graphs as one batch of nodes: the first layer reads nodes, the second graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = layers()

    def logits(self, a: Callable[..., Tensor], b: Callable[..., Tensor], x: Tensor,
               graph: Tensor) -> Tensor:
        hidden = torch.tanh(a(x))
        return b(hidden.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, hidden))

    def forward(self, x: Tensor, graph: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.logits(self.net["a"], self.net["b"], x, graph)
        with pyro.plate("data", NUM_DATA, subsample=out[:, 0]):
            pyro.sample("obs", dist.Categorical(logits=out), obs=y)
        return out


class Indexed(Graphs):
    """A network of all nodes, some of which have labels."""

    def logits(self, a: Callable[..., Tensor], b: Callable[..., Tensor], x: Tensor,
               graph: Tensor) -> Tensor:
        return b(torch.tanh(a(x)))[graph]


Batch = tuple[Tensor, Tensor, Tensor]


def batch(model: Graphs, nodes: int, count: int, first: int = 0) -> Batch:
    index = torch.arange(nodes) % count if type(model) is Graphs else torch.randperm(nodes)[:count]
    y = torch.arange(first, first + count) % 3
    return torch.randn(nodes, 3).double(), index, y


def dense(guide: StructuredGuide) -> Tensor:
    return guide.posterior.precision.dense()


def curvature(model: Graphs, guide: StructuredGuide, data: list[Batch], kind: str) -> Tensor:
    """The dense matrix in plain torch, in the order of the guide's sites."""
    medians, names = guide.median(), [*guide.sites]

    def logits(part: Batch, *weights: Tensor) -> Tensor:
        w = dict(zip(names, weights, strict=True))
        affine = [
            lambda h, k=k: torch.nn.functional.linear(h, w[f"net.{k}.weight"], w[f"net.{k}.bias"])
            for k in ("a", "b")
        ]
        return model.logits(*affine, *part[:2])

    total = torch.zeros(())
    for part in data:
        values = tuple(medians[n] for n in names)
        parts = torch.autograd.functional.jacobian(lambda *w, p=part: logits(p, *w), values)
        jacobian = torch.cat([p.flatten(2) for p in parts], -1)  # [B, C, P]
        p = logits(part, *values).softmax(-1)
        inner = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
        if kind == "empirical":
            error = p - torch.nn.functional.one_hot(part[2], 3)
            inner = error.unsqueeze(-1) * error.unsqueeze(-2)
        total = total + (jacobian.mT @ inner @ jacobian).sum(0)
    return total


CASES: dict[str, Callable[[], tuple[Graphs, list[tuple[int, int]]]]] = {
    "graphs": lambda: (Graphs(), [(12, 4), (11, 5)]),
    "graphs, as many nodes first": lambda: (Graphs(), [(4, 4), (11, 5)]),
    "indexed": lambda: (Indexed(), [(12, 4), (11, 5)]),
}


@pytest.mark.parametrize("kind", ["ggn", "empirical"])
@pytest.mark.parametrize("structure", ["diag", "block", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_precision_is_the_dense_curvature(case: str, structure: str, kind: str) -> None:
    """On all entries where the guide is dense, on the diagonal elsewhere."""
    model, sizes = CASES[case]()
    data = [batch(model, nodes, count, count) for nodes, count in sizes]
    guide = GUIDES[structure](model)
    Laplace(model, guide, kind).fit(data)
    wanted = curvature(model, guide, data, kind)
    wanted = wanted + torch.eye(len(wanted)).double() / 0.64
    found = dense(guide)
    torch.testing.assert_close(found[found != 0], wanted[found != 0])
    if case.endswith("first") and structure == "full":
        assert (found != 0).all()


def test_rows_that_mix_as_many_examples_are_found() -> None:
    """Each of five graphs has one node at first, then five nodes are one permuted batch."""
    model = Indexed()
    data = [(torch.randn(4, 3).double(), torch.arange(4), torch.arange(4) % 3)]
    data += [(torch.randn(5, 3).double(), torch.tensor([4, 2, 0, 1, 3]), torch.arange(5) % 3)]
    guide = GUIDES["full"](model)
    with pytest.warns(UserWarning, match="net.a.weight, net.b.weight: the rows"):
        Laplace(model, guide, "empirical").fit(data)
    wanted = curvature(model, guide, data, "empirical")
    torch.testing.assert_close(dense(guide), wanted + torch.eye(len(wanted)).double() / 0.64)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker_factors_where_nodes_are_positions(structure: str) -> None:
    """With three nodes to each graph they are those of three positions of an example."""

    class Positions(Graphs):
        def logits(self, a: Callable[..., Tensor], b: Callable[..., Tensor], x: Tensor,
                   graph: Tensor) -> Tensor:
            return b(torch.tanh(a(x)).sum(1))

    torch.manual_seed(0)
    nodes, one = Graphs(), torch.randn(2, 3).double()
    first = one, torch.arange(2), torch.arange(2)
    x, y = torch.randn(21, 3).double(), torch.arange(7) % 3
    guide = GUIDES[structure](nodes)
    guide(*first)
    Laplace(nodes, guide).fit([first, (x, torch.arange(21) // 3, y)])
    pyro.clear_param_store()
    positions = Positions()
    other = GUIDES[structure](positions)
    other(one.unsqueeze(1), *first[1:])
    other.load_state_dict(guide.state_dict())  # the same mean
    data = [(one.unsqueeze(1), *first[1:]), (x.unflatten(0, (7, 3)), torch.arange(7), y)]
    Laplace(positions, other).fit(data)
    torch.testing.assert_close(dense(guide), dense(other))


@pytest.mark.parametrize("structure", ["kfac", "full"])
@pytest.mark.parametrize("case", CASES)
def test_predictions_and_tuned_priors(case: str, structure: str) -> None:
    model, sizes = CASES[case]()
    data = [batch(model, nodes, count, count) for nodes, count in sizes]
    guide = GUIDES[structure](model)
    laplace = Laplace(model, guide).fit(data)
    before = laplace.log_marginal_likelihood()
    laplace.tune_prior()
    assert laplace.log_marginal_likelihood() > before
    x, index, _ = data[1]
    medians = guide.median()

    def logits(*weights: Tensor) -> Tensor:
        return pyro.condition(model, dict(zip(guide.sites, weights, strict=True)))(x, index)

    parts = torch.autograd.functional.jacobian(logits, tuple(medians[n] for n in guide.sites))
    jacobian = torch.cat([p.flatten(2) for p in parts], -1)
    covariance = jacobian @ torch.linalg.inv(dense(guide)) @ jacobian.mT
    center = logits(*(medians[n] for n in guide.sites)).detach()
    wanted = predictive(torch.distributions.Categorical(logits=center), 0, covariance)
    torch.testing.assert_close(laplace.predict(x, index, link="probit").probs, wanted.probs)


class Heads(PyroModule):
    """One body and two heads with labelled rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        net = nn.ModuleDict({"body": nn.Linear(3, 4), "a": nn.Linear(4, 3), "b": nn.Linear(4, 2)})
        self.net = bayesianize(net.double(), normal_prior(0.8, 0.8))

    def forward(self, x: Tensor, rows: tuple[Tensor, Tensor],
                y: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)) -> list[Tensor]:
        hidden = torch.tanh(self.net["body"](x))
        outs = [self.net[name](hidden[index]) for name, index in zip("ab", rows, strict=True)]
        for name, out, value in zip("ab", outs, y, strict=True):
            with pyro.plate(f"data {name}", len(out)):
                pyro.sample(name, dist.Categorical(logits=out), obs=value)
        return outs


@pytest.mark.parametrize("sizes", [(7, 5), (3, 8), (6, 6)], ids=str)
@pytest.mark.parametrize("kind", ["ggn", "empirical", "hessian"])
def test_heads_with_rows_of_their_own(kind: str, sizes: tuple[int, int]) -> None:
    """The diagonal of the dense matrix of both likelihoods."""
    model, x = Heads(), torch.randn(9, 3).double()
    rows = tuple(torch.randperm(9)[:size] for size in sizes)
    y = tuple(torch.arange(size) % (3 - n) for n, size in enumerate(sizes))
    guide = GUIDES["diag"](model)
    Laplace(model, guide, kind).fit([(x, rows, y)])
    medians, names = guide.median(), [*guide.sites]
    values = tuple(medians[n] for n in names)

    def outputs(*weights: Tensor) -> Any:
        return pyro.condition(model, dict(zip(names, weights, strict=True)))(x, rows)

    def nll(*weights: Tensor) -> Tensor:
        losses = [torch.nn.functional.cross_entropy(out, value, reduction="sum")
                  for out, value in zip(outputs(*weights), y, strict=True)]
        return losses[0] + losses[1]

    size = sum(v.numel() for v in values)
    if kind == "hessian":
        parts = torch.autograd.functional.hessian(nll, values)
        wanted = torch.cat([p[n].reshape(values[n].numel(), -1).diagonal()
                            for n, p in enumerate(parts)]).clamp(min=0)
    else:
        wanted = torch.zeros(size).double()
        for n, out in enumerate(outputs(*values)):
            parts = torch.autograd.functional.jacobian(lambda *w, n=n: outputs(*w)[n], values)
            jacobian = torch.cat([p.flatten(2) for p in parts], -1)
            p = out.detach().softmax(-1)
            inner = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
            if kind == "empirical":
                error = p - torch.nn.functional.one_hot(y[n], p.shape[1])
                inner = error.unsqueeze(-1) * error.unsqueeze(-2)
            wanted += (jacobian.mT @ inner @ jacobian).sum(0).diagonal()
    torch.testing.assert_close(guide.posterior.precision.diag(), wanted + 1 / 0.64)


def test_one_notice_and_the_hessian_of_factors() -> None:
    model = Graphs()
    data = [batch(model, 4, 4), batch(model, 11, 5, 4)]
    guide = GUIDES["kfac"](model)
    guide(*data[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        laplace = Laplace(model, guide)
        for _ in range(2):
            laplace.fit(data)
    assert [str(w.message) for w in caught if "not the examples" in str(w.message)] == [
        "net.a.weight: the rows of the layer's input are not the examples, so that its curvature "
        "takes a backward pass for each example"
    ]
    with pytest.raises(ValueError, match="'net.a.weight' reads 11 rows where there are 5 examples"):
        Laplace(model, guide, "hessian").fit(data)


def test_ngvi_goes_on_when_rows_stop_to_tell() -> None:
    model = Graphs()
    guide = GUIDES["kfac"](model)
    ngvi = NGVI(model, guide, curvature=Curvature("ggn", every=1, batch=3))
    ngvi.step(*batch(model, 4, 4))
    assert all(torch.isfinite(torch.tensor(ngvi.step(*batch(model, 11, 5)))) for _ in range(3))
