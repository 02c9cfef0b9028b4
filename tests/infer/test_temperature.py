"""The automatic temperature in runs of `NGVI` and `VIOptimizer`, its warmup, and runs at chance."""

import copy
import io
from contextlib import nullcontext
from typing import Any

import oracles
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    GUIDES,
    NOISE,
    NUM_DATA,
    PRIORS,
    class_data,
    classifier,
    everything,
    exactly,
    identical,
    mlp,
    normal_prior,
    regression_data,
    regressor,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import DiagonalGuide, FullGuide, KFACGuide, StructuredGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import VIOptimizer
from pyrocurv.posterior.temperature import REFERENCE

CHANCE = "after one pass over the data the loss at samples of the posterior"


def formula(mean_square: Tensor | float) -> float:
    return 0.1 * min(1.0, 2.5 / float(mean_square)) ** 3


# ---- the temperature of a run -------------------------------------------------------------------


@pytest.fixture
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass has 5 steps at least."""
    monkeypatch.setattr("pyrocurv.posterior.temperature.MIN_STEPS", 5)


@pytest.fixture
def sensitive(monkeypatch: pytest.MonkeyPatch, short_passes: None) -> None:
    """A loss has not fallen if it is 0.2 % below its start."""
    monkeypatch.setattr("pyrocurv.posterior.temperature.PROGRESS", 0.998)


@pytest.fixture
def never_at_chance(monkeypatch: pytest.MonkeyPatch, short_passes: None) -> None:
    """Whatever the loss."""
    monkeypatch.setattr("pyrocurv.posterior.temperature.PROGRESS", 1.0)
    monkeypatch.setattr("pyrocurv.posterior.temperature.DIVERGED", 1.0)


@pytest.mark.usefixtures("never_at_chance")
@pytest.mark.parametrize("priors", PRIORS)
@pytest.mark.parametrize("structure", GUIDES)
def test_the_temperature_follows_the_curvature(structure: str, priors: str) -> None:
    """r of a linear model, whose curvature per datum is known; T is 0.02 in the first pass."""
    rows, columns, outputs = 12, 20, 4
    x, y = torch.randn(rows, columns).double(), torch.randn(rows, outputs).double()
    weight, bias = (deviation / 10 for deviation in PRIORS[priors])
    design = oracles.linear_layer_design(x, outputs)
    data = design.T @ design / NOISE**2 / REFERENCE
    if structure == "diag":
        data = data.diag().diag()
    delta = torch.cat([
        torch.full((outputs * columns,), weight**-2.0), torch.full((outputs,), bias**-2.0)
    ]).double()
    determined = torch.linalg.solve(data + delta.diag(), data)
    net = bayesianize(nn.Linear(columns, outputs).double(), normal_prior(weight, bias))
    ngvi = exactly(
        Regressor(net, rows, noise=NOISE), structure, temperature="auto", lr=0.01, num_particles=1
    )
    assert ngvi.evaluate_loss(x, y).temperature == 0.02  # before the first estimate
    for step in range(9):
        before = ngvi.guide.posterior.loc.detach() if step else None
        ngvi.step(x, y)
        expected = 0.02
        if step >= 5:  # the first step starts no pass
            square = (before * delta) @ determined @ before
            expected = formula(square / determined.trace())
            assert 0.02 < expected < 0.1
        assert ngvi.evaluate_loss(x, y).temperature == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("structure", ["diag", "kfac", "full"])
def test_what_is_left_of_the_initial_curvature_counts_as_well(structure: str) -> None:
    """The defaults on batches, from the posterior that each step has left."""
    num_data, batch, spec = 9, 3, Curvature("fisher", every=2)
    model = Classifier(mlp(0.8, 0.8, outputs=3), num_data)  # one standard deviation for all weights
    guide = GUIDES[structure](model)
    ngvi, (x, y) = NGVI(model, guide, curvature=spec), class_data(num_data)
    guide(x, y)
    for step in range(8):
        rows, mean = torch.randint(num_data, (batch,)), guide.posterior.loc.detach()
        temperature = ngvi.evaluate_loss(x, y).temperature
        ngvi.step(x[rows], y[rows])
        if step % 2 == 0:
            precision, left = guide.posterior.precision.dense().detach(), 0.95**step
            unit = torch.eye(len(precision)).to(precision)
            warm = 0.8**-2 * unit + (precision - 0.8**-2 * unit) * temperature / REFERENCE
            rest = 0.8**-2 + spec.initial * left * num_data / REFERENCE
            determined = unit - rest * torch.linalg.inv(warm)
            gamma, square = determined.trace(), mean @ determined @ mean / 0.8**2
            number = gamma + left * (len(precision) - gamma)
        seen = ngvi._posterior.temperature
        assert seen.determined == pytest.approx(float(number) / num_data, rel=1e-8)
        assert seen.mean_square == pytest.approx(float(square / number), rel=1e-8)


@pytest.mark.parametrize("structure", ["diag", "kfac"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_with_an_earlier_task_as_prior_the_temperature_is_the_highest(
    structure: str, has_norm: bool
) -> None:
    """From the second step on; the scales of a norm, whose mean is 1, are no such prior."""
    x, y = torch.randn(12, 3), torch.randint(3, (12,))
    guide, found = None, []
    for _ in range(2):
        norm = [nn.LayerNorm(4)] if has_norm else []
        net = nn.Sequential(nn.Linear(3, 4), *norm, nn.Linear(4, 3))
        optimizer = VIOptimizer(net, 12, structure=structure, prior=guide)
        for _ in range(3):
            with optimizer.sampled_params():
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
        found.append(optimizer._posterior.temperature.value)
        model = Classifier(bayesianize(net, layers=[nn.Linear]), 12)
        guide = GUIDES[structure](model)
        NGVI(model, guide).step(x, y)
    assert found == [0.02, 0.1]


class Line:
    """A regression without a network."""

    def __call__(self, x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ slope, NOISE), obs=y)


@pytest.mark.parametrize("kind", [FullGuide, DiagonalGuide])
def test_without_a_network_the_temperature_is_one(kind: type[StructuredGuide]) -> None:
    x, _ = regression_data()
    model = Line()
    ngvi = NGVI(model, kind(model), curvature="hessian")
    ngvi.step(x, x[:, 0])
    assert ngvi.evaluate_loss(x, x[:, 0]).temperature == 1.0
    assert ngvi.state_dict()["update"] == "natural"


def test_without_samples_the_temperature_is_one() -> None:
    model = regressor()
    ngvi = NGVI(model, KFACGuide(model), num_particles=0)
    for _ in range(2):
        assert ngvi.evaluate_loss(*regression_data()).temperature == 1.0
        ngvi.step(*regression_data())
    assert ngvi.state_dict()["update"] == "natural"


def test_a_sampled_network_has_whitened_muon() -> None:
    model = classifier()
    assert NGVI(model, KFACGuide(model)).state_dict()["update"] == "whitened-muon"
    assert VIOptimizer(nn.Linear(2, 2), 4).state_dict()["update"] == "whitened-muon"


def test_another_name_is_refused() -> None:
    model = classifier()
    with pytest.raises(ValueError, match="temperature='warm'"):
        NGVI(model, KFACGuide(model), temperature="warm")


# ---- NGVI and VIOptimizer -----------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("temperature", [0.8, "auto"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_warmup_of_ngvi_is_that_of_the_optimizer(temperature: Any, warmup: int) -> None:
    net, num_data = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), 20
    model = Classifier(bayesianize(copy.deepcopy(net)), num_data)
    options: dict[str, Any] = {"temperature": temperature, "kl_warmup": warmup, "lr": 0.05}
    torch.manual_seed(1)
    optimizer = VIOptimizer(net, num_data, **options)
    torch.manual_seed(1)
    guide = KFACGuide(model)
    ngvi, temperatures = NGVI(model, guide, **options), []
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    for _ in range(6):
        temperatures.append(ngvi.evaluate_loss(x, y).temperature)
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        ngvi.step(x, y)
        found = [state.hyperparameters.temperature for state in optimizer._posterior.blocks]
        assert found == pytest.approx(2 * temperatures[-1:], rel=1e-9)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), guide.median()[f"net.{name}"].detach())
    if temperature != "auto":
        shares = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] if warmup else [1.0] * 6
        assert temperatures == pytest.approx([0.8 * share for share in shares])


@pytest.mark.parametrize("kl_warmup", [-1, 1.5, "auto", None])
def test_a_warmup_is_a_number_of_steps(kl_warmup: Any) -> None:
    model = classifier()
    with pytest.raises(ValueError, match="kl_warmup=.*an integer of at least 0"):
        NGVI(model, KFACGuide(model), kl_warmup=kl_warmup)


# ---- at chance ----------------------------------------------------------------------------------


def stuck(num_data: int = NUM_DATA, **options: Any) -> NGVI:
    """An NGVI that hardly moves."""
    torch.manual_seed(0)
    model = Classifier(mlp(outputs=3), num_data)
    return NGVI(model, KFACGuide(model), lr=1e-9, **options)


def restored(ngvi: NGVI) -> list[dict[str, Any]]:
    torch.save([ngvi.guide.state_dict(), ngvi.state_dict()], buffer := io.BytesIO())
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.usefixtures("sensitive")
@pytest.mark.parametrize("saved_at", [3, 8])
def test_a_run_at_chance_is_colder_after_each_pass_and_resumed_bit_for_bit(saved_at: int) -> None:
    x, y = class_data()
    ngvi, temperatures, state = stuck(), [], None
    with pytest.warns(UserWarning, match=CHANCE) as caught:
        for step in range(14):
            if step == saved_at:
                state = restored(ngvi)
            ngvi.step(x, y)
            temperatures.append(ngvi.evaluate_loss(x, y).temperature)
    assert "the temperature is reduced" in str(caught[0].message) and len(caught) == 1
    # the first step starts no pass; the loss of the second is lower by more than 0.2 %
    assert temperatures == pytest.approx([0.02] * 5 + [0.002] * 5 + [0.01] * 4)
    other = stuck()
    other.guide(x, y)
    other.guide.load_state_dict(state[0])
    other.load_state_dict(state[1])
    with pytest.warns(UserWarning, match=CHANCE) if saved_at < 5 else nullcontext():
        for expected in temperatures[saved_at:]:
            other.step(x, y)
            assert other.evaluate_loss(x, y).temperature == expected
    assert identical(everything(other), everything(ngvi))


def categorical(logits: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.Categorical(logits=logits)


class Chance:
    """A `VIOptimizer` that hardly moves, and the loop around it."""

    def __init__(self, loop: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.twin, self.loop = copy.deepcopy(self.net), loop
        if "own" in loop:
            options["likelihood"] = categorical
        torch.manual_seed(1)
        self.optimizer = VIOptimizer(self.net, NUM_DATA, lr=1e-9, **options)

    def step(self, x: Tensor, y: Tensor) -> float:
        """Of the temperature that is returned."""
        parts = [*zip(x.chunk(2), y.chunk(2), strict=True)] if self.loop == "halves" else [(x, y)]

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            losses = [F.cross_entropy(self.net(a), b) / len(parts) for a, b in parts]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum().detach()

        if "closure" in self.loop:
            self.optimizer.step(closure)
        else:
            with self.optimizer.sampled_params():
                closure()
            self.optimizer.step()
        return self.optimizer._posterior.blocks[0].hyperparameters.temperature


@pytest.mark.usefixtures("sensitive")
@pytest.mark.parametrize(("loop", "temperature"), [
    ("plain", "auto"), ("closure", "auto"), ("halves", "auto"), ("plain", 3.0),
    ("closure of one's own likelihood", "auto"),
])
def test_an_optimizer_at_chance_is_as_cold_as_ngvi(loop: str, temperature: Any) -> None:
    """It reads the loss off the gradient in the output; or a closure has returned it."""
    x, y = class_data()
    chance = Chance(loop, temperature=temperature)
    model = Classifier(bayesianize(chance.twin), NUM_DATA)
    torch.manual_seed(1)
    ngvi = NGVI(model, KFACGuide(model), lr=1e-9, temperature=temperature)
    with pytest.warns(UserWarning, match=CHANCE) as caught:
        for _ in range(14):
            expected = ngvi.evaluate_loss(x, y).temperature
            ngvi.step(x, y)
            assert chance.step(x, y) == pytest.approx(expected, rel=1e-6)
    assert [str(one.message) for one in caught] == 2 * [str(caught[0].message)]
    assert expected == pytest.approx(0.002 if temperature == "auto" else 3)


@pytest.mark.usefixtures("short_passes")
def test_without_a_closure_the_loss_of_ones_own_likelihood_is_unknown() -> None:
    """Then the temperature stays, without a warning, an error here."""
    chance = Chance("own")
    assert [chance.step(*class_data()) for _ in range(14)] == [0.02] * 14


@pytest.mark.usefixtures("sensitive")
@pytest.mark.parametrize("saved_at", [3, 8])
@pytest.mark.parametrize("copied", [False, True])
def test_an_optimizer_at_chance_is_resumed_bit_for_bit(saved_at: int, copied: bool) -> None:
    x, y = class_data()
    first, second = Chance("plain"), Chance("plain")
    with pytest.warns(UserWarning, match=CHANCE):
        for step in range(14):
            if step == saved_at:
                torch.save([first.net.state_dict(), first.optimizer.state_dict()],
                           buffer := io.BytesIO())
                net_state, state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
                second.net.load_state_dict(net_state)
                second.optimizer.load_state_dict(state)
                second = copy.deepcopy(first) if copied else second
            expected = first.step(x, y)
            if step >= saved_at:
                assert second.step(x, y) == expected
    for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("short_passes")
def test_an_optimizer_at_chance_is_rescued(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep network and few data, for which T = 0.1 is too high."""
    monkeypatch.setattr("pyrocurv.posterior.temperature.CAUTIOUS", 0.1)
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(size, 40), nn.Tanh()) for size in (60, 40, 40, 40, 40)]
    net = nn.Sequential(*hidden, nn.Linear(40, 2))
    x = torch.randn(16, 60)
    y, losses = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long(), []
    optimizer = VIOptimizer(net, 16)
    with pytest.warns(UserWarning, match=f"{CHANCE}.*the temperature is reduced"):
        for _ in range(50):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                loss = F.cross_entropy(net(x), y)
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[5:15]) > 6.5 and sum(losses[-5:]) < 1


@pytest.mark.usefixtures("short_passes")
def test_a_run_at_chance_keeps_a_given_temperature_and_warns_once() -> None:
    x, y = class_data()
    ngvi = stuck(temperature=3.0)
    with pytest.warns(UserWarning, match=f'{CHANCE}.*try temperature="auto"') as caught:
        for _ in range(14):
            ngvi.step(x, y)
    assert len(caught) == 1 and ngvi.evaluate_loss(x, y).temperature == 3.0


@pytest.mark.usefixtures("short_passes")
def test_a_pass_over_small_batches() -> None:
    """The first step and a twelfth of the data twelve times; a warning before is an error."""
    x, y = class_data(12)
    ngvi = stuck(num_data=12)
    for step in range(12):
        ngvi.step(x[step:step + 1], y[step:step + 1])
    with pytest.warns(UserWarning, match=CHANCE):
        ngvi.step(x[:1], y[:1])


@pytest.mark.usefixtures("short_passes")
@pytest.mark.parametrize("temperature", ["auto", 0.5])
def test_a_run_that_learns_keeps_its_temperature(temperature: Any) -> None:
    """Without a warning, which would be an error here."""
    x, y = class_data()
    model = classifier()
    ngvi = NGVI(model, KFACGuide(model), lr=0.1, temperature=temperature)
    losses = [ngvi.step(x, y) for _ in range(32)]
    assert losses[-1] < 0.8 * losses[0]
    expected = ngvi.evaluate_loss(x, y).temperature
    assert expected == (0.1 if temperature == "auto" else temperature)
