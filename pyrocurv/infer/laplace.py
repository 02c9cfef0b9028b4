"""The Laplace approximation: a Gaussian at a mode, its precision the curvature of the log joint.

    Λ = Σ_n C_n(M) + δ,   q(w) = N(M, Λ⁻¹)

with M the guide's mean, C_n the curvature of -log p(y_n | w), δ the prior precision. It is fitted
in one pass over the data and written into the guide. Predictions are those of the linearized
network; sampling it in the network itself is wrong by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.guides import StructuredGuide
from pyrocurv.guides.owned_blocks import elsewhere
from pyrocurv.handlers.modules import module_tensors, modules
from pyrocurv.infer.guide_store import check_guide
from pyrocurv.infer.laplace_fit import sum_curvature
from pyrocurv.infer.linearized_predictive import LINKS, predict
from pyrocurv.infer.marginal_likelihood import (
    LaplaceBlock,
    log_evidence,
    maximize_evidence,
    with_prior_scales,
)
from pyrocurv.infer.model_run import setup_guide
from pyrocurv.nn import rescale_prior
from pyrocurv.posterior.correlated_prior import CorrelatedPrior
from pyrocurv.runtime.agreement import SAME_INPUTS, check_same
from pyrocurv.runtime.choices import CurvatureKind, Link, Per
from pyrocurv.runtime.inference_mode import outside_inference_mode
from pyrocurv.runtime.representation import described
from pyrocurv.runtime.sharding import check_unsharded
from pyrocurv.runtime.single_thread import one_thread_at_a_time
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import (
    check_callable,
    check_choice,
    check_integer,
    check_loader,
    check_values,
)
from pyrocurv.runtime.workers import AUTO, Workers


class Laplace:
    """A Laplace approximation around the mean of a guide, left in the same guide.

    Args:
        model: a Pyro model, as for `NGVI`. It runs in eval mode here.
        guide: one of `pyrocurv.guides`, made for the model, in any structure. Its mean should be at
            a mode of the log joint: the guide of a trained network starts there (or use
            `init_loc_fn=init_to_value(...)`), and `NGVI(..., num_particles=0)` converges to one.
            Layers that it excludes (structure={...: "frozen"}) keep their values and have no
            posterior: exclude all but the last for a last-layer approximation.
        curvature: a kind, or a `Curvature` of which `kind` and `num_samples` are used. All data are
            read. "ggn" and "fisher" are positive semi-definite; a "hessian" is projected to its
            positive part.
        process_group: the processes that fit together, each with its part of the data in its
            loader: a group of `torch.distributed`, by default that of `init_process_group`, if it
            was called; None for this process alone. All of them have to call `fit` and
            `tune_prior`, with the same mean, and have the same posterior and evidence after it.

    Latents of the fallback guide (a noise scale, say) stay at their medians. The approximation is
    that of the weights given them, and the evidence does not re-fit them: a K-FAC evidence counts
    parameters too often for that.

    Raises:
        TypeError: the guide is not one of `pyrocurv.guides`.
        ValueError: an unknown curvature, a process group without this process, or a guide of which
            each rank has a part.

    Reference: MacKay 1992; Daxberger et al. 2021, "Laplace redux", arXiv:2106.14806.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> x = torch.randn(64, 3)
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(3, 1))        # a trained one, say
        >>> model = pyrocurv.nn.Regressor(net, num_data=64, noise=0.1)
        >>> laplace = Laplace(model, KFACGuide(model)).fit([(x, x.sum(-1))])
        >>> laplace.predict(x[:5]).stddev.shape
        torch.Size([5])
    """

    def __init__(
        self, model: Callable[..., Any], guide: StructuredGuide,
        curvature: CurvatureKind | Curvature = "ggn", process_group: Any = AUTO,
    ) -> None:
        check_guide(guide)
        check_callable("model", model, "a Pyro model, a callable,")
        check_unsharded("model", modules(model))
        if guide.is_shared_out:
            raise ValueError(f"Laplace: {elsewhere('it needs all of it')}")
        Workers.of(process_group)  # raises for what is none
        self.process_group = process_group
        self.model, self.guide = model, guide
        self.curvature = as_curvature(curvature)
        if self.curvature.uses_sample_gradients:
            raise ValueError(
                "curvature='noise' is computed from the samples of training: choose another"
            )
        self._fitted: list[LaplaceBlock] = []
        self._log_likelihood = 0.0

    def __repr__(self) -> str:
        return described(
            self, repr(self.guide), f"curvature={self.curvature.kind!r}",
            "fitted" if self._fitted else "not fitted yet",
        )

    # ---- the posterior --------------------------------------------------------------------------

    @one_thread_at_a_time
    @outside_inference_mode
    def fit(self, loader: Iterable[Any]) -> Laplace:
        """Set the guide's precision from the curvature of all data at its mean.

        Args:
            loader: every datum once, in batches of the model's arguments: tuples, or mappings of
                keywords. "ekfac" iterates it twice, so an iterator will not do. Of several
                processes, each reads its own part, of any size but 0. A `DistributedSampler` is
                right only if the number of processes divides that of the data, as it repeats or
                drops some otherwise: take `Subset(data, range(rank, len(data), world_size))`.

        Raises, before anything is changed:
            ValueError: the number of data, of all processes, is not the size of the plate, or they
                have different means or models; what `NGVI.step` raises at its first call.
            RuntimeError: another process has raised an exception.
            FloatingPointError: a likelihood or a curvature is not finite.
        """
        check_loader("loader", loader)
        workers = Workers.of(self.process_group)
        fitted, log_likelihood = sum_curvature(
            self.model, self.guide, self.curvature, loader, workers
        )
        self._write(fitted)
        self._log_likelihood = log_likelihood
        return self

    @torch.no_grad()
    def _write(self, fitted: Sequence[LaplaceBlock]) -> None:
        """Write into the guide: everything, or nothing if an exception is raised."""
        families = [*self.guide.blocks]
        encoded = [f.encode(block.precision) for f, block in zip(families, fitted, strict=True)]
        with Undo() as undo:
            undo.keep_attributes(self, self.guide)
            for family, values in zip(families, encoded, strict=True):
                family.keep(undo, values)
            for family, values in zip(families, encoded, strict=True):
                family.write(values)
            self.guide.observe_priors([block.prior.gaussian.base for block in fitted])
            self.guide.is_laplace = True
            self._fitted = list(fitted)

    # ---- the evidence ---------------------------------------------------------------------------

    def _ready(self) -> list[LaplaceBlock]:
        if not self._fitted:
            raise RuntimeError("fit(loader) comes first")
        return [block.to(torch.float64) for block in self._fitted]

    @torch.no_grad()
    def log_marginal_likelihood(self) -> float:
        """log p(D) with the Gaussian over the weights integrated out, given all other latents.

        log p(D | M) + log p(M) + ½ (P log 2π - log det Λ), in nats. Exact for a model that is
        linear in its weights with normal noise, if the structure can represent the posterior.
        """
        fitted = self._ready()
        unscaled = fitted[0].loc.new_zeros(1)
        return self._log_likelihood + float(log_evidence(fitted, unscaled))

    @outside_inference_mode
    @torch.no_grad()
    def tune_prior(self, per: Per = "layer") -> dict[str, Tensor]:
        """Scale the prior precisions to maximize the evidence, with the curvature fixed.

        Args:
            per: a factor for each "layer", or one for the whole "model". Precisions that differ
                within a layer (weight and bias, units) keep their ratios.

        Returns:
            The prior precision at each site, a scalar or of the weight's shape. The posterior has
            them at once, and so has the model where `bayesianize` made the prior a normal (which,
            like the first prior, is not in `model.state_dict()`). In other models your own code
            defines the prior, and `NGVI` would continue with that.

        The mean stays, and is then no longer exactly the mode: train on and fit again. Noise scales
        are never changed. A higher evidence may predict worse, above all for classifiers: check
        held-out data. The search evaluates the evidence a dozen times or more, each time with a
        Cholesky factorization of every dense block, which is slow with `FullGuide` from a few
        thousand weights on, but not with Kronecker factors.

        Raises ValueError for another `per`, or a prior that is the posterior of another task, whose
        width is known; RuntimeError before `fit`.
        """
        check_choice("per", per, ("layer", "model"))
        self._ready()
        bases = [(fitted.block, fitted.prior.gaussian.base) for fitted in self._fitted]
        names = [block.name for block, base in bases if isinstance(base, CorrelatedPrior)]
        if names:
            raise ValueError(
                f"tune_prior: the prior of {', '.join(names)} is the posterior of another task, "
                "which has its width from data"
            )
        factors = maximize_evidence(self._fitted, per == "layer").to(self._fitted[0].loc)
        Workers.of(self.process_group).broadcast_([factors])
        self._write(with_prior_scales(self._fitted, factors))
        precisions: dict[str, Tensor] = {}
        layers = [layer for fitted in self._fitted for layer in fitted.block.layers]
        for layer, factor in zip(layers, factors.expand(len(layers)), strict=True):
            for site in layer.tensors:
                rescale_prior(self.model, site, (-factor / 2).exp())
        for fitted in self._fitted:
            precision = fitted.prior.gaussian.base.diagonal.expand(fitted.block.size)
            precisions.update(fitted.block.unpack(precision))
        return {name: _scalar_if_equal(value) for name, value in precisions.items()}

    # ---- prediction -----------------------------------------------------------------------------

    @one_thread_at_a_time
    @outside_inference_mode
    def predict(
        self, *args: Any, link: Link = "auto", num_samples: int = 256, process_group: Any = None,
        **kwargs: Any,
    ) -> Distribution:
        """The predictive distribution of the network linearized at the guide's mean.

        A normal likelihood gives a normal (for several outputs in one event, a multivariate normal)
        that includes the noise of the model, at the median of its scale. It is exact. Bernoulli and
        categorical likelihoods give their own kind, with mean probabilities. The guide may be
        fitted, trained or loaded.

        Args:
            args, kwargs: the model's arguments without the data.
            link: how probabilities are averaged. "mc": over draws of the outputs, whose random
                numbers are always the same and not those of torch's global generators. "probit": by
                MacKay's approximation, which is good for two classes, and for every pair of more,
                which doubts too much. "auto": "mc" from three classes on, otherwise "probit".
            num_samples: the number of draws, in antithetic pairs (an odd number is rounded up).
            process_group: shares draws of the weights out over processes that have the same model,
                posterior and inputs, all of which call this: a group of `torch.distributed`, or
                "auto" for that of `init_process_group`. Other predictions each computes in full.

        The covariance of the outputs takes a backward pass for each output of an example. Draws
        take no more than `num_samples` passes for any number of outputs. Neither does a posterior
        over the last layer alone, which has a closed form. Split a large x into batches.

        Raises:
            ValueError: an unknown `link`, or a `num_samples` that is not a positive integer;
                another likelihood (see `linear_predictor` in
                `pyrocurv.infer.linearized_predictive`), several observed sites, or none; processes
                with other inputs or posteriors.
            RuntimeError: the guide is not initialized, or neither fitted nor trained.
        """
        check_choice("link", link, LINKS)
        check_integer("num_samples", num_samples, 1)
        check_values((*args, *kwargs.values()), "the model")
        if self.guide.sites:  # also those of a loaded guide
            setup_guide(self.guide, args, kwargs)
        self.guide._ready_blocks()
        if not self.guide.is_laplace and self.guide.has_initial_scale:
            raise RuntimeError("fit(loader) comes first: the guide still has its initial scale")
        workers = Workers.of(process_group)
        if not workers.is_alone:
            tensors = {**module_tensors(self.guide), **module_tensors(self.model)}
            check_same(workers, {"the inputs": (args, kwargs), **tensors}, SAME_INPUTS)
        return predict(self.model, self.guide, args, kwargs, link, num_samples, workers)


def _scalar_if_equal(value: Tensor) -> Tensor:
    """A scalar if all entries are the same."""
    first = value.flatten()[0]
    return first.clone() if bool((value == first).all()) else value
