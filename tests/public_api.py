"""Every public callable with arguments that are right, for tests that replace one of them.

A scene is small: two inputs, three classes, six data, all of them linear layers.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.poutine.runtime import _PYRO_STACK
from snapshots import contents, modules_state
from torch import Tensor, nn

from pyrocurv import curvature, guides, infer, metrics, optim, plots, structures
from pyrocurv import nn as models
from pyrocurv.curvature import KFAC, Curvature
from pyrocurv.nn import networks

matplotlib.use("Agg")
X, Y = torch.linspace(-1, 2, 12).reshape(6, 2).sin(), torch.arange(6) % 3
TARGETS = torch.linspace(-1, 1, 6)


@dataclass
class Scene:
    """A call that is right, and all that it may change."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    watched: list[Any] = field(default_factory=list)  # modules, and owners of a state dict
    data: tuple[str, ...] = ()  # arguments whose shape is a matter of the user's own model
    words: tuple[str, ...] = ()  # which an error may use for an argument
    then: Callable[[Any], Any] | None = None  # what is done with the result
    free: str = ""  # a part of the state that is not the package's: a model draws its latents

    def state(self) -> Any:
        """All that the call may change, for a comparison bit by bit."""
        modules = [owner for owner in self.watched if isinstance(owner, nn.Module)]
        others = [owner for owner in self.watched if not isinstance(owner, nn.Module)]
        store = {name: p.detach() for name, p in pyro.get_param_store().named_parameters()}
        return contents({
            **modules_state(*modules), "others": [owner.state_dict() for owner in others],
            "store": store, "handlers": len(_PYRO_STACK), "threads": torch.get_num_threads(),
            "python": hash(random.getstate()), "numpy": np.random.get_state()[1].tobytes(),
            "validation": pyro.settings.get("validate_poutine"),
            "layouts": [[g.sites, g.fallback_sites, g.is_joint, g.is_laplace] for g in modules
                        if isinstance(g, guides.StructuredGuide)],
        })

    def numbers(self) -> Iterator[Tensor]:
        """The tensors that must stay finite."""
        yield from (p.detach() for p in pyro.get_param_store()._params.values())
        for owner in self.watched:
            if isinstance(owner, nn.Module):
                yield from (value for value in (*owner.parameters(), *owner.buffers()))


# ---- what scenes consist of ---------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3))


def classifier() -> models.Classifier:
    return models.Classifier(models.bayesianize(net()), 12)


def regressor() -> models.Regressor:
    return models.Regressor(models.bayesianize(nn.Linear(2, 1)), 6)


def trained(guide: type[guides.StructuredGuide] = guides.KFACGuide, **options: Any) -> infer.NGVI:
    model = classifier()
    ngvi = infer.NGVI(model, guide(model), **options)
    ngvi.step(X, Y)
    return ngvi


def fitted(make: Callable[[], Any] = classifier, y: Tensor = Y) -> infer.Laplace:
    model = make()
    model.num_data = 6
    return infer.Laplace(model, guides.KFACGuide(model)).fit([(X, y)])


def step(optimizer: Any, x: Tensor = X, y: Tensor = Y) -> Any:
    """One step of a plain loop."""
    if isinstance(optimizer, optim.VIOptimizer):
        with optimizer.sampled_params():
            F.cross_entropy(optimizer.net(x), y).backward()
    else:
        F.cross_entropy(optimizer.net(x), y).backward()
    optimizer.step()
    return optimizer


def stepped(kind: Any, **options: Any) -> Any:
    sizes = () if kind is optim.SecondOrderOptimizer else (12,)
    return step(kind(net(), *sizes, **options))


# ---- the table ----------------------------------------------------------------------------------

SCENES: dict[str, Callable[[], Scene]] = {}


def scene(*names: str) -> Callable[[Any], Any]:
    """Register a function () -> Scene, or name -> Scene for several names."""

    def register(make: Any) -> Any:
        for name in names:
            SCENES[name] = make if len(names) == 1 else (lambda name=name: make(name))
        return make

    return register


@scene("nn.bayesianize")
def _() -> Scene:
    target = net()
    arguments = {"net": target, "prior": "fan_in", "layers": None}
    return Scene(models.bayesianize, arguments, [target], words=("layers: no module",))


@scene("nn.Classifier")
def _() -> Scene:
    return Scene(models.Classifier, {"net": models.bayesianize(net()), "num_data": 6})


@scene("nn.Regressor")
def _() -> Scene:
    arguments = {"net": models.bayesianize(nn.Linear(2, 1)), "num_data": 6, "noise": 0.3}
    return Scene(models.Regressor, arguments)


@scene("nn.Classifier.forward", "nn.Regressor.forward")
def _(name: str) -> Scene:
    model, y = (classifier(), Y) if "Classifier" in name else (regressor(), TARGETS)
    return Scene(model, {"x": X, "y": y}, [model], ("x",), WORDS, free=".random")


@scene("nn.rescale_prior")
def _() -> Scene:
    model = classifier()
    arguments = {"model": model, "site": "net.0.weight", "factor": torch.tensor(0.5)}
    return Scene(models.rescale_prior, arguments, [model])


@scene("nn.update_bn")
def _() -> Scene:
    layers = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)
    model = models.Classifier(models.bayesianize(nn.Sequential(*layers)), 12)
    guide = guides.KFACGuide(model)
    guide(X, Y)
    arguments = {
        "model": model, "guide": guide, "loader": [(X, Y)], "num_batches": None, "progress": False,
    }
    return Scene(models.update_bn, arguments, [model, guide], words=("site 'obs'",))


@scene("nn.networks.LeNet5")
def _() -> Scene:
    return Scene(networks.LeNet5, {"channels": 1, "classes": 3, "padding": 2})


@scene("nn.networks.MLP")
def _() -> Scene:
    return Scene(networks.MLP, {"inputs": 2, "hidden": [4, 3], "outputs": 3})


@scene("nn.networks.ResNet")
def _() -> Scene:
    return Scene(networks.ResNet, {"channels": 1, "classes": 3, "widths": [2, 4]})


@scene("nn.networks.GPT")
def _() -> Scene:
    arguments = {"vocabulary": 5, "context": 6, "width": 8, "heads": 2, "layers": 1}
    return Scene(networks.GPT, arguments)


WORDS = ("site 'obs'", "targets", "classes", "argument [01]", "logits", "means",
         "the loss")


@scene(*(f"guides.{kind}" for kind in (
    "StructuredGuide", "DiagonalGuide", "KFACGuide", "EKFACGuide", "BlockGuide", "FullGuide"
)))
def _(name: str) -> Scene:
    kind, model = getattr(guides, name.removeprefix("guides.")), classifier()

    def then(guide: guides.StructuredGuide) -> None:
        if kind is not guides.StructuredGuide:  # which has no structure of its own
            guide(X, Y)

    arguments = {
        "model": model, "init_loc_fn": guides.init_to_network, "init_scale": 0.01,
        "structure": {"net.0": "diag"}, "fallback": pyro.infer.autoguide.AutoNormal,
        "create_plates": None,
    }
    return Scene(kind, arguments, [model], then=then)


@scene("guides.init_to_network")
def _() -> Scene:
    fn = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return Scene(guides.init_to_network, {"site": {"fn": fn, "value": torch.zeros(3)}})


@scene("guides.MixtureGuide")
def _() -> Scene:
    members = [trained().guide for _ in range(2)]
    return Scene(guides.MixtureGuide, {"guides": members[:1] * 2})


@scene("guides.KFACGuide.forward", "guides.FullGuide.forward")
def _(name: str) -> Scene:
    model = classifier()
    guide = getattr(guides, name.split(".")[1])(model)
    return Scene(guide, {"x": X, "y": Y}, [model, guide], ("x",), (*WORDS, "latents"))


@scene("guides.KFACGuide.sample_posterior", "guides.MixtureGuide.sample_posterior")
def _(name: str) -> Scene:
    guide: Any = trained().guide
    if "Mixture" in name:
        guide = guides.MixtureGuide([guide])
    return Scene(guide.sample_posterior, {"n": 2}, [guide])


@scene("guides.KFACGuide.to_module")
def _() -> Scene:
    ngvi = trained()
    arguments = {"sample": False, "module": "net"}
    return Scene(ngvi.guide.to_module, arguments, [ngvi.guide, ngvi.model])


@scene("guides.DiagonalGuide.quantiles")
def _() -> Scene:
    guide = trained(guides.DiagonalGuide).guide
    return Scene(guide.quantiles, {"quantiles": [0.1, 0.5]}, [guide])


@scene("guides.EKFACGuide.get_posterior")
def _() -> Scene:
    guide = trained(guides.EKFACGuide).guide
    return Scene(guide.get_posterior, {"site": "net.0.weight"}, [guide])


@scene("guides.KFACGuide.load_state_dict", "guides.MixtureGuide.load_state_dict",
       "infer.NGVI.load_state_dict", "optim.SecondOrderOptimizer.load_state_dict",
       "optim.VIOptimizer.load_state_dict")
def _(name: str) -> Scene:
    if "Optimizer" in name:
        target = stepped(getattr(optim, name.split(".")[1]))
        watched = [target, target.net]
    else:
        ngvi = trained()
        target = ngvi if "NGVI" in name else ngvi.guide
        target = guides.MixtureGuide([target]) if "Mixture" in name else target
        watched = [target, ngvi.guide, ngvi.model]
    argument = "state" if "NGVI" in name else "state_dict"
    return Scene(target.load_state_dict, {argument: target.state_dict()}, watched,
                 words=("the state",))


@scene("infer.NGVI")
def _() -> Scene:
    model = classifier()
    guide = guides.KFACGuide(model)

    def then(ngvi: infer.NGVI) -> None:
        ngvi.step(X, Y), ngvi.step(X, Y)

    arguments: dict[str, Any] = {
        "model": model, "guide": guide, "lr": 0.02, "momentum": 0.9, "curvature": "fisher",
        "temperature": 1.0, "kl_warmup": 2, "damping": 1e-3, "decoupled_weight_decay": 0.1,
        "nesterov": "auto", "kl_clip": 1e-3, "num_particles": 1, "antithetic": True,
        "update": "auto", "average": False, "optim": None, "on_nonfinite": "raise",
    }
    return Scene(infer.NGVI, arguments, [model, guide], then=then)


@scene("infer.NGVI.step", "infer.NGVI.evaluate_loss")
def _(name: str) -> Scene:
    ngvi = trained()
    call = ngvi.step if "step" in name else ngvi.evaluate_loss
    return Scene(call, {"x": X, "y": Y}, [ngvi, ngvi.guide, ngvi.model], ("x",), WORDS)


@scene("infer.NGVI.step of a regression")
def _() -> Scene:
    model = regressor()
    ngvi = infer.NGVI(model, guides.BlockGuide(model), curvature="ggn")
    ngvi.step(X, TARGETS)
    watched = [ngvi, ngvi.guide, model]
    return Scene(ngvi.step, {"x": X, "y": TARGETS}, watched, ("x",), WORDS)


@scene("infer.Laplace")
def _() -> Scene:
    laplace = fitted()
    arguments = {
        "model": laplace.model, "guide": laplace.guide, "curvature": "ggn", "process_group": None,
    }
    watched = [laplace.model, laplace.guide]
    return Scene(infer.Laplace, arguments, watched, then=lambda made: made.fit([(X, Y)]))


@scene("infer.Laplace.fit")
def _() -> Scene:
    laplace = fitted()
    return Scene(laplace.fit, {"loader": [(X, Y)]}, [laplace.model, laplace.guide], words=WORDS)


@scene("infer.Laplace.tune_prior")
def _() -> Scene:
    laplace = fitted()
    return Scene(laplace.tune_prior, {"per": "layer"}, [laplace.model, laplace.guide])


@scene("infer.Laplace.predict", "infer.Laplace.predict of a regression")
def _(name: str) -> Scene:
    laplace = fitted(regressor, TARGETS) if "regression" in name else fitted()
    return Scene(laplace.predict, {"x": X}, [laplace.model, laplace.guide], ("x",), WORDS)


@scene("infer.Predictive")
def _() -> Scene:
    ngvi = trained()

    arguments = {
        "model": ngvi.model, "posterior_samples": None, "guide": ngvi.guide, "num_samples": 2,
        "return_sites": ["_RETURN"], "parallel": False, "process_group": None,
    }
    watched = [ngvi.model, ngvi.guide]
    return Scene(infer.Predictive, arguments, watched, then=lambda predict: predict(X))


@scene("infer.Predictive of samples")
def _() -> Scene:
    ngvi = trained()

    samples = ngvi.guide.sample_posterior(2)
    arguments = {"model": ngvi.model, "posterior_samples": samples, "num_samples": None}
    return Scene(infer.Predictive, arguments, [ngvi.model], then=lambda predict: predict(X))


@scene("infer.Predictive.forward")
def _() -> Scene:
    ngvi = trained()
    predict = infer.Predictive(ngvi.model, guide=ngvi.guide, num_samples=2)
    words = (*WORDS, "these inputs")
    return Scene(predict, {"x": X}, [ngvi.model, ngvi.guide], ("x",), words)


@scene("infer.Predictive.loader")
def _() -> Scene:
    ngvi = trained()
    predict = infer.Predictive(ngvi.model, guide=ngvi.guide, num_samples=2)
    arguments = {"loader": [(X, Y)], "inputs": None, "device": "cpu", "progress": None}
    words = (*WORDS, "these inputs", "'obs'")
    return Scene(predict.loader, arguments, [ngvi.model, ngvi.guide], words=words)


@scene("infer.choose_temperature")
def _() -> Scene:
    ngvi = trained()
    arguments = {
        "fit": lambda temperature: ngvi, "held_out": [(X, Y)], "temperatures": [1.0, 0.1],
        "num_samples": 2, "process_group": None,
    }
    watched = [ngvi.model, ngvi.guide]
    return Scene(infer.choose_temperature, arguments, watched, words=WORDS)


@scene("infer.log_predictive_density")
def _() -> Scene:
    ngvi = trained()
    arguments = {
        "model": ngvi.model, "guide": ngvi.guide, "loader": [(X, Y)], "num_samples": 2,
        "process_group": None,
    }
    watched = [ngvi.model, ngvi.guide]
    return Scene(infer.log_predictive_density, arguments, watched, words=WORDS)


@scene("infer.fit")
def _() -> Scene:
    ngvi = trained()
    arguments = {
        "ngvi": ngvi, "loader": [(X, Y)], "epochs": 1, "schedule": "cosine", "warmup": 0,
        "num_samples": 2, "patience": None, "callbacks": [], "logger": None, "progress": False,
    }
    return Scene(infer.fit, arguments, [ngvi, ngvi.guide, ngvi.model], words=WORDS)


@scene("infer.Epoch")
def _() -> Scene:
    arguments = {"epoch": 1, "step": 2, "loss": 1.0, "nll": 1.0, "kl": 1.0, "lr": 1.0,
                 "temperature": 1.0}
    return Scene(infer.Epoch, arguments)


@scene("infer.History")
def _() -> Scene:
    return Scene(infer.History, {"epochs": (), "stopped_early": False})


@scene("infer.to_arviz")
def _() -> Scene:
    guide: Any = trained().guide

    def call(guide: Any, **arguments: Any) -> Any:
        return infer.to_arviz(guide, X, Y, **arguments) if find_spec("arviz") else None

    arguments = {
        "guide": guide, "num_samples": 2, "sites": ["net.0.bias"], "posterior_predictive": False,
    }
    return Scene(call, arguments, [guide], words=WORDS)


@scene("infer.train_mixture")
def _() -> Scene:
    def make(seed: int) -> infer.NGVI:
        model = classifier()
        return infer.NGVI(model, guides.DiagonalGuide(model))

    arguments = {
        "make": make, "loader": [(X, Y)], "epochs": 1, "seeds": [3], "finished": None,
        "progress": False,
    }
    return Scene(infer.train_mixture, arguments, words=WORDS)


OPTIONS: dict[str, dict[str, Any]] = {
    "SecondOrderOptimizer": {
        "lr": 0.03, "params": None, "likelihood": "categorical", "curvature": "fisher",
        "structure": "kfac", "update": "auto", "momentum": 0.9, "damping": 3e-3,
        "weight_decay": 0.0, "decoupled_weight_decay": 0.1, "nesterov": "auto",
        "kl_clip": 1e-2, "fallback_lr": 2e-3,
    },
    "VIOptimizer": {
        "num_data": 12, "lr": 0.02, "params": None, "likelihood": "categorical",
        "curvature": "fisher", "structure": "kfac", "update": "auto", "prior_precision": "fan_in",
        "temperature": 1.0, "kl_warmup": 0, "augmentation": 1.0, "momentum": 0.9,
        "damping": 3e-3, "decoupled_weight_decay": 0.1, "nesterov": "auto", "kl_clip": 1e-3,
        "num_samples": 1, "antithetic": True,
        "fallback_lr": 2e-3,
    },
    "vogn": {
        "num_data": 12, "lr": 0.01, "prior_precision": 1.0, "beta1": 0.9, "beta2": 0.99,
        "damping": 0.0, "temperature": 1.0,
    },
    "ivon": {
        "num_data": 12, "lr": 0.1, "weight_decay": 1e-4, "beta1": 0.9, "beta2": 0.999,
        "hess_init": 1.0, "temperature": 1.0,
    },
    "noisy_kfac": {"num_data": 12, "lr": 0.02}, "noisy_ekfac": {"num_data": 12, "lr": 0.02},
}
SYNONYMS = {"vogn": ("momentum", "decay"), "ivon": ("momentum", "decay", "initial")}


@scene(*(f"optim.{kind}" for kind in OPTIONS))
def _(name: str) -> Scene:
    kind, target = name.removeprefix("optim."), net()

    arguments = {"net": target, **OPTIONS[kind]}
    words = SYNONYMS.get(kind, ())
    return Scene(getattr(optim, kind), arguments, [target], (), words, step, ".gradients")


@scene("optim.SecondOrderOptimizer.step", "optim.VIOptimizer.step")
def _(name: str) -> Scene:
    optimizer = stepped(getattr(optim, name.split(".")[1]))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(optimizer.net(X), Y)
        loss.backward()
        return loss

    watched = [optimizer, optimizer.net]
    return Scene(optimizer.step, {"closure": closure}, watched, free=".gradients")


@scene("optim.SecondOrderOptimizer.add_param_group", "optim.VIOptimizer.add_param_group")
def _(name: str) -> Scene:
    kind, target = getattr(optim, name.split(".")[1]), net()
    sizes = () if kind is optim.SecondOrderOptimizer else (12,)
    optimizer = kind(target, *sizes, params=target[0].parameters())
    group = {"params": [*target[2].parameters()], "lr": 0.1}
    return Scene(optimizer.add_param_group, {"param_group": group}, [optimizer, target],
                 words=("params", "parameters"))


@scene("optim.VIOptimizer.predict")
def _() -> Scene:
    optimizer = stepped(optim.VIOptimizer)

    def call(num_samples: Any) -> Any:
        return optimizer.predict(X, num_samples=num_samples)

    return Scene(call, {"num_samples": 2}, [optimizer, optimizer.net])


@scene("curvature.Curvature")
def _() -> Scene:
    arguments = {
        "kind": "ggn", "every": 20, "eigen_every": 200, "batch": 32, "decay": 0.95,
        "initial": 0.1, "num_samples": 1,
    }
    return Scene(Curvature, arguments, words=("curvature",))


@scene("curvature.KFAC")
def _() -> Scene:
    return Scene(KFAC, {"num_blocks": 1, "rank": "auto", "sharing": "expand"})


@scene("curvature.EKFAC")
def _() -> Scene:
    return Scene(curvature.EKFAC, {"rank": "auto", "sharing": "expand"})


@scene("curvature.Full", "curvature.Block", "curvature.Diagonal")
def _(name: str) -> Scene:
    return Scene(getattr(curvature, name.removeprefix("curvature.")), {})


@scene("curvature.estimate")
def _() -> Scene:
    target = net()
    arguments = {
        "net": target, "x": X, "y": Y, "likelihood": "categorical", "curvature": "fisher",
        "structure": "kfac",
    }
    return Scene(curvature.estimate, arguments, [target], ("x",), WORDS)


@scene("metrics.uncertainty", "metrics.uncertainty of normals")
def _(name: str) -> Scene:
    arguments = {"logits": torch.ones(4, 6, 3), "likelihood": "categorical", "dim": 0}
    if "normals" in name:
        arguments = {"mean": torch.ones(4, 6), "scale": torch.ones(4, 6), "dim": 0}
    return Scene(metrics.uncertainty, arguments, words=("samples",))


@scene("metrics.Uncertainty")
def _() -> Scene:
    parts = {name: torch.zeros(6) for name in ("total", "aleatoric", "epistemic")}
    return Scene(metrics.Uncertainty, parts)


@scene("plots.reliability")
def _() -> Scene:
    arguments = {"probs": torch.full((6, 3), 1 / 3), "labels": Y, "ax": None, "bins": 5}
    return Scene(plots.reliability, arguments)


@scene("plots.uncertain_images")
def _() -> Scene:
    arguments = {
        "images": torch.ones(6, 2, 2), "probs": torch.full((6, 3), 1 / 3), "labels": Y,
        "figure": None, "n": 1,
    }
    return Scene(plots.uncertain_images, arguments)


@scene("plots.risk_coverage")
def _() -> Scene:
    arguments = {"probs": torch.full((6, 3), 1 / 3), "labels": Y, "ax": None, "label": "a net"}
    return Scene(plots.risk_coverage, arguments)


@scene("plots.entropy_histogram")
def _() -> Scene:
    probs = torch.full((6, 3), 1 / 3)
    return Scene(
        plots.entropy_histogram, {"probs": probs, "unseen": probs[:2], "ax": None, "bins": 3}
    )


@scene("plots.heat_map")
def _() -> Scene:
    arguments = {"matrix": torch.eye(2), "ax": None, "limit": 1.0}
    return Scene(plots.heat_map, arguments)


@scene("plots.spectrum")
def _() -> Scene:
    return Scene(plots.spectrum, {"matrices": structures.Diagonal(torch.ones(2)), "ax": None})


@scene("plots.predictive_band")
def _() -> Scene:
    arguments = {
        "x": TARGETS, "predictive": torch.ones(3, 6), "ax": None, "mass": 0.9, "label": "a net",
    }
    return Scene(plots.predictive_band, arguments)


@scene("plots.weight_noise")
def _() -> Scene:
    guide = trained().guide
    return Scene(plots.weight_noise, {"guide": guide, "ax": None}, [guide])


EYE = torch.eye(2)
FIELDS: dict[str, dict[str, Any]] = {
    "Dense": {"matrix": EYE}, "InverseDense": {"scale_tril": EYE},
    "Diagonal": {"entries": torch.ones(2)}, "Kronecker": {"output": EYE, "input": EYE},
    "KroneckerEigen": {"output_basis": EYE, "input_basis": EYE, "spectrum": torch.ones(2, 2)},
    "Rescaled": {"inner": structures.Dense(EYE), "root": torch.ones(2)},
    "BlockDiagonal": {"blocks": (structures.Dense(EYE), structures.Diagonal(torch.ones(1)))},
}
OPERANDS: dict[str, Any] = {  # of one of them
    "__matmul__": "x", "solve": "x", "rsqrt": "z", "solution": "x", "scale": "factor",
    "shift": "delta",
}


@scene(*(f"structures.{name}" for name in FIELDS))
def _(name: str) -> Scene:
    return Scene(getattr(structures, name.removeprefix("structures.")), FIELDS[name[11:]])


@scene(*(f"structures.{kind}.{method}" for kind in FIELDS for method in OPERANDS))
def _(name: str) -> Scene:
    _, kind, method = name.split(".")
    matrix = getattr(structures, kind)(**FIELDS[kind])
    right = 2.0 if method in ("scale", "shift") else torch.ones(matrix.size)

    def call(**arguments: Any) -> Any:
        return getattr(matrix, method)(*arguments.values())

    return Scene(call, {OPERANDS[method]: right}, words=("x", "operand"))


@scene("structures.Structure")
def _() -> Scene:
    state = structures.Diagonal(torch.ones(2)).state()
    return Scene(structures.Structure.from_state, {"state": state}, words=("the state", "entries"))


@scene("structures.LazySolution", "structures.Solution")
def _(name: str) -> Scene:  # made by `solution` alone
    return Scene(structures.LazySolution, {"dot": torch.ones(()), "factors": (torch.ones(2),)})


@scene("structures.cut")
def _() -> Scene:
    return Scene(structures.cut, {"matrix": EYE, "num_blocks": 2})


@scene("structures.automatic_ranks")
def _() -> Scene:
    return Scene(structures.automatic_ranks, {"outputs": 3, "inputs": 4, "rank": "auto"})
