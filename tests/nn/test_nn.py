"""Networks as Pyro models: priors, which layers, the ready likelihoods."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import normal_prior, trained

import pyrocurv
from pyrocurv.nn import Classifier, Regressor, bayesianize


def small_net() -> nn.Sequential:
    convolution = nn.Conv2d(2, 4, (3, 2)), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(24, 3))


def image(rows: int = 5) -> Tensor:
    return torch.randn(rows, 2, 4, 4)


def priors(net: nn.Module, *args: Any) -> dict[str, dist.Distribution]:
    """{name: prior} of all latents in a run."""
    trace = poutine.trace(net).get_trace(*args)
    return {name: trace.nodes[name]["fn"] for name in trace.stochastic_nodes}


def scales(net: nn.Module, *args: Any) -> dict[str, Tensor]:
    return {name: fn.base_dist.scale for name, fn in priors(net, *args).items()}


# ---- bayesianize --------------------------------------------------------------------------------


def test_it_is_done_in_place() -> None:
    net = small_net()
    again = bayesianize(net)
    assert again is net and isinstance(net, PyroModule)
    assert [name for name, _ in net.named_parameters()] == ["1.weight", "1.bias"]
    names = ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert list(priors(net, image())) == names
    assert net(image()).shape == (5, 3)
    assert not torch.equal(net(image()), net(image())), "the weights are sampled"


def test_latents_have_their_parameters_shape_and_a_mean_of_zero() -> None:
    for fn in priors(bayesianize(small_net()), image()).values():
        assert fn.batch_shape == () and isinstance(fn.base_dist, dist.Normal)
        assert (fn.mean == 0).all()
    shapes = [tuple(fn.event_shape) for fn in priors(bayesianize(small_net()), image()).values()]
    assert shapes == [(4, 2, 3, 2), (4,), (3, 24), (3,)]


def test_fan_in() -> None:
    """Variance 1/(fan_in + 1), for the bias too: a unit's input of ones and its bias have one."""
    found = scales(bayesianize(small_net()), image())
    for name, fan_in in {"0.weight": 12, "0.bias": 12, "4.weight": 24, "4.bias": 24}.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], (fan_in + 1) ** -0.5))


@pytest.mark.parametrize("scale", [0.3, 2])
def test_one_standard_deviation(scale: float) -> None:
    found = scales(bayesianize(small_net(), prior=scale), image())
    assert all(torch.equal(value, torch.full_like(value, scale)) for value in found.values())


def test_a_callable_prior() -> None:
    calls = []

    def prior(module: nn.Module, name: str) -> dist.Distribution:
        calls.append((type(module).__name__, name))
        shape = getattr(module, name).shape
        if name == "bias":
            return dist.Laplace(torch.zeros(shape), 1.0)
        return dist.Normal(torch.ones(shape), 0.5)

    found = priors(bayesianize(small_net(), prior), image())
    assert calls == [
        ("Conv2d", "weight"), ("Conv2d", "bias"), ("Linear", "weight"), ("Linear", "bias"),
    ]
    assert isinstance(found["0.bias"].base_dist, dist.Laplace)
    assert found["0.bias"].event_shape == (4,) and found["0.bias"].batch_shape == ()
    assert (found["4.weight"].mean == 1).all() and (found["4.weight"].stddev == 0.5).all()


@pytest.mark.parametrize("events", [0, 1, 2])
def test_event_dimensions_of_a_prior_make_no_difference(events: int) -> None:
    def prior(module: nn.Module, name: str) -> dist.Distribution:
        like = getattr(module, name)
        fn = dist.Normal(torch.zeros_like(like), 1.0)
        return fn.to_event(min(events, like.dim()))

    found = priors(bayesianize(nn.Linear(3, 2), prior), torch.randn(5, 3))
    assert [fn.batch_shape for fn in found.values()] == [(), ()]
    assert [tuple(fn.event_shape) for fn in found.values()] == [(2, 3), (2,)]


def test_a_prior_of_the_wrong_shape() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"Linear.weight has shape \(\), the parameter \(4, 3\)"):
        bayesianize(net, lambda module, name: dist.Normal(0.0, 1.0))
    assert not isinstance(net, PyroModule) and len(list(net.parameters())) == 4


@pytest.mark.parametrize("prior", ["fan_out", 0.0, -1.0, math.nan])
def test_a_prior_out_of_range(prior: Any) -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="prior="):
        bayesianize(net, prior)
    assert not isinstance(net, PyroModule)


@pytest.mark.parametrize(("layers", "names"), [
    ([nn.Linear], ["4.weight", "4.bias"]),
    (nn.Linear, ["4.weight", "4.bias"]),
    ("0", ["0.weight", "0.bias"]),
    (["0"], ["0.weight", "0.bias"]),
    (["0", nn.Linear], ["0.weight", "0.bias", "4.weight", "4.bias"]),
    ([nn.BatchNorm2d], ["1.weight", "1.bias"]),
])
def test_layers_by_type_and_by_name(layers: list[Any], names: list[str]) -> None:
    net = bayesianize(small_net(), layers=layers)
    assert list(priors(net, image())) == names
    assert len(list(net.parameters())) == 6 - len(names)


def test_a_layer_inside_a_module() -> None:
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    bayesianize(net, layers=["0.1"])
    assert list(priors(net, torch.randn(5, 3))) == ["0.1.weight", "0.1.bias"]


def test_the_net_itself_is_a_layer() -> None:
    assert list(priors(bayesianize(nn.Linear(3, 2, bias=False)), torch.randn(5, 3))) == ["weight"]


@pytest.mark.parametrize("prior", [dist.Normal(0.0, 1.0), torch.distributions.Normal(0.0, 1.0)])
def test_a_distribution_is_no_prior(prior: Any) -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"prior=Normal.*: a standard deviation .* or a callable"):
        bayesianize(net, prior)
    assert not isinstance(net, PyroModule)


@pytest.mark.parametrize("layers", [["9"], [nn.Conv1d], [nn.Flatten], []])
def test_layers_that_are_not_there(layers: list[Any]) -> None:
    net = small_net()
    message = "no module '9'; 0, 1, 2, 3, 4 exist" if layers == ["9"] else "no module in Sequential"
    with pytest.raises(ValueError, match=message):
        bayesianize(net, layers=layers)
    assert not isinstance(net, PyroModule)


def test_frozen_parameters_stay_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 2), nn.Linear(2, 2))
    net[1].bias.requires_grad_(False)
    net.append(nn.Linear(3, 3).requires_grad_(False))
    net[3].weight = net[0].weight  # tied, and frozen in both
    bayesianize(net)
    assert net[3].weight is net[0].weight
    left = ["0.weight", "0.bias", "1.bias", "3.bias"]
    assert [name for name, _ in net.named_parameters()] == left
    assert not any(p.requires_grad for p in net.parameters())
    bayesianize(net, layers="1")  # asked for by name
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "3.bias"]
    with pytest.raises(ValueError, match="one tensor, a tied weight: choose both"):
        bayesianize(net, layers="0")
    with pytest.raises(ValueError, match="with a trainable parameter matches"):
        bayesianize(nn.Linear(3, 2).requires_grad_(False))


def test_weights_that_are_made_are_named() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"a parametrization computes 0\.weight from") as caught:
        bayesianize(copy.deepcopy(net))
    assert len(caught) == 1
    bayesianize(net, layers=nn.Module)  # without a word
    bare = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    with pytest.warns(UserWarning, match="computes 0.weight from"):
        bayesianize(nn.Sequential(bare, nn.Linear(3, 2)))
    assert not list(net.parameters())


def tied_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net


def test_a_tied_weight_is_one_site() -> None:
    net, x = tied_net().double(), torch.randn(5, 3).double()
    before = net(x)
    model = bayesianize(net)
    found = priors(net, x)
    assert list(found) == ["0.weight", "0.bias", "2.bias"]
    values = {name: fn.initial for name, fn in found.items()}
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with poutine.condition(data=values):
            assert torch.equal(again(x), before)
        assert "weight" not in again[2].__dict__  # nothing sampled is left behind


def test_a_tied_weight_does_not_outlive_an_exception() -> None:
    net = bayesianize(tied_net())
    with pytest.raises(RuntimeError):
        net[2](torch.randn(5, 7))
    assert "weight" not in net[2].__dict__


def test_a_tied_weight_of_which_one_layer_is_left_out_is_refused() -> None:
    net = tied_net()
    with pytest.raises(ValueError, match="0.weight and 2.weight are one tensor, a tied weight"):
        bayesianize(net, layers=["0"])
    assert not isinstance(net, PyroModule) and net[2].weight is net[0].weight


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_use_the_sampled_weights(kind: Any) -> None:
    net, x = nn.Sequential(kind(3, 2, batch_first=True)).double(), torch.randn(4, 3, 3).double()
    before, _ = net(x)
    model = bayesianize(net)
    found = priors(model, x)
    assert set(found) == {f"0.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    values = {name: fn.initial for name, fn in found.items()}
    with poutine.condition(data=values):
        assert torch.equal(model(x)[0], before)
    with poutine.condition(data={**values, "0.weight_ih_l0": 2 * values["0.weight_ih_l0"]}):
        assert not torch.allclose(model(x)[0], before)


@pytest.mark.parametrize(("make", "fan_in"), [
    (lambda: nn.Conv2d(4, 6, 3, groups=2), 18),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 18),
    (lambda: nn.Embedding(7, 5), 1),
    (lambda: nn.MultiheadAttention(4, 2), 4),
    (lambda: nn.LSTM(3, 5), 5),
])  # fmt: skip
def test_fan_in_of_other_layers(make: Any, fan_in: int) -> None:
    module = make()
    bayesianize(module, layers=[type(module)])
    name = next(n for n in ("weight", "in_proj_weight", "weight_ih_l0") if hasattr(type(module), n)
                or f"_{n}_scale" in module._buffers)
    assert float(module._buffers[f"_{name}_scale"]) == pytest.approx((fan_in + 1) ** -0.5)


def test_the_scales_of_norm_layers_have_mean_one() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    found = priors(bayesianize(net, layers=[nn.Linear, nn.LayerNorm]), torch.randn(5, 3))
    locs = {name: fn.base_dist.loc.unique().tolist() for name, fn in found.items()}
    assert locs["1.weight"] == [1.0] and locs["1.bias"] == locs["0.weight"] == [0.0]


def test_a_module_used_twice_is_one_layer() -> None:
    layer = nn.Linear(3, 3)
    net = bayesianize(nn.Sequential(layer, nn.Tanh(), layer))
    found = priors(net, torch.randn(5, 3))
    assert [tuple(fn.event_shape) for fn in found.values()] == [(3, 3), (3,)]


@pytest.mark.parametrize("move", ["double", "to"])
def test_priors_move_with_the_network(move: str) -> None:
    net = bayesianize(small_net(), prior=0.5)
    priors(net, image())
    net = net.double() if move == "double" else net.to(torch.float64)
    found = priors(net, image().double())
    assert all(fn.base_dist.scale.dtype == fn.base_dist.loc.dtype == torch.float64
               for fn in found.values())
    assert net(image().double()).dtype == torch.float64
    assert priors(net.float(), image())["0.weight"].base_dist.scale.dtype == torch.float32


def test_priors_are_not_part_of_the_state() -> None:
    net = bayesianize(small_net())
    assert set(net.state_dict()) == {
        "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))],
                         ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = bayesianize(small_net(), prior=0.5)
    before = priors(net, image())
    other = copied(net)
    found = priors(other, image())
    assert list(found) == list(before)
    assert all(torch.equal(found[n].base_dist.scale, before[n].base_dist.scale) for n in before)
    assert all(torch.equal(found[n].initial, before[n].initial) for n in before)
    other.double()
    assert priors(net, image())["0.weight"].base_dist.scale.dtype == torch.float32
    assert priors(other, image().double())["0.weight"].base_dist.scale.dtype == torch.float64


def test_a_trained_model_is_copied() -> None:
    ngvi, data = trained("kfac", steps=1)
    other = copy.deepcopy(ngvi.model)
    assert other(data[0]).shape == (30, 2)


def test_twice_is_an_error_or_nothing() -> None:
    net = bayesianize(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="match Linear, .* have been bayesianized already"):
        bayesianize(net)


class Tokens(nn.Module):
    """A language model that reads each token by itself, of a pad that is 0."""

    def __init__(self, tied: bool = True, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(5, 3, padding_idx), nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.tok.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.tok(tokens).tanh())


@pytest.mark.parametrize(("is_frozen", "layers"), [(False, None), (True, "head")])
def test_the_remedy_for_a_tied_embedding(is_frozen: bool, layers: str | None) -> None:
    with pytest.raises(ValueError, match="tok.weight and head.weight are one") as caught:
        bayesianize(Tokens().requires_grad_(not is_frozen), layers=layers)
    remedy = str(caught.value).partition("layers=")[2].partition(" has both")[0]
    net = bayesianize(
        Tokens().requires_grad_(not is_frozen), layers=eval(remedy, {"pyrocurv": pyrocurv})
    )
    assert list(priors(net, torch.arange(5))) == ["tok.weight"]


@pytest.mark.parametrize("copied", [lambda net: net, copy.deepcopy])
@pytest.mark.parametrize("row", [0.0, 2.0])
def test_padding_stays_as_it_is(row: float, copied: Callable[[nn.Module], nn.Module]) -> None:
    """Whatever is sampled for its row, of which no data say anything."""
    embedding, tokens = nn.Embedding(5, 3, padding_idx=-2), torch.tensor([[3, 1], [0, 3]])
    with torch.no_grad():
        embedding.weight[3] = row
    net = copied(bayesianize(embedding, layers=nn.Embedding))
    for output in (net(tokens), net(input=tokens), net.double()(tokens)):
        assert (output[[0, 1], [0, 1]] == row).all() and (output[[0, 1], [1, 0]] != row).all()


def test_tied_padding_is_a_row_as_others_are() -> None:
    net = bayesianize(Tokens(padding_idx=0), layers=[nn.Embedding, nn.Linear])
    assert (net(torch.zeros(4, dtype=torch.long)) != 0).all()


# ---- Classifier and Regressor -------------------------------------------------------------------


def test_a_classifier() -> None:
    model = Classifier(bayesianize(nn.Linear(3, 4)), num_data=100)
    x, y = torch.randn(5, 3), torch.randint(4, (5,))
    trace = poutine.trace(model).get_trace(x, y)
    obs = trace.nodes["obs"]
    assert obs["is_observed"] and obs["value"] is y
    assert isinstance(obs["fn"], dist.Categorical) and obs["fn"].batch_shape == (5,)
    assert obs["scale"] == 20
    (frame,) = obs["cond_indep_stack"]
    assert (frame.name, frame.full_size, frame.size) == ("data", 100, 5)
    assert trace.nodes["_RETURN"]["value"].shape == (5, 4)
    trace.compute_log_prob()
    log_prob = trace.nodes["_RETURN"]["value"].log_softmax(-1)[torch.arange(5), y]
    torch.testing.assert_close(trace.nodes["obs"]["log_prob_sum"], 20 * log_prob.sum())


@pytest.mark.parametrize(("outputs", "mean", "targets"), [
    (1, (5,), [(5,), (5, 1)]), (2, (5, 2), [(5, 2)]),
])
def test_a_regressor(outputs: int, mean: tuple[int, ...], targets: list[tuple[int, ...]]) -> None:
    model = Regressor(bayesianize(nn.Linear(3, outputs)), num_data=100, noise=0.3)
    for shape in targets:
        trace = poutine.trace(model).get_trace(torch.randn(5, 3), torch.randn(shape))
        obs = trace.nodes["obs"]
        assert trace.nodes["_RETURN"]["value"].shape == obs["value"].shape == mean
        assert obs["fn"].batch_shape == (5,) and obs["fn"].event_shape == mean[1:]
        assert (obs["fn"].stddev == 0.3).all() and obs["scale"] == 20
        assert "sigma" not in trace.nodes


def test_a_regressor_that_learns_its_noise() -> None:
    model = Regressor(bayesianize(nn.Linear(3, 2).double()), num_data=100)
    trace = poutine.trace(model).get_trace(torch.randn(5, 3).double(), torch.randn(5, 2).double())
    sigma = trace.nodes["sigma"]
    assert isinstance(sigma["fn"], dist.LogNormal) and sigma["value"].dtype == torch.float64
    assert sigma["fn"].loc == 0 and sigma["fn"].scale == 1 and not sigma["cond_indep_stack"]
    assert (trace.nodes["obs"]["fn"].stddev == sigma["value"]).all()


def makers() -> dict[str, Callable[[int], nn.Module]]:
    return {
        "Classifier": lambda n: Classifier(bayesianize(nn.Linear(3, 2)), n),
        "Regressor": lambda n: Regressor(bayesianize(nn.Linear(3, 2)), n, noise=0.3),
        "Regressor with sigma": lambda n: Regressor(bayesianize(nn.Linear(3, 2)), n),
    }


each_model = pytest.mark.parametrize("name", makers())


@each_model
@pytest.mark.parametrize("rows", [1, 3, 10, 50])
def test_prediction_for_any_number_of_rows(name: str, rows: int) -> None:
    """Also more than num_data: there are no targets, so nothing to be scaled."""
    model = makers()[name](10)
    x = torch.randn(rows, 3)
    assert model(x).shape == (rows, 2)
    trace = poutine.trace(model).get_trace(x)
    assert trace.nodes["obs"]["scale"] == 1 and not trace.nodes["obs"]["is_observed"]
    shape = (4, rows) if name == "Classifier" else (4, rows, 2)
    assert Predictive(model, num_samples=4)(x)["obs"].shape == shape


@each_model
def test_more_targets_than_data(name: str) -> None:
    """A mistake in training; held-out data may be as many as they like."""
    y = torch.zeros(11, dtype=torch.long) if name == "Classifier" else torch.zeros(11, 2)
    model, x = makers()[name](10), torch.randn(11, 3)
    with pytest.raises(ValueError, match="a batch of 11 targets, but num_data=10"):
        model(x, y)
    trace = poutine.trace(model.eval()).get_trace(x, y)
    assert trace.nodes["obs"]["scale"] == pytest.approx(10 / 11)


@each_model
@pytest.mark.parametrize("num_data", [0, -5, 2.5, True, "10"])
def test_a_number_of_data_out_of_range(name: str, num_data: Any) -> None:
    with pytest.raises(ValueError, match="num_data="):
        makers()[name](num_data)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan])
def test_a_noise_out_of_range(noise: float) -> None:
    with pytest.raises(ValueError, match="noise="):
        Regressor(bayesianize(nn.Linear(3, 2)), 10, noise=noise)


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (4, 2), (5, 2, 1)])
def test_targets_that_do_not_fit(shape: tuple[int, ...]) -> None:
    """Broadcasting [B] against [B, D] would go unseen."""
    model = Regressor(bayesianize(nn.Linear(3, 2)), 10, noise=0.3)
    with pytest.raises(ValueError, match="do not fit means"):
        model(torch.randn(5, 3), torch.zeros(shape))
    single = Regressor(bayesianize(nn.Linear(3, 1)), 10, noise=0.3)
    if shape not in ((5,), (5, 1)):
        with pytest.raises(ValueError, match="do not fit means"):
            single(torch.randn(5, 3), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1,), (4,), (6,), (5, 1), (5, 4), ()])
def test_classes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    """One class for all rows, or another number of them, is a mistake and no broadcast."""
    model = Classifier(bayesianize(nn.Linear(3, 4)), 10)
    with pytest.raises(ValueError):
        trace = poutine.trace(model).get_trace(torch.randn(5, 3), torch.zeros(shape).long())
        trace.compute_log_prob()


def test_a_plain_network_is_a_model_too() -> None:
    model = Regressor(nn.Linear(3, 2), 10, noise=0.3)
    assert model(torch.randn(5, 3)).shape == (5, 2)
    assert len(list(model.parameters())) == 2


def test_different_priors_for_weight_and_bias() -> None:
    found = scales(bayesianize(nn.Linear(3, 2), normal_prior(0.5, 2.0)), torch.randn(5, 3))
    assert (found["weight"] == 0.5).all() and (found["bias"] == 2.0).all()


def test_the_model_can_be_drawn() -> None:
    pytest.importorskip("graphviz")
    model = Classifier(bayesianize(nn.Linear(3, 4)), num_data=100)
    graph = pyro.render_model(model, (torch.randn(5, 3), torch.randint(4, (5,))))
    assert "net.weight" in graph.source and "obs" in graph.source


def test_a_container_by_name_is_all_in_it() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)))
    net.add_module("10", nn.Linear(4, 2))
    bayesianize(net, layers="1")
    left = [name for name, _ in net.named_parameters()]
    assert left == ["0.weight", "0.bias", "10.weight", "10.bias"]


def test_what_is_no_layer_and_what_is_no_prior() -> None:
    with pytest.raises(TypeError, match="layers: module types and names are needed, got 0"):
        bayesianize(nn.Sequential(nn.Linear(3, 2)), layers=[0])  # type: ignore[list-item]
    make: Any = lambda module, name: None  # noqa: E731
    with pytest.raises(TypeError, match="Linear.weight is not a Distribution, but of type None"):
        bayesianize(nn.Linear(3, 2), prior=make)
