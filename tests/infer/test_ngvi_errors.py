"""Nothing is lost when a step of `NGVI` fails, and bad input is named."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from toys import (
    GUIDES,
    NOISE,
    NUM_DATA,
    Line,
    class_data,
    classifier,
    everything,
    identical,
    leaves,
    linear,
    mlp,
    plain,
    regression_data,
    regressor,
    sigma_model,
)

from pyrocurv.curvature import Curvature
from pyrocurv.guides import FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Laplace, log_predictive_density
from pyrocurv.nn import Classifier, Regressor, bayesianize

each = pytest.mark.parametrize("structure", GUIDES)


# ---- steps that fail ----------------------------------------------------------------------------


class Failing(PyroModule):
    """A regressor that can be told to fail in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.broken = sigma_model(), False

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        result = self.inner(x, y)
        if self.broken:
            raise KeyError("out of order")
        return result


def failing(structure: str = "kfac", steps: int = 3, **options: Any) -> tuple[NGVI, Any, Any]:
    model, data = Failing(), regression_data()
    curvature = Curvature("fisher", every=2)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature, **options)
    for _ in range(steps):
        ngvi.step(*data)
    return ngvi, model, data


@pytest.mark.parametrize("steps", [1, 2, 3])
@each
def test_an_exception_in_the_model_changes_nothing(structure: str, steps: int) -> None:
    ngvi, model, data = failing(structure, steps)
    before, generator = everything(ngvi), torch.get_rng_state()
    model.broken = True
    with pytest.raises(KeyError, match="out of order"):
        ngvi.step(*data)
    assert identical(everything(ngvi), before)
    assert torch.equal(torch.get_rng_state(), generator)
    model.broken = False
    assert math.isfinite(ngvi.step(*data))


def test_a_failed_step_is_taken_as_if_it_had_not_failed() -> None:
    losses = []
    for fails in (False, True):
        torch.manual_seed(5)
        ngvi, model, data = failing()
        if fails:
            model.broken = True
            for _ in range(2):
                with pytest.raises(KeyError):
                    ngvi.step(*data)
            model.broken = False
        losses.append([ngvi.step(*data) for _ in range(4)])
    assert losses[0] == losses[1]


def with_nan(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x = data[0].clone()
    x[3, 1] = torch.nan
    return x, data[1]


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
@each
def test_nan_in_the_data_raises_and_changes_nothing(structure: str, steps: int) -> None:
    ngvi, _, data = failing(structure, steps)
    before, generator = everything(ngvi), torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
        ngvi.step(*with_nan(data))
    assert identical(everything(ngvi), before)
    assert torch.equal(torch.get_rng_state(), generator) and ngvi.skipped == 0
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
def test_nan_in_the_data_is_skipped_and_counted(steps: int) -> None:
    ngvi, _, data = failing(steps=steps, on_nonfinite="skip")
    before = everything(ngvi)
    for skipped in (1, 2):
        assert math.isnan(ngvi.step(*with_nan(data)))
        assert ngvi.skipped == skipped
        ngvi.skipped = 0
        assert identical(everything(ngvi), before)
        ngvi.skipped = skipped
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("kind", ["fisher", "ggn", "empirical"])
@pytest.mark.parametrize("steps", [2, 3], ids=["curvature due", "not due"])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_nan_in_a_classifier(kind: str, steps: int, on_nonfinite: str) -> None:
    """Whose Fisher cannot even draw its targets."""
    model, data = classifier(), class_data()
    ngvi = NGVI(model, KFACGuide(model), curvature=Curvature(kind, every=2),
                on_nonfinite=on_nonfinite)
    for _ in range(steps):
        ngvi.step(*data)
    before = everything(ngvi)
    if on_nonfinite == "skip":
        assert math.isnan(ngvi.step(*with_nan(data))) and ngvi.skipped == 1
        ngvi.skipped = 0
    else:
        with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
            ngvi.step(*with_nan(data))
    assert identical(everything(ngvi), before)
    assert math.isfinite(ngvi.step(*data))


def test_a_gradient_that_is_not_finite_where_the_loss_is() -> None:
    """sqrt has an infinite slope at 0, and here a bias of exactly 0 in front of it."""

    class Root(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shift = linear("equal").net, 1.0
            self.offset = nn.Parameter(torch.zeros(()).double())

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x) + (self.offset.abs() + self.shift).sqrt()
            with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
                plain(mean, y)

    model, data = Root(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), optim=partial(torch.optim.SGD, lr=0.0))
    ngvi.step(*data)
    model.shift = 0.0
    before = everything(ngvi)
    with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
        ngvi.step(*data)
    assert identical(everything(ngvi), before)


def test_nan_at_the_first_step() -> None:
    """Validation sees it first, or else the curvature; the guide is then as good as new."""
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(FloatingPointError, match="site 'obs': the network's output is not finite"):
        ngvi.step(*with_nan(data))
    assert ngvi.guide.prototype_trace is None and ngvi.guide.sites == {}
    ngvi.step(*data)


@pytest.mark.filterwarnings("ignore:a curvature estimate is not finite")
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_nan_at_the_first_step_without_validation(on_nonfinite: str) -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model), on_nonfinite=on_nonfinite)
    with pyro.validation_enabled(False):
        if on_nonfinite == "skip":
            assert math.isnan(ngvi.step(*with_nan(data))) and ngvi.skipped == 1
        else:
            with pytest.raises(FloatingPointError, match="not finite|the loss is nan"):
                ngvi.step(*with_nan(data))
        assert ngvi.guide.prototype_trace is None and ngvi.guide.sites == {}
        assert math.isfinite(ngvi.step(*data))
        assert all(torch.isfinite(value).all() for value in ngvi.guide.median().values())


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("moment", ["made", "stepped"])
def test_an_optimizer_that_fails_leaves_all_as_it_was(moment: str, steps: int) -> None:
    """Batch norm's statistics, too; and goes on as if it had not failed."""
    broken = False

    def check() -> None:
        if broken:
            raise KeyError("out of order")

    class Unreliable(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            check()
            return super().step(closure)

    def optim(params: Any) -> torch.optim.Optimizer:
        if moment == "made":
            check()
        return Unreliable(params, lr=0.01)

    def state(ngvi: NGVI) -> list[Any]:
        parts = [ngvi.guide.state_dict(), ngvi.model.state_dict(), ngvi.state_dict()]
        return list(leaves(parts))

    data, losses = regression_data(), []
    for fails in (False, True):
        torch.manual_seed(4)
        model = sigma_model()
        ngvi = NGVI(model, KFACGuide(model), optim=optim)
        ngvi.guide(*data)
        for _ in range(steps):
            ngvi.step(*data)
        if fails and (moment == "stepped" or steps == 0):
            broken, before, generator = True, state(ngvi), torch.get_rng_state()
            with pytest.raises(KeyError, match="out of order"):
                ngvi.step(*data)
            broken = False
            assert identical(state(ngvi), before)
            assert torch.equal(torch.get_rng_state(), generator)
        losses.append([ngvi.step(*data) for _ in range(3)])
    assert losses[0] == losses[1]


def test_validation_is_put_back() -> None:
    ngvi, model, data = failing()
    model.broken = True
    with pytest.raises(KeyError):
        ngvi.step(*data)
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, -1.0)


def test_an_interrupt_in_a_step_changes_nothing() -> None:
    """The run goes on as one that was not interrupted, curvature and clocks too."""
    data, stop = regression_data(), [False]

    def observe(mean: Tensor, y: Tensor | None) -> None:
        plain(mean, y)
        if stop[0]:
            raise KeyboardInterrupt

    def run(interrupted: bool) -> list[float]:
        torch.manual_seed(0)
        model = Line(observe)
        ngvi = NGVI(model, KFACGuide(model), curvature=Curvature("fisher", every=2))
        losses = [ngvi.step(*data) for _ in range(4)]
        if interrupted:
            stop[0] = True
            with pytest.raises(KeyboardInterrupt):
                ngvi.step(*data)
            stop[0] = False
        return losses + [ngvi.step(*data) for _ in range(4)]

    assert run(True) == run(False)


@pytest.mark.filterwarnings("ignore:a matrix of .* rows is indefinite by rounding")
@pytest.mark.parametrize("noise", [0.1, 0.01])
@each
def test_a_step_in_single_precision_is_taken_or_changes_nothing(
    structure: str, noise: float
) -> None:
    """N/T C is rounded by more than the prior's precision: a Cholesky factor may not exist."""
    x, y = (part.float() for part in regression_data(20))
    net = bayesianize(nn.Sequential(nn.Linear(3, 30), nn.ReLU(), nn.Linear(30, 2)), prior=1.0)
    model = Regressor(net, 100_000, noise=noise)
    curvature = Curvature("ggn", every=1, initial=0.0)
    ngvi = NGVI(model, GUIDES[structure](model), curvature=curvature)
    ngvi.guide(x, y)
    for _ in range(3):
        before = everything(ngvi)
        try:
            assert math.isfinite(ngvi.step(x, y))
        except torch.linalg.LinAlgError:
            assert identical(everything(ngvi), before)
            assert structure in ("block", "full")


# ---- bad arguments ------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "curvature": ({"curvature": "gnn"}, ValueError, "curvature='gnn': choose one of hessian, ggn"),
    "curvature type": ({"curvature": 3}, TypeError, "a name or a Curvature is needed, got 3"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, ValueError, "'ignore': choose 'raise' or 'skip'"),
    "lr": ({"lr": 0.0}, ValueError, "lr=0.0"),
    "lr nan": ({"lr": math.nan}, ValueError, "lr=nan"),
    "temperature": ({"temperature": -1.0}, ValueError, "temperature=-1.0"),
    "kl_clip": ({"kl_clip": 0.0}, ValueError, "kl_clip=0.0"),
    "momentum": ({"momentum": 1.0}, ValueError, "momentum=1.0"),
    "damping": ({"damping": -1e-3}, ValueError, "damping=-0.001"),
    "num_particles": ({"num_particles": -1}, ValueError, "num_particles=-1"),
    "half a particle": ({"num_particles": 1.5}, ValueError, "num_particles=1.5"),
    "optim": ({"optim": "adam"}, TypeError, "optim: a callable .* got 'adam'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    options, error, message = BAD[name]
    model = regressor()
    with pytest.raises(error, match=message):
        NGVI(model, KFACGuide(model), **options)


CHANGED = [
    *((name, value) for name in ("lr", "momentum", "damping", "kl_clip", "temperature")
      for value in (math.inf, math.nan, -1.0, "much")),
    ("initial_lr", math.inf), ("kl_warmup", 1.5), ("num_particles", -1),
]


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(("guide", "options"), [
    (KFACGuide, {"update": "natural"}), (KFACGuide, {"update": "soap"}),
    (KFACGuide, {"update": lambda p: torch.optim.SGD(p, lr=0.1)}),
    (FullGuide, {"curvature": "hessian"}),
])
def test_settings_that_are_changed_later_are_checked(
    guide: Any, options: dict[str, Any], steps: int
) -> None:
    """Also at the first step, and by `evaluate_loss`; the next step is taken."""
    x, y = class_data()
    model = classifier()
    ngvi = NGVI(model, guide(model), **options)
    ngvi.guide(x, y)
    for _ in range(steps):
        ngvi.step(x, y)
    before = everything(ngvi)
    for name, value in CHANGED:
        where = ngvi.optimizer.param_groups[0] if name in ("lr", "momentum", "damping", "kl_clip",
                                                           "initial_lr") else vars(ngvi)
        has_been = dict(where)
        where[name] = value
        for call in (ngvi.step, ngvi.evaluate_loss):
            with pytest.raises(ValueError, match=f"{name}={value!r}: .* is needed"):
                call(x, y)
        where.clear()
        where.update(has_been)
        assert identical(before, everything(ngvi)), name
    ngvi.step(x, y)


def test_a_learning_rate_of_zero_moves_no_mean() -> None:
    """As at the end of a schedule, or set by hand; the noise has a learning rate of its own."""
    x, y = regression_data()
    model = regressor(noise=None)
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(x, y)
    before = {name: value.clone() for name, value in ngvi.guide.median().items()}
    ngvi.optimizer.param_groups[0]["lr"] = 0.0
    ngvi.step(x, y)
    after = ngvi.guide.median()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("net."))


def test_a_guide_of_another_kind() -> None:
    model = regressor()
    with pytest.raises(TypeError, match="one of pyrocurv.guides .* is needed, got AutoNormal"):
        NGVI(model, AutoNormal(model))


# ---- models and data that do not fit ------------------------------------------------------------


def test_targets_left_out_of_the_first_step() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="left out"):
        ngvi.step(data[0])
    ngvi.step(*data)


@pytest.mark.parametrize("make", [regressor, sigma_model, classifier])
def test_targets_left_out_of_a_later_step(make: Callable[[], Any]) -> None:
    model = make()
    data = class_data() if isinstance(model, Classifier) else regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(*data)
    before = everything(ngvi)
    with pytest.raises(ValueError, match="'obs'.*left out"):
        ngvi.step(data[0])
    with pytest.raises(ValueError, match="'obs'.*left out"):
        ngvi.evaluate_loss(data[0])
    assert identical(everything(ngvi), before)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_plate_smaller_than_the_batch(steps: int) -> None:
    class Small(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear("equal").net
            self.size = NUM_DATA

        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            mean = self.net(x)
            with pyro.plate("data", self.size, subsample=torch.arange(len(x))):
                plain(mean, y)

    model, data = Small(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    for _ in range(steps):
        ngvi.step(*data)
    before = everything(ngvi)
    model.size = 7
    with pytest.raises(ValueError, match="30 rows in a plate of size 7"):
        ngvi.step(*data)
    if steps:
        assert identical(everything(ngvi), before)
    model.size = NUM_DATA
    assert math.isfinite(ngvi.step(*data))


def test_a_latent_that_the_guide_does_not_know() -> None:
    model, data = regressor(), regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(*data)
    model.noise = None  # now with a sigma
    with pytest.raises(ValueError, match="'sigma' is neither observed .* latents are net.0.weight"):
        ngvi.step(*data)


def test_a_batch_that_is_not_the_first_axis() -> None:
    class Sideways(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(nn.Linear(3, 2).double())

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = self.net(x.mT.reshape(5, -1, 3)).reshape(-1, 2)
            with pyro.plate("data", NUM_DATA, subsample_size=len(y)):
                plain(mean, y)

    model, data = Sideways(), regression_data()
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide)
    with pytest.warns(UserWarning, match="net.weight .5 rows where there are 30 examples"):
        ngvi.step(*data)
    assert all(family.block.is_untraced for family in guide.blocks)
    assert math.isfinite(ngvi.step(*data))


@pytest.mark.parametrize("mask", [False, torch.tensor([[True, False, True]])], ids=["all", "one"])
def test_a_masked_prior_is_refused(mask: Any) -> None:
    """A flat prior has no KL; one that nothing masks is what it was."""
    x, y = regression_data()

    def model(x: Tensor, y: Tensor, mask: Any) -> None:
        with poutine.mask(mask=mask):
            w = pyro.sample("w", dist.Normal(torch.zeros(1, 3).double(), 0.1).to_event(2))
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(nn.functional.linear(x, w)[:, 0], 0.3), obs=y[:, 0])

    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="prior of 'w' is masked"):
        ngvi.step(x, y, mask)
    assert math.isfinite(ngvi.step(x, y, True))


@pytest.mark.parametrize("structure", GUIDES)
def test_data_that_were_left_out_are_missed_beside_a_deterministic(structure: str) -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mean = pyro.deterministic("mean", net(x), event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, NOISE).to_event(1), obs=y)

    x, y = regression_data()
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    with pytest.raises(ValueError, match="were the data left out"):
        ngvi.step(x)
    assert math.isfinite(ngvi.step(x, y))
    with pytest.raises(ValueError, match="'obs' is neither observed"):
        ngvi.step(x)


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_data_that_spread_their_distribution_are_named(structure: str) -> None:
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)[:, 0]
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    x, y = regression_data()
    ngvi = NGVI(model, GUIDES[structure](model))
    with pytest.raises(ValueError, match=r"'obs': data of shape \(30, 1\) against .* \(30,\)"):
        ngvi.step(x, y[:, :1])
    ngvi.step(x, y[:, 0])
    with pytest.raises(ValueError, match="'obs': data of shape"):
        ngvi.step(x, y[:, :1])


@pytest.mark.parametrize("structure", ["kfac", "full"])
def test_an_output_that_was_not_squeezed_is_named(structure: str) -> None:
    """[B, 1] in a plate of B is a density of B x B, which Pyro's ELBOs refuse too."""
    net = mlp(outputs=1)

    def model(x: Tensor, y: Tensor, is_squeezed: bool) -> None:
        mean = net(x).squeeze(-1) if is_squeezed else net(x)
        with pyro.plate("data", NUM_DATA):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    x, y = regression_data()
    guide = GUIDES[structure](model)
    ngvi = NGVI(model, guide)
    told = r"'obs': a batch of shape \(30, 30\) in plates of sizes \(30,\)"
    with pytest.raises(ValueError, match=told):
        ngvi.step(x, y[:, 0], False)
    ngvi.step(x, y[:, 0], True)
    for call in (
        lambda: ngvi.step(x, y[:, 0], False), lambda: ngvi.evaluate_loss(x, y[:, 0], False),
        lambda: Laplace(model, guide).fit([(x, y[:, 0], False)]),
        lambda: log_predictive_density(model, guide, [(x, y[:, 0], False)]),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_a_plate_as_large_as_the_batch_is_noticed_once() -> None:
    """As soon as a batch of another size shows it."""
    net = mlp()

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)

    x, y = regression_data()
    ngvi = NGVI(model, KFACGuide(model))
    ngvi.step(x, y)
    ngvi.evaluate_loss(x[:5], y[:5])  # held-out data may be as many as they are
    with pytest.warns(UserWarning, match="had 30 data in total, and now has 7") as caught:
        for size in (30, 7, 30, 7, 5):
            ngvi.step(x[:size], y[:size])
    assert len(caught) == 1
