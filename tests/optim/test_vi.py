"""VIOptimizer: the steps of NGVI without Pyro, the presets against their papers, the contexts."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.guides import BlockGuide, DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim import (
    SecondOrderOptimizer,
    VIOptimizer,
    ivon,
    noisy_ekfac,
    noisy_kfac,
    vogn,
)
from pyrocurv.posterior.temperature import TemperatureRule

GUIDES = {
    "diag": DiagonalGuide, "kfac": KFACGuide, "ekfac": EKFACGuide, "block": BlockGuide,
    "full": FullGuide,
}

N = 48


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.unsqueeze(1))[0][:, -1])


def classes(size: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 5), torch.randint(3, (size,))


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def step(optimizer: VIOptimizer, net: nn.Module, x: Tensor, y: Tensor, samples: int = 1) -> None:
    if samples > 1:  # whose curvature is their mean
        optimizer.num_samples = samples
        optimizer.step(lambda: F.cross_entropy(net(x), y).backward())
        return
    optimizer.zero_grad()
    with optimizer.sampled_params():
        F.cross_entropy(net(x), y).backward()
    optimizer.step()


# ---- one engine ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:.*consumed by no supported op")
@pytest.mark.parametrize(("structure", "curvature", "samples", "make"), [
    (structure, curvature, samples, makes[(i + j) % len(makes)])
    for i, structure in enumerate(GUIDES) for j, (curvature, samples, *makes) in enumerate([
        (Curvature("fisher", every=3), 1, small, convolutional, Recurrent),
        (Curvature("fisher", every=3), 4, small, convolutional, Recurrent),
        (Curvature("empirical", every=2, batch=None), 1, small, convolutional, Recurrent),
        (Curvature("ggn", every="auto"), 3, small, convolutional, Recurrent),
        # the fused recurrent kernel has no second derivative
        (Curvature("hessian", every="schedule"), 2, small, convolutional),
    ])
])
def test_steps_are_those_of_ngvi(
    structure: str, curvature: Curvature, samples: int, make: Callable[[], nn.Module]
) -> None:
    net = make()
    model = Classifier(bayesianize(copy.deepcopy(net)), N)
    numbers: dict[str, Any] = {"lr": 0.05, "temperature": 0.5, "curvature": curvature}
    torch.manual_seed(1)
    optimizer = VIOptimizer(net, N, structure=structure, **numbers)
    torch.manual_seed(1)
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide, num_particles=samples, **numbers)
    for _ in range(8):
        x, y = classes()
        step(optimizer, net, x, y, samples)
        ngvi.step(x, y)
    mean = guide.median()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), mean[f"net.{name}"].detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(optimizer.kl(), guide.kl().detach(), rtol=1e-9, atol=1e-8)


@pytest.mark.usefixtures("double")
def test_a_normal_likelihood_is_a_regressor_of_unit_noise() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    model = Regressor(bayesianize(copy.deepcopy(net)), N, noise=1.0)
    torch.manual_seed(1)
    optimizer = VIOptimizer(net, N, likelihood="normal", temperature="auto")
    torch.manual_seed(1)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, temperature="auto")
    for _ in range(5):
        x, y = torch.randn(16, 5), torch.randn(16, 1)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            (F.mse_loss(net(x), y) / 2).backward()
        optimizer.step()
        ngvi.step(x, y)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), guide.median()[f"net.{name}"].detach())


# ---- the presets --------------------------------------------------------------------------------


def normal_kl(mean: Tensor, precision: Tensor, delta: float) -> Tensor:
    """KL(N(mean, 1/precision) ‖ N(0, 1/δ))."""
    ratio = delta / precision
    return (ratio + delta * mean.square() - 1 - ratio.log()).sum() / 2


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of every example's loss, [B, P]."""
    rows = []
    for a, b in zip(x, y, strict=True):
        loss = F.cross_entropy(net(a[None]), b[None])
        grads = torch.autograd.grad(loss, [*net.parameters()])
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("samples", [1, 3])
def test_vogn_is_its_equations(samples: int) -> None:
    net, delta, lr, beta1, beta2 = small(), 0.7, 0.05, 0.8, 0.6
    optimizer = vogn(net, N, lr, prior_precision=delta, beta1=beta1, beta2=beta2)
    mean, m, s, share = flat(net), torch.zeros(57), torch.zeros(57), delta / N
    for t in range(1, 7):
        x, y = classes()
        optimizer.zero_grad()
        squares, slope = torch.zeros(57), torch.zeros(57)
        for number in range(samples):
            with optimizer.sampled_params():
                F.cross_entropy(net(x), y).backward()
                theta = copy.deepcopy(net)
            rows = gradients(theta, x, y)
            slope += rows.mean(0) / samples
            if number == 0:
                squares = rows.square().mean(0)
        optimizer.step()
        s += max(1 - beta2, 1 / t) * (squares - s)
        m += (1 - beta1) * (slope - m)
        mean = mean - lr * (m / (1 - beta1**t) + share * mean) / (s + share)
        torch.testing.assert_close(flat(net), mean)
        torch.testing.assert_close(optimizer.kl(), normal_kl(mean, N * (s + share), delta))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("antithetic", [False, True])
def test_ivon_is_its_equations(samples: int, antithetic: bool) -> None:
    net, delta, lr, beta1, beta2, start = small(), 1e-2, 0.05, 0.8, 0.9, 0.3
    optimizer = ivon(
        net, N, lr, weight_decay=delta, beta1=beta1, beta2=beta2, hess_init=start,
        antithetic=antithetic,
    )
    mean, g, h = flat(net), torch.zeros(57), torch.full((57,), start)
    for t in range(1, 9):
        x, y = classes()
        optimizer.zero_grad()
        slope, hessian = torch.zeros(57), torch.zeros(57)
        for _ in range(samples):
            with optimizer.sampled_params():
                F.cross_entropy(net(x), y).backward()
                theta = copy.deepcopy(net)
            assert not torch.equal(flat(theta), mean)  # sampled from the first step on
            one = gradients(theta, x, y).mean(0)
            slope += one / samples
            hessian += one * (flat(theta) - mean) * N * (h + delta) / samples
        optimizer.step()
        g = beta1 * g + (1 - beta1) * slope
        change = (1 - beta2) ** 2 * (h - hessian).square() / (2 * (h + delta))
        h = beta2 * h + (1 - beta2) * hessian + change
        mean = mean - lr * (g / (1 - beta1**t) + delta * mean) / (h + delta)
        torch.testing.assert_close(flat(net), mean)
        kl = normal_kl(mean, N * (h + delta), delta * N)
        torch.testing.assert_close(optimizer.kl(), kl)


def test_ivon_draws_from_its_posterior() -> None:
    net, draws = small(), 4000
    optimizer = ivon(net, N, weight_decay=1e-2, hess_init=0.5)
    found = torch.stack([_sample(optimizer, net) for _ in range(draws)])
    z = (found - flat(net)) * (N * (0.5 + 1e-2)) ** 0.5
    assert (z.mean(0).abs() * draws**0.5).max() < 4.5
    assert ((z.square().mean(0) - 1).abs() * (draws / 2) ** 0.5).max() < 4.5


def _sample(optimizer: VIOptimizer, net: nn.Module) -> Tensor:
    with optimizer.sampled_params():
        return flat(net)


@pytest.mark.parametrize(("make", "kind", "structure"), [
    (noisy_kfac, "fisher", "kfac"), (noisy_ekfac, "fisher", "ekfac"), (vogn, "empirical", "diag"),
    (ivon, "noise", "diag"),
])
def test_presets_are_rows_of_the_table(make: Any, kind: str, structure: str) -> None:
    net = small()
    optimizer = make(net, N, temperature=0.5)
    assert type(optimizer) is VIOptimizer
    assert (optimizer.curvature.kind, optimizer.structure) == (kind, structure)
    for _ in range(3):
        step(optimizer, net, *classes())
    assert torch.isfinite(flat(net)).all()


# ---- contexts -----------------------------------------------------------------------------------


@pytest.fixture
def trained() -> tuple[nn.Module, VIOptimizer]:
    net = small()
    optimizer = VIOptimizer(net, N, temperature=0.5, curvature=Curvature("fisher", every=2))
    for _ in range(4):
        step(optimizer, net, *classes())
    return net, optimizer


@pytest.mark.parametrize("make", [vogn, ivon, noisy_kfac])
def test_what_is_frozen_later_stays(make: Callable[..., VIOptimizer]) -> None:
    net = small()
    optimizer = make(net, N)
    step(optimizer, net, *classes())
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone(), net[2].weight.clone()
    for _ in range(3):
        step(optimizer, net, *classes())
    assert torch.equal(before[0], net[0].weight) and not torch.equal(before[1], net[2].weight)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_the_mean_comes_back_whatever_is_raised(
    trained: tuple[nn.Module, VIOptimizer], error: type[BaseException]
) -> None:
    net, optimizer = trained
    before, again = flat(net), _sample(optimizer, net)
    x, y = classes()
    state = copy.deepcopy(optimizer._stream.state_dict())
    with pytest.raises(error), optimizer.sampled_params():
        assert not torch.equal(flat(net), before)
        F.cross_entropy(net(x), y).backward()
        raise error
    assert torch.equal(flat(net), before)
    assert torch.equal(state["states"]["cpu"], optimizer._stream.states["cpu"])
    with pytest.raises(RuntimeError, match="without a sample"):  # that one does not count
        optimizer.step()
    assert not torch.equal(again, before)


def test_samples_inside_samples_and_steps_inside(trained: tuple[nn.Module, VIOptimizer]) -> None:
    net, optimizer = trained
    before = flat(net)
    with (
        pytest.raises(RuntimeError, match="inside another"), optimizer.sampled_params(),
        optimizer.sampled_params(),
    ):
        pass
    x, y = classes()
    with optimizer.sampled_params():
        F.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError, match="inside sampled_params"), optimizer.sampled_params():
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(RuntimeError, match="inside of sampled"), optimizer.sampled_params():
        optimizer.load_state_dict(state)
    assert torch.equal(flat(net), before)
    optimizer.step()  # from the sample before, which is not lost


def test_the_mean_can_be_used_inside_a_sample(trained: tuple[nn.Module, VIOptimizer]) -> None:
    net, optimizer = trained
    before = flat(net)
    with optimizer.use_mean():
        assert torch.equal(flat(net), before)
    with optimizer.sampled_params():
        sample = flat(net)
        with optimizer.use_mean():
            assert torch.equal(flat(net), before)
        assert torch.equal(flat(net), sample)
        optimizer.predict(torch.randn(2, 5), num_samples=1)
        assert torch.equal(flat(net), sample)
        with optimizer.use_mean():
            assert torch.equal(flat(net), before)
    assert torch.equal(flat(net), before)


def test_antithetic_samples_mirror_each_other(trained: tuple[nn.Module, VIOptimizer]) -> None:
    net, optimizer = trained
    x, y = classes()
    optimizer.zero_grad()
    mean, found = flat(net), []
    for _ in range(3):  # the first is the mirror image of the last step's
        with optimizer.sampled_params():
            found.append(flat(net))
            F.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(found[1] + found[2], 2 * mean)
    assert not torch.allclose(found[0], found[2])


def test_predictions_spread_as_the_posterior(trained: tuple[nn.Module, VIOptimizer]) -> None:
    net, optimizer = trained
    x, before = torch.randn(7, 5), flat(net)
    outputs = optimizer.predict(x, num_samples=6)
    assert outputs.shape == (6, 7, 3) and not outputs.requires_grad
    assert torch.equal(flat(net), before)
    assert (outputs.std(0) > 0).all()
    assert optimizer.predict(x).shape == (1, 7, 3)
    torch.manual_seed(4)
    first = optimizer.predict(x, num_samples=3)
    torch.manual_seed(4)
    assert torch.equal(first, optimizer.predict(x, num_samples=3))
    with optimizer.sampled_params():  # around the mean all the same
        sample = flat(net)
        torch.manual_seed(4)
        assert torch.equal(first, optimizer.predict(x, num_samples=3))
        assert torch.equal(flat(net), sample)


def test_prediction_before_training_is_the_network() -> None:
    net, x = small(), torch.randn(4, 5)
    optimizer = VIOptimizer(net, N)
    assert torch.equal(optimizer.predict(x, num_samples=2), net(x).expand(2, 4, 3))
    assert optimizer.kl() == 0


def test_evaluation_inside_a_sample_is_no_sample(trained: tuple[nn.Module, VIOptimizer]) -> None:
    net, optimizer = trained
    with optimizer.sampled_params(), torch.no_grad():
        net(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step()


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
def test_closures_are_called_for_each_sample() -> None:
    def run(closed: bool) -> Tensor:
        torch.manual_seed(0)
        net = small()
        optimizer = VIOptimizer(net, N, num_samples=3)
        for number in range(4):
            torch.manual_seed(number)
            x, y = classes()

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            if closed:
                assert optimizer.step(closure) > 0
            else:
                step(optimizer, net, x, y, 3)
        return flat(net)

    torch.testing.assert_close(run(True), run(False))


@pytest.mark.usefixtures("double")
def test_augmentation_multiplies_the_data_and_warmup_heats_up() -> None:
    def run(size: int, **numbers: Any) -> Tensor:
        torch.manual_seed(0)
        net = small()
        optimizer = VIOptimizer(net, size, **numbers)
        for number in range(3):
            torch.manual_seed(number)
            step(optimizer, net, *classes())
        return torch.cat([flat(net), optimizer.kl()[None]])

    torch.testing.assert_close(run(N, augmentation=2.0), run(2 * N))
    torch.testing.assert_close(run(N, kl_warmup=1), run(N))
    assert not torch.allclose(run(N, kl_warmup=100), run(N))
    optimizer = VIOptimizer(small(), N, temperature=0.8, kl_warmup=4)
    net = optimizer.net
    temperatures = []
    for _ in range(6):
        step(optimizer, net, *classes())
        temperatures.append({b.hyperparameters.temperature for b in optimizer._posterior.blocks})
    for (temperature,), expected in zip(temperatures, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], strict=True):
        assert temperature == pytest.approx(expected)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_an_automatic_temperature_is_by_the_weights_that_are_determined(
    likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the groups that have no other; r is that of the last estimate, γ/N at N data."""
    for name, value in {"MIN_STEPS": 5, "PROGRESS": 1.0, "DIVERGED": 1.0, "LARGEST": 0.1}.items():
        monkeypatch.setattr(f"pyrocurv.posterior.temperature.{name}", value)
    net = small()  # of 57 weights
    optimizer = VIOptimizer(net, 12, likelihood=likelihood, augmentation=1.5, params=[
        {"params": net[0].parameters()}, {"params": net[2].parameters(), "temperature": 0.7},
    ])
    temperature, seen = 0.02, []
    for step in range(25):
        with optimizer.sampled_params():
            out, y = net(torch.randn(11, 5)), torch.randint(3, (11,))
            loss = F.cross_entropy(out, y) if likelihood == "categorical" else out.square().mean()
            loss.backward()
        optimizer.step()
        first, second = (b.hyperparameters.temperature for b in optimizer._posterior.blocks)
        assert first == pytest.approx(temperature) and second == 0.7
        state = optimizer._posterior.temperature
        temperature = TemperatureRule("auto")(state, step)
        seen.append(state)
        assert temperature == pytest.approx(
            max(0.02, 0.1 * min(1, 0.1 / state.mean_square) ** 3) if step >= 5 else 0.02
        )
    assert seen[0].determined == pytest.approx(57 / 18) and seen[19].determined == 57 / 18
    assert 1 / 18 < seen[20].determined < 57 / 18
    assert len({state.mean_square for state in seen}) == 2


def test_groups_have_priors_and_temperatures_of_their_own() -> None:
    net = small()
    optimizer = VIOptimizer(net, N, params=[
        {"params": net[0].parameters(), "prior_precision": 1e6, "temperature": 2.0},
        {"params": net[2].parameters()},
    ], prior_precision=1.0, temperature=1.0)
    for _ in range(4):
        step(optimizer, net, *classes())
    first, second = (state.precision.diag() for state in optimizer._posterior.blocks)
    assert first.min() >= 1e6 > second.max()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diag", "full"])
@pytest.mark.parametrize("steps", [3, 4])  # with a noise to be mirrored, and without
def test_a_resumed_run_is_the_uninterrupted_one(structure: str, steps: int) -> None:
    def made() -> tuple[nn.Module, VIOptimizer]:
        torch.manual_seed(0)
        net = small()
        return net, VIOptimizer(net, N, structure=structure, curvature=Curvature(
            "fisher", every=2, batch=8))

    def go(net: nn.Module, optimizer: VIOptimizer, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            step(optimizer, net, *classes())

    whole, first, second = made(), made(), made()
    go(*whole, range(8))
    go(*first, range(steps))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    go(*second, range(steps, 8))
    assert torch.equal(flat(whole[0]), flat(second[0]))
    assert torch.equal(whole[1].kl(), second[1].kl())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_as_the_original(
    trained: tuple[nn.Module, VIOptimizer], copied: Callable[[Any], Any]
) -> None:
    other = copied(trained)
    x, y = classes()
    for net, optimizer in (trained, other):
        step(optimizer, net, x, y)
    assert torch.equal(flat(trained[0]), flat(other[0]))


def test_bf16_autocast_sees_each_sample() -> None:
    net = small()
    optimizer = VIOptimizer(net, N, temperature=5.0)
    for _ in range(2):
        step(optimizer, net, *classes())
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):  # which keeps the weights that it has cast
        outputs = optimizer.predict(x, num_samples=4)
    assert len(outputs.flatten(1).unique(dim=0)) == 4


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {"num_data": 0}, {"num_data": 2.5}, {"prior_precision": -1.0}, {"prior_precision": "fanin"},
    {"temperature": 0.0}, {"temperature": "hot"}, {"kl_warmup": -1}, {"augmentation": 0.0},
    {"num_samples": 0}, {"momentum": 1.0}, {"likelihood": "poisson"}, {"structure": "kfack"},
])
def test_bad_numbers_and_names(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        VIOptimizer(small(), **{"num_data": N, **options})


def test_noise_tells_of_diagonals_only() -> None:
    with pytest.raises(ValueError, match="wants structure='diag'"):
        net = small()
        optimizer = VIOptimizer(net, N, curvature="noise", structure="full")
        step(optimizer, net, *classes())


def test_noise_is_a_curvature_of_ngvi_too() -> None:
    model = Classifier(bayesianize(small()), N)
    ngvi = NGVI(model, DiagonalGuide(model), curvature=Curvature("noise", every=1, decay=0.9))
    x, y = classes(N)
    losses = [ngvi.step(x, y) for _ in range(30)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="wants structure='diag'"):
        NGVI(model, KFACGuide(model), curvature="noise").step(x, y)


def test_gradients_that_are_not_finite_change_nothing(
    trained: tuple[nn.Module, VIOptimizer]
) -> None:
    net, optimizer = trained
    before, kl = flat(net), optimizer.kl()
    with pytest.raises(FloatingPointError), optimizer.sampled_params():  # curvature is due
        F.cross_entropy(net(torch.full((4, 5), torch.nan)), torch.zeros(4).long()).backward()
    with optimizer.sampled_params():
        F.cross_entropy(net(torch.randn(4, 5)), torch.zeros(4).long()).backward()
    net[2].bias.grad[0] = torch.inf
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(flat(net), before) and torch.equal(optimizer.kl(), kl)
    step(optimizer, net, *classes())


# ---- gradients that are cleared, or scaled ------------------------------------------------------


def trained_for(make: Callable[..., VIOptimizer], one: Callable[..., None], steps: int) -> Tensor:
    """The weights after some calls of `one` (optimizer, net, x, y), each with a step of its own."""
    torch.manual_seed(2)
    net = small()
    optimizer, (x, y) = make(net, N), classes()
    for _ in range(steps):
        one(optimizer, net, x, y)
    return flat(net)


OFTEN: Any = {"beta2": 0.9}
SENSED = {"ivon": lambda net, n: ivon(net, n, **OFTEN), "kfac": noisy_kfac}


@pytest.mark.parametrize("name", SENSED)
def test_clearing_gradients_inside_of_a_sample_is_as_good(name: str) -> None:
    def inside(optimizer: VIOptimizer, net: nn.Module, x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
        optimizer.step()

    assert torch.equal(trained_for(SENSED[name], inside, 5), trained_for(SENSED[name], step, 5))


@pytest.mark.parametrize("name", SENSED)
def test_a_sample_whose_gradients_were_cleared_does_not_count(name: str) -> None:
    """As after a step that was skipped: the next one is not divided by two samples."""
    def skipped(optimizer: VIOptimizer, net: nn.Module, x: Tensor, y: Tensor) -> None:
        with optimizer.sampled_params():
            (1e6 * F.cross_entropy(net(-x), y)).backward()
        optimizer.zero_grad()
        step(optimizer, net, x, y)

    assert torch.equal(trained_for(SENSED[name], skipped, 5), trained_for(SENSED[name], step, 5))


def test_a_curvature_of_gradients_wants_them_unscaled() -> None:
    def scaled(optimizer: VIOptimizer, net: nn.Module, x: Tensor, y: Tensor) -> None:
        scaler = torch.amp.GradScaler("cpu")
        optimizer.zero_grad()
        with optimizer.sampled_params():
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    make = SENSED["ivon"]
    torch.testing.assert_close(trained_for(make, scaled, 5), trained_for(make, step, 5))
    net = small()
    optimizer, (x, y), scaler = make(net, N), classes(), torch.amp.GradScaler("cpu")
    with optimizer.sampled_params():
        scaler.scale(F.cross_entropy(net(x), y)).backward()
    before = flat(net)
    with pytest.raises(RuntimeError, match="65536 times larger .* call scaler.unscale_"):
        scaler.step(optimizer)
    assert torch.equal(flat(net), before)


# ---- refused steps ------------------------------------------------------------------------------


def refuse(optimizer: VIOptimizer, net: nn.Module, how: str) -> None:
    x, y = classes()
    if how == "closure":
        with pytest.raises(FloatingPointError):
            optimizer.step(lambda: (torch.nan * F.cross_entropy(net(x), y)).backward())
        return
    if how == "output":
        with pytest.raises(FloatingPointError), optimizer.sampled_params():
            F.cross_entropy(net(x * torch.nan), y).backward()
        return
    for _ in range(3 if how == "samples" else 1):
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()
    if how == "cleared":
        optimizer.zero_grad()
        return
    net[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()


@pytest.mark.parametrize(("make", "how"), [
    *product([noisy_kfac, vogn, ivon], ["gradient", "samples", "closure", "cleared"]),
    (vogn, "output"),  # which has a curvature due at every step
], ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("steps", [0, 1])
def test_a_refused_step_leaves_the_random_stream(
    make: Callable[..., VIOptimizer], how: str, steps: int
) -> None:
    """The next steps are those of a run without it."""
    def run(refused: bool) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        net = small()
        optimizer = make(net, N)
        for number in range(steps + 2):
            torch.manual_seed(number)
            x, y = classes()
            if refused and number == steps:
                before = optimizer.state_dict()["stream"]
                refuse(optimizer, net, how)
                after = optimizer.state_dict()["stream"]
                assert before["states"].keys() == after["states"].keys()
                assert all(torch.equal(after["states"][k], v) for k, v in before["states"].items())
            step(optimizer, net, x, y)
        return flat(net), optimizer.state_dict()

    (found, _), (wanted, _) = run(True), run(False)
    assert torch.equal(found, wanted)


# ---- the closures of trainers -------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("make", [noisy_kfac, ivon], ids=lambda make: make.__name__)
def test_a_closure_that_does_nothing_keeps_the_samples(
    make: Callable[..., VIOptimizer], samples: int
) -> None:
    """As Lightning passes one to `step` in manual optimization."""
    def run(closure: Callable[[], None] | None) -> Tensor:
        torch.manual_seed(0)
        net, (x, y) = small(), classes()
        optimizer = make(net, N, num_samples=samples)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(samples):
                with optimizer.sampled_params():
                    F.cross_entropy(net(x), y).backward()
            optimizer.step(*[closure] * (closure is not None))
        return flat(net)

    assert torch.equal(run(lambda: None), run(None))


@pytest.mark.parametrize("make", [
    lambda net: SecondOrderOptimizer(net), lambda net: VIOptimizer(net, N, num_samples=2),
    lambda net: ivon(net, N),
], ids=["second order", "variational", "ivon"])
def test_the_closure_of_a_trainer_is_the_plain_loop(make: Callable[[nn.Module], Any]) -> None:
    """Lightning's automatic optimization clears the gradients between forward and backward."""
    def run(automatic: bool) -> Tensor:
        torch.manual_seed(0)
        net, (x, y) = small(), classes()
        optimizer = make(net)

        def trainer() -> Tensor:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            return loss.detach()

        def plain() -> Tensor:
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(4):
            if automatic:
                assert optimizer.step(trainer).isfinite()
            elif isinstance(optimizer, VIOptimizer):
                optimizer.step(plain)
            else:
                optimizer.zero_grad()
                plain()
                optimizer.step()
        return flat(net)

    assert torch.equal(run(True), run(False))


def test_a_closure_without_a_pass_and_no_sample_changes_nothing() -> None:
    net, (x, y) = small(), classes()
    optimizer = VIOptimizer(net, N)
    F.cross_entropy(net(x), y).backward()
    gradients = [p.grad for p in net.parameters()]
    with pytest.raises(RuntimeError, match="without a sample"):
        optimizer.step(lambda: None)
    assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))


def test_passes_at_the_mean_are_told() -> None:
    """Their gradients would be part of a step as if they were those of a sample."""
    net, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.arange(8) % 2
    optimizer = VIOptimizer(net, num_data=8)

    def at_a_sample() -> None:
        with optimizer.sampled_params():
            F.cross_entropy(net(x), y).backward()

    F.cross_entropy(net(x), y).backward()
    with pytest.warns(UserWarning, match="outside of sampled_params"):
        at_a_sample()
    optimizer.zero_grad()
    at_a_sample()
    F.cross_entropy(net(x), y).backward()
    with pytest.warns(UserWarning, match="outside of sampled_params"):
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()  # a look at the gradients, which are cleared
    net.zero_grad()
    at_a_sample()
    optimizer.step()


# ---- what users do besides training -------------------------------------------------------------


@pytest.mark.parametrize("steps", [7, 8])
@pytest.mark.parametrize("antithetic", [True, False])
def test_blocks_without_a_backward_pass_have_new_samples(steps: int, antithetic: bool) -> None:
    """And a run goes on from its state as it would have without interruption."""
    x, y = classes()
    net = small()
    optimizer = VIOptimizer(net, N, antithetic=antithetic)
    for _ in range(steps):
        step(optimizer, net, x, y)
    samples = torch.stack([_sample(optimizer, net) for _ in range(40)])
    assert len({tuple(sample.tolist()) for sample in samples}) == 40
    assert (samples.std(0) > 0).all()
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other = small()
    resumed = VIOptimizer(other, N, antithetic=antithetic)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for _ in range(3):
        step(optimizer, net, x, y)
        step(resumed, other, x, y)
    assert torch.equal(flat(net), flat(other))


def test_predictions_between_two_samples_of_a_step_are_new() -> None:
    x, y = classes()
    net = small()
    optimizer = VIOptimizer(net, N)
    step(optimizer, net, x, y)
    with optimizer.sampled_params():
        F.cross_entropy(net(x), y).backward()
    found = [_sample(optimizer, net) for _ in range(4)]
    assert len({tuple(sample.tolist()) for sample in found}) == 4
    optimizer.step()


@pytest.mark.parametrize("make", [
    lambda net: VIOptimizer(net, N), lambda net: ivon(net, N),
    lambda net: VIOptimizer(net, N, update="natural", structure="diag"),
    lambda net: SecondOrderOptimizer(net, weight_decay=1.0),
])
def test_the_row_of_a_padding_index_stays(make: Callable[..., Any]) -> None:
    """In samples and at the mean, so that padding changes nothing."""
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Flatten(), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight[2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer = make(net)
    tokens, y = torch.randint(6, (16, 5)), torch.randint(3, (16,))
    for _ in range(4):
        optimizer.zero_grad()
        inside = getattr(optimizer, "sampled_params", nullcontext)
        with inside():
            assert net[0].weight[2].tolist() == [1, 2, 3, 4]
            F.cross_entropy(net(tokens), y).backward()
        optimizer.step()
    assert net[0].weight[2].tolist() == [1, 2, 3, 4]
    if isinstance(optimizer, VIOptimizer):
        inner = optimizer.predict(torch.full((1, 5), 2), num_samples=3)
        with optimizer.sampled_params(), torch.no_grad():
            assert (net[0].weight[3] != 0).all()
        assert inner.shape == (3, 1, 3)


def test_a_tied_row_of_a_padding_index_is_sampled() -> None:
    """As it is the weight of a class elsewhere."""
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 6)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).mean(1))

    net = Tied()
    optimizer = VIOptimizer(net, N)
    tokens, y = torch.randint(6, (16, 5)), torch.randint(6, (16,))
    before = net.head.weight[2].tolist()
    step(optimizer, net, tokens, y)
    step(optimizer, net, tokens, y)
    assert net.head.weight[2].tolist() != before


def test_groups_have_no_arguments_that_are_one_for_all() -> None:
    for name, value in {"update": "muon", "nesterov": True, "kl_warmup": 3, "num_data": 2}.items():
        with pytest.raises(ValueError, match=f"a group of VIOptimizer has no {name} of its own"):
            VIOptimizer(net := small(), N, params=[{"params": net.parameters(), name: value}])
    with pytest.raises(ValueError, match="SecondOrderOptimizer has no structure of its own, it"):
        SecondOrderOptimizer(
            net := small(), params=[{"params": net.parameters(), "structure": "diag"}]
        )
    net = small()
    groups = [{"params": net[0].parameters(), "weight_decay": 0.0, "name": "first"},
              {"params": net[2].parameters(), "decoupled_weight_decay": 0.1, "damping": 0.1}]
    VIOptimizer(net, N, params=groups)
    with pytest.warns(UserWarning, match="weight_decay=0.5 in a group of VIOptimizer is for param"):
        VIOptimizer(net, N, params=[{"params": net.parameters(), "weight_decay": 0.5}])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_without_examples(steps: int) -> None:
    x, y = classes()
    for optimizer_class in (VIOptimizer, SecondOrderOptimizer):
        net = small()
        is_posterior = optimizer_class is VIOptimizer
        optimizer: Any = optimizer_class(net, N) if is_posterior else optimizer_class(net)
        inside = optimizer.sampled_params if is_posterior else nullcontext
        for _ in range(steps):
            optimizer.zero_grad()
            with inside():
                F.cross_entropy(net(x), y).backward()
            optimizer.step()
        before = flat(net)
        with pytest.raises(ValueError, match="the batch has no examples"):
            with inside():
                net(x[:0]).sum().backward()
            optimizer.step()
        assert torch.equal(flat(net), before)
        optimizer.zero_grad()
        with inside():
            F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert not torch.equal(flat(net), before)


def test_predictions_in_train_mode_keep_the_statistics_of_batch_norm() -> None:
    x, y = classes()
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    optimizer = VIOptimizer(net, N)
    step(optimizer, net, x, y)
    before = copy.deepcopy(dict(net.named_buffers()))
    optimizer.predict(100 * x, num_samples=4)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())


@pytest.mark.parametrize("make", [noisy_kfac, noisy_ekfac, vogn, ivon])
def test_presets_have_a_curvature_of_their_own(make: Callable[..., Any]) -> None:
    for name, value in {"curvature": "ggn", "structure": "full"}.items():
        with pytest.raises(TypeError, match=f"{make.__name__} has a {name} of its own: use VIOpt"):
            make(small(), N, **{name: value})


def test_an_unfrozen_layer_is_adams_until_the_next_estimate() -> None:
    x, y = classes()
    net = small()
    optimizer = VIOptimizer(net, N, params=net[2].parameters(), curvature=Curvature("ggn", every=3))
    step(optimizer, net, x, y)
    optimizer.add_param_group({"params": net[0].parameters()})
    with pytest.warns(UserWarning, match="0.weight, 0.bias not used yet .*: Adam trains them"):
        step(optimizer, net, x, y)
    for _ in range(3):
        step(optimizer, net, x, y)
    assert "adam" not in optimizer.summary()


def test_a_summary_has_the_temperatures_of_all_groups() -> None:
    x, y = classes()
    net = small()
    optimizer = VIOptimizer(net, N, params=[
        {"params": net[0].parameters(), "temperature": 1.0},
        {"params": net[2].parameters(), "temperature": 0.01},
    ])
    step(optimizer, net, x, y)
    assert optimizer.summary().endswith("at temperature 1 and 0.01")
