"""`repr` and `help` of what users make, and the words that arguments take."""

import inspect
from typing import Any, get_args

import pyro
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrocurv import guides, optim
from pyrocurv.curvature.likelihood import LIKELIHOODS
from pyrocurv.curvature.spec import KINDS, PRICE
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.infer.linearized_predictive import LINKS
from pyrocurv.layers.structure_selection import LEFT_OUT
from pyrocurv.layers.structure_spec import SHARING, STRUCTURES
from pyrocurv.nn import Classifier, Regressor, bayesianize
from pyrocurv.optim.mean_updates import UPDATES
from pyrocurv.runtime import choices

X, Y = torch.linspace(-1, 1, 12).reshape(6, 2).double(), torch.arange(6) % 3


def model(**options: Any) -> Classifier:
    return Classifier(bayesianize(nn.Linear(2, 3).double()), 60)


def test_guides() -> None:
    guide = guides.KFACGuide(model())
    assert repr(guide) == "KFACGuide(structure='kfac', not called yet)"
    guide(X, Y)
    assert repr(guide) == "KFACGuide(structure='kfac', 9 weights in 1 block)"
    pyro.clear_param_store()
    repr(guide)
    assert not len(pyro.get_param_store()), "nothing is read from the store"
    regressor = Regressor(bayesianize(nn.Linear(2, 1).double()), 60)
    other = guides.DiagonalGuide(regressor)
    other(X, X[:, 0])
    assert repr(other) == (
        "DiagonalGuide(structure='diag', 3 weights in 1 block, fallback=['sigma'])"
    )
    loaded = guides.DiagonalGuide(regressor)
    loaded.load_state_dict(other.state_dict())
    assert repr(loaded) == repr(other)
    mixture = guides.MixtureGuide([guide, guides.KFACGuide(model())])
    assert repr(mixture) == f"MixtureGuide({guide!r}, {mixture[1]!r})"


def test_inference() -> None:
    classifier = model()
    guide = guides.KFACGuide(classifier)
    ngvi = NGVI(classifier, guide, lr=0.05)
    assert repr(ngvi) == (
        "NGVI(KFACGuide(structure='kfac', not called yet), curvature='fisher', "
        "update='whitened-muon', lr=0.05, temperature='auto', 0 steps)"
    )
    ngvi.step(X, Y)
    text = repr(ngvi)
    assert "9 weights in 1 block, temperature=" in text and " now, N=60, 1 step)" in text
    predict = Predictive(classifier, guide=guide, num_samples=1000, return_sites=["obs"])
    assert repr(predict) == (
        "Predictive(model=Classifier, guide=KFACGuide, num_samples=1000, return_sites=['obs'])"
    )
    assert repr(Predictive(classifier, guide.sample_posterior(2))) == (
        "Predictive(model=Classifier, posterior_samples, num_samples=2)"
    )
    fresh = model()
    fresh.num_data = 6
    laplace = Laplace(fresh, guides.BlockGuide(fresh))
    assert repr(laplace) == (
        "Laplace(BlockGuide(structure='block', not called yet), curvature='ggn', not fitted yet)"
    )
    laplace.fit([(X, Y)])
    assert repr(laplace) == (
        "Laplace(BlockGuide(structure='block', 9 weights in 1 block, a Laplace approximation), "
        "curvature='ggn', fitted)"
    )


def test_models_and_optimizers() -> None:
    assert repr(model()).splitlines()[1].strip() == "num_data=60"
    assert "num_data=60, noise=None" in repr(Regressor(bayesianize(nn.Linear(2, 1)), 60))

    def likelihood(output: Tensor) -> Any:
        return torch.distributions.Normal(output, 1.0)

    net = nn.Linear(2, 3).double()
    optimizer = optim.VIOptimizer(net, 60, structure={"weight": "diag"})
    first, second, *_ = repr(optimizer).splitlines()
    assert first == (
        "VIOptimizer(9 weights of Linear, likelihood='categorical', curvature='fisher', "
        "structure=by layer, update='whitened-muon', 0 steps)"
    )
    assert second == "VIOptimizer ("
    other = optim.SecondOrderOptimizer(nn.Linear(2, 3), likelihood=likelihood, structure="block")
    assert "likelihood=a function" in repr(other) and "structure='block'" in repr(other)
    with optimizer.sampled_params():
        F.cross_entropy(net(X), Y).backward()
    optimizer.step()
    assert "1 step)" in repr(optimizer)


@pytest.mark.parametrize("kind", ["KFACGuide", "FullGuide", "DiagonalGuide"])
def test_the_constructor_of_a_guide_tells_its_options(kind: str) -> None:
    guide = getattr(guides, kind)
    options = [*inspect.signature(guide).parameters]
    assert options == ["model", "init_loc_fn", "init_scale", "structure", "fallback",
                       "create_plates"]
    assert all(f"{name}: " in inspect.getdoc(guide.__init__) for name in options)


def test_the_words_are_those_that_exist() -> None:
    tables: dict[Any, Any] = {
        choices.CurvatureKind: (*KINDS, PRICE), choices.LikelihoodName: LIKELIHOODS,
        choices.Link: LINKS, choices.Sharing: SHARING,
        choices.StructureName: (*STRUCTURES, *LEFT_OUT), choices.UpdateName: ("auto", *UPDATES),
    }
    for words, table in tables.items():
        assert {*get_args(words)} == {*table}
