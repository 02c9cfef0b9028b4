"""`Predictive.loader` over batches against one call on all data, at the same random numbers."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyrocurv.guides import KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.infer import predictive as module
from pyrocurv.nn import Classifier, Regressor, bayesianize

N, S = 11, 5
X, Y = torch.randn(N, 3).double(), torch.arange(N) % 4


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def trained() -> tuple[Any, Any]:
    model = Classifier(bayesianize(network()), num_data=N)
    guide = KFACGuide(model)
    ngvi = NGVI(model, guide, temperature=1.0)
    for _ in range(3):
        ngvi.step(X, Y)
    return model, guide


def made(kind: str) -> dict[str, Any]:
    model, guide = trained()
    if kind == "samples":
        return {"model": model, "posterior_samples": guide.sample_posterior(S)}
    if kind == "mixture":
        other = KFACGuide(model)
        other(X, Y)
        guide = MixtureGuide([guide, other])
    if kind == "autoguide":
        guide = AutoNormal(model, init_scale=0.3)
        guide(X, Y)
    if kind == "function":
        loc = {name: x.detach() for name, x in guide.median().items()}
        guide = lambda *args: [  # noqa: E731
            pyro.sample(name, dist.Normal(x, 0.3).to_event(x.dim())) for name, x in loc.items()
        ]
    return {"model": model, "guide": guide, "num_samples": S}


def batches(size: int = 4) -> DataLoader[Any]:
    # without a generator of its own a DataLoader takes a seed from the global one
    return DataLoader(TensorDataset(X, Y), size, generator=torch.Generator())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {*a} == {*b}
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return call()


@pytest.mark.parametrize("kind", ["kfac", "mixture", "autoguide", "function", "samples"])
def test_batches_are_one_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = Predictive(**made(kind), return_sites=["_RETURN", "net.0.weight"])
    whole = seeded(lambda: predict(X))
    assert whole["_RETURN"].shape == (S, N, 4)
    for size in (4, 1, N):
        same(seeded(lambda size=size: predict.loader(batches(size))), whole)
    monkeypatch.setattr(module, "MAX_ELEMENTS", 100)  # two samples at once
    joined = seeded(lambda: predict.loader(batches()))
    again = seeded(lambda: predict.loader(batches(N)))
    same(joined, again)
    if kind in ("kfac", "mixture"):
        for sample, logits in enumerate(joined["_RETURN"]):
            assert not torch.equal(logits, joined["_RETURN"][sample - 1])


def test_a_network_runs_at_the_weights_that_are_returned() -> None:
    names = ["_RETURN", "obs", *(f"net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))]
    predict = Predictive(**made("kfac"), return_sites=names)
    found = predict.loader(batches())
    for s in range(S):
        w, b, v, c = (found[name][s, 0] for name in names[2:])
        logits = torch.tanh(X @ w.mT + b) @ v.mT + c
        torch.testing.assert_close(logits, found["_RETURN"][s], rtol=1e-12, atol=1e-12)
    assert found["obs"].shape == (S, N)


def test_targets_are_drawn_for_each_batch() -> None:
    """The noise of equal batches is another one, at the same weights."""
    predict = Predictive(**made("kfac"), return_sites=["obs", "_RETURN"])
    found = predict.loader([(X, Y)] * 30)
    torch.testing.assert_close(found["_RETURN"][:, :N], found["_RETURN"][:, -N:])
    obs = found["obs"].reshape(S, 30, N)
    assert not (obs == obs[:, :1]).all()
    counts = nn.functional.one_hot(obs, 4).double().mean((0, 1))
    probs = found["_RETURN"][:, :N].softmax(-1).mean(0)
    assert ((counts - probs).abs() < 5 * (probs * (1 - probs) / 150).sqrt() + 1e-12).all()


def test_axis_of_plates_and_events() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = bayesianize(network())

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            logits = self.net(x)
            pyro.deterministic("norm", self.net[0].weight.square().sum())
            pyro.deterministic("logits", logits, event_dim=1)
            with pyro.plate("outputs", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
                pyro.sample("obs", dist.Normal(logits.mT, 1e-9), obs=y)
            return logits.mT

    model = Model()
    guide = AutoNormal(pyro.poutine.block(model, hide=["norm", "logits"]), init_scale=0.1)
    guide(X, torch.zeros(4, N).double())
    sites = ["norm", "logits", "obs", "_RETURN"]
    predict = Predictive(model, guide=guide, num_samples=S, return_sites=sites)
    for loader in ([(X[:4],), (X[4:8],), (X[8:],)], [X[:4], X[4:]]):
        found = predict.loader(loader)
        assert found["norm"].shape == (S, 1, 1)
        assert found["logits"].shape == (S, 1, N, 4)
        assert found["obs"].shape == (S, 4, N) == found["_RETURN"].shape
        torch.testing.assert_close(found["obs"], found["_RETURN"], rtol=0, atol=1e-7)
        torch.testing.assert_close(found["logits"][:, 0].mT, found["_RETURN"])


def test_kinds_of_batches() -> None:
    predict = Predictive(**made("kfac"), return_sites=["_RETURN"])
    whole = seeded(lambda: predict(X))
    parts = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    for loader, inputs in (
        (parts, None), ([list(part) for part in parts], None), ([x for x, _ in parts], None),
        ([{"x": x, "labels": y} for x, y in parts], None),
        ([UserDict(x=x, y=y) for x, y in parts], None),
        ([(y, x) for x, y in parts], lambda batch: batch[1]),
        ([(y, x) for x, y in parts], lambda batch: (batch[1],)),
        ([(y, x) for x, y in parts], lambda batch: {"x": batch[1]}),
    ):
        same(seeded(lambda a=loader, b=inputs: predict.loader(a, inputs=b)), whole)


def test_generators_move_as_in_one_call_and_not_on_errors() -> None:
    predict = Predictive(**made("kfac"), return_sites=["_RETURN"])
    first = predict.loader(batches(1))
    assert not torch.equal(first["_RETURN"], predict.loader(batches(1))["_RETURN"])
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        predict.loader([(X, Y), (X[:, :2], Y)])
    assert torch.equal(torch.get_rng_state(), before)


def test_errors() -> None:
    model, guide = trained()
    predict = Predictive(model, guide=guide, num_samples=2)
    with pytest.raises(ValueError, match="gave no data"):
        predict.loader([])
    for names in (["RETURN"], ["_RETURN", "logits"]):
        unknown = Predictive(model, guide=guide, num_samples=2, return_sites=names)
        with pytest.raises(ValueError, match=f"the model has no site '{names[-1]}', it has '"):
            unknown.loader([(X, Y)])
    with pytest.raises(ValueError, match="batches in a list"):
        predict.loader((X, Y))
    with pytest.raises(TypeError, match="loader: a DataLoader"):
        predict.loader(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device='nowhere'"):
        predict.loader([X], device="nowhere")
    with pytest.raises(TypeError, match="inputs: a callable"):
        predict.loader([X], inputs=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="progress=3"):
        predict.loader([X], progress=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a tensor"):
        predict.loader([("a", Y)])
    with pytest.raises(ValueError, match="site 'net.0.weight' .* is drawn by the model itself"):
        Predictive(model, num_samples=2).loader([X, X])
    with pytest.raises(RuntimeError, match="inside of a Pyro handler"), pyro.poutine.trace():
        predict.loader([X])

    def total(x: Tensor, y: Tensor | None = None) -> Any:
        return model(x, y).sum()

    predict = Predictive(total, guide=guide, num_samples=2, return_sites=["_RETURN"])
    with pytest.raises(ValueError, match="'_RETURN' .* which axis"):
        predict.loader([X, X + 1])
    pair = Predictive(lambda x: (model(x), x), guide=guide, num_samples=2, return_sites=["_RETURN"])
    with pytest.raises(TypeError, match="returns no tensor"):
        pair.loader([X])


def test_noise_scale_of_a_regressor() -> None:
    """Latents of the fallback guide are the same for all batches too."""
    model = Regressor(bayesianize(nn.Linear(3, 1).double()), num_data=N)
    guide = KFACGuide(model)
    guide(X, X[:, 0])
    predict = Predictive(model, guide=guide, num_samples=S, return_sites=["_RETURN", "sigma"])
    whole = seeded(lambda: predict(X))
    same(seeded(lambda: predict.loader(batches())), whole)
