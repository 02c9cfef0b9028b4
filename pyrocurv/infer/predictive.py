"""The posterior predictive distribution, for many posterior samples at once.

Like `pyro.infer.Predictive`, which draws from the guide and traces the model once for each sample;
here the latents are drawn together, and the model runs at all of them under `torch.func.vmap` where
that is possible and faster (`pyrocurv.handlers.vectorized`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.infer
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor

from pyrocurv.guides import MixtureGuide, StructuredGuide
from pyrocurv.handlers.modules import module_tensors, modules
from pyrocurv.handlers.vectorized import (
    RETURN,
    RunResults,
    VectorizedRunner,
    call_signature,
    concatenate,
    remember,
)
from pyrocurv.infer.loaders import arguments, check_progress, device_of_model, length, progress_bar
from pyrocurv.infer.predictive_batches import RepeatedDraws, inputs_of, join_batches
from pyrocurv.infer.predictive_checks import (
    finite_probabilities,
    uninitialized_guides,
    updates_statistics,
)
from pyrocurv.nn.batch_norm import warn_of_initial_statistics
from pyrocurv.runtime.agreement import (
    SAME_INPUTS,
    SharedSamples,
    check_same,
    raise_together,
)
from pyrocurv.runtime.module_state import preserve_module_state, still_frozen
from pyrocurv.runtime.representation import described, name_of
from pyrocurv.runtime.rng import RandomStream, device_of, isolated_rng, rewind_rng_on_error
from pyrocurv.runtime.single_thread import one_thread_at_a_time
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import (
    as_device,
    as_number,
    check_callable,
    check_flag,
    check_integer,
    check_is,
    check_iterable,
    check_loader,
    check_tensor,
    check_values,
)
from pyrocurv.runtime.workers import Workers

# entries of all latents drawn together: the model may return little, the draws are large
MAX_ELEMENTS = 1 << 22


class Predictive(pyro.infer.Predictive):
    """Samples from the posterior predictive: `pyro.infer.Predictive`, vectorized.

    Args:
        model: a Pyro model.
        posterior_samples: {site: [S, ...]}, instead of a guide.
        guide: any Pyro guide. Those of `pyrocurv.guides` that were loaded need no data first.
        num_samples: S.
        return_sites: names of sites, with "_RETURN" for the return value of the model. Empty: all
            sites or, without a guide, all that are not in `posterior_samples`. None: all sites.
        parallel: Pyro runs the model inside a plate then. Here all samples run at once where
            possible, with either value.
        process_group: shares the samples out over processes that have the same model, posterior and
            inputs: a group of `torch.distributed`, or "auto" for that of `init_process_group`, if
            it was called. All of them call it, and all have all samples. With the same seed on each
            process the samples of the posterior are those of a single process; with other seeds
            each evaluates its part of its own. What the model itself draws, as observations, comes
            from a random stream for each process. Models that Pyro's own rules are needed for (in
            a handler, or with a return value that is not a tensor) are run in full on each process.

    Called with the model's arguments it returns {site: [S, ...]} in Pyro's shapes, without
    gradients; `loader` does so for all data of a loader. As in Pyro's `Predictive`, each plate of
    the model has a dimension in all sites: with one plate, a scalar latent outside of it has the
    shape [S, 1]. The samples have the same distribution as Pyro's. The random numbers are others
    than Pyro's, and are determined by `torch.manual_seed`.

    The model runs once for many samples, so its side effects, and numbers that it draws from other
    sources than torch, happen once for all of them. Models with control flow that depends on
    sampled values, or with ops and distributions that vmap does not support, are detected and run
    sample by sample. Batch-norm statistics do not change; a model that would update them, in
    `train()` mode, is warned about once.

    Raises:
        ValueError: a guide that is not initialized, and cannot be from these arguments; a guide
            whose state belongs to another model; processes with other inputs or posteriors.
        TypeError: `return_sites` is a string.
        RuntimeError: another process has raised an exception.
        Exception: any error of Pyro's `Predictive` or of the model.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> from pyrocurv.infer import Predictive
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
        *,
        process_group: Any = None,
    ) -> None:
        check_callable("model", model, "a Pyro model, a callable,")
        if guide is not None:
            check_callable("guide", guide, "a Pyro guide, a callable,")
        if posterior_samples is not None:
            check_is("posterior_samples", posterior_samples, Mapping, "{site: samples [S, ...]}")
            for name, value in posterior_samples.items():
                check_tensor(f"posterior_samples[{name!r}]", value)
        if num_samples is not None:
            check_integer("num_samples", as_number(num_samples), 1)
        if isinstance(return_sites, str):
            raise TypeError(
                f"return_sites={return_sites!r}: a list of names is needed, [{return_sites!r}]"
            )
        if return_sites is not None:
            check_iterable("return_sites", return_sites, "a list of names")
            return_sites = [*return_sites]
        check_flag("parallel", parallel)
        super().__init__(model, posterior_samples, guide, num_samples, return_sites, parallel)
        Workers.of(process_group)  # raises for what is none
        self.process_group = process_group
        self._run_model, self._run_guide = VectorizedRunner(), VectorizedRunner()
        self._num_elements: dict[Any, int] = {}  # of one draw from the guide
        self._warned = self._has_checked = False

    def __repr__(self) -> str:
        source = "posterior_samples" if self.guide is None else f"guide={name_of(self.guide)}"
        sites = "" if self.return_sites in ((), []) else f"return_sites={self.return_sites}"
        return described(
            self, f"model={name_of(self.model)}", source, f"num_samples={self.num_samples}", sites
        )

    @one_thread_at_a_time
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """{site: [S, ...]} for the model's arguments."""
        check_values((*args, *kwargs.values()), "the model")
        given: Collection[str] = self.posterior_samples
        if isinstance(self.guide, MixtureGuide):
            self.guide.prepare(self.model)
            given = self.guide.tensors_of(self.guide.leaves[0])
        if not self._has_checked:
            self._has_checked = True
            warn_of_initial_statistics(self.model, given)
        if am_i_wrapped() or torch.jit.is_tracing():  # handlers outside have to see each run
            return super().forward(*args, **kwargs)
        with self._sharing(args, kwargs) as samples:
            results = self._runs(samples, args, kwargs)
            if results is None:
                return super().forward(*args, **kwargs)
        return self._to_pyro_shapes(_gathered(samples, results))

    @one_thread_at_a_time
    @torch.no_grad()
    def loader(
        self, loader: Iterable[Any], *, inputs: Callable[[Any], Any] | None = None,
        device: torch.device | str | None = "cpu", progress: bool | None = None,
    ) -> dict[str, Tensor]:
        """Predictions for all data of a loader, {site: [S, ..., N, ...]}.

        The samples of the posterior are the same for all batches, those of one call on all data; no
        more of them are in memory at once than in a call. Results of the batches are concatenated
        along their first axis, after that of the samples, of as many rows as the batch has. Sites
        without one have to be the same for all batches, as weights are, and are returned once.

        Args:
            loader: batches, in a list or a DataLoader.
            inputs: batch -> the model's arguments without the data that it observes: a tensor, a
                tuple of arguments, or a mapping of keyword arguments. By default the first element
                of a tuple or list, and of a mapping all but "y", "label", "labels", "target" and
                "targets".
            device: of the results; None for that of the model. Batches are moved to the model's.
            progress: whether to show a progress bar; None for on a terminal only.

        Raises:
            ValueError: no batch, or one without a tensor; a name in `return_sites` that is no site;
                a site whose axis of the data cannot be told; a latent that neither guide nor
                `posterior_samples` have, so that it would be drawn anew for each batch.
            TypeError: a return value that is not a tensor.
            RuntimeError: inside of a Pyro handler, which would have to see each run.
            Exception: any error of a call.

        Example:
            >>> import torch, pyrocurv
            >>> from pyrocurv.infer import Predictive
            >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
            >>> model = pyrocurv.nn.Classifier(net, num_data=64)
            >>> guide = pyrocurv.guides.KFACGuide(model)
            >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(3, (64,)))
            >>> weights = guide(*data.tensors)
            >>> predict = Predictive(model, guide=guide, num_samples=8, return_sites=["_RETURN"])
            >>> predict.loader(torch.utils.data.DataLoader(data, 20))["_RETURN"].shape
            torch.Size([8, 64, 3])
        """
        check_loader("loader", loader)
        if inputs is not None:
            check_callable("inputs", inputs, "a callable from batches to the model's inputs")
        check_progress(progress)
        target = as_device("device", device)
        if am_i_wrapped():
            raise RuntimeError("loader: inside of a Pyro handler, call this on each batch instead")
        place = device_of_model(self.model, self.guide)
        with (rewind_rng_on_error(place or torch.device("cpu")),
              progress_bar(progress, total=length(loader), unit="batch") as bar):
            batches = (arguments((inputs or inputs_of)(batch), place) for batch in loader)
            results = join_batches(batches, self._batch, target, bar.update)
            RandomStream()  # the next call has other samples
        return results

    def _batch(
        self, args: Any, kwargs: Any, draws: RepeatedDraws
    ) -> tuple[dict[str, Tensor], RunResults]:
        """The results of a batch in Pyro's shapes, and as they came."""
        check_values((*args, *kwargs.values()), "the model")
        with self._sharing(args, kwargs) as samples:
            results = self._runs(samples, args, kwargs, draws)
            if results is None:
                raise TypeError(
                    "the model returns no tensor, and its return value cannot be joined over "
                    "batches: choose other return_sites"
                )
        runs = _gathered(samples, results)
        unknown = [name for name in self.return_sites or () if name not in runs.sites]
        if unknown:
            raise ValueError(
                f"return_sites: the model has no site {unknown[0]!r}, it has "
                f"{', '.join(map(repr, runs.sites))}"
            )
        return self._to_pyro_shapes(runs), runs

    @contextmanager
    def _sharing(self, args: Any, kwargs: Any) -> Iterator[SharedSamples]:
        """Which samples this process evaluates inside, with all that a run needs around it."""
        workers = Workers.of(self.process_group)
        if not workers.is_alone:
            check_same(workers, self._inputs(args, kwargs), SAME_INPUTS)
        with (self._preserve_module_state(), pyro.validation_enabled(False),
              rewind_rng_on_error(device_of(args)), finite_probabilities(),
              raise_together(workers, "Predictive")):
            yield SharedSamples.of(workers, self.num_samples)

    def _runs(
        self, samples: SharedSamples, args: Any, kwargs: Any, draws: RepeatedDraws | None = None
    ) -> list[RunResults] | None:
        """The model at the samples of this process; None if it needs Pyro's own rules."""
        results, first = [], 0
        for values, n in self._draws(args, kwargs, draws):
            own = samples.evaluated_of(range(first, first + n))
            first += n
            if not own:
                continue
            values = {name: value[own.start:own.stop] for name, value in values.items()}
            with samples.noise(device_of(args)):
                runs = self._run_model(
                    self.model, values, len(own), args, kwargs, self._is_returned
                )
            self._check_shapes(values, runs)
            if self._is_returned(RETURN) and RETURN not in runs.values:
                return None
            results.append(runs)
        return results

    def _inputs(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """What processes have to have in common, by name."""
        return {
            "the inputs": (args, kwargs), "posterior_samples": dict(self.posterior_samples),
            "num_samples": self.num_samples,
            **{f"the model's {name}": x for name, x in module_tensors(self.model).items()},
            **{f"the guide's {name}": x for name, x in module_tensors(self.guide).items()},
        }

    def _check_shapes(self, values: Mapping[str, Tensor], runs: RunResults) -> None:
        """Raise ValueError where one of our guides draws latents of another model's shapes."""
        if not isinstance(self.guide, (StructuredGuide, MixtureGuide)):
            return
        for name, value in values.items():
            site = runs.sites.get(name)
            if site is not None and value[0].numel() != site.shape.numel():
                raise ValueError(
                    f"site {name!r} has shape {tuple(site.shape)} in the model, the guide draws "
                    f"{tuple(value.shape[1:])}: was its state saved for another model?"
                )

    def _is_returned(self, name: str) -> bool:
        if self.return_sites:
            return name in self.return_sites
        returns_all = self.return_sites is None or self.guide is not None
        return name != RETURN and (returns_all or name not in self.posterior_samples)

    def _to_pyro_shapes(self, runs: RunResults) -> dict[str, Tensor]:
        """{site: [S, 1 for each plate that the site is not in, *shape]}, observed sites last.

        No tensor shares memory with the posterior samples or the data.
        """
        names = sorted(runs.values, key=lambda name: (name == RETURN, runs.sites[name].is_observed))
        result = {}
        for name in names:
            value, site = runs.values[name], runs.sites[name]
            ones = [1] * (0 if name == RETURN else runs.max_plate_nesting - site.batch_dim)
            value = value.reshape(len(value), *ones, *site.shape)
            owns_memory = value.is_contiguous() and name not in self.posterior_samples
            result[name] = (
                value if owns_memory else value.clone(memory_format=torch.contiguous_format)
            )
        return result

    # ---- draws from the guide -------------------------------------------------------------------

    def _draws(
        self, args: Any, kwargs: Any, draws: RepeatedDraws | None
    ) -> Iterator[tuple[Mapping[str, Tensor], int]]:
        """Latents {site: [n, *shape]} and n, S in total, in groups that are small in memory."""
        if self.guide is None:
            if draws is not None:
                draws.names = {*self.posterior_samples}
            yield self.posterior_samples, self.num_samples
            return
        signature = call_signature(self.guide, args, kwargs)
        if signature not in self._num_elements:
            self._initialize_guides(args, kwargs)
            with isolated_rng(device_of(args)):
                draw = self._draw(1, args, kwargs)
            elements = sum(value.numel() for value in draw.values())
            remember(self._num_elements, signature, elements)
        size = max(1, MAX_ELEMENTS // max(1, self._num_elements[signature]))
        for start in range(0, self.num_samples, size):
            n = min(size, self.num_samples - start)
            with nullcontext() if draws is None else draws.next(device_of(args)):
                values = self._draw(n, args, kwargs)
            if draws is not None:
                draws.names = {*values}
            yield values, n

    def _initialize_guides(self, args: Any, kwargs: Any) -> None:
        for guide in uninitialized_guides(self.guide):
            try:
                guide.setup(args, kwargs)
            except ValueError as error:
                raise ValueError(
                    "the guide is not initialized, and cannot be from these arguments: train it "
                    f"first, or call it once with the data, guide(x, y) ({error})"
                ) from error

    def _draw(self, n: int, args: Any, kwargs: Any) -> Mapping[str, Tensor]:
        if hasattr(self.guide, "sample_posterior"):
            if getattr(self.guide, "create_plates", None) is not None:
                self.guide._create_plates(*args, **kwargs)  # of local latents, for these data
            return self.guide.sample_posterior(n)
        guide = poutine.mask(self.guide, mask=False)  # skips the log densities in autoguides
        return self._run_guide(guide, {}, n, args, kwargs, lambda name: name != RETURN).values

    # ---- module state ---------------------------------------------------------------------------

    @contextmanager
    def _preserve_module_state(self) -> Iterator[None]:
        """Restore batch-norm statistics, keep frozen parameters frozen."""
        all_modules = modules(self.model)
        updated = [module for module in all_modules if updates_statistics(module)]
        if updated and not self._warned:
            self._warned = True
            kind = type(updated[0]).__name__.removeprefix("Pyro")
            warn_user(
                f"the model is in train() mode: {kind} uses the statistics of the batch. Call "
                "model.eval() before predicting"
            )
        with preserve_module_state(updated), still_frozen(all_modules):
            yield


def _gathered(samples: SharedSamples, results: Sequence[RunResults]) -> RunResults:
    """The results of all processes."""
    runs = concatenate(results)
    if not samples.workers.is_alone:
        runs = replace(runs, values=samples.gather(runs.values))
        RandomStream()  # the next call has other noise, also without a guide
    return runs
