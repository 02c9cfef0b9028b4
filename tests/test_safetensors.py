"""`checkpoint.save_guide` and `load_guide`: the state of a guide as a safetensors file."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from toys import GUIDES, regression_data, regressor

from pyrocurv.checkpoint import load_guide, save_guide
from pyrocurv.guides import FullGuide, KFACGuide, MixtureGuide
from pyrocurv.infer import NGVI, Laplace
from pyrocurv.nn import Regressor, bayesianize

safetensors = pytest.importorskip("safetensors")


def equal(one: Any, other: Any) -> bool:
    """Two state dicts, bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(x, other[name]) if isinstance(x, torch.Tensor) else x == other[name]
        for name, x in one.items()
    )


@pytest.mark.parametrize("structure", GUIDES)
@pytest.mark.parametrize("noise", [0.3, None])
def test_a_guide_is_the_same_after_it(structure: str, noise: float | None, tmp_path: Path) -> None:
    model, data = regressor(noise), regression_data()
    ngvi = NGVI(model, GUIDES[structure](model, structure={"net.2": "kfac-block"}
                                         if structure != "full" else None))
    ngvi.step(*data), ngvi.step(*data)
    save_guide(path := tmp_path / "posterior.safetensors", ngvi.guide)
    for called in (False, True):
        fresh = type(ngvi.guide)(model, structure=ngvi.guide._choice)
        if called:
            fresh(*data)
        load_guide(path, fresh)
        assert equal(fresh.state_dict(), ngvi.guide.state_dict())
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with safetensors.safe_open(path, framework="pt") as file:
        assert all("." in name for name in file.keys())


def test_layouts_of_all_kinds(tmp_path: Path) -> None:
    """Truncated factors, points, frozen layers, recurrent weights; a Laplace approximation."""
    net = nn.Sequential(nn.Linear(3, 170), nn.Linear(170, 4), nn.Linear(4, 2)).double()
    model, data = Regressor(bayesianize(net), 30, noise=0.3), regression_data()
    choice: Any = {"net.1": "point", "net.2": "frozen"}
    laplace = Laplace(model, KFACGuide(model, structure=choice)).fit([data])
    path = tmp_path / "posterior.safetensors"
    save_guide(path, laplace.guide)
    fresh = KFACGuide(model, structure=choice)
    load_guide(path, fresh)
    assert fresh.is_laplace and equal(fresh.state_dict(), laplace.guide.state_dict())


def test_mixtures_and_guides_of_pyro(tmp_path: Path) -> None:
    data, models = regression_data(), [regressor(None) for _ in range(2)]
    guides = [KFACGuide(model) for model in models]
    for model, guide in zip(models, guides, strict=True):
        guide(*data)
        model.net.register_buffer("offset", torch.randn(2))
    mixture = MixtureGuide(guides)
    save_guide(path := tmp_path / "mixture.safetensors", mixture)
    fresh = MixtureGuide([KFACGuide(models[0]) for _ in range(2)])
    load_guide(path, fresh)
    assert equal(fresh.state_dict(), mixture.state_dict())
    auto = AutoNormal(regressor(0.3))
    auto(*data)
    save_guide(path, auto)
    before = copy.deepcopy(auto.state_dict())
    with torch.no_grad():
        for parameter in auto.parameters():
            parameter.zero_()
    load_guide(path, auto)
    assert equal(auto.state_dict(), before)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = regressor(0.3), regression_data()
    guide = KFACGuide(model)
    guide(*data)
    path = tmp_path / "posterior.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_guide(path, guide)
    save_guide(path, guide)
    content = path.read_bytes()
    full = FullGuide(model)
    with pytest.raises(ValueError, match="of a guide with structure 'kfac', this one has 'full'"):
        load_guide(path, full)
    for damaged in (b"", content[:-9], b"x" * 50):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no file of a guide, or a damaged one"):
            load_guide(path, guide)
    safetensors_torch = pytest.importorskip("safetensors.torch")
    safetensors_torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no file of a guide"):
        load_guide(path, guide)

    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(TypeError, match="no JSON .*: use save"):
        save_guide(path, Odd())
    with pytest.raises(TypeError, match="guide: a torch.nn.Module is needed"):
        save_guide(path, NGVI(model, guide))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        save_guide(path, guide)
