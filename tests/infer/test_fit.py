"""`fit` against loops that are written by hand, its checkpoints, and what it does around a step."""

from __future__ import annotations

import logging
import math
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from toys import everything, identical, leaves

from pyrocurv.guides import KFACGuide
from pyrocurv.infer import NGVI, Epoch, History, fit, log_predictive_density, training
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.runtime.rng import RandomStream

N, BATCH = 24, 8
X = torch.randn(N + 9, 3).double()
Y = (X[:, 0] > 0).long() + (X[:, 1] > 1).long()
DATA, HELD_OUT = TensorDataset(X[:N], Y[:N]), [(X[N:], Y[N:])]


def made(**options: Any) -> NGVI:
    """With batch norm, whose parameters and statistics are no latents."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)
    model = Classifier(bayesianize(nn.Sequential(*layers).double()), num_data=N)
    return NGVI(model, KFACGuide(model), **{"temperature": 0.5, **options})


def batches(seed: int = 5) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(DATA, BATCH, shuffle=True, generator=generator)


def everything_sorted(ngvi: NGVI) -> list[Any]:
    """Copies of all that a step may change; the order of the store's entries is of no matter."""
    store = pyro.get_param_store()
    for name in sorted(store.keys()):
        constraint, value = store._constraints.pop(name), store._params.pop(name)
        store._params[name], store._constraints[name] = value, constraint
    return everything(ngvi)


def of_modules(ngvi: NGVI) -> list[Any]:
    model: Any = ngvi.model
    return [*leaves([model.state_dict(), ngvi.guide.state_dict(), ngvi.state_dict()])]


def trained_state(ngvi: NGVI) -> list[Any]:
    """All but the learning rate, which a schedule changes."""
    (group,) = ngvi.optimizer.param_groups
    before, group["lr"] = group["lr"], 0.0
    initial = group.pop("initial_lr", None)
    try:
        return everything_sorted(ngvi)
    finally:
        group["lr"] = before
        if initial is not None:
            group["initial_lr"] = initial


def cosine(done: int, total: int) -> float:
    return (1 + math.cos(math.pi * done / total)) / 2


# ---- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, warmup", [("cosine", 0), ("cosine", 4), (None, 3), (None, 0)])
def test_a_loop_by_hand(schedule: str | None, warmup: int) -> None:
    total, factors = 9, []
    for step in range(10):
        factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if schedule:
            factor *= cosine(max(0, step - warmup), total - warmup)
        factors.append(factor)
    own, loader, losses = made(), batches(), []
    scheduler = LambdaLR(own.optimizer, lambda step: factors[step])
    for _ in range(3):
        for x, y in loader:
            losses.append(own.step(x, y) / N)
            scheduler.step()
    expected, ngvi = trained_state(own), made()
    lr = ngvi.optimizer.param_groups[0]["lr"]
    history = fit(ngvi, batches(), 3, schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    assert identical(expected, trained_state(ngvi))
    means = torch.tensor(losses).reshape(3, 3).double().mean(1)
    torch.testing.assert_close(torch.tensor([e.loss for e in history]).double(), means)
    assert [e.step for e in history] == [3, 6, 9] and [e.epoch for e in history] == [1, 2, 3]
    assert [e.lr for e in history] == [lr * factors[i] for i in (2, 5, 8)]
    assert ngvi.optimizer.param_groups[0]["lr"] == lr
    for e in history:
        assert e.loss == pytest.approx(e.nll + e.temperature * e.kl)
        assert e.temperature == 0.5 and e.held_out is None and e.seconds > 0


def test_a_schedule_of_ones_own() -> None:
    own, loader, lrs = made(), batches(), []

    def schedule(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, 0.1, total_steps=7, cycle_momentum=False)

    scheduler = schedule(own.optimizer)
    for _ in range(2):
        for x, y in loader:
            lrs.append(own.optimizer.param_groups[0]["lr"])
            own.step(x, y)
            scheduler.step()
    ngvi = made()
    history = fit(ngvi, batches(), 2, schedule=schedule)
    assert [e.lr for e in history] == [lrs[2], lrs[5]]
    for a, b in zip(own.guide.parameters(), ngvi.guide.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_second_fit_starts_its_schedule_anew() -> None:
    ngvi = made()
    first, second = (fit(ngvi, batches(), 2) for _ in range(2))
    assert [e.lr for e in first] == [e.lr for e in second]
    assert "initial_lr" not in ngvi.optimizer.param_groups[0]


def test_kinds_of_batches() -> None:
    parts = [*batches(0)]
    states = []
    for loader in (
        parts, [list(part) for part in parts], [{"x": x, "y": y} for x, y in parts],
        [UserDict(x=x, y=y) for x, y in parts],
    ):
        ngvi = made()
        fit(ngvi, loader, 1)
        states.append(trained_state(ngvi))
    assert all(identical(states[0], state) for state in states)


class Mean(PyroModule):
    """A model of one argument, its data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bayesianize(nn.Linear(1, 1).double())

    def forward(self, y: Tensor) -> None:
        mean = self.net(torch.ones_like(y))
        with pyro.plate("data", N, subsample=torch.arange(len(y))):
            pyro.sample("obs", dist.Normal(mean, 1.0).to_event(1), obs=y)


def test_batches_of_single_tensors() -> None:
    model = Mean()
    ngvi = NGVI(model, KFACGuide(model))
    history = fit(ngvi, [*X[:N, :1].split(6)], 2)
    assert history[-1].step == 8


def test_loaders_without_a_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([DATA[i] for i in range(12)])

    loader: Any = DataLoader(Stream(), 4)
    with pytest.raises(ValueError, match="'cosine' needs the number of steps, .* schedule=None"):
        fit(made(), loader, 2)
    assert fit(made(), loader, 2, schedule=None)[-1].step == 6


def test_the_sampler_is_told_the_epoch() -> None:
    sampler: Any = DistributedSampler(DATA, num_replicas=2, rank=0)
    seen: list[int] = []
    sampler.set_epoch = seen.append
    fit(made(), DataLoader(DATA, BATCH, sampler=sampler), 3)
    assert seen == [0, 1, 2]


def test_modes_of_the_modules_and_random_numbers() -> None:
    ngvi, modes = made(), []
    model: Any = ngvi.model
    model.net[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    model.eval()
    model.net[0].train()
    before = torch.get_rng_state()
    fit(ngvi, batches(), 1, callbacks=[lambda epoch: modes.append("callback")])
    assert {*modes[:-1]} == {True} and modes[-1] == "callback"
    flags = [module.training for module in model.net]
    assert flags == [True, False, False, False] and not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_steps_do_not_count() -> None:
    bad = [(X[:8], Y[:8]), (X[:8] * math.nan, Y[:8]), (X[8:16], Y[8:16])]
    ngvi = made(on_nonfinite="skip")
    history = fit(ngvi, bad, 2)
    assert history[-1].step == 4 and ngvi.skipped == 2
    assert all(math.isfinite(epoch.loss) for epoch in history)
    only = fit(made(on_nonfinite="skip"), [bad[1]], 1)
    assert math.isnan(only[0].loss) and only[0].step == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError, ValueError])
def test_a_step_that_fails(error: type[BaseException]) -> None:
    """Everything is as after the last step that was complete; the learning rate as before all."""
    own = made()
    scheduler = LambdaLR(own.optimizer, lambda step: cosine(step, 9))
    for x, y in batches():
        own.step(x, y)
        scheduler.step()
    expected, ngvi = trained_state(own), made()
    (group,) = ngvi.optimizer.param_groups
    lr, count, step = group["lr"], [0], ngvi.step

    def failing(*args: Any) -> float:
        count[0] += 1
        if count[0] == 4:
            raise error
        return step(*args)

    ngvi.step = failing  # type: ignore[method-assign]
    ngvi.model.eval()  # type: ignore[attr-defined]
    with pytest.raises(error):
        fit(ngvi, batches(), 3, held_out=HELD_OUT)
    assert identical(expected, trained_state(ngvi))
    assert group["lr"] == lr and not ngvi.model.training  # type: ignore[attr-defined]


# ---- held-out data ------------------------------------------------------------------------------


def test_density_of_the_held_out_data() -> None:
    """Always at the samples of one seed."""
    ngvi, densities = made(), []
    torch.manual_seed(2)
    seed = RandomStream().seed

    def score(epoch: Epoch) -> None:
        with RandomStream(seed)(torch.device("cpu")):
            densities.append(log_predictive_density(ngvi.model, ngvi.guide, HELD_OUT, 6))

    torch.manual_seed(2)
    history = fit(ngvi, batches(), 3, held_out=HELD_OUT, num_samples=6, callbacks=[score])
    assert [e.held_out for e in history] == densities
    best = history.best
    assert best is not None and best.held_out == max(densities)


def scored(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    values = iter(scores)
    monkeypatch.setattr(training, "density_at_seed", lambda *args: next(values))


@pytest.mark.parametrize("scores, patience, length, best", [
    ([-3.0, -2.0, -2.5, -2.2, -2.1, -1.0], 3, 5, 2), ([-3.0, -2.0, -2.0, -1.0], 2, 4, 4),
    ([-3.0, -4.0, -5.0], None, 3, 1), ([math.nan, -4.0, -5.0, math.nan], 2, 4, 2),
    ([math.nan, math.nan, -1.0], 2, 2, None), ([-math.inf, -1.0], 3, 2, 2),
])
def test_the_best_epoch_is_restored(
    scores: list[float], patience: int | None, length: int, best: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ngvi, states = made(), []
    scored(monkeypatch, scores)
    history = fit(
        ngvi, batches(), len(scores), held_out=HELD_OUT, patience=patience,
        callbacks=[lambda epoch: states.append(trained_state(ngvi))],
    )
    assert len(history) == length and history.stopped_early == (length < len(scores))
    found = history.best
    assert (found and found.epoch) == best
    assert identical(trained_state(ngvi), states[best - 1 if best else -1])
    ngvi.step(X[:8], Y[:8])  # goes on from there


def test_the_best_values_of_loose_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are in Pyro's store alone, of a model that is a function."""
    pyro.clear_param_store()
    net = bayesianize(nn.Linear(3, 1).double())

    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(()).double(), constraint=dist.constraints.positive)
        mean = net(x).squeeze(-1)
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(mean, scale), obs=y)

    values = []
    ngvi = NGVI(model, KFACGuide(model), optim=lambda params: torch.optim.Adam(params, 0.1))
    scored(monkeypatch, [-1.0, -2.0])
    fit(ngvi, [(X[:N], X[:N, 0])], 2, held_out=HELD_OUT,
        callbacks=[lambda epoch: values.append(pyro.param("scale").item())])
    assert pyro.param("scale").item() == values[0] != values[1]


# ---- callbacks, loggers, bars -------------------------------------------------------------------


def test_callbacks() -> None:
    seen: list[Epoch] = []
    callbacks = [seen.append, lambda epoch: 1, lambda epoch: epoch.epoch == 2]
    history = fit(made(), batches(), 5, callbacks=callbacks)
    assert [*history] == seen and len(history) == 2 and history.stopped_early
    last = fit(made(), batches(), 2, callbacks=[lambda epoch: epoch.epoch == 2])
    assert len(last) == 2 and not last.stopped_early
    with pytest.raises(AttributeError):
        seen[0].loss = 1.0  # type: ignore[misc]


def test_loggers() -> None:
    class Run:
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def log(self, values: dict[str, Any]) -> None:
            self.lines.append(values)

    class Writer:
        def __init__(self) -> None:
            self.lines: list[Any] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.lines.append((name, value, step))

    run, writer, lines = Run(), Writer(), []
    for logger in (run, writer, lines.append):
        history = fit(made(), batches(), 2, logger=logger, held_out=HELD_OUT)
    assert [line.pop("seconds") > 0 for line in (*run.lines, *lines)] == [True] * 4
    assert run.lines == lines
    assert [line["loss"] for line in lines] == [e.loss for e in history]
    assert {*lines[0]} == {"epoch", "step", "loss", "nll", "kl", "lr", "temperature", "held_out"}
    assert ("nll", history[1].nll, 2) in writer.lines and len(writer.lines) == 16
    fit(made(), batches(), 1, logger=lines.append)
    assert "held_out" not in lines[-1]


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    fit(made(), batches(), 2, held_out=HELD_OUT)
    assert capsys.readouterr().err == ""  # which is no terminal
    fit(made(), batches(), 2, held_out=HELD_OUT, progress=True)
    text = capsys.readouterr().err
    assert "6/6" in text and all(f"{name}=" in text for name in ("nll", "kl", "lr", "held_out"))


def test_the_history_prints_a_table() -> None:
    epochs = [Epoch(i, 3 * i, 1.5, 1.0, 5.0, 0.01, 0.1, -1.0 / i, 2.0) for i in range(1, 4)]
    history = History((*epochs, Epoch(4, 12, 1.5, 1.0, 5.0, 0.01, 0.1, -2.0)), True)
    lines = repr(history).splitlines()
    assert lines[0].split() == "epoch loss nll kl T lr held-out seconds".split()
    assert lines[3].split() == "3 1.5000 1.0000 5.0000 0.1 1.00e-02 -0.3333 2.0 *".split()
    assert lines[-1] == "stopped early after 4 epochs" and len(lines) == 6
    assert history[1:3] == (epochs[1], epochs[2]) and epochs[0] in history
    assert len(repr(History(tuple(epochs * 20))).splitlines()) == 22
    inside = [Epoch(i, i, 1.0, 1.0, 1.0, 0.1, 0.1, -abs(i - 30.0)) for i in range(1, 61)]
    lines = repr(History(tuple(inside))).splitlines()
    assert len(lines) == 24 and [line.split()[0] for line in lines if line.endswith("*")] == ["30"]
    assert History().best is None and "-" in repr(History((Epoch(1, 3, 1, 1, 1, 1, 1),)))


# ---- checkpoints --------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(number: int) -> Callable[[Epoch], None]:
    def callback(epoch: Epoch) -> None:
        if epoch.epoch == number:
            raise Killed

    return callback


@pytest.mark.parametrize("killed", [1, 3])
@pytest.mark.parametrize("temperature", [0.5, "auto"])
def test_a_resumed_run_is_the_uninterrupted_one(
    killed: int, temperature: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(path: Path, *callbacks: Any) -> tuple[NGVI, History]:
        ngvi = made(temperature=temperature)
        torch.manual_seed(4)  # of the samples for the held-out data
        history = fit(ngvi, batches(), 4, warmup=2, held_out=HELD_OUT, num_samples=4,
                      callbacks=callbacks, checkpoint=path)
        return ngvi, history

    whole, history = start(tmp_path / "whole.pt")
    expected = everything_sorted(whole)
    with pytest.raises(Killed):
        start(tmp_path / "run.pt", killed_at(killed))
    assert (tmp_path / "run.pt").exists() == (killed > 1)
    torch.manual_seed(9)
    resumed, again = start(tmp_path / "run.pt")
    assert again == history and len(again) == 4
    assert identical(everything_sorted(resumed), expected)
    finished = made(temperature=temperature)
    steps: list[Any] = []
    monkeypatch.setattr(finished, "step", steps.append)
    assert fit(finished, batches(), 4, warmup=2, held_out=HELD_OUT, num_samples=4,
               checkpoint=tmp_path / "whole.pt") == history
    assert not steps and identical(of_modules(finished), of_modules(whole))


def test_the_best_epoch_is_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, states = tmp_path / "run.pt", []
    scored(monkeypatch, [-1.0, -3.0, -2.0, -2.0, -2.0, -2.0])
    ngvi = made()
    with pytest.raises(Killed):
        fit(ngvi, batches(), 4, held_out=HELD_OUT, checkpoint=path,
            callbacks=[lambda e: states.append(trained_state(ngvi)), killed_at(3)])
    ngvi = made()
    history = fit(ngvi, batches(), 4, held_out=HELD_OUT, patience=3, checkpoint=path)
    best = history.best
    assert best is not None and best.epoch == 1 and len(history) == 4
    assert identical(trained_state(ngvi), states[0])
    longer = fit(made(), batches(), 9, held_out=HELD_OUT, patience=3, checkpoint=path)
    assert len(longer) == 5 and longer.stopped_early


def test_checkpoints_of_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    fit(made(), batches(), 1, checkpoint=path)
    for options, text in (({"schedule": None}, "schedule='cosine'.* this one has schedule=None"),
                          ({"held_out": HELD_OUT}, "held_out=False")):
        ngvi = made()
        before = everything(ngvi)
        with pytest.raises(ValueError, match=text):
            fit(ngvi, batches(), 2, checkpoint=path, **options)  # type: ignore[arg-type]
        assert identical(before, everything(ngvi))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        fit(made(), batches(), 1, checkpoint=path)
    with pytest.raises(ValueError, match="folder that exists"):
        fit(made(), batches(), 1, checkpoint=tmp_path / "nowhere" / "run.pt")


@pytest.mark.parametrize("options", [
    {"temperature": 0.1}, {"temperature": "auto"}, {"lr": 1e-3}, {"momentum": 0.5},
    {"damping": 1e-2}, {"kl_clip": 1e-4}, {"decoupled_weight_decay": 0.1}, {"kl_warmup": 3},
])
def test_a_checkpoint_of_other_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    """The state has them too, so that what was given would be ignored."""
    path = tmp_path / "run.pt"
    fit(made(), batches(), 1, checkpoint=path)
    ngvi = made(**options)
    before = everything(ngvi)
    (name, value), = options.items()
    with pytest.raises(ValueError, match=f"of a run with {name}=.*this one has {name}={value!r}"):
        fit(ngvi, batches(), 2, checkpoint=path)
    assert identical(before, everything(ngvi))
    assert len(fit(made(), batches(), 2, checkpoint=path)) == 2


def test_parameters_that_a_checkpoint_would_lose(tmp_path: Path) -> None:
    pyro.clear_param_store()
    net = bayesianize(nn.Linear(3, 1).double())

    def model(x: Tensor, y: Tensor) -> None:
        mean = net(x).squeeze(-1) + pyro.param("shift", torch.zeros(()).double())
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    ngvi = NGVI(model, KFACGuide(model))
    with pytest.raises(ValueError, match="checkpoint: shift is in Pyro's param store alone"):
        fit(ngvi, [(X[:N], X[:N, 0])], 1, checkpoint=tmp_path / "run.pt")


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, kind, text", [
    ({"ngvi": None}, TypeError, "ngvi: an NGVI"),
    ({"loader": (X, Y)}, ValueError, "loader: batches in a list"),
    ({"loader": []}, ValueError, "no batch in epoch 1"),
    ({"epochs": 0}, ValueError, "epochs=0"),
    ({"schedule": "linear"}, ValueError, "schedule='linear'"),
    ({"schedule": lambda optimizer: 3}, TypeError, "schedule: .* it returned 3"),
    ({"schedule": ReduceLROnPlateau}, TypeError, "schedule"),
    ({"schedule": nn.Linear}, TypeError, "schedule=Linear"),
    ({"schedule": lambda optimizer: 3, "warmup": 2}, ValueError, "warmup=2"),
    ({"warmup": -1}, ValueError, "warmup=-1"),
    ({"patience": 2}, ValueError, "patience=2 needs held_out"),
    ({"patience": 0, "held_out": HELD_OUT}, ValueError, "patience=0"),
    ({"held_out": 3}, TypeError, "held_out"),
    ({"held_out": iter(HELD_OUT)}, ValueError, "held_out: an iterator"),
    ({"callbacks": 3}, TypeError, "callbacks"), ({"callbacks": [3]}, TypeError, "callbacks"),
    ({"logger": 3}, TypeError, "logger"), ({"logger": logging.getLogger()}, TypeError, "logger"),
    # the log of these is not a function of a dict
    *(({"logger": other}, TypeError, "logger") for other in (logging, math, torch, torch.ones(2))),
    ({"logger": lambda: None}, TypeError, "logger"),
    ({"callbacks": [lambda: None]}, TypeError, "callbacks"),
    ({"callbacks": [lambda epoch, history: None]}, TypeError, "callbacks"),
    ({"callbacks": [torch.ones(2)]}, TypeError, "callbacks"),
    ({"checkpoint": 3}, TypeError, "checkpoint"), ({"progress": 3}, TypeError, "progress=3"),
])
def test_errors(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    ngvi = made()
    before = everything(ngvi)
    with pytest.raises(kind, match=text):
        fit(**{"ngvi": ngvi, "loader": batches(), "epochs": 1, **options})
    assert identical(before, everything(ngvi))


@pytest.mark.parametrize(("num_data", "warns"), [(N, False), (30, False), (60_000, True)])
def test_more_data_than_there_are(num_data: int, warns: bool) -> None:
    pyro.clear_param_store()
    model = Classifier(bayesianize(nn.Linear(3, 3).double()), num_data=num_data)
    ngvi = NGVI(model, KFACGuide(model))
    expected = pytest.warns(UserWarning, match="num_data=60000, but the loader has 24 examples")
    with expected if warns else nullcontext():
        fit(ngvi, batches(), 1)
    fit(NGVI(model, KFACGuide(model)), [*batches()], 1)  # a list may be a part


def test_one_hot_targets_are_recognized() -> None:
    model = Classifier(bayesianize(nn.Linear(3, 3).double()), num_data=N)
    with pytest.raises(ValueError, match=r"do not fit logits .* take y.argmax\(-1\)"):
        NGVI(model, KFACGuide(model)).step(X[:N], nn.functional.one_hot(Y[:N], 3))


def test_no_held_out_data_for_a_mode() -> None:
    model = Regressor(bayesianize(nn.Linear(3, 1).double()), num_data=N, noise=1.0)
    ngvi = NGVI(model, KFACGuide(model), num_particles=0, curvature="ggn")
    loader = [(X[:N], X[:N, 0])]
    with pytest.raises(ValueError, match="held_out: with num_particles=0"):
        fit(ngvi, loader, 1, held_out=loader)
    assert fit(ngvi, loader, 2)[-1].nll > 0
