"""When curvature is estimated: the clock on streams of known movement, and its part in `NGVI`.

The streams have 32 rows, as an estimate has by default. All that is random is run with seeds 0 to
4, of which none was picked.
"""

import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from pyro import distributions as dist
from pyro import plate, sample
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from toys import GUIDES, NUM_DATA, class_data, classifier, regression_data, regressor

from pyrocurv.curvature import Curvature, collect, running_average
from pyrocurv.curvature import update_interval as clock
from pyrocurv.curvature.layer_statistics import GradientStatistics, LayerStatistics
from pyrocurv.curvature.spec import KINDS
from pyrocurv.curvature.update_interval import LONGEST, SHORTEST, START, UpdateInterval
from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, bayesianize

ROWS, STEPS, CHANGE = 32, 9_000, 4_000
STRUCTURES = {**GUIDES, "kfac-block": partial(KFACGuide, structure="kfac-block")}

each_seed = pytest.mark.parametrize("seed", range(5))
each_width = pytest.mark.parametrize("width", [65, 300])


# ---- streams ------------------------------------------------------------------------------------


class RandomStream:
    """Inputs of variances 1, 1/2, 1/3, ... in a random basis, output gradients of variance 1."""

    def __init__(self, seed: int, width: int = 65) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.scale = torch.arange(1, width + 1).double().rsqrt()
        self.bases = [torch.linalg.qr(self.normal(width, width))[0] for _ in range(2)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def pair(self, size: float = 1.0, slope: float = 1.0, basis: int = 0) -> LayerStatistics:
        a = size * self.scale * self.normal(ROWS, len(self.scale)) @ self.bases[basis]
        return LayerStatistics(a[None, :, None], slope * self.normal(1, ROWS, 1, 10))


def tick(now: UpdateInterval, step: int, *pairs: LayerStatistics) -> UpdateInterval:
    """Of a block whose layers have one use each."""
    return now.after_estimate(step, [[pair] for pair in pairs])


def intervals(
    pair: Callable[
        [int], list[LayerStatistics]
    ], steps: int = STEPS, start: UpdateInterval | None = None
) -> list[tuple[int, int]]:
    """The steps of a block's estimates, and the interval after each."""
    now, found = start or UpdateInterval(), []
    for step in range(steps):
        if step >= now.due:
            now = tick(now, step, *pair(step))
            found.append((step, now.interval))
    return found


@each_seed
@each_width
def test_at_rest_the_interval_grows_to_the_longest(width: int, seed: int) -> None:
    """With fewer than a tenth of the 450 estimates of an interval of 20."""
    stream = RandomStream(seed, width)
    found = intervals(lambda step: [stream.pair()])
    assert next(step for step, interval in found if interval == LONGEST) < 2_000
    assert found[-1][1] == LONGEST and len(found) < STEPS / 20 / 10


JUMPS: dict[str, Callable[[RandomStream], LayerStatistics]] = {
    "inputs x 3": lambda stream: stream.pair(size=3),  # A times 9
    "inputs / 3": lambda stream: stream.pair(size=1 / 3),
    "gradients x 3": lambda stream: stream.pair(slope=3),
    "gradients / 3": lambda stream: stream.pair(slope=1 / 3),
    "pure rotation": lambda stream: stream.pair(basis=1),
}


@each_seed
@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_is_noticed_at_the_next_estimate(jump: str, seed: int) -> None:
    stream = RandomStream(seed)
    found = intervals(lambda step: [JUMPS[jump](stream) if step > CHANGE else stream.pair()])
    before = max(step for step, _ in found if step <= CHANGE)
    assert dict(found)[before] == LONGEST
    after = min(step for step, _ in found if step > CHANGE)
    assert dict(found)[after] == SHORTEST and found[-1][1] == LONGEST


@each_seed
def test_a_pure_rotation_is_noticed_in_a_projection(seed: int) -> None:
    """Of 300 inputs to 64 directions."""
    stream = RandomStream(seed, 300)
    found = intervals(lambda step: [stream.pair(basis=int(step > CHANGE))])
    after = min(step for step, _ in found if step > CHANGE)
    assert dict(found)[after] == SHORTEST


@each_seed
@pytest.mark.parametrize("what", ["size", "slope"])
def test_a_slow_drift_keeps_the_interval_short(what: str, seed: int) -> None:
    """A factor of e in A or in tr G every 300 steps up to CHANGE, then rest."""
    stream = RandomStream(seed)
    found = intervals(lambda step: [stream.pair(**{what: math.exp(min(step, CHANGE) / 600)})])
    drifting = [(step, interval) for step, interval in found if step <= CHANGE]
    assert max(interval for step, interval in drifting if step > 500) < LONGEST / 2
    assert len(drifting) > 3 * 18  # at rest there are 18 estimates by then
    assert found[-1][1] == LONGEST


def test_few_large_examples_are_no_jump() -> None:
    """Rows of log-normal size: fewer than a sixth of the estimates of an interval of 20."""
    counts = []
    for seed in range(5):
        stream = RandomStream(seed)

        def pair(step: int, stream: RandomStream = stream) -> list[LayerStatistics]:
            one = stream.pair()
            size, slope = (stream.normal(1, ROWS, 1, 1).exp() for _ in range(2))
            return [LayerStatistics(one.a * size**0.7, one.g * slope)]

        counts.append(len(intervals(pair)))
    assert sum(counts) / 5 < STEPS / 20 / 6


@each_seed
def test_a_block_goes_by_the_layer_that_moves_most(seed: int) -> None:
    still, moving = RandomStream(seed), RandomStream(seed + 10)
    found = intervals(
        lambda step: [still.pair(), moving.pair(basis=int(step > CHANGE)), still.pair()]
    )
    after = min(step for step, _ in found if step > CHANGE)
    assert dict(found)[after] == SHORTEST


# ---- the statistics -----------------------------------------------------------------------------


def test_the_averages_are_those_of_the_rows() -> None:
    """Against plain sums: A, ln tr G of the halves, their variances; then weight 1/2."""
    torch.manual_seed(3)
    pairs = [LayerStatistics(torch.randn(1, 7, 4, 3).double(), torch.randn(2, 7, 4, 5).double())
             for _ in range(2)]
    values = []
    for pair in pairs:
        (a,), g = pair.a, pair.g
        halves = [range(0, 6, 2), range(1, 6, 2)]
        A = [sum(a[n].T @ a[n] for n in rows) / 3 for rows in halves]
        t = [torch.log(sum(g[:, n].square().sum() for n in rows) / 3) for rows in halves]
        values.append([((p + q) / 2, (p - q).square().sum() / 4) for p, q in (A, t)])
    first = tick(UpdateInterval(), 0, pairs[0])
    second = tick(first, 20, pairs[1])
    for i, average in enumerate(first.averages):
        torch.testing.assert_close(average.mean, values[0][i][0])
        assert average.variance == pytest.approx(float(values[0][i][1]))
    for i, average in enumerate(second.averages):
        torch.testing.assert_close(average.mean, (values[0][i][0] + values[1][i][0]) / 2)
        assert average.variance == pytest.approx(float(values[0][i][1] + values[1][i][1]) / 4)


def test_movement_is_zero_on_average_at_rest() -> None:
    """The noise is taken out without bias: over 500 clocks at their fifth estimate."""
    stream = RandomStream(0, 10)
    found = []
    for _ in range(500):
        now = UpdateInterval()
        for step in range(0, 100, 20):
            before = now
            now = tick(now, step, stream.pair())
        pairs = zip(before.averages, now.averages, strict=True)
        found.append([(new.drift - (1 - clock.NOISE_WEIGHT) * old.drift) / clock.NOISE_WEIGHT
                      for old, new in pairs])
    rho = torch.tensor(found)
    assert (rho.mean(0).abs() < 4 * rho.std(0) / math.sqrt(len(rho))).all()


@pytest.mark.parametrize(("drift", "expected"), [(1.0, 40), (0.45, 80), (0.1, 160)])
def test_the_interval_follows_the_movement(drift: float, expected: int) -> None:
    """Down where the running mean of ρ is above 0.4, up where it is below 0.2."""
    stream, now = RandomStream(0), UpdateInterval()
    for step in range(0, 400, 20):
        now = tick(now, step, stream.pair())
    first, *rest = now.averages
    averages = (clock.replace(first, drift=drift), *rest)
    now = clock.replace(now, interval=80, estimates_since_change=5, averages=averages)
    assert tick(now, 400, stream.pair()).interval == expected
    assert tick(clock.replace(now, estimates_since_change=0), 400, stream.pair()).interval == 80


def test_movement_is_the_same_there_and_back() -> None:
    stream = RandomStream(0)
    one, other = stream.pair(), stream.pair(size=3, slope=0.3)
    there, back = (
        tick(
            tick(UpdateInterval(), 0, first), 20, second
        ) for first, second in [(one, other), (other, one)]
    )
    for a, b in zip(there.averages, back.averages, strict=True):
        assert a.drift == pytest.approx(b.drift)


def test_the_clock_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    clock._directions.cache_clear()
    one = tick(UpdateInterval(), 0, RandomStream(0, 300).pair())
    assert torch.equal(torch.get_rng_state(), before)
    assert one.averages[0].mean.shape == (64, 64)
    clock._directions.cache_clear()  # another process
    other = tick(UpdateInterval(), 0, RandomStream(0, 300).pair())
    assert torch.equal(one.averages[0].mean, other.averages[0].mean)


def test_leading_axes_are_positions() -> None:
    a, g = torch.randn(1, 2, 8, 5, 3).double(), torch.randn(4, 2, 8, 5, 6).double()
    grouped = tick(UpdateInterval(), 0, LayerStatistics(a, g))
    flat = tick(
        UpdateInterval(), 0, LayerStatistics(*(torch.cat([*part.unbind(1)], 2) for part in (a, g)))
    )
    for one, other in zip(grouped.averages, flat.averages, strict=True):
        torch.testing.assert_close(one.mean, other.mean)
        assert one.variance == pytest.approx(other.variance)


def test_a_single_row_leaves_the_interval_as_it_is() -> None:
    found = intervals(
        lambda step: [LayerStatistics(torch.randn(1, 1, 1, 3) * step, torch.randn(1, 1, 1, 2))], 100
    )
    assert found == [(step, START) for step in range(0, 100, 20)]


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_few_rows_and_odd_ones(rows: int) -> None:
    found = intervals(
        lambda step: [LayerStatistics(torch.randn(1, rows, 1, 3), torch.randn(1, rows, 1, 2))], 500
    )
    assert all(SHORTEST <= interval <= LONGEST for _, interval in found)


def test_gradients_that_are_all_zero_stand_still() -> None:
    found = intervals(
        lambda step: [LayerStatistics(torch.zeros(1, 8, 1, 3), torch.zeros(1, 8, 1, 2))], 2_000
    )
    assert found[-1][1] == LONGEST


def test_blocks_of_longer_intervals_join_those_of_shorter_ones() -> None:
    """Intervals are 500 or 5 times a power of two, and so are their halves."""
    assert [clock._half(k) for k in (500, 320, 160, 20, 10, 5)] == [160, 160, 80, 10, 5, 5]
    assert [UpdateInterval().postpone(step).due for step in (0, 19, 20, 41)] == [20, 20, 40, 60]


def test_turns_at_regular_steps_are_those_of_a_fixed_interval() -> None:
    for every, eigen_every in ((20, 200), (7, 50), (300, 200)):
        fixed = Curvature("ggn", every=every, eigen_every=eigen_every)
        auto = Curvature("ggn", every="auto", eigen_every=eigen_every)
        for step in range(every, 1_500, every):
            assert auto.is_basis_due(
                step, UpdateInterval(last=step - every)
            ) == fixed.is_basis_due(step)
    auto = Curvature("ggn", every="auto", eigen_every=200)
    assert auto.is_basis_due(
        640, UpdateInterval(last=320)
    ) and not auto.is_basis_due(740, UpdateInterval(last=640))


# ---- in NGVI ------------------------------------------------------------------------------------


def data_of(model: Any) -> tuple[Tensor, Tensor]:
    return class_data() if isinstance(model, Classifier) else regression_data()


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, ...]]]:
    """The layers of each block whenever its curvature is estimated."""
    seen: list[tuple[str, ...]] = []
    update = running_average.begin_update

    def spy(due: Any, *rest: Any) -> Any:
        seen.append(tuple(layer.weight for layer in due.block.layers))
        return update(due, *rest)

    monkeypatch.setattr(running_average, "begin_update", spy)
    yield seen


@pytest.mark.filterwarnings("ignore:after one pass over the data")  # of random targets
@pytest.mark.parametrize(("structure", "every", "kind", "make"), [  # every kind with every interval
    (structure, every, KINDS[(3 * i + j) % len(KINDS)], (regressor, classifier)[(i + j) % 2])
    for i, structure in enumerate(STRUCTURES) for j, every in enumerate([3, "schedule", "auto"])
])
def test_counts(
    structure: str, every: int | str, kind: str, make: Callable[[], Any],
    estimates: list[tuple[str, ...]],
) -> None:
    model = make()
    ngvi = NGVI(model, STRUCTURES[structure](model), curvature=Curvature(kind, every=every))
    assert ngvi.update_counts() == {}
    for _ in range(130):
        assert math.isfinite(ngvi.step(*data_of(model)))
    counts = ngvi.update_counts()
    names = ["net.0", "net.2"]
    assert list(counts) == (["net.0 ... net.2"] if structure in ("full", "diag") else names)
    for name, (updates, interval) in counts.items():
        layers = tuple(f"{part}.weight" for part in name.split(" ... "))
        assert updates == estimates.count(layers)
        if every == "auto":
            assert 4 <= updates <= 26 and 5 <= interval <= 80
        else:
            assert (updates, interval) == {3: (44, 3), "schedule": (23, 10)}[every]


@pytest.mark.filterwarnings("ignore:after one pass over the data")  # of random targets
@pytest.mark.parametrize("kind", ["hessian", "fisher"])
def test_layers_of_every_make(kind: str) -> None:
    """Groups, columns, units, a truncated side, and rows of one example only."""
    net = nn.Sequential(
        nn.Embedding(9, 6), nn.LayerNorm(6), nn.Conv1d(4, 4, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose1d(4, 2, 3), nn.Flatten(), nn.Linear(12, 170), nn.Tanh(),
        nn.Linear(170, 3),
    ).double()
    model = Classifier(bayesianize(net, layers=[type(layer) for layer in net]), NUM_DATA)
    ngvi = NGVI(model, KFACGuide(model), curvature=Curvature(kind, every="auto", batch=8))
    for step in range(100):
        rows = 1 if step == 40 else 8
        ngvi.step(torch.randint(9, (rows, 4)), torch.randint(3, (rows,)))
    counts = ngvi.update_counts()
    assert len(counts) == 6 and all(1 < count.updates < 100 for count in counts.values())


class Sides(PyroModule):
    """Two layers side by side, so that the inputs of one move alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left = bayesianize(nn.Linear(3, 2).double(), prior=1.0)
        self.right = bayesianize(nn.Linear(3, 2).double(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.left(x[:, :3]) + self.right(x[:, 3:])
        with plate("data", NUM_DATA, subsample_size=len(x)):
            sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)


def truncated_factors(step: int, moves: bool = True) -> tuple[Tensor, Tensor]:
    x = torch.randn(NUM_DATA, 6).double()
    x[:, 3:] *= 5 if moves and step > 100 else 1
    return x, torch.randn(NUM_DATA, 2).double()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block"])
def test_each_block_has_its_own_clock(
    structure: str, monkeypatch: pytest.MonkeyPatch, estimates: list[tuple[str, ...]]
) -> None:
    model = Sides()
    ngvi = NGVI(model, GUIDES[structure](model), lr=1e-3, curvature=Curvature("ggn", every="auto"))
    pulled, pullback = [], collect.pullback

    def spy(kind: Any, terms: Any, calls: Any, *rest: Any) -> Any:
        pulled.append(tuple(call.layer.weight for call in calls))
        return pullback(kind, terms, calls, *rest)

    monkeypatch.setattr(collect, "pullback", spy)
    for step in range(200):
        before = ngvi._posterior
        ngvi.step(*truncated_factors(step))
        for old, new in zip(before.blocks if before else (), ngvi._posterior.blocks, strict=False):
            same_interval = new.curvature.interval is old.curvature.interval
            assert (new.curvature is old.curvature) == same_interval
            assert same_interval == (step < old.curvature.interval.due)
    left, right = (ngvi.update_counts()[side] for side in ("left", "right"))
    assert right.updates > left.updates + 5
    assert set(pulled) == {("left.weight", "right.weight"), ("right.weight",)}
    assert sum(map(len, pulled)) == len(estimates)  # what is not due, autograd does not see


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("structure", ["kfac", "block"])
def test_the_initial_curvature_fades_in_blocks_that_are_not_due(
    structure: str, moves: bool
) -> None:
    """Λ = (N/T)(C + e) + δ: C of its last estimate, e of any block's last or of step 20, 40, ..."""
    model = Sides()
    ngvi = NGVI(model, GUIDES[structure](model), lr=1e-3, temperature=0.5,
                curvature=Curvature("ggn", every="auto", initial=1e6))
    alone = 0
    for step in range(300):
        before = ngvi._posterior
        ngvi.step(*truncated_factors(step, moves))
        left, right = ngvi._posterior.blocks
        if before and right.curvature is before.blocks[1].curvature and step % START:
            continue
        alone += before is not None and left.curvature is before.blocks[0].curvature
        faint = 1e6 * 0.95**step
        for one, name in ((left, "left"), (right, "right")):
            likelihood = NUM_DATA / 0.5 * (
                one.curvature.curvature.dense() + faint * torch.eye(8).double()
            )
            expected = likelihood + torch.eye(8).double()
            torch.testing.assert_close(one.precision.dense(), expected)
            family = next(f for f in ngvi.guide.blocks if f.block.name == name)
            torch.testing.assert_close(family.precision().dense(), expected)
    assert alone > 3


class Odd(PyroModule):
    """A layer, and a shift `w` [2] that no supported op consumes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(3, 2).double(), prior=1.0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        shift = sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        mean = self.net(x) + shift.cumsum(0)
        with plate("data", NUM_DATA, subsample_size=len(x)):
            sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)


@pytest.mark.filterwarnings("ignore:.*no supported op")
def test_weights_that_no_op_consumes_do_not_wake_the_others(
    estimates: list[tuple[str, ...]]
) -> None:
    model = Odd()
    ngvi = NGVI(model, GUIDES["kfac"](model), lr=1e-3, curvature=Curvature("ggn", every="auto"))
    data = regression_data()
    for _ in range(200):
        ngvi.step(*data)
    assert ngvi.update_counts()["net"].updates == len(estimates) < 20
    assert ngvi.update_counts()["w"].interval == 1


class Changing(Sides):
    """The left bias' prior widens from step to step, and with it the units of its block."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0
        self.left = PyroModule[nn.Linear](3, 2).double()
        for name, shape in (("weight", [2, 3]), ("bias", [2])):
            setattr(self.left, name, PyroSample(partial(self.prior, name, shape)))

    def prior(self, name: str, shape: list[int], _: Any) -> dist.Distribution:
        zero = torch.zeros(()).double()
        scale = zero + (self.scale if name == "bias" else 1.0)
        return dist.Normal(zero, scale).expand(shape).to_event(len(shape))


@pytest.mark.filterwarnings("ignore:after one pass over the data")  # of random targets
def test_a_block_keeps_its_units_until_its_next_estimate() -> None:
    model = Changing()
    curvature = Curvature("ggn", every="auto", initial=0.0)
    ngvi = NGVI(model, GUIDES["kfac"](model), lr=1e-3, temperature=1.0, curvature=curvature)
    alone = 0
    for step in range(160):
        model.scale += 0.01
        before = ngvi._posterior
        ngvi.step(*truncated_factors(step))
        left = ngvi._posterior.blocks[0]
        if before is not None and left.curvature is before.blocks[0].curvature:
            assert left.precision is before.blocks[0].precision
            alone += ngvi._posterior.blocks[1].curvature is not before.blocks[1].curvature
            continue
        delta = torch.tensor([1.0, 1, 1, model.scale**-2] * 2).double()  # [O, I], the bias last
        roots = delta.sqrt()
        whole = left.curvature.factors.dense() * NUM_DATA + torch.diag(delta)
        if step == 0:  # later the basis is that of an earlier estimate
            torch.testing.assert_close(left.precision.dense(), whole)
        scaled = left.precision.dense() / torch.outer(roots, roots)
        assert (torch.linalg.eigvalsh(scaled) > 1 - 1e-9).all()  # Λ - δ is not negative
    assert alone > 3


@pytest.mark.parametrize("structure", ["diag", "ekfac", "block"])
def test_a_clock_that_never_moves_is_a_fixed_interval(
    structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit."""
    monkeypatch.setattr(clock, "MIN_COUNT", 10**9)
    losses = []
    for every in (START, "auto"):
        torch.manual_seed(5)
        model = classifier()
        ngvi = NGVI(model, GUIDES[structure](model), lr=0.1,
                    curvature=Curvature("fisher", every=every, eigen_every=50))
        losses.append([ngvi.step(*class_data()) for _ in range(130)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("structure", "steps"), [
    ("diag", 61), ("kfac", 61), ("kfac", 105), ("ekfac", 112), ("block", 105), ("full", 112),
])
def test_a_run_is_resumed_bit_for_bit(structure: str, steps: int) -> None:
    torch.manual_seed(7)
    batches = [truncated_factors(step) for step in range(180)]

    def start(seed: int) -> tuple[Any, NGVI]:
        torch.manual_seed(seed)
        model = Sides()
        guide = GUIDES[structure](model)
        return guide, NGVI(model, guide, curvature=Curvature("fisher", every="auto"))

    guide, ngvi = start(1)
    for batch in batches[:steps]:
        ngvi.step(*batch)
    file = io.BytesIO()
    torch.save((guide.state_dict(), ngvi.state_dict()), file)
    expected = [ngvi.step(*batch) for batch in batches[steps:]]
    counts = ngvi.update_counts()
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    guide, ngvi = start(2)
    for part, state in zip((guide, ngvi), states, strict=True):
        part.load_state_dict(state)
    losses = [ngvi.step(*batch) for batch in batches[steps:]]
    assert losses == expected and ngvi.update_counts() == counts
    if structure not in ("full", "diag"):
        assert counts["left"] != counts["right"]


def test_an_estimate_that_is_left_out_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regressor()
    ngvi = NGVI(model, GUIDES["kfac"](model), curvature=Curvature("ggn", every="auto"))
    data = regression_data()
    ngvi.step(*data)
    gather = collect.gradient_statistics
    monkeypatch.setattr(
        collect, "gradient_statistics",
        lambda *args: GradientStatistics([
            [LayerStatistics(pair.a * math.nan, pair.g) for pair in layer]
            for layer in gather(*args).layers
        ]),
    )
    with pytest.warns(UserWarning, match="a curvature estimate is not finite"):
        for _ in range(25):
            ngvi.step(*data)
    assert set(ngvi.update_counts().values()) == {(1, START)}
    monkeypatch.setattr(collect, "gradient_statistics", gather)
    for _ in range(20):
        ngvi.step(*data)
    assert set(ngvi.update_counts().values()) == {(2, START)}


def test_auto_is_a_choice() -> None:
    assert Curvature("fisher", every="auto").every == "auto"
    with pytest.raises(ValueError, match="'auto' or 'schedule' is needed"):
        Curvature("fisher", every="automatic")
