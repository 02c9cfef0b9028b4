"""`to_module`: the network of a model without Pyro, at the median or at a sample."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn

from pyrocurv.guides import DiagonalGuide, KFACGuide, MixtureGuide
from pyrocurv.nn import Classifier, Regressor, bayesianize, update_bn
from pyrocurv.nn.networks import GPT, MLP, ResNet

X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(6, 3)


class Tied(nn.Module):
    """Tied weights, a padding index, recurrence and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.kind = nn.Embedding(7, 4), nn.Embedding(3, 4, padding_idx=0)
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.token(x) + self.kind(x % 3))[0]
        return self.head(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any]] = {
    "mlp": (lambda: MLP(3, [4], 3), X, None),
    "resnet": (lambda: ResNet(classes=3, widths=(4, 6)), torch.randn(6, 1, 8, 8).double(), None),
    "tied": (Tied, torch.arange(24).reshape(6, 4) % 7, nn.Module),
}


def guided(name: str, kind: Any = KFACGuide) -> tuple[nn.Module, Any, nn.Module, Tensor]:
    """A model, a guide with a mean of its own, the network as it was, and inputs."""
    make, x, layers = NETWORKS[name]
    net = make().double()
    plain = copy.deepcopy(net)
    model = Classifier(bayesianize(net, layers=layers), 6)
    guide = kind(model, init_scale=0.1)
    guide(x, torch.arange(6) % 3)
    with torch.no_grad():
        for family in guide.blocks:
            family.raw_loc.add_(0.1 * torch.randn_like(family.raw_loc))
    update_bn(model, guide, [x])
    return model.eval(), guide, plain, x


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:KFACGuide")  # of recurrent weights
def test_it_predicts_what_the_model_does(name: str) -> None:
    model, guide, plain, x = guided(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    module = guide.to_module()
    with torch.no_grad():
        wanted = poutine.condition(model, guide.median())(x)
        torch.testing.assert_close(module(x), wanted)
    assert [type(one) for one in module.modules()] == [type(one) for one in plain.modules()]
    assert [*module.state_dict()] == [*plain.state_dict()]
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not any("pyro" in str(value).lower() for one in module.modules() for value in vars(one))
    assert not any(one.training or one._forward_hooks or one._forward_pre_hooks
                   for one in module.modules())
    assert all(type(p) is nn.Parameter and p.requires_grad for p in module.parameters())
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(plain.eval()(x), module(x))
    with torch.no_grad():  # it is a copy
        for parameter in (*module.parameters(), *module.buffers()):
            parameter.zero_()
        torch.testing.assert_close(poutine.condition(model, guide.median())(x), wanted)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_sample() -> None:
    model, guide, _, x = guided("mlp")
    torch.manual_seed(5)
    module = guide.to_module(sample=True)
    torch.manual_seed(5)
    draw = {name: value[0] for name, value in guide.sample_posterior(1).items()}
    with torch.no_grad():
        torch.testing.assert_close(module(x), poutine.condition(model, draw)(x))
        assert not torch.allclose(guide.to_module(sample=True)(x), module(x))


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_it_is_exported(name: str) -> None:
    _, guide, _, x = guided(name)
    module = guide.to_module()
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))


def test_a_transformer_is_exported_and_pickled() -> None:
    net = GPT(vocabulary=7, context=5, width=8, heads=2, layers=1)
    tokens = torch.arange(30).reshape(6, 5) % 7

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(net)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.net(x)
            with pyro.plate("data", 6):
                pyro.sample("obs", dist.Categorical(logits=logits).to_event(1), obs=x)
            return logits

    model = Model()
    guide = DiagonalGuide(model)
    guide(tokens)
    module = guide.to_module()
    wanted = poutine.condition(model.eval(), guide.median())(tokens)
    exported = torch.export.export(module, (tokens,))
    torch.testing.assert_close(exported.module()(tokens), wanted)
    torch.save(module, file := io.BytesIO())
    assert b"pyro." not in file.getvalue()
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(tokens), wanted)


# ---- which network ------------------------------------------------------------------------------


class Own(PyroModule):
    """A model of a user: a network by another name, and one with a constraint."""

    def __init__(self) -> None:
        super().__init__()
        self.features = bayesianize(nn.Sequential(nn.Linear(3, 4), nn.Tanh()))
        self.head = PyroModule[nn.Linear](4, 2)
        self.head.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
        self.head.bias = PyroParam(torch.ones(2), dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        mean = self.head(self.features(x))
        with pyro.plate("data", 6, dim=-1):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)
        return mean


def test_a_network_by_its_name() -> None:
    model, x = Own(), X.float()
    guide = KFACGuide(model)
    guide(x, torch.zeros(6, 2))
    with pytest.raises(ValueError, match="Name it, as in module='features'; features, head exist"):
        guide.to_module()
    with pytest.raises(ValueError, match="module='x': features, features.0, features.1, head exi"):
        guide.to_module(module="x")
    with pytest.raises(TypeError, match="module '' is a Own, whose class is a PyroModule by itse"):
        guide.to_module(module="")
    with pytest.raises(TypeError, match="sample=1: True or False"):
        guide.to_module(1)
    head, features = guide.to_module(module="head"), guide.to_module(module="features")
    assert type(head) is nn.Linear and type(features) is nn.Sequential
    wanted = poutine.condition(model, guide.median())(x)
    torch.testing.assert_close(head(features(x)), wanted)


def test_a_function_and_a_network_that_is_the_model() -> None:
    net = bayesianize(nn.Linear(3, 2).double())
    likelihood = Regressor(net, 6, noise=0.3)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = net(x)
        with pyro.plate("data", 6):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)

    for one in (model, net):
        guide = KFACGuide(one)
        guide(*((X, X[:, :2]) if one is model else (X,)))
        assert type(guide.to_module()) is nn.Linear
    assert likelihood.net is net


def test_weights_that_the_fallback_guide_has() -> None:
    def prior(module: nn.Module, name: str) -> Any:
        return dist.Laplace(torch.zeros_like(getattr(module, name)), 1.0)

    net = bayesianize(nn.Linear(3, 2), prior)
    with pytest.warns(UserWarning, match="prior"):
        guide = KFACGuide(Regressor(net, 6, noise=0.3), fallback=AutoNormal)
        guide(X.float(), torch.zeros(6, 2))
    torch.testing.assert_close(guide.to_module().weight.data, guide.median()["net.weight"])


def test_what_is_refused() -> None:
    model = Classifier(bayesianize(nn.Linear(3, 2).double()), 6)
    guide = KFACGuide(model)
    with pytest.raises(RuntimeError, match="not initialized"):
        guide.to_module()
    guide(X, torch.arange(6) % 2)
    with pytest.raises(RuntimeError, match="was unpickled, without its model"):
        pickle.loads(pickle.dumps(guide)).to_module()
    hidden = KFACGuide(poutine.block(model, hide=["net.bias"]))
    hidden(X, torch.arange(6) % 2)
    with pytest.raises(ValueError, match="the guide has no latent bias of the network"):
        hidden.to_module()
    mixture = MixtureGuide([guide])
    assert type(mixture[0].to_module()) is nn.Linear
