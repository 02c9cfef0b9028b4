"""The Laplace approximation: a Gaussian at a mode, its precision the curvature of the log joint.

    Λ = Σ_n C_n(M) + δ,   q(w) = N(M, Λ⁻¹)

with M the guide's mean, C_n the curvature of -log p(y_n | w), δ the prior precision. Fitted in one
pass over the data, it is written into the guide. What it predicts is that of the linearised
network; its samples, put into the network itself, are wrong by far.
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
from pyrocurv.infer.laplace_fit import sum_curvature
from pyrocurv.infer.linearized_predictive import predict
from pyrocurv.infer.marginal_likelihood import (
    LaplaceBlock,
    log_evidence,
    maximize_evidence,
    with_prior_scales,
)
from pyrocurv.infer.model_run import setup_guide
from pyrocurv.nn import rescale_prior
from pyrocurv.runtime.undo import Undo


class Laplace:
    """A Laplace approximation around the mean of a guide, left in the same guide.

    Args:
        model: a Pyro model, as for `NGVI`. It runs in eval mode here.
        guide: one of `pyrocurv.guides`, made for the model, in any structure. Its mean should be at
            a mode of the log joint: of a trained network the guide starts there by itself (or by
            `init_loc_fn=init_to_value(...)`); `NGVI(..., num_particles=0)` goes to one. What it
            leaves out (structure={...: "frozen"}) keeps its value and has no part: so the last
            layer alone has a posterior when all others are left out.
        curvature: a kind, or a `Curvature` of which `kind` and `num_samples` count. All data are
            read. "ggn" and "fisher" are positive semi-definite; of a "hessian" what is negative is
            left out.

    Latents of the fallback guide (a noise scale, say) stay at their medians: the approximation is
    that of the weights given them, and no evidence here re-fits them. A K-FAC evidence would count
    parameters too often for that.

    Raises:
        TypeError: the guide is none of `pyrocurv.guides`.
        ValueError: an unknown curvature.

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
        self, model: Callable[..., Any], guide: StructuredGuide, curvature: str | Curvature = "ggn"
    ) -> None:
        if not isinstance(guide, StructuredGuide):
            raise TypeError(
                "guide: one of pyrocurv.guides is needed (KFACGuide, ...), got "
                f"{type(guide).__name__}"
            )
        self.model, self.guide = model, guide
        self.curvature = as_curvature(curvature)
        if self.curvature.uses_sample_gradients:
            raise ValueError("curvature='noise' comes from training's samples: choose another")
        self._fitted: list[LaplaceBlock] = []
        self._log_likelihood = 0.0

    # ---- the posterior --------------------------------------------------------------------------

    def fit(self, loader: Iterable[Any]) -> Laplace:
        """Set the guide's precision from the curvature of all data at its mean.

        Args:
            loader: gives every datum once, in batches of the model's arguments: tuples, or
                mappings of keywords. "ekfac" takes a second pass, so no iterator for that.

        Raises, before anything is changed:
            ValueError: the batches have not as many data as the plate is large; what `NGVI.step`
                raises at its first call.
            FloatingPointError: a likelihood or a curvature that is not finite.
        """
        if isinstance(loader, tuple) and any(isinstance(part, Tensor) for part in loader):
            raise ValueError("loader: batches in a list or a DataLoader are needed, [(x, y)]")
        fitted, log_likelihood = sum_curvature(self.model, self.guide, self.curvature, loader)
        self._write(fitted)
        self._log_likelihood = log_likelihood
        return self

    @torch.no_grad()
    def _write(self, fitted: Sequence[LaplaceBlock]) -> None:
        """Into the guide: everything, or nothing if an exception is raised."""
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
        return [one.to(torch.float64) for one in self._fitted]

    @torch.no_grad()
    def log_marginal_likelihood(self) -> float:
        """log p(D), by the integral of the Gaussian: of the weights, given all other latents.

        log p(D | M) + log p(M) + ½ (P log 2π - log det Λ), in nats; exact for a model that is
        linear in its weights with normal noise, where the structure can hold the posterior.
        """
        fitted = self._ready()
        nothing = fitted[0].loc.new_zeros(1)
        return self._log_likelihood + float(log_evidence(fitted, nothing))

    @torch.no_grad()
    def tune_prior(self, per: str = "layer") -> dict[str, Tensor]:
        """Scale the prior precisions to where the evidence is highest, the curvature kept.

        Args:
            per: a factor for each "layer", or one for the whole "model". Precisions that differ
                inside of a layer (weight and bias, units) keep their ratios.

        Returns:
            The prior precision at each site, a scalar or of the weight's shape. The posterior has
            them at once. So has the model where `bayesianize` made the prior a normal (like its
            first prior it is no part of `model.state_dict()`); in other models the prior is what
            your own code says, and `NGVI` would go on with that.

        The mean stays where it is, which is no longer quite the mode: train on and fit once more,
        or tune within what the mean allows. Noise scales are never touched. A higher evidence may
        predict worse, of classifiers above all: look at held-out data. The search takes a dozen
        evidences or more, each with a Cholesky factor of every dense block: from a few thousand
        weights on that is slow with `FullGuide`, and is not with Kronecker factors.

        Raises ValueError for another word, RuntimeError before `fit`.
        """
        if per not in ("layer", "model"):
            raise ValueError(f"per={per!r}: choose 'layer' or 'model'")
        self._ready()
        factors = maximize_evidence(self._fitted, per == "layer").to(self._fitted[0].loc)
        self._write(with_prior_scales(self._fitted, factors))
        found: dict[str, Tensor] = {}
        layers = [layer for one in self._fitted for layer in one.block.layers]
        for layer, factor in zip(layers, factors.expand(len(layers)), strict=True):
            for site in layer.tensors:
                rescale_prior(self.model, site, (-factor / 2).exp())
        for one in self._fitted:
            precision = one.prior.gaussian.base.precision.expand(one.block.size)
            found.update(one.block.unpack(precision))
        return {name: _compact(value) for name, value in found.items()}

    # ---- prediction -----------------------------------------------------------------------------

    def predict(self, *args: Any, **kwargs: Any) -> Distribution:
        """The predictive distribution of the network linearised at the guide's mean.

        Takes the model's arguments without the data. A normal likelihood gives a normal (of
        several outputs in one event, a multivariate one) that has the noise of the model, at the
        median of its scale; Bernoulli and categorical ones give their own kind, with
        probabilities by the probit approximation. It reads the guide as it is, loaded or trained,
        and costs a backward pass for each output; hand over a large x in parts.

        Raises:
            ValueError: another likelihood (see `pyrocurv.infer.linearised.output`), several
                observed sites, or none.
            RuntimeError: the guide has not seen its model, or is neither fitted nor trained.
        """
        if self.guide.sites:  # also of a guide that was loaded
            setup_guide(self.guide, args, kwargs)
        self.guide._ready_blocks()
        if not self.guide.is_laplace and self.guide.has_initial_scale:
            raise RuntimeError("fit(loader) comes first: the guide has still its first width")
        return predict(self.model, self.guide, args, kwargs)


def _compact(value: Tensor) -> Tensor:
    """A scalar where all entries are the same."""
    first = value.flatten()[0]
    return first.clone() if bool((value == first).all()) else value
