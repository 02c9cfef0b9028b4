"""The Laplace approximation: a Gaussian at a mode, its precision the curvature of the log joint.

    Λ = Σ_n C_n(M) + δ,   q(w) = N(M, Λ⁻¹)

with M the guide's mean, C_n the curvature of -log p(y_n | w), δ the prior precision. Fitted in one
pass over the data, it is written into the guide. What it predicts is that of the linearised
network; its samples, put into the network itself, are wrong by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrocurv import engine
from pyrocurv.blocks import Block
from pyrocurv.capture import Capture
from pyrocurv.curvature import Curvature
from pyrocurv.curvature.hessian import twice_differentiable
from pyrocurv.curvature.propagate import propagate
from pyrocurv.curvature.pullback import Opaque
from pyrocurv.curvature.spec import NOISE, as_curvature
from pyrocurv.curvature.total import Batch, Total, accumulate
from pyrocurv.guides import StructuredGuide
from pyrocurv.infer.evidence import Fitted, best_factors, evidence, scaled
from pyrocurv.infer.linearised import innermost, output, predictive
from pyrocurv.infer.run import Run, leaves, run_model
from pyrocurv.nn import rescale_prior
from pyrocurv.priors import BlockPrior
from pyrocurv.prototype import modules, still_frozen
from pyrocurv.stream import Stream
from pyrocurv.uses import Call


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
        if self.curvature.kind == NOISE:
            raise ValueError("curvature='noise' comes from training's samples: choose another")
        self._fitted: list[Fitted] = []
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
        totals: list[Total] = []
        priors: list[BlockPrior] = []
        log_likelihood, counted, num_data = 0.0, 0, 0
        for batch in loader:
            run = self._run(batch)
            if not totals:
                blocks = [family.block for family in self.guide.blocks]
                priors = [BlockPrior.read(block, run.sources) for block in blocks]
                totals = [Total(b, p.units) for b, p in zip(blocks, priors, strict=True)]
            terms = sum(site.log_prob.detach().double() for site in run.replay.observed)
            log_likelihood += float(terms) * run.batch / run.num_data
            counted, num_data = counted + run.batch, run.num_data
            totals = self._accumulated(totals, run)
        _check_count(counted, num_data)
        if any(total.wants_another_pass for total in totals):
            totals = self._second_pass(totals, loader, counted)
        if not torch.isfinite(torch.tensor(log_likelihood)):
            raise FloatingPointError(f"the log likelihood is {log_likelihood}")
        self._write([
            Fitted(total.block, total.sum(), prior, family.raw_loc.detach().clone())
            for total, prior, family in zip(totals, priors, self.guide.blocks, strict=True)
        ])
        self._log_likelihood = log_likelihood
        return self

    def _second_pass(
        self, totals: Sequence[Total], loader: Iterable[Any], counted: int
    ) -> list[Total]:
        again = [total.second() if total.wants_another_pass else total for total in totals]
        places = [n for n, total in enumerate(totals) if total.wants_another_pass]
        some, seen = [again[n] for n in places], 0
        for batch in loader:
            run = self._run(batch)
            some, seen = self._accumulated(some, run), seen + run.batch
        if seen != counted:
            raise ValueError(
                f"the loader gave {counted} data and then {seen}: structure 'ekfac' reads it "
                "twice, so an iterator will not do"
            )
        for place, total in zip(places, some, strict=True):
            again[place] = total
        return again

    def _run(self, batch: Any) -> Run:
        """The model at the mean, with its ops watched."""
        args, kwargs = arguments(batch)
        if self.guide.prototype_trace is None:
            with Stream(0)(torch.device("cpu")):
                poutine.block(self.guide)(*args, **kwargs)
        families = self.guide.blocks
        if not families:
            raise ValueError(self.guide.emptiness)
        locs = [family.raw_loc.detach() for family in families]
        sample = engine.around([family.block for family in families], locs, None)
        twice = self.curvature.kind == "hessian"
        with (
            evaluated(self.model), torch.enable_grad(),
            twice_differentiable() if twice else nullcontext(),
        ):
            rest = self._rest(*args, **kwargs)
            return run_model(self.model, self.guide, leaves(sample), args, kwargs, True, rest)

    def _rest(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The medians of the latents that have no Gaussian here."""
        if not self.guide.fallback_sites:
            return {}
        return self.guide.fallback.median(*args, **kwargs)

    def _accumulated(self, totals: Sequence[Total], run: Run) -> list[Total]:
        rows = run.main.rows
        calls = _calls(self.guide, run.capture, run.weights, rows)
        with torch.enable_grad():
            batch = Batch(run.observations, calls, rows, run.batch)
            return accumulate(self.curvature, totals, batch)

    @torch.no_grad()
    def _write(self, fitted: Sequence[Fitted]) -> None:
        """Into the guide; all that may fail is done first."""
        families = self.guide.blocks
        encoded = [f.encode(one.precision) for f, one in zip(families, fitted, strict=True)]
        for family, one, precision in zip(families, fitted, encoded, strict=True):
            family.write(one.loc, precision)
        self.guide.observe_priors([one.prior.packed.base for one in fitted])
        self.guide.at_mode = True
        self._fitted = list(fitted)

    # ---- the evidence ---------------------------------------------------------------------------

    def _ready(self) -> list[Fitted]:
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
        return self._log_likelihood + float(evidence(fitted, nothing))

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
        or tune within what the mean allows. Noise scales are never touched.

        Raises ValueError for another word, RuntimeError before `fit`.
        """
        if per not in ("layer", "model"):
            raise ValueError(f"per={per!r}: choose 'layer' or 'model'")
        self._ready()
        factors = best_factors(self._fitted, per == "layer").to(self._fitted[0].loc)
        self._write(scaled(self._fitted, factors))
        found: dict[str, Tensor] = {}
        layers = [layer for one in self._fitted for layer in one.block.layers]
        for layer, factor in zip(layers, factors.expand(len(layers)), strict=True):
            for site in layer.tensors:
                rescale_prior(self.model, site, (-factor / 2).exp())
        for one in self._fitted:
            precision = one.prior.packed.base.precision.expand(one.block.size)
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
            RuntimeError: the guide has not seen its model.
        """
        self.guide._ready_blocks()
        families = self.guide.blocks
        blocks = [family.block for family in families]
        locs = [family.raw_loc.detach() for family in families]
        weights = {
            name: value.requires_grad_()
            for part in engine.around(blocks, locs, None) for name, value in part.items()
        }
        look = _Outlook({**weights, **self._rest()})
        with (
            torch.enable_grad(), Stream(0)(locs[0].device), evaluated(self.model),
            still_frozen(modules(self.model)), look, Capture(dict(weights)) as capture,
        ):
            self.model(*args, **kwargs)
        likelihood, event = look.likelihood()
        with torch.enable_grad():
            outputs = output(likelihood)
        calls = _calls(self.guide, capture, weights, len(outputs))
        with torch.no_grad():
            precisions = [family.precision() for family in families]
        covariance = propagate(blocks, precisions, outputs, calls)
        with torch.no_grad():
            return predictive(likelihood, event, covariance)


class _Outlook(Messenger):
    """Runs a model at `values` {site: tensor} and keeps the likelihoods of what is no latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.found: dict[str, Distribution] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not site_is_subsample(msg):
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values and not site_is_subsample(msg):
            self.found[msg["name"]] = msg["fn"]

    def likelihood(self) -> tuple[Distribution, int]:
        """The one there is, without what is around it, and its event axes."""
        if len(self.found) != 1:
            raise ValueError(
                "predict() needs a model with one site beside the latents, got "
                f"{', '.join(self.found) or 'none'}"
            )
        return innermost(*self.found.values())


def _calls(
    guide: StructuredGuide, capture: Capture | None, weights: Mapping[str, Tensor], rows: int
) -> list[Call | Opaque]:
    """The ops of the guide's layers; weights that no supported op consumes are layers too."""
    assert capture is not None
    held: list[Block] = [family.block for family in guide.blocks]
    opaque = [layer for block in held if block.is_opaque for layer in block.layers]
    return [*capture.calls, *(Opaque(one, weights[one.weight], rows) for one in opaque)]


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a loader gave as the arguments of a model."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _check_count(counted: int, num_data: int) -> None:
    if not counted:
        raise ValueError("the loader gave no batch")
    if counted != num_data:
        raise ValueError(
            f"the loader gave {counted} data, the model's plate says there are {num_data}: every "
            "datum is needed once (no drop_last, no sampling with replacement)"
        )


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """With the model's modules in eval mode, in which no buffer moves."""
    training: list[nn.Module] = [module for module in modules(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _compact(value: Tensor) -> Tensor:
    """A scalar where all entries are the same."""
    first = value.flatten()[0]
    return first.clone() if bool((value == first).all()) else value
