"""A structured Gaussian posterior, trained by natural gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrocurv.guides import BlockGuide, DiagonalGuide, EKFACGuide, FullGuide, KFACGuide
from pyrocurv.infer import NGVI, Predictive
from pyrocurv.nn import Classifier, bayesianize, rescale_prior
from vision.methods.dense import check_dense
from vision.methods.trainer import Metrics, Problem, Trainer, accuracy, log_softmax

GUIDES = {
    "kfac": KFACGuide, "ekfac": EKFACGuide, "diagonal": DiagonalGuide, "block": BlockGuide,
    "full": FullGuide,
}


def ngvi(problem: Problem) -> Trainer:
    """Under `torchrun`, `NGVI` finds the process group by itself."""
    config, settings = problem.config, problem.settings
    net = problem.make_network()
    check_dense(net, config.guide)
    model = Classifier(bayesianize(net), num_data=problem.num_data)
    _scale_priors(model, config.prior_scale)
    guide = GUIDES[config.guide](model)
    engine = NGVI(
        model, guide, lr=settings.lr, update=config.update,
        decoupled_weight_decay=settings.weight_decay,
        curvature="fisher" if config.curvature == "auto" else config.curvature,
        temperature="auto" if config.temperature is None else config.temperature,
    )
    outputs: list[Tensor] = []  # logits of the network in a step, at a sample of its weights
    model.net.register_forward_hook(lambda _, inputs, logits: outputs.append(logits.detach()))

    def train_step(x: Tensor, y: Tensor) -> Metrics:
        outputs.clear()
        loss = engine.step(x, y) / problem.num_data
        logits, terms = outputs[0], engine.loss_terms
        outputs.clear()
        assert terms is not None
        return {
            "loss": loss, "nll": terms.nll / problem.num_data, "kl": terms.kl / problem.num_data,
            "temperature": terms.temperature, "accuracy": accuracy(logits, y),
        }

    predictive = Predictive(
        model, guide=guide, num_samples=settings.samples, return_sites=["_RETURN"]
    )

    def predict(x: Tensor) -> Tensor:
        logits = predictive(x)["_RETURN"]
        outputs.clear()
        return log_softmax(logits)

    return Trainer(
        train_step, predict, [model], [engine.optimizer],
        {"model": model, "guide": guide, "ngvi": engine},
    )


def _scale_priors(model: nn.Module, scale: float) -> None:
    """Priors of `scale` times the usual width for the weights of all layers."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and scale != 1:
            rescale_prior(model, f"{name}.weight", torch.tensor(scale))
