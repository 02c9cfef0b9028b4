"""The posterior predictive distribution, many samples of the posterior at once.

As `pyro.infer.Predictive`, which draws from the guide and traces the model once for each sample:
here the latents are drawn together and the model runs at all of them under `torch.func.vmap`, or in
a lean loop where that is no slower (`pyrocurv.repeated`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.vectorized import RETURN, RunResults, VectorizedRunner, call_signature, join
from pyrocurv.runtime.module_state import save_buffers, still_frozen
from pyrocurv.runtime.rng import RandomStream
from pyrocurv.runtime.user_warnings import warn_user

NUMBERS = 1 << 22  # latents drawn together, in all samples: as few megabytes as are fast


class Predictive(pyro.infer.Predictive):
    """Samples of the posterior predictive: `pyro.infer.Predictive`, vectorised.

    Args:
        model: a Pyro model.
        posterior_samples: {site: [S, ...]}, in place of a guide.
        guide: any Pyro guide. One of `pyrocurv.guides` that was loaded needs no data first.
        num_samples: S.
        return_sites: names of sites, with "_RETURN" for what the model returns. Empty: all sites,
            or, without a guide, those that are not in `posterior_samples`. None: all sites.
        parallel: with Pyro, runs the model inside a plate. Here all are run at once where that can
            be, in either case.

    Called with the model's arguments it gives {site: [S, ...]} in the shapes that Pyro has, without
    gradients, distributed as with Pyro; other random numbers, as determined by `torch.manual_seed`.

    The model is run once for many samples: what it does beside its sites and its result, or draws
    from another source than torch, is done once for all of those. Control flow that hangs on
    sampled values, and ops and distributions that vmap does not know, are found out and run sample
    by sample.
    Batch-norm statistics stay as they are; a model that would move them, in `train()` mode, is
    warned about once.

    Raises what Pyro does, and what the model does.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=64)
        >>> guide = KFACGuide(model)
        >>> weights = guide(torch.randn(64, 4), torch.randint(3, (64,)))
        >>> predict = Predictive(model, guide=guide, num_samples=100, return_sites=["_RETURN"])
        >>> predict(torch.randn(5, 4))["_RETURN"].softmax(-1).mean(0).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Tensor] | None = None,
        guide: Callable[..., Any] | None = None,
        num_samples: int | None = None,
        return_sites: Collection[str] | None = (),
        parallel: bool = False,
    ) -> None:
        if isinstance(return_sites, str):
            raise TypeError(f"return_sites={return_sites!r}: names in a list, [{return_sites!r}]")
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        self._of_model, self._of_guide = VectorizedRunner(), VectorizedRunner()
        self._sizes: dict[Any, int] = {}  # numbers in a draw from the guide
        self._warned = False

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """{site: [S, ...]} for the model's arguments."""
        if am_i_wrapped() or torch.jit.is_tracing():  # handlers around this want to see each run
            return super().forward(*args, **kwargs)
        parts = []
        with self._preserve_module_state(), pyro.validation_enabled(False):
            for values, n in self._draws(args, kwargs):
                parts.append(self._of_model(self.model, values, n, args, kwargs, self._is_returned))
                self._check_shapes(values, parts[-1])
                if self._is_returned(RETURN) and parts[0].sites[RETURN].shape is None:
                    return super().forward(*args, **kwargs)  # no tensor: Pyro knows what to do
        return self._shaped(join(parts))

    def _check_shapes(self, values: Mapping[str, Tensor], runs: RunResults) -> None:
        """Raises ValueError where a guide of ours draws for another model: a wrong state, say."""
        if not isinstance(self.guide, (StructuredGuide, MixtureGuide)):
            return
        for name, value in values.items():
            site = runs.sites.get(name)
            if site is not None and site.shape is not None:
                if value[0].numel() != site.shape.numel():
                    raise ValueError(
                        f"site {name!r} has shape {tuple(site.shape)} in the model, the guide "
                        f"draws {tuple(value.shape[1:])}: is its state of another model?"
                    )

    def _is_returned(self, name: str) -> bool:
        if self.return_sites:
            return name in self.return_sites
        everything = self.return_sites is None or self.guide is not None
        return name != RETURN and (everything or name not in self.posterior_samples)

    def _shaped(self, runs: RunResults) -> dict[str, Tensor]:
        """[S, 1 for each plate that the site is not in, *shape], observed sites last, in memory."""
        names = sorted(runs.values, key=lambda name: (name == RETURN, runs.sites[name].is_observed))
        result = {}
        for name in names:
            value, site = runs.values[name], runs.sites[name]
            assert site.shape is not None
            ones = [1] * (0 if name == RETURN else runs.max_plate_nesting - site.batch_dim)
            value = value.reshape(len(value), *ones, *site.shape)
            mine = value.is_contiguous() and name not in self.posterior_samples
            result[name] = value if mine else value.clone(memory_format=torch.contiguous_format)
        return result

    # ---- draws ----------------------------------------------------------------------------------

    def _draws(self, args: Any, kwargs: Any) -> Iterator[tuple[Mapping[str, Tensor], int]]:
        """Latents {site: [n, *shape]} with their n, S in all, in groups of small memory."""
        if self.guide is None:
            yield self.posterior_samples, self.num_samples
            return
        key = call_signature(self.guide, args, kwargs)
        if key not in self._sizes:
            self._sizes[key] = sum(v.numel() for v in self._first_draw(args, kwargs).values())
        size = max(1, NUMBERS // max(1, self._sizes[key]))
        for start in range(0, self.num_samples, size):
            n = min(size, self.num_samples - start)
            yield self._draw(n, args, kwargs), n

    def _first_draw(self, args: Any, kwargs: Any) -> Mapping[str, Tensor]:
        """One draw that takes no random numbers, after the guide has met its model."""
        try:
            return self._draw_aside(args, kwargs)
        except RuntimeError:  # of ours: it has not, nor was it loaded
            if not (new := [*_uninitialized_guides(self.guide)]):
                raise
        for guide in new:
            try:
                guide(*args, **kwargs)
            except ValueError as error:
                raise ValueError(
                    "the guide has not seen its model, and these arguments do not show it: train "
                    f"it first, or call it once with the data, guide(x, y) ({error})"
                ) from error
        return self._draw_aside(args, kwargs)

    def _draw_aside(self, args: Any, kwargs: Any) -> Mapping[str, Tensor]:
        with RandomStream(0)(torch.device("cpu")):
            return self._draw(1, args, kwargs)

    def _draw(self, n: int, args: Any, kwargs: Any) -> Mapping[str, Tensor]:
        if hasattr(self.guide, "sample_posterior"):
            if getattr(self.guide, "create_plates", None) is not None:
                self.guide._create_plates(*args, **kwargs)  # of local latents, for these data
            return self.guide.sample_posterior(n)
        guide = poutine.mask(self.guide, mask=False)  # autoguides need no densities then
        return self._of_guide(guide, {}, n, args, kwargs, lambda name: name != RETURN).values

    # ---- what stays as it was -------------------------------------------------------------------

    @contextmanager
    def _preserve_module_state(self) -> Iterator[None]:
        """Keep the buffers, and frozen parameters frozen."""
        parts = modules(self.model)
        moving = [part for part in parts if _updates_statistics(part)]
        if moving and not self._warned:
            self._warned = True
            kind = type(moving[0]).__name__.removeprefix("Pyro")
            warn_user(
                f"the model is in train() mode: {kind} takes the statistics of the batch. Call "
                "model.eval() before predicting"
            )
        restore = save_buffers(moving)
        try:
            with still_frozen(parts):
                yield
        finally:
            restore()


def _uninitialized_guides(guide: Any) -> Iterator[Any]:
    """The guides in it that have not met their model."""
    if isinstance(guide, MixtureGuide):
        for component in guide:
            yield from _uninitialized_guides(component)
    elif getattr(guide, "prototype_trace", True) is None:
        yield guide


def _updates_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.training and module.track_running_stats
