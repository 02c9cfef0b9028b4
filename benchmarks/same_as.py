"""Does this working tree train exactly as another commit does?

    python benchmarks/same_as.py HEAD                  # all trainings, one or two minutes
    python benchmarks/same_as.py COMMIT --only laplace --tolerance 1e-9

Runs a table of small seeded trainings twice, in separate processes of one thread and in float64:
with the package of COMMIT, and with that of the working tree. Prints for each training the largest
difference of losses, means, precisions and predictions, relative to the largest magnitude in the
tensor concerned; then the largest of all. The exit status is 1 when that exceeds the tolerance. A
training that raises counts as an infinite difference, and its error is printed.

Only the public API is used, so the two packages may be organized differently. Training amplifies
rounding errors: the same formula in another order of operations may differ by more than 1e-12.
"""

from __future__ import annotations

import argparse
import fnmatch
import inspect
import io
import math
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import pyrocurv
from pyrocurv import guides, infer, optim
from pyrocurv.curvature import EKFAC, KFAC, Curvature, estimate
from pyrocurv.infer import NGVI
from pyrocurv.nn import Classifier, Regressor, bayesianize

ROOT = Path(__file__).resolve().parents[1]
N, BATCH, STEPS, LONG = 48, 24, 14, 110  # LONG: until the intervals of every="auto" move
COLUMNS = ("losses", "means", "precisions", "predictions")
KINDS = ("fisher", "ggn", "empirical", "hessian")
OFTEN = {kind: Curvature(kind, every=3, eigen_every=6, batch=20) for kind in (*KINDS, "noise")}
AUTO = Curvature("fisher", every="auto", eigen_every=30)
GUIDES: dict[str, Any] = {
    "diag": guides.DiagonalGuide, "kfac": guides.KFACGuide, "ekfac": guides.EKFACGuide,
    "block": guides.BlockGuide, "full": guides.FullGuide,
}
HAS_UPDATES = "update" in inspect.signature(NGVI).parameters  # not in older commits
NATURAL: dict[str, Any] = {"update": "natural"} if HAS_UPDATES else {}
Data = Sequence[Tensor]
Result = dict[str, Any]  # {column: a tensor or number, or nested lists and dicts of them}
CASES: dict[str, Callable[[], Result]] = {}


def cases(prefix: str, table: Mapping[str, Mapping[str, Any]]) -> Callable[[Any], Any]:
    """Register a function once for each row of a table {name: keyword arguments}."""
    def register(run: Callable[..., Result]) -> Callable[..., Result]:
        CASES.update({f"{prefix}: {name}": partial(run, **row) for name, row in table.items()})
        return run
    return register


# ---- data, networks and models ------------------------------------------------------------------


def classes(*shape: int) -> Data:
    x = torch.randn(N, *shape)
    return x, (x.flatten(1) @ torch.randn(math.prod(shape), 3)).argmax(1)


def numbers(size: int = 5, outputs: int = 1) -> Data:
    x, noise = torch.randn(N, size), 0.1 * torch.randn(N, outputs)
    return x, ((x @ torch.randn(size, outputs)).sin() + noise).squeeze(-1)


def batches(data: Data, count: int) -> Iterator[list[Tensor]]:
    for _ in range(count):
        rows = torch.randperm(len(data[0]))[:BATCH]
        yield [part[rows] for part in data]


def mlp(*sizes: int) -> nn.Sequential:
    layers = [(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[module for pair in layers for module in pair][:-1])


class Net(nn.Module):
    """Modules and parameters by name, and a function of them and the input."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Model(PyroModule):
    """A network with a likelihood of its own, `observe(output, y)`, in the plate of the data."""

    def __init__(self, net: nn.Module, observe: Callable[[Tensor, Tensor | None], Any]) -> None:
        super().__init__()
        self.net, self.observe = net, observe

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        output = self.net(x)
        with pyro.plate("data", len(x) if y is None else N, subsample=torch.arange(len(x))):
            self.observe(output, y)
        return output


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of an input
    "mlp": (lambda: mlp(5, 6, 3), (5,)),
    "deep": (lambda: mlp(5, 6, 5, 4, 3), (5,)),
    "wide": (lambda: mlp(40, 20, 3), (40,)),
    "very wide": (lambda: mlp(165, 5, 3), (165,)),
    "convolution": (lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(16, 3)), (1, 6, 6)),
    "transposed convolution": (lambda: nn.Sequential(
        nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)), (2, 3)),
    "embedding": (lambda: Net(
        lambda net, x: net.head(net.table((3 * x.abs()).long().clamp(max=5)).tanh().flatten(1)),
        table=nn.Embedding(6, 3, padding_idx=2), head=nn.Linear(18, 3)), (6,)),
    "layer norm": (lambda: nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "batch norm": (lambda: nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "attention": (lambda: Net(
        lambda net, x: net.head(net.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3)), (3, 4)),
    "recurrent": (lambda: Net(
        lambda net, x: net.head(net.recur(x)[0][:, -1]),
        recur=nn.GRU(4, 4, batch_first=True), head=nn.Linear(4, 3)), (3, 4)),
    "opaque parameter": (lambda: Net(
        lambda net, x: net.head(torch.cdist(x, net.centers)),
        centers=nn.Parameter(torch.randn(4, 5)), head=nn.Linear(4, 3)), (5,)),
    "tied weight": (lambda: Net(
        lambda net, x: net.head(F.linear(net.first(x).tanh(), net.first.weight.T).tanh()),
        first=nn.Linear(5, 4), head=nn.Linear(5, 3)), (5,)),
    "layer run twice": (lambda: Net(
        lambda net, x: net.head(net.layer(net.layer(x).tanh()).tanh()),
        layer=nn.Linear(5, 5), head=nn.Linear(5, 3)), (5,)),
}  # fmt: skip


# ---- NGVI ---------------------------------------------------------------------------------------


def classifier(
    net: str = "mlp", layers: Any = nn.Module, prior: Any = "fan_in", num_data: int = N
) -> Classifier:
    return Classifier(bayesianize(NETS[net][0](), prior, layers), num_data)


def regressor(outputs: int = 1, noise: float | None = None) -> Regressor:
    return Regressor(bayesianize(mlp(5, 4, outputs)), N, noise)


def report(losses: Sequence[float], model: Any, guide: Any, x: Tensor) -> Result:
    """What a guide knows, and what the model predicts at samples of it."""
    predict = infer.Predictive(model, guide=guide, num_samples=4, return_sites=["_RETURN"])
    state = model.state_dict() if isinstance(model, nn.Module) else {}
    params = {name: p for name, p in pyro.get_param_store().items() if "." not in name}
    precisions = [guide.posterior.precision.dense(), guide.quantiles([0.1, 0.8])]
    with suppress(RuntimeError):  # a Gaussian over all latents has no KL in closed form
        precisions.append(guide.kl())
    return {
        "losses": losses, "means": [guide.posterior.loc, guide.median(), state, params],
        "precisions": precisions, "predictions": [predict(x), guide.sample_posterior(2)],
    }


def reload(old: Sequence[Any], new: Sequence[Any]) -> None:
    """The states of some objects into others, by way of a file."""
    torch.save([part.state_dict() for part in old], file := io.BytesIO())
    file.seek(0)
    for part, state in zip(new, torch.load(file), strict=True):
        part.load_state_dict(state)


def update_counts(optimizer: Any) -> list[float]:
    return [float(n) for update in optimizer.update_counts().values() for n in update]


def trained(
    model: Callable[[], Any] = classifier, data: Callable[[], Data] | None = None,
    guide: str = "kfac", structure: Any = None, count: int = STEPS, gamma: float = 1.0,
    nan_at: int | None = None, resume_at: int | None = None, **options: Any,
) -> Result:
    """By NGVI. The losses are those of the steps and, last, of all data."""
    options = {"lr": 0.1, "temperature": 0.3, "curvature": OFTEN["fisher"], **NATURAL, **options}

    def start() -> list[Any]:
        pyro.clear_param_store()
        made = model()
        ngvi = NGVI(made, GUIDES[guide](made, structure=structure), **options)
        return [made, ngvi.guide, ngvi, ExponentialLR(ngvi.optimizer, gamma)]

    parts, losses = start(), []
    xy = classes(5) if data is None else data()
    for number, (x, y) in enumerate(batches(xy, count)):
        if number == resume_at:
            old, parts = parts, start()
            reload(old, parts)
        losses.append(parts[2].step(x * math.nan if number == nan_at else x, y))
        parts[3].step()
    made, family, ngvi, _ = parts
    loss = ngvi.evaluate_loss(*xy)
    losses += [loss, loss.temperature, ngvi.skipped, *update_counts(ngvi)]
    return report(losses, made, family, xy[0])


cases("guide", {
    f"{s}, {kind}": {"guide": s, "curvature": OFTEN[kind]} for s, kind in product(GUIDES, KINDS)
})(trained)
cases("ngvi", {
    "defaults": {"lr": "auto", "temperature": 1.0, "curvature": "fisher"},
    "more data": {"model": partial(classifier, num_data=900), "guide": "block"},
    "every=auto": {"curvature": AUTO, "count": LONG},
    "every=auto, ekfac": {"curvature": AUTO, "count": LONG, "guide": "ekfac"},
    "every=schedule": {"curvature": Curvature("fisher", every="schedule")},
    "two targets, decay": {
        "curvature": Curvature("fisher", every=1, batch=None, decay=0.6, num_samples=2)},
    "4 particles": {"num_particles": 4, "guide": "ekfac"},
    "4 particles, not antithetic": {"num_particles": 4, "antithetic": False},
    "at the mean": {"num_particles": 0, "temperature": 1.0},
    "average": {"average": True},
    "temperature=auto": {"temperature": "auto"},
    "momentum, damping, no clip": {"momentum": 0.5, "damping": 0.1, "kl_clip": None},
    "clip": {"kl_clip": 1e-5},
    "schedule": {"gamma": 0.9},
    "noise": {"curvature": OFTEN["noise"], "guide": "diag"},
    "joint hessian": {"curvature": "hessian", "guide": "full", "lr": "auto", "count": 6},
    "skipped step": {"nan_at": 4, "on_nonfinite": "skip"},
    "parameters by optim": {"model": partial(classifier, "batch norm", nn.Linear),
                            "optim": partial(torch.optim.SGD, lr=0.05, momentum=0.9)},
    "latent sigma": {"model": regressor, "data": numbers, "curvature": OFTEN["ggn"], "count": 8},
    "latent sigma, joint hessian": {
        "model": regressor, "data": numbers, "curvature": "hessian", "guide": "full", "count": 6},
    "two outputs": {"model": partial(regressor, 2, 0.3), "data": partial(numbers, 5, 2),
                    "curvature": OFTEN["ggn"], "guide": "ekfac"},
    "resumed, kfac": {"resume_at": 7},
    "resumed, ekfac": {"resume_at": 6, "guide": "ekfac", "model": regressor, "data": numbers},
    "resumed, average": {"resume_at": 7, "average": True, "guide": "block"},
    "resumed, every=auto": {"resume_at": 65, "count": 90, "curvature": AUTO, "guide": "diag"},
    "resumed, joint hessian": {
        "resume_at": 3, "count": 6, "curvature": "hessian", "guide": "full", "lr": "auto"},
})(trained)


@cases("network", {
    **{f"{net}, {s}": {"net": net, "guide": s} for net, s in [
        *product([*NETS][3:], ["kfac"]), ("very wide", "ekfac"), ("convolution", "ekfac"),
        ("attention", "ekfac"), ("tied weight", "block"), ("layer norm", "diag"),
        ("recurrent", "full"),
    ]},
    "rank 4, kfac": {"net": "wide", "structure": KFAC(rank=4)},
    "rank 4, ekfac": {"net": "wide", "structure": EKFAC(rank=4)},
    "kfac-block": {"net": "mlp", "structure": "kfac-block"},
    "kfac in blocks": {"net": "mlp", "structure": KFAC(num_blocks=(3, 2))},
    "kfac, reduce": {"net": "convolution", "structure": KFAC(sharing="reduce")},
    "ekfac, reduce": {"net": "convolution", "structure": EKFAC(sharing="reduce")},
    "mapping": {"net": "deep", "structure": {
        "net.0": "point", "net.2": "frozen", "net.4": EKFAC(), nn.Linear: "block"}},
    "rule": {"net": "deep", "structure": lambda name, _: "full" if name < "net.3" else None},
})
def _(net: str, **options: Any) -> Result:
    return trained(partial(classifier, net), partial(classes, *NETS[net][1]), **options)


def masked(output: Tensor, y: Tensor | None) -> None:
    with poutine.mask(mask=torch.arange(len(output)) % 3 > 0), poutine.scale(scale=0.7):
        pyro.sample("obs", dist.Categorical(logits=output), obs=y)


def two_sites(output: Tensor, y: Tensor | None) -> None:
    pyro.sample("class", dist.Categorical(logits=output), obs=y)
    first = None if y is None else (y == 0).double()
    pyro.sample("first", dist.Bernoulli(logits=output[:, 0]), obs=first)


def positive(name: str) -> Tensor:
    return pyro.param(name, torch.tensor(0.5), constraint=dist.constraints.positive)


def observed(family: Callable[[Tensor], Any], target: Any = lambda y: y) -> Callable[..., Any]:
    return lambda output, y: pyro.sample(
        "obs", family(output.squeeze(-1)), obs=None if y is None else target(y)
    )


@cases("likelihood", {
    **{f"masked and scaled, {kind}": {"observe": masked, "kind": kind} for kind in KINDS[:2]},
    "two sites": {"observe": two_sites, "kind": "empirical"},
    **{name: {"observe": observed(*family), "data": numbers} for name, family in {
        "normal, noise a parameter": (lambda f: dist.Normal(f, positive("noise")),),
        "bernoulli": (lambda f: dist.Bernoulli(logits=f), lambda y: (y > 0).double()),
        "poisson": (lambda f: dist.Poisson(f.exp()), lambda y: y.abs().round()),
        "student": (lambda f: dist.StudentT(4.0, f, 0.3),),
        "gamma": (lambda f: dist.Gamma(2.0, f.exp()), lambda y: y.abs() + 0.1),
    }.items()},
})
def _(observe: Any, kind: str = "ggn", data: Any = None) -> Result:
    outputs = 3 if data is None else 1
    return trained(
        lambda: Model(bayesianize(mlp(5, 6, outputs)), observe), data, curvature=OFTEN[kind]
    )


@cases("prior", {
    "of weights and biases": {"scale": lambda _, name: 0.3 + (name == "bias"), "guide": "ekfac"},
    "of inputs": {"scale": lambda weight, _: torch.linspace(0.2, 2, weight.shape[-1])},
    "of each weight": {"scale": lambda weight, _: weight.abs() + 0.2, "guide": "full"},
    "laplace, by the fallback guide": {"scale": lambda *_: 0.5, "first": dist.Laplace},
})
def _(scale: Any, guide: str = "kfac", first: Any = dist.Normal) -> Result:
    def prior(module: Any, name: str) -> dist.Distribution:
        weight = getattr(module, name).detach()
        family = first if module.in_features == 5 else dist.Normal
        return family(0.1, scale(weight, name)).expand(weight.shape)

    return trained(lambda: classifier(prior=prior), guide=guide)


@cases("prior", {
    "scale a latent": {"scale": lambda layer: layer.tau},
    "scale a parameter": {"scale": lambda _: positive("scale")},
})
def _(scale: Any) -> Result:
    def make() -> Model:
        layer = PyroModule[nn.Linear](5, 3)
        layer.tau = PyroSample(dist.LogNormal(0.0, 1.0))
        layer.weight = PyroSample(lambda it: dist.Normal(0.0, scale(it)).expand([3, 5]).to_event(2))
        return Model(layer, lambda f, y: pyro.sample("obs", dist.Categorical(logits=f), obs=y))

    return trained(make, guide="ekfac")


def logistic(x: Tensor, y: Tensor | None = None) -> Tensor:
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    logits = x @ weight + pyro.sample("bias", dist.Normal(0.0, 2.0))
    with pyro.plate("data", N, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Bernoulli(logits=logits), obs=None if y is None else (y > 0) * 1.0)
    return logits


def scales(x: Tensor, y: Tensor | None = None) -> Tensor:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    noise = pyro.sample("noise", dist.Gamma(2.0, 2.0))
    with pyro.plate("groups", x.shape[1]):
        weight = pyro.sample("weight", dist.Normal(0.0, scale))
    with pyro.plate("data", N, subsample=torch.arange(len(x))):
        pyro.sample("obs", dist.Normal(x @ weight, noise), obs=y)
    return x @ weight


@cases("no network", {
    "logistic, full": {"model": logistic}, "logistic, diag": {"model": logistic, "guide": "diag"},
    "scales, full": {"model": scales}, "scales, diag": {"model": scales, "guide": "diag"},
    "decay": {"model": logistic, "curvature": Curvature("hessian", decay=0.8), "temperature": 0.5},
    "at the mean, no average": {"model": logistic, "num_particles": 0, "average": False},
    "not antithetic": {"model": scales, "num_particles": 3, "antithetic": False},
})
def _(model: Any, guide: str = "full", **options: Any) -> Result:
    options = {"lr": "auto", "temperature": 1.0, "curvature": "hessian", **options}
    return trained(lambda: model, numbers, guide, **options)


# ---- SVI, Laplace, mixtures, temperatures, matrices ---------------------------------------------


@cases("svi", {name: {"guide": name} for name in GUIDES})
def _(guide: str) -> Result:
    model, data = classifier(), classes(5)
    family = GUIDES[guide](model)
    svi = SVI(model, family, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return report([svi.step(*data) for _ in range(5)], model, family, data[0])


@cases("laplace", {
    "regression, kfac": {"guide": "kfac"}, "regression, full": {"guide": "full", "per": "model"},
    "ekfac": {"guide": "ekfac", "outputs": 3}, "kfac": {"guide": "kfac", "outputs": 3},
    "two outputs, block, hessian": {"guide": "block", "outputs": 2, "kind": "hessian"},
    "diag, fisher": {"guide": "diag", "outputs": 3, "kind": "fisher"},
    "last layer": {"guide": "full", "outputs": 3, "structure": {"net.0": "frozen"}},
})
def _(
    guide: str, outputs: int = 1, kind: str = "ggn", per: str = "layer", structure: Any = None
) -> Result:
    is_regression = outputs < 3
    model = regressor(outputs, 0.3) if is_regression else classifier()
    x, y = numbers(5, outputs) if is_regression else classes(5)
    family = GUIDES[guide](model, structure=structure)
    ngvi = NGVI(model, family, lr=0.1, curvature=OFTEN["ggn"], num_particles=0)
    losses = [ngvi.step(*batch) for batch in batches((x, y), STEPS)]
    laplace = infer.Laplace(model, family, Curvature(kind, num_samples=3))
    laplace.fit([(x[:30], y[:30]), (x[30:], y[30:])])
    precisions, evidence = [family.posterior.precision.dense()], laplace.log_marginal_likelihood()
    precisions += [laplace.tune_prior(per), family.posterior.precision.dense(), family.kl()]
    found = laplace.predict(x)
    moments = [found.mean, getattr(found, "covariance_matrix", found.variance)]
    return {
        "losses": [*losses, evidence, laplace.log_marginal_likelihood()],
        "means": family.posterior.loc, "precisions": precisions,
        "predictions": moments if is_regression else found.probs,
    }


def started(temperature: float = 0.3, data: Sequence[Data] = ()) -> NGVI:
    model = classifier()
    guide = guides.KFACGuide(model)
    ngvi = NGVI(model, guide, lr=0.1, temperature=temperature, curvature=OFTEN["ggn"], **NATURAL)
    for batch in data:
        ngvi.step(*batch)
    return ngvi


@cases("mixture", {"of three": {}})
def _() -> Result:
    data, done = [*batches(classes(5), 3)], dict[int, NGVI]()
    infer.train_mixture(lambda _: started(), data, 4, seeds=3, finished=done, progress=False)
    mixture = guides.MixtureGuide([ngvi.guide for ngvi in done.values()])
    predict = infer.Predictive(done[0].model, guide=mixture, num_samples=8)
    return {
        "means": [guide.posterior.loc for guide in mixture],
        "precisions": [guide.posterior.precision.dense() for guide in mixture],
        "predictions": [predict(data[0][0]), mixture(*data[0]), mixture.sample_posterior(5)],
    }


@cases("temperature", {"chosen": {}})
def _() -> Result:
    *data, held_out = batches(classes(5), 7)
    choice = infer.choose_temperature(partial(started, data=data), [held_out], num_samples=8)
    return {"losses": [float(choice)], "predictions": [*choice.densities.values()]}


@cases("estimate", {f"{s}, {net}": {"structure": s, "net": net} for s, net in [
    ("kfac", "convolution"), ("ekfac", "attention"), ("block", "layer norm"),
    ("full", "tied weight"), ("diag", "embedding"), ("kfac-block", "deep"),
    ("kfac", "opaque parameter"), ("ekfac", "layer run twice"),
]})
def _(structure: str, net: str) -> Result:
    make, shape = NETS[net]
    module, (x, y) = make(), classes(*shape)
    found = [estimate(module, x, y, curvature=kind, structure=structure) for kind in KINDS]
    return {"precisions": [[matrix.dense(), matrix.diag()] for matrix in found]}


# ---- optimizers of plain loops ------------------------------------------------------------------


def half_mse(output: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(output.squeeze(-1), y) / 2


def optimized(
    make: Callable[..., Any], net: str = "mlp", count: int = STEPS, gamma: float = 1.0,
    samples: int = 1, use_closure: bool = False, resume_at: int | None = None,
    groups: Callable[[Any], Any] | None = None, ignored: float = 0.0, **options: Any,
) -> Result:
    """By one of the optimizers of `pyrocurv.optim`, with so many samples a step or a closure."""
    (build, shape), loss = NETS[net], F.cross_entropy
    x, y = classes(*shape)
    if "likelihood" in options:
        build, (x, y), loss = partial(mlp, 5, 6, 1), numbers(), half_mse
    y = torch.where(torch.rand(N) < ignored, -100, y)

    def start() -> list[Any]:
        module = build()
        optimizer = make(module, **options, **({"params": groups(module)} if groups else {}))
        return [module, optimizer, ExponentialLR(optimizer, gamma)]

    def closure(x: Tensor, y: Tensor) -> Tensor:
        value = loss(parts[0](x), y)
        value.backward()
        losses.append(value.detach())
        return value

    parts, losses = start(), list[Tensor]()
    for number, batch in enumerate(batches((x, y), count)):
        if number == resume_at:
            old, parts = parts, start()
            reload(old, parts)
        module, optimizer, schedule = parts
        optimizer.zero_grad()
        for _ in range(0 if use_closure else samples):
            with getattr(optimizer, "sampled_params", nullcontext)():
                closure(*batch)
        optimizer.step(*[partial(closure, *batch)] * use_closure)
        schedule.step()
    result = {"losses": [*losses, *update_counts(optimizer)], "means": dict(module.state_dict())}
    module.eval()
    if not isinstance(optimizer, optim.VIOptimizer):
        return {**result, "predictions": module(x)}
    with optimizer.sampled_params():
        sample = [p.detach().clone() for p in module.parameters()]
    predictions = optimizer.predict(x, num_samples=3)
    return {**result, "precisions": [optimizer.kl(), sample], "predictions": predictions}


def two_groups(**own: Any) -> Callable[[Any], list[dict[str, Any]]]:
    return lambda net: [
        {"params": net[0].parameters(), **own}, {"params": net[2].parameters(), "lr": 0.05},
    ]


EITHER: dict[str, dict[str, Any]] = {
    **{f"{s}, {kind}": {"structure": s, "curvature": OFTEN[kind]} for s, kind in [
        ("kfac", "fisher"), ("ekfac", "ggn"), ("diag", "empirical"), ("block", "hessian"),
        ("full", "fisher"), ("kfac", "hessian"), ("kfac-block", "empirical"),
    ]},
    **{net: {"net": net} for net in ("convolution", "batch norm", "recurrent", "attention")},
    "automatic rank": {"net": "very wide", "structure": "ekfac"},
    "schedule": {"gamma": 0.9}, "closure": {"use_closure": True},
    "every=auto": {"curvature": AUTO, "count": LONG},
    "mapping": {"net": "deep", "structure": {"0": "point", "2": "frozen", "4": "block"}},
    "normal": {"likelihood": "normal", "curvature": OFTEN["empirical"]},
    "student": {"likelihood": lambda f: torch.distributions.StudentT(4.0, f, 0.3)},
    "ignored entries": {"ignored": 0.3, "curvature": OFTEN["empirical"]},
    "momentum, damping, clip": {"momentum": 0.5, "damping": 0.1, "kl_clip": 1e-4},
    "resumed": {"resume_at": 7, "net": "deep", "gamma": 0.9,
                "structure": {"0": "point", "2": "ekfac"}},
}


@cases("second order", {
    **EITHER, "weight decay": {"weight_decay": 0.1},
    "groups": {"groups": two_groups(weight_decay=0.3), "structure": "block"},
})
def _(**options: Any) -> Result:
    options = {"curvature": OFTEN["fisher"], **NATURAL, **options}
    return optimized(optim.SecondOrderOptimizer, **options)


@cases("vi", {
    **EITHER, "3 samples": {"samples": 3}, "not antithetic": {"antithetic": False},
    "closure, 3 samples": {"use_closure": True, "num_samples": 3},
    "groups": {"groups": two_groups(prior_precision=3.0, temperature=0.1), "structure": "full"},
    "noise": {"curvature": OFTEN["noise"], "structure": "diag"},
    "temperature=auto": {"temperature": "auto"},
    "warmup, augmentation": {"kl_warmup": 9, "augmentation": 20.0, "prior_precision": 2.0},
})
def _(**options: Any) -> Result:
    options = {"lr": 0.05, "temperature": 0.5, "curvature": OFTEN["fisher"], **NATURAL, **options}
    return optimized(partial(optim.VIOptimizer, num_data=N), **options)


@cases("preset", {
    "vogn": {"make": optim.vogn},
    "vogn, 2 samples": {"make": optim.vogn, "samples": 2, "beta2": 0.8},
    "ivon": {"make": optim.ivon}, "ivon, resumed": {"make": optim.ivon, "resume_at": 7},
    "noisy_kfac": {"make": optim.noisy_kfac}, "noisy_ekfac": {"make": optim.noisy_ekfac},
})
def _(make: Any, **options: Any) -> Result:
    return optimized(partial(make, num_data=N), temperature=0.5, **options)


# ---- both packages, and the comparison ----------------------------------------------------------


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) for all that is in nested lists and dicts."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(part, f"{path}/{key}")
    else:
        yield path, torch.as_tensor(value).detach().double().clone()


def matching(pattern: str) -> list[str]:
    return [name for name in CASES if pattern in name or fnmatch.fnmatch(name, pattern)]


def run_cases(pattern: str, root: Path, path: Path) -> None:
    """With the package under `root`, into a file: {name: {column: {path: tensor}} or an error}."""
    assert Path(pyrocurv.__file__).is_relative_to(root), f"{pyrocurv.__file__} is not in {root}"
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in matching(pattern):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        try:
            found[name] = {column: dict(flat(part)) for column, part in CASES[name]().items()}
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    torch.save(found, path)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest of any tensor, relative to its largest magnitude; infinite for other shapes."""
    if {name: a.shape for name, a in one.items()} != {name: b.shape for name, b in other.items()}:
        return math.inf
    worst = 0.0
    for name, a in one.items():
        b = other[name]
        differs = (a != b) & ~(a.isnan() & b.isnan())
        if differs.any():
            found = (a - b)[differs].abs().max() / torch.stack([a, b]).nan_to_num().abs().max()
            worst = max(worst, float(found.nan_to_num(math.inf)))
    return worst


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> float:
    """Print a row for each training, and return the largest difference."""
    width, worst = max(map(len, old)), 0.0
    print(" " * width, *(f"{column:>12}" for column in COLUMNS))
    for name, a in old.items():
        b, cells = new[name], []
        if isinstance(a, str) or isinstance(b, str):
            worst, cells = math.inf, [x if isinstance(x, str) else "no error" for x in (a, b)]
        for column in [] if cells else COLUMNS:
            found = difference(a.get(column, {}), b.get(column, {}))
            worst = max(worst, found)
            cells.append(f"{shown(found) if column in {*a, *b} else '-':>12}")
        print(f"{name:<{width}}", *cells)
    print(f"{len(old)} trainings, largest difference {shown(worst)}")
    return worst


def shown(number: float) -> str:
    return f"{number:.1e}" if number else "0"


def both(commit: str, pattern: str, jobs: int) -> list[dict[str, Any]]:
    """The results with the package of the commit, and with that of the working tree."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        archive = ["git", "-C", str(ROOT), "archive", commit, "pyrocurv"]
        packed = subprocess.run(archive, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", name], input=packed, check=True)
        paths, running = [folder / "old.pt", folder / "new.pt"], []
        for root, path in zip((folder, ROOT), paths, strict=True):
            alone = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            running.append(subprocess.Popen(
                [sys.executable, __file__, commit, "--only", pattern, "--run", root, path],
                env={**os.environ, **alone, "PYTHONPATH": str(root)},
            ))
            if jobs == 1:
                running[-1].wait()
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit(f"exit codes: {codes[0]} for {commit}, {codes[1]} for the working tree")
        return [torch.load(path) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="any name that git has for it")
    parser.add_argument("--only", default="*", help="trainings whose name contains or matches this")
    parser.add_argument("--tolerance", type=float, default=1e-12)
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="processes at a time")
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not matching(args.only):
        parser.error(f"--only {args.only}: no training has such a name")
    if args.run:
        run_cases(args.only, *args.run)
    else:
        sys.exit(compare(*both(args.commit, args.only, args.jobs)) > args.tolerance)


if __name__ == "__main__":
    main()
