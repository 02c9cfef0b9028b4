"""Layers whose rows are not the examples: one backward pass for each example, exact."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from pyrocurv.curvature import Curvature
from pyrocurv.optim import SecondOrderOptimizer, VIOptimizer

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:.*rows of the layer's input are not the examples"),
]
GRAPH = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 4])
LABELS = torch.tensor([0, 2, 1, 1, 0])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)


class Graphs(Net):
    """Nodes of several graphs in one batch, summed over each."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.last(hidden.new_zeros(5, 4).index_add(0, graph, hidden))


class Labelled(Net):
    """All nodes, of which some have labels."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())[[0, 3, 4, 7, 9]]


class SequenceFirst(Net):
    """Inputs [T, B, 3], as recurrent networks have them."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return self.last(self.first(x.view(2, 5, 3)).tanh()).mean(0)


class Convolved(Net):
    """Neighbors exchange rows before and after."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        mix = (graph[:, None] == graph).to(x)
        return (mix @ self.last(mix @ self.first(x).tanh()))[[0, 3, 4, 7, 9]]


NETS = [Graphs, Labelled, SequenceFirst, Convolved]


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """[5, 3, P], with the weights as they are packed: the bias of a layer as its last column."""
    names = [name for name, _ in net.named_parameters()]

    def outputs(*weights: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x, GRAPH))

    parts = torch.autograd.functional.jacobian(outputs, tuple(net.parameters()))
    layers = [torch.cat([parts[i], parts[i + 1].unsqueeze(-1)], -1).flatten(2) for i in (0, 2)]
    return torch.cat(layers, -1)


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("structure", ["full", "block", "diag"])
@pytest.mark.parametrize("make", NETS, ids=lambda make: make.__name__)
def test_the_curvature_is_exact(make: Any, structure: str, variational: bool) -> None:
    net, x = make(), torch.randn(10, 3)
    spec = Curvature("ggn", batch=None, initial=0.0)
    optimizer: Any = (
        VIOptimizer(net, 100, curvature=spec, structure=structure) if variational
        else SecondOrderOptimizer(net, curvature=spec, structure=structure)
    )
    J, p = jacobian(net, x), net(x, GRAPH).softmax(-1).detach()
    weight = torch.tensor([1.0, 2.0, 5.0])
    with optimizer.sampled_params() if variational else nullcontext():
        F.cross_entropy(net(x, GRAPH), LABELS, weight=weight).backward()
    optimizer.step()
    information = p.diag_embed() - p[:, :, None] * p[:, None]
    share = weight[LABELS] / weight[LABELS].sum()
    wanted = torch.einsum("n,nci,ncd,ndj->ij", share, J, information, J)
    found = [state.curvature.curvature.dense() for state in optimizer._posterior.blocks]
    if structure == "diag":
        wanted = wanted.diag().diag()
    elif structure == "block":
        wanted = torch.block_diag(wanted[:16, :16], wanted[16:, 16:])
    torch.testing.assert_close(torch.block_diag(*found), wanted)


@pytest.mark.parametrize("kind", ["fisher", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("make", [Graphs, SequenceFirst])
def test_training_goes_on_with_one_notice(make: Any, structure: str, kind: str) -> None:
    net, x = make(), torch.randn(10, 3)
    optimizer = SecondOrderOptimizer(
        net, 0.1, structure=structure, curvature=Curvature(kind, every=2)
    )
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x, GRAPH), LABELS)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert len({str(one.message) for one in caught}) == 1
    assert len(optimizer.layout.blocks) == 2


def test_several_batches_of_graphs_are_each_a_part() -> None:
    """Their nodes cannot be joined."""
    net, x = Graphs(), torch.randn(10, 3)
    optimizer = SecondOrderOptimizer(
        net, structure="full", curvature=Curvature("ggn", batch=None, initial=0.0)
    )
    J, p = jacobian(net, x), net(x, GRAPH).softmax(-1).detach()
    for factor in (0.25, 0.75):
        (factor * F.cross_entropy(net(x, GRAPH), LABELS)).backward()
    optimizer.step()
    information = p.diag_embed() - p[:, :, None] * p[:, None]
    wanted = torch.einsum("nci,ncd,ndj->ij", J, information, J) / 5
    torch.testing.assert_close(
        optimizer._posterior.blocks[0].curvature.curvature.dense(), wanted)


def likelihood(f: Tensor) -> Categorical:
    return Categorical(logits=f)


@pytest.mark.parametrize("given", ["categorical", likelihood])
def test_a_network_that_needs_its_whole_batch_says_so(given: Any) -> None:
    """As one with an adjacency matrix: its first examples alone are no input."""
    class Adjacent(Net):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.last(adjacency @ self.first(x).tanh())

    net, x, y = Adjacent(), torch.randn(40, 3), torch.arange(40) % 3
    optimizer = SecondOrderOptimizer(net, likelihood=given)
    F.cross_entropy(net(x, torch.eye(40)), y).backward()
    with pytest.raises(ValueError, match="first 32 examples .* use Curvature.batch=None"):
        optimizer.step()
