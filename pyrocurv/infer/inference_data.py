"""Samples of a posterior for ArviZ: with the log likelihood of each datum, for `arviz.loo`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.poutine.condition_messenger import ConditionMessenger
from torch import Tensor

from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.replay import ReplayMessenger
from pyrocurv.runtime.module_state import eval_mode, preserve_module_state, still_frozen
from pyrocurv.runtime.rng import device_of, rewind_rng_on_error
from pyrocurv.runtime.validation import check_flag, check_integer, check_is, check_iterable

Guide = StructuredGuide | MixtureGuide


@torch.no_grad()
def to_arviz(
    guide: Guide, *args: Any, num_samples: int = 1000, sites: Collection[str] | None = None,
    posterior_predictive: bool = False, **kwargs: Any,
) -> Any:
    """Samples of a posterior as an `arviz.InferenceData`, one chain of independent draws.

    Its groups are `posterior`, `log_likelihood` (of each datum, without a mask's and without the
    scale of a plate), `observed_data` and, if asked for, `posterior_predictive`. The model is in
    eval mode, and runs once for each sample. Needs ArviZ, `pip install arviz`.

    Args:
        guide: one of `pyrocurv.guides`, which has its model.
        args, kwargs: of the model, with the targets.
        num_samples: the number of draws.
        sites: the latents in the group `posterior`, by default all. A network has many weights, and
            for `arviz.loo` one is enough.
        posterior_predictive: whether to draw targets too, at each sample.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: a Laplace approximation, whose samples are not meant for the network itself; a
            site that does not exist; a model that observes nothing in this call.
        RuntimeError: the guide is not initialized, or was unpickled without its model.

    Example:
        >>> import arviz, torch, pyrocurv  # doctest: +SKIP
        >>> samples = pyrocurv.infer.to_arviz(guide, x, y, sites=["net.bias"])  # doctest: +SKIP
        >>> arviz.loo(samples)  # doctest: +SKIP

    Reference: Kumar et al. 2019, "ArviZ", JOSS; Vehtari et al. 2017, arXiv:1507.04544, for loo.
    """
    arviz = _arviz()
    check_is("guide", guide, (StructuredGuide, MixtureGuide), "one of pyrocurv.guides")
    check_integer("num_samples", num_samples, 1)
    check_flag("posterior_predictive", posterior_predictive)
    leaves = guide.leaves if isinstance(guide, MixtureGuide) else [guide]
    if any(leaf.is_laplace for leaf in leaves):
        raise ValueError(
            "the guide is a Laplace approximation: Laplace.predict(x) has densities, not samples"
        )
    if not leaves[0]._base_model:
        raise RuntimeError("the guide was unpickled, without its model")
    model = leaves[0]._base_model[0]
    with rewind_rng_on_error(device_of(args)):
        samples = guide.sample_posterior(num_samples)
        latents = [name for name in samples if name in {*guide.sites, *guide.fallback_sites}]
        chosen = latents if sites is None else _chosen(sites, latents)
        if isinstance(guide, MixtureGuide):
            guide.prepare(model)
        densities: dict[str, list[Tensor]] = {}
        targets: dict[str, list[Tensor]] = {}
        data: dict[str, Tensor] = {}
        with (eval_mode(modules(model)), preserve_module_state(modules(model)),
              still_frozen(modules(model))):
            for number in range(num_samples):
                draw = {name: value[number] for name, value in samples.items()}
                values = {name: draw.pop(name) for name in latents}
                with ConditionMessenger(draw), ReplayMessenger(values) as replay:
                    model(*args, **kwargs)
                for site in replay.observed:
                    data[site.name] = site.value
                    densities.setdefault(site.name, []).append(site.each)
                    if posterior_predictive and not site.is_factor:
                        targets.setdefault(site.name, []).append(site.fn.sample())
    if not data:
        raise ValueError("the model observes nothing in this call: were the targets left out?")
    groups: dict[str, dict[str, Any]] = {
        "posterior": {name: _array(samples[name])[None] for name in chosen},
        "log_likelihood": {n: _array(torch.stack(each))[None] for n, each in densities.items()},
        "observed_data": {name: _array(value) for name, value in data.items()},
        "posterior_predictive": {n: _array(torch.stack(x))[None] for n, x in targets.items()},
    }
    return _made(arviz, {name: group for name, group in groups.items() if group})


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an announcement of its next version
            import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install arviz") from error
    return arviz


def _made(arviz: Any, groups: Mapping[str, Any]) -> Any:
    """ArviZ takes the groups by keyword before its version 1, and as a dict from then on."""
    major = int(arviz.__version__.partition(".")[0])
    return arviz.from_dict(groups) if major else arviz.from_dict(**groups)


def _chosen(sites: Collection[str], latents: Collection[str]) -> list[str]:
    check_iterable("sites", sites, "a list of names")
    if not sites:
        raise ValueError("sites: at least one is needed")
    if unknown := [name for name in sites if name not in latents]:
        raise ValueError(f"sites: there is no latent {unknown[0]!r}; {', '.join(latents)} exist")
    return [*sites]


def _array(value: Tensor) -> Any:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
