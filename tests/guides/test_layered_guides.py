"""Guides and NGVI on every kind of layer, with a structure for each."""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import layer_cases
import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
from designs import alternating, pairs
from layer_cases import HALF, HIDDEN, LAYERED, MISREAD, OPAQUE, WOVEN, InHalf
from pyro.infer import Predictive
from torch import Tensor, nn
from toys import EXACT, GUIDES, NATURAL, NUM_DATA, mlp, normal_prior, regression_data, regressor

from pyrocurv.curvature import EKFAC, KFAC, Curvature, estimate
from pyrocurv.guides import BlockGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import SecondOrderOptimizer

EVERY = [
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d,
    nn.BatchNorm2d, nn.MultiheadAttention, nn.RNNBase, layer_cases.Products, layer_cases.OwnOp,
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        yield


# --- conjugate --------------------------------------------------------------------------------

# one layer, linear in its weights: the exact posterior is Gaussian
SINGLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "grouped": (lambda: nn.Conv1d(4, 6, 2, groups=2), lambda: torch.randn(9, 4, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 2, groups=3), lambda: torch.randn(9, 3, 3, 2)),
    "transposed": (
        lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), lambda: torch.randn(9, 2, 3),
    ),
    "embedding": (lambda: nn.Embedding(4, 3), lambda: torch.randint(4, (9, 2))),
    "padded": (lambda: nn.Embedding(4, 3, padding_idx=1), lambda: torch.randint(4, (9, 2))),
    "layer-norm": (lambda: nn.LayerNorm(3), lambda: torch.randn(9, 2, 3)),
    "group-norm": (lambda: nn.GroupNorm(1, 2), lambda: torch.randn(9, 2, 3)),
}  # fmt: skip


CONJUGATE = [
    (name, structure) for name in SINGLE for structure in ("block", "full", "kfac")
    if structure != "kfac" or "norm" in name
]


@pytest.mark.parametrize(("name", "structure"), CONJUGATE)
def test_one_step_is_the_exact_posterior(name: str, structure: str) -> None:
    """Kronecker factors are exact where a layer has a 2 x 2 matrix for each unit."""
    make, inputs = SINGLE[name]
    net, x, noise = make().double(), inputs(), 0.3
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        y = torch.randn_like(net(x))
        zero = torch.func.functional_call(net, {n: 0 * p for n, p in net.named_parameters()}, (x,))
    ggn = oracles.ggn(net, x, y, "normal") / noise**2
    J = oracles.jacobian(net, x).flatten(0, 1)
    mean = torch.cat([torch.full((p.numel(),), float("norm" in name and n == "weight"))
                      for n, p in net.named_parameters()]).double()
    precision = ggn + torch.eye(len(ggn), dtype=ggn.dtype) / 0.7**2
    residual = (y - zero).flatten() - J @ mean
    expected = mean + torch.linalg.solve(precision, J.T @ residual / noise**2)

    model = Regressor(bayesianize(net, prior=0.7, layers=[type(net)]), len(x), noise=noise)
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide, lr=1.0, momentum=0.0, damping=0.0, kl_clip=None, curvature=EXACT,
                **NATURAL)
    ngvi.step(x, y)
    posterior = guide.posterior
    torch.testing.assert_close(posterior.precision.dense(), precision, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(posterior.loc, expected, rtol=1e-10, atol=1e-10)


# --- every layer in every guide ---------------------------------------------------------------


def model_of(name: str, batch: int = 6) -> tuple[Classifier, Tensor, Tensor]:
    net, x = layer_cases.make(name, batch)
    y = torch.randint(2, (batch,)) if net(x).shape[-1] == 2 else torch.randint(4, (batch,))
    return Classifier(bayesianize(net.train(), layers=EVERY), 2 * batch), x, y


@pytest.mark.parametrize(("name", "structure"), [
    *((name, "kfac") for name in {**LAYERED, **WOVEN}),
    *alternating({**LAYERED, **WOVEN}, ["diag", "ekfac", "block", "full"]),
])
def test_no_weight_is_left_out(name: str, structure: str) -> None:
    model, x, y = model_of(name)
    names = {f"net.{n}" for n, _ in layer_cases.make(name, 1)[0].named_parameters()}
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide, lr=0.05, temperature=0.1, curvature=Curvature("fisher", every=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore" if name in OPAQUE else "error", ".*no supported op")
        losses = [ngvi.step(x, y) for _ in range(4)]
    assert torch.tensor(losses).isfinite().all()
    assert guide.sites.keys() == names and not guide.fallback_sites
    *lines, last = guide.summary().splitlines()
    assert {line.split()[0] for line in lines[1:]} == names
    total = f"{sum(family.block.size for family in guide.blocks):,}"
    assert last == f"{total} of {total} parameters have a posterior, at temperature 0.1"
    assert torch.linalg.eigvalsh(guide.posterior.precision.dense()).min() > 0
    fresh, file = GUIDES[structure](model), io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(
        fresh.posterior.precision.dense(), guide.posterior.precision.dense()
    )
    assert fresh.sites == guide.sites


def test_training_lowers_the_loss_of_attention() -> None:
    model, x, y = model_of("attention", 32)
    y = (x[:, 0, 0] > 0).long()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1, temperature=0.01)
    losses = [ngvi.step(x, y) for _ in range(80)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


# --- mixed precision --------------------------------------------------------------------------


def posterior_in(where: str, name: str, structure: str, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and precision after a step; autocast "inside" the network, "around" all or "nowhere".

    Later steps draw noise in an eigenbasis, which rounding may turn.
    """
    make, shape, _ = HALF[name]
    torch.manual_seed(0)
    net, x = bayesianize(make(), layers=EVERY), torch.randn(32, *shape)
    y = torch.randint(3 - (name == "attention"), (32,))
    model = Classifier(InHalf(net) if where == "inside" else net, 64)
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide, lr=0.05, curvature=Curvature(kind, every=1, batch=None))
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        ngvi.step(x, y)
    loc, precision = guide.posterior.loc.clone(), guide.posterior.precision.dense()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        assert math.isfinite(ngvi.step(x, y)) and math.isfinite(ngvi.evaluate_loss(x, y))
    return loc, precision


@pytest.mark.parametrize(
    ("name", "structure", "kind"), pairs(HALF, GUIDES, ["ggn", "hessian"])
)
def test_autocast(name: str, structure: str, kind: str) -> None:
    """Within the errors of `test_layers.test_autocast`; the prior's part has none."""
    plain, inside, around = (
        posterior_in(where, name, structure, kind) for where in ("nowhere", "inside", "around")
    )
    torch.testing.assert_close(inside, around)
    (loc, true), (_, precision) = plain, inside
    assert precision.dtype == loc.dtype == torch.float32
    error = (precision - true).norm() / true.norm()
    assert 0 < error < 4 * HALF[name][2] * 2**-8 * (2 if kind == "hessian" else 1)


# --- what no supported op consumes ------------------------------------------------------------


def test_recurrent_weights_are_named_once_and_trained() -> None:
    net = layer_cases.Recurrent().double()
    model, x = Classifier(bayesianize(net), 64), torch.randn(64, 3, 3).double()
    y = (x[:, -1, 0] > 0).long()
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, lr=0.1, temperature=0.1, num_particles=2)
    with pytest.warns(UserWarning, match="net.recurrent.weight_ih_l0 .*from gradients") as caught:
        first = ngvi.step(x, y)
    assert len(caught) == 1
    start = guide.posterior.variance.clone()
    losses = [ngvi.step(x, y) for _ in range(120)]
    assert sum(losses[-20:]) / 20 < 0.6 * first
    label = {line.split()[0]: line.split()[-2] for line in guide.summary().splitlines()[1:-1]}
    assert label["net.recurrent.weight_hh_l0"] == "diag" and label["net.head.weight"] == "kfac"
    assert not torch.equal(guide.posterior.variance[:18], start[:18])


@pytest.mark.parametrize("name", MISREAD)
@pytest.mark.parametrize("batch", [3, 4], ids=["fewer", "as many"])
def test_layers_that_do_not_see_the_examples_have_gradients_alone(name: str, batch: int) -> None:
    """Found at the first call, with four rows (or fewer) in their inputs; later ones may differ."""
    model, x, y = model_of(name, batch)
    model.num_data, guide = 20, KFACGuide(model)
    ngvi = NGVI(model, guide, lr=0.05, temperature=0.1, curvature=Curvature("fisher", every=2))
    misread = {f"net.{tensor}" for tensor in MISREAD[name][2]}
    with pytest.warns(UserWarning, match="batch .*from gradients") as caught:
        ngvi.step(x, y)
    assert len(caught) == 1
    opaque = {
        n for family in guide.blocks for n in family.block.tensors if family.block.is_untraced
    }
    assert opaque == misread
    for other in (4, 5, 2, 3):
        rows = torch.arange(other) % batch
        assert math.isfinite(ngvi.step(x[rows], y[rows]))
    assert torch.linalg.eigvalsh(guide.posterior.precision.dense()).min() > 0


def test_a_layer_that_one_example_made_look_right() -> None:
    model, x, y = model_of("code-row")
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(x[:1], y[:1])
    with pytest.warns(UserWarning, match="net.maker.weight: the rows of the layer's input") as seen:
        losses = [ngvi.step(x, y) for _ in range(21)]
    assert len(seen) == 1 and all(map(math.isfinite, losses))
    assert torch.linalg.eigvalsh(ngvi.guide.posterior.precision.dense()).min() > 0


def test_logging_a_weight_leaves_it_its_factors() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head, self.log = nn.Linear(3, 4), nn.Linear(4, 2), []

        def forward(self, x: Tensor) -> Tensor:
            self.log.append(self.layer.weight.detach().norm())
            hidden = self.layer(x)
            with torch.no_grad():
                self.log += [self.layer(x).mean(), self.layer.weight.square().sum()]
            return self.head(hidden.tanh())

    model = Classifier(bayesianize(Logging()), 12)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, curvature=Curvature("fisher", every=1))
    for _ in range(3):
        assert math.isfinite(ngvi.step(torch.randn(6, 3), torch.randint(2, (6,))))
    assert [family.block.kind for family in guide.blocks] == ["kfac", "kfac"]


def test_examples_that_meet_in_batch_norm() -> None:
    """They do in training mode: still layers, seen by rows."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model = Classifier(bayesianize(net), 12)
    guide = KFACGuide(model)
    NGVI(model, guide).step(torch.randn(6, 3), torch.randint(2, (6,)))
    assert [family.block.kind for family in guide.blocks] == ["kfac", "kfac"]


def test_the_look_at_gradients_takes_no_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    model = Classifier(bayesianize(net), 12)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    guide = KFACGuide(model)
    guide(x, y)
    torch.manual_seed(0)
    nn.functional.dropout(torch.ones(6, 4))  # of the run that makes the trace
    guide(x, y)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    KFACGuide(model)(x, y)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_alone_under_a_prior_that_moves(seed: int) -> None:
    """The scale of the prior is a latent: its precision changes in every step, by far."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(16, 2), tau).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(1, 16), 0.5).to_event(2))
        hidden = torch.einsum("ni,hi->nh", x, w).tanh()
        with pyro.plate("data", 300, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(torch.einsum("nh,oh->n", hidden, v), 0.2), obs=y)

    pyro.set_rng_seed(seed)
    x = torch.rand(300, 2) * 4 - 2
    y = (2 * x[:, 0]).sin() * x[:, 1] + 0.1 * torch.randn(300)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no supported op")
        for _ in range(60):
            rows = torch.randperm(300)[:100]
            ngvi.step(x[rows], y[rows])
            assert (guide.posterior.variance > 0).all()


# --- choice -----------------------------------------------------------------------------------

STEPS = 6


def chosen(structure, guide=KFACGuide, **kwargs) -> tuple[NGVI, tuple[Tensor, Tensor]]:
    data, model = regression_data(), Regressor(mlp(), NUM_DATA, noise=0.3)
    guide = guide(model, structure=structure, **kwargs)
    return NGVI(model, guide, lr=0.1, curvature=Curvature("ggn", every=2)), data


def labels(ngvi: NGVI) -> dict[str, str]:
    return {line.split()[0]: line.split()[-2] for line in ngvi.guide.summary().splitlines()[1:-1]}


@pytest.mark.parametrize(("structure", "first", "last"), [
    ({nn.Linear: "block"}, "block", "block"),
    ({"net.0": "diag"}, "diag", "kfac"),
    ({"net.*": "full"}, "full", "full"),
    ({"*": "ekfac", "net.2": "diag"}, "ekfac", "ekfac"),
    ({"net.2": EKFAC(rank=1), nn.Linear: "kfac-block"}, "kfac-block", "ekfac"),
    (lambda name, module: "diag" if module.out_features == 2 else None, "kfac", "diag"),
    (KFAC(num_blocks=(2, 1)), "kfac-block", "kfac-block"),
])  # fmt: skip
def test_a_structure_for_each_layer(structure, first: str, last: str) -> None:
    ngvi, data = chosen(structure)
    losses = [ngvi.step(*data) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    found = labels(ngvi)
    assert found["net.0.weight"] == found["net.0.bias"] == first
    assert found["net.2.weight"] == found["net.2.bias"] == last


def test_mixed_blocks_are_what_each_guide_has_alone() -> None:
    """The first step is at the mean, so the curvature is the same in all."""
    results = {}
    for structure in ({"net.0": "diag"}, "kfac", "diag"):
        pyro.set_rng_seed(3)
        ngvi, data = chosen(structure)
        ngvi.step(*data)
        results[str(structure)] = ngvi.guide.posterior.precision.dense()
    mixed, kfac, diag = results.values()
    first, last = slice(0, 16), slice(16, None)  # 3 x 4 + 4, 4 x 2 + 2
    torch.testing.assert_close(mixed[first, first], diag[first, first])
    torch.testing.assert_close(mixed[last, last], kfac[last, last])


def test_full_rank_thin_and_cut_agree_where_they_are_the_same() -> None:
    results = []
    for structure in ("kfac", KFAC(rank=None), KFAC(rank=20), KFAC(num_blocks=1)):
        pyro.set_rng_seed(3)
        ngvi, data = chosen(structure)
        for _ in range(STEPS):
            ngvi.step(*data)
        results.append(ngvi.guide.posterior.loc)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("left", ["point", "frozen"])
@pytest.mark.parametrize("guide", [KFACGuide, FullGuide, BlockGuide])
def test_a_layer_left_out(left: str, guide) -> None:
    ngvi, data = chosen({"net.2": left}, guide)
    ngvi.guide(*data)
    trained = ngvi.model.net[2]._buffers["_weight_initial"]
    assert torch.equal(ngvi.guide.median()["net.2.weight"], trained)
    for _ in range(STEPS):
        ngvi.step(*data)
    guide = ngvi.guide
    assert guide.sites == {"net.0.weight": (4, 3), "net.0.bias": (4,)}
    assert guide.fallback_sites == ("net.2.weight", "net.2.bias")
    assert labels(ngvi)["net.2.weight"] == left
    start = ngvi.model.net[2]._buffers["_weight_initial"]
    draws = guide.sample_posterior(4)["net.2.weight"]
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert torch.equal(draws[0], start) == (left == "frozen")
    assert torch.equal(guide.median()["net.2.weight"], draws[0])
    assert torch.equal(guide.quantiles([0.1, 0.9])["net.2.weight"], draws[:2])
    samples = Predictive(ngvi.model, guide=guide, num_samples=3)(data[0])
    assert samples["obs"].shape == (3, NUM_DATA, 2)


def test_points_and_frozen_weights_beside_each_other_and_on_disk() -> None:
    def run(ngvi: NGVI, data, steps: int) -> list[float]:
        return [ngvi.step(*data) for _ in range(steps)]

    choice = {"net.2": "point", "net.0": "frozen"}
    data = regression_data()
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    models = [Regressor(bayesianize(net.double()), NUM_DATA)]
    ngvi = NGVI(models[0], KFACGuide(models[0], structure=choice), lr=0.1)
    run(ngvi, data, 3)
    assert labels(ngvi)["sigma"] == "AutoNormal"
    file = io.BytesIO()
    torch.save({"guide": ngvi.guide.state_dict(), "ngvi": ngvi.state_dict()}, file)
    expected = run(ngvi, data, 4)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = NGVI(models[0], KFACGuide(models[0], structure=choice), lr=0.1)
    again.guide.load_state_dict(state["guide"])
    again.load_state_dict(state["ngvi"])
    assert run(again, data, 4) == expected


@pytest.mark.parametrize(("structure", "error", "reason"), [
    ({"net.9": "kfac"}, ValueError, "no layer 'net.9'; net.0, net.2 exist"),
    (lambda name, module: "points", ValueError, "'points': choose one of"),
    (lambda name, module: KFAC, TypeError, r"structure=KFAC is a class: give KFAC\(\)"),
])  # fmt: skip
def test_a_wrong_choice_changes_nothing(structure, error, reason) -> None:
    ngvi, data = chosen(structure)
    with pytest.raises(error, match=reason):
        ngvi.step(*data)
    assert not ngvi.guide.sites and ngvi.guide.prototype_trace is None


@pytest.mark.parametrize(("structure", "error", "reason"), [
    ({"net.0": "points"}, ValueError, "'points': choose one of"),
    ({1: "kfac"}, TypeError, "neither a module type nor a name"),
    (KFAC, TypeError, r"structure=KFAC is a class: give KFAC\(\)"),
    ({nn.Linear: EKFAC}, TypeError, r"structure=EKFAC is a class: give EKFAC\(\)"),
])
def test_a_choice_that_no_network_can_have(structure, error, reason) -> None:
    with pytest.raises(error, match=reason):
        KFACGuide(regressor(), structure=structure)
    with pytest.raises(error, match=reason):
        SecondOrderOptimizer(nn.Linear(3, 2), structure=structure)


def test_a_loaded_guide_of_another_choice_is_refused() -> None:
    ngvi, data = chosen({"net.0": "diag"})
    ngvi.step(*data)
    other, _ = chosen(None)
    other.guide.load_state_dict(ngvi.guide.state_dict())
    with pytest.raises(ValueError, match="the loaded guide has"):
        other.step(*data)


# --- whole networks ---------------------------------------------------------------------------


def test_resnet18() -> None:
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(num_classes=10)
    names = {f"net.{name}" for name, _ in net.named_parameters()}
    model = Classifier(bayesianize(net), num_data=100)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, temperature=0.1, curvature=Curvature("fisher", every=2))
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    losses = [ngvi.step(x, y) for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()
    lines = [line.split() for line in guide.summary().splitlines()[1:-1]]
    assert {line[0] for line in lines} == names
    kinds = {line[0]: line[-2] for line in lines}
    assert {kinds[name] for name in guide.sites} == {"kfac"} and len(guide.sites) == 22
    assert {kinds[name] for name in names - guide.sites.keys()} == {"point"}
    assert all("bn" in n or "downsample.1" in n for n in names - guide.sites.keys())


def test_a_transformer_encoder() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1)
            self.embed = nn.Embedding(11, 8)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x)).mean(1))

    net = Encoder()
    names = {f"net.{name}" for name, _ in net.named_parameters()}
    kinds = [nn.Linear, nn.MultiheadAttention, nn.LayerNorm, nn.Embedding]
    model = Classifier(bayesianize(net, layers=kinds), num_data=64)
    guide = KFACGuide(model, structure={nn.Embedding: "diag"})
    ngvi = NGVI(model, guide, temperature=0.1, lr=0.05, curvature=Curvature("fisher", every=2))
    x = torch.randint(11, (64, 5))
    y = (x.sum(1) % 3).long()
    losses = [ngvi.step(x, y) for _ in range(6)]
    assert torch.tensor(losses).isfinite().all()
    assert guide.sites.keys() == names
    kinds_of = {line.split()[0]: line.split()[-2] for line in guide.summary().splitlines()[1:-1]}
    assert {kind for name, kind in kinds_of.items() if "embed" not in name} == {"kfac"}
    model.eval()
    samples = Predictive(model, guide=guide, num_samples=3)(x)
    assert samples["obs"].shape == (3, 64)


@pytest.mark.parametrize("name", HIDDEN)
def test_weights_out_of_sight_have_gradients_alone(name: str) -> None:
    """From where they are, with a warning; not the fallback's, which would start elsewhere."""
    model, x, y = model_of(name)
    guide = KFACGuide(model)
    net, _ = layer_cases.make(name, 6)
    start = {f"net.{n}": p.detach().clone() for n, p in net.named_parameters()}
    with pytest.warns(UserWarning, match="an op that could not be traced.*from gradients"):
        guide(x, y)
    opaque = {
        n for family in guide.blocks for n in family.block.tensors if family.block.is_untraced
    }
    assert opaque == {f"net.{tensor}" for tensor in HIDDEN[name][2]}
    assert not guide.fallback_sites
    for site in opaque:
        torch.testing.assert_close(guide.median()[site], start[site], check_dtype=False)


STRUCTURES = "diag", "block", "kfac", "ekfac", "kfac-block", KFAC(sharing="reduce"), KFAC(rank=1)


@pytest.mark.parametrize(("name", "structure"), [  # every other cell of the table
    (name, structure)
    for i, name in enumerate(n for n in {**LAYERED, **WOVEN} if n not in OPAQUE)
    for j, structure in enumerate(STRUCTURES) if (i + j) % 2 == 0
], ids=str)
def test_the_first_posterior_is_that_of_the_curvature_estimated(name: str, structure: Any) -> None:
    """N/B times the sum over the batch, plus the prior's precision; the same for all weights."""
    if name == "embedding" and structure not in ("diag", "block"):
        pytest.skip("padding that bayesianize keeps has no gradient in G, where a module's has")
    net, x = layer_cases.make(name, 6)
    y = torch.zeros_like(net(x))
    matrix = estimate(net, x, y, likelihood="normal", curvature="ggn", structure=structure).dense()
    order = {n: p.numel() for n, p in net.named_parameters()}
    bayesianize(net, normal_prior(0.5, 0.5), layers=EVERY)
    model = Regressor(net, 12, noise=1.0)
    guide = KFACGuide(model, structure=lambda *_: structure)
    spec = Curvature("ggn", batch=None, initial=0.0)
    NGVI(model, guide, lr=1e-9, temperature=1.0, curvature=spec).step(x, y)
    rows = torch.arange(len(matrix)).split(list(order.values()))
    here = dict(zip(order, rows, strict=True))
    index = torch.cat([here[site.removeprefix("net.")] for site in guide.sites])
    wanted = 2 * matrix[index][:, index] + 4 * torch.eye(len(index)).double()
    torch.testing.assert_close(
        guide.posterior.precision.dense(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.max())
    )
