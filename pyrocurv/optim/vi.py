"""Natural-gradient variational inference for any PyTorch training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.likelihood import Likelihood
from pyrocurv.curvature.particle import Particle
from pyrocurv.layers.block import Block
from pyrocurv.layers.structure_selection import StructureChoice
from pyrocurv.layers.weight_gaussian import WeightGaussian
from pyrocurv.optim.checks import check_batch_size, check_run_settings
from pyrocurv.optim.curvature_optimizer import CurvatureOptimizer
from pyrocurv.optim.default_prior import DefaultPriors, posterior_parts
from pyrocurv.optim.forward_recorder import ForwardRecorder
from pyrocurv.optim.mean_updates import UpdateChoice, as_mean_update, check_decay
from pyrocurv.optim.parameter_blocks import ParameterBlocks
from pyrocurv.optim.parameter_store import Group, ParameterStore, Params
from pyrocurv.optim.recorded_pass import RecordedPass, num_examples
from pyrocurv.optim.sampling import (
    EvaluationSum,
    Sample,
    predict_at_samples,
    sum_gradients,
)
from pyrocurv.optim.traced_network import TracedNetwork
from pyrocurv.posterior.hyperparameters import AUTO, Hyperparameters
from pyrocurv.posterior.precision import (
    measure_determined,
    update_from_sample_gradients,
    uses_sample_gradients,
)
from pyrocurv.posterior.prior import BlockPrior, kl
from pyrocurv.posterior.sampling import Sampler, mirrors
from pyrocurv.posterior.summary import at_temperature
from pyrocurv.posterior.temperature import TemperatureRule, warn_at_chance
from pyrocurv.runtime.choices import Auto, CurvatureKind, FanIn
from pyrocurv.runtime.inference_mode import outside_inference_mode
from pyrocurv.runtime.module_state import preserve_module_state
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user
from pyrocurv.runtime.validation import check_callable, check_flag, check_integer
from pyrocurv.runtime.workers import ALONE, Workers, naming_step


class VIOptimizer(CurvatureOptimizer):
    """A Gaussian posterior over a network's weights, N(M, Λ⁻¹), trained by natural gradients.

    Between steps the network's parameters are the mean M. The loss, N times its mean over the
    batch, is that of a sample:

        with optimizer.sampled_params():
            loss = F.cross_entropy(net(x), y)
            loss.backward()
        optimizer.step()

    Several such blocks before a step are several samples, of which the first gives the curvature;
    of the samples of `step(closure)` it is the mean. Their mean is taken here: do not divide the
    losses of several blocks by their number. Inside of one block, parts of a batch accumulate as
    anywhere else, each loss divided by how many there are. The equations are those of
    `pyrocurv.infer.NGVI`, which needs a Pyro model and gives the same steps on it.

    Args:
        net, params, likelihood, class_dim, curvature, structure, update: as for
            `SecondOrderOptimizer`; "point" leaves a layer without a posterior, and update="auto" is
            "whitened-muon". A group may have its own lr, momentum, damping, kl_clip,
            decoupled_weight_decay, prior_precision and temperature; a `weight_decay` is for its
            parameters without a posterior.
        momentum, damping, kl_clip, fallback_lr: as for `SecondOrderOptimizer`.
        num_data: N, how many numbers the loss would be the mean of on all data: examples, or
            tokens, or examples times outputs.
        lr: learning rate of the mean; "auto" as for `NGVI`.
        nesterov, decoupled_weight_decay: as for `NGVI`.
        prior_precision: of independent normal priors: a number, or "fan_in" (fan_in + 1 for each
            layer, as `pyrocurv.nn.bayesianize` has it). Means are 0, those of norm scales 1.
        prior: the posterior of an earlier task, as for `bayesianize`, for the weights in it.
        temperature: T multiplies the KL term; 1 is the ELBO. "auto" follows the curvature and the
            loss, see `pyrocurv.posterior.temperature`. With a callable as `likelihood` it needs
            `step(closure)`, and stays at 0.02 without.
        kl_warmup: steps over which T rises linearly to its value.
        augmentation: N counts so many times, for data that random transformations multiply.
        num_samples: how often `step(closure)` calls the closure, and what `predict` draws.
        antithetic: use each noise a second time with its sign turned.
        sample_parallel: under `DistributedDataParallel`, whether each rank has a sample of its own,
            in antithetic pairs, in place of one for all.

    How wide the posterior is at the start is `Curvature(initial=...)`. What no supported op
    consumes gets independent Gaussians, from gradients.

    Raises:
        TypeError, ValueError, FloatingPointError: as `SecondOrderOptimizer`.
        RuntimeError: a step without a sample; one `sampled_params()` inside another.

    Reference: Zhang et al. 2018, arXiv:1712.02390; Khan & Rue 2023, arXiv:2107.04562.

    Example:
        >>> import torch
        >>> from pyrocurv.optim import VIOptimizer
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = VIOptimizer(net, num_data=16)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     with optimizer.sampled_params():
        ...         torch.nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
        >>> optimizer.predict(x, num_samples=8).softmax(-1).mean(0).shape
        torch.Size([16, 3])
    """

    has_untraced_blocks = has_samples = True
    fallback_description = "independent Gaussians, from gradients"
    settings = (
        "num_data", "num_samples", "antithetic", "augmentation", "kl_warmup", "sample_parallel",
        "_priors",
    )
    _samples: EvaluationSum | None = None  # of the next step
    _sample: Sample | None = None  # that the parameters are
    _num_particles = 1  # samples of a step that give its curvature
    _is_closure = False

    def __init__(
        self,
        net: nn.Module,
        num_data: int,
        lr: float | Auto = AUTO,
        *,
        params: Params | None = None,
        likelihood: Likelihood = "categorical",
        class_dim: int | None = None,
        curvature: CurvatureKind | Curvature = "fisher",
        structure: StructureChoice = "kfac",
        update: UpdateChoice = AUTO,
        prior_precision: float | FanIn = "fan_in",
        prior: Any = None,
        temperature: float | Auto = AUTO,
        kl_warmup: int = 0,
        augmentation: float = 1.0,
        momentum: float = 0.9,
        nesterov: bool | Auto = AUTO,
        damping: float = 3e-3,
        decoupled_weight_decay: float = 0.0,
        kl_clip: float | None = 1e-3,
        num_samples: int = 1,
        antithetic: bool = True,
        fallback_lr: float = 2e-3,
        sample_parallel: bool = False,
    ) -> None:
        check_flag("sample_parallel", sample_parallel)
        self.sample_parallel = sample_parallel
        check_run_settings(num_data, num_samples, kl_warmup, augmentation, antithetic)
        self.num_data, self.num_samples, self.antithetic = num_data, num_samples, antithetic
        self.augmentation, self.kl_warmup = augmentation, kl_warmup
        rule = as_mean_update(update)
        check_decay(rule, decoupled_weight_decay, lr)
        super().__init__(
            net, params, likelihood, class_dim, curvature, structure, update, nesterov,
            fallback_lr, {
                "lr": rule.default_lr if lr == AUTO else lr,
                "momentum": momentum, "damping": damping,
                "decoupled_weight_decay": decoupled_weight_decay, "kl_clip": kl_clip,
                "prior_precision": prior_precision, "temperature": temperature,
            },
        )
        if prior is not None and not self._network.owners.is_alone:
            raise ValueError(
                "prior: not for a network that fully_shard has sharded, only prior_precision=; use "
                "DistributedDataParallel"
            )
        self._priors = DefaultPriors(prior, self._recorder.inner)
        if self.curvature.uses_sample_gradients:
            self._init_untraced()

    @torch.no_grad()
    def _init_untraced(self) -> None:
        """Lay out all parameters before any forward pass, which this curvature does not need."""
        store = self._store()
        self._network.layout = self._network.diagonal_layout(store)
        self._posterior = self._with_new_blocks(self._posterior, self.layout, store)
        self._schedule_recording()

    # ---- samples --------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; samples that they came from do not count in the next step."""
        super().zero_grad(set_to_none)
        if self._sample is not None:
            self._sample.gradients = {}
            self._samples = self._samples if self._is_closure else None
        elif not self._is_closure:  # which may clear them for each of its samples
            self._drop_samples()

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """The parameters are a sample inside, and the mean again afterwards, whatever is raised.

        A forward and a backward pass inside make it one of the samples of the next step. Blocks
        without a backward pass, as for predictions, have a new sample each.
        """
        if self._sample is not None:
            raise RuntimeError("sampled_params() inside another one")
        self._synchronize()
        self._warn_of_passes_at_the_mean()
        store, blocks = self._store(), self._posterior.blocks
        mirrored = self._samples.mirrors if self._samples else mirrors(blocks)
        with naming_step(self._posterior.step), Undo() as undo:
            undo.keep_attributes(self._likelihood, self._network, self._stream)
            undo.keep(self._recorder.pop_passes)
            with self._stream(store.device):
                workers = self._recorder.workers if self.sample_parallel else ALONE
                sample = Sample.draw(
                    self.curvature, blocks, store, self.antithetic, mirrored, workers
                )
            self._recorder.pop_passes()
            self._sample = sample
            try:
                with sample.in_parameters():
                    yield
                    samples = self._samples
                    if passes := self._recorder.pop_passes():
                        samples = self._add_sample(passes, sample, undo)
                    elif samples is not None:  # a mirrored sample has been seen
                        samples = replace(samples, mirrors=None)
                    elif mirrored is not None:
                        self._posterior = self._posterior.with_mirrors(None)
                self._samples = samples
            finally:
                self._sample = None

    @outside_inference_mode
    @torch.no_grad()
    def _add_sample(
        self, passes: Sequence[RecordedPass], sample: Sample, undo: Undo
    ) -> EvaluationSum:
        """The samples with one more, whose weights the parameters still have."""
        samples, store = self._samples, sample.store
        if samples is None:
            self._check_sample_gradients()
            self._check_batch(passes)
            batch_size = round(self._recorder.workers.sum(num_examples(passes), store.like))
            check_batch_size(batch_size, self.num_data, self.augmentation)
            decayed = self._decayed(store, batch_size / self._num_data)
            samples = EvaluationSum(0, batch_size, undo, self.layout, decayed, None, {})
        is_wanted = samples.count < self._num_particles and self._is_due()
        if is_wanted and any(recorded.inputs for recorded in passes):
            layout, posterior = self._update_curvature(
                samples.layout, samples.posterior, passes, store,
                samples.batch_size / self._num_data, Particle(samples.count, self._num_particles),
            )
            samples = replace(samples, layout=layout, posterior=posterior, is_estimate=True)
        return samples.add(sample, passes, self._likelihood.total_weight)

    def _check_sample_gradients(self) -> None:
        """Raise where a curvature from sample gradients would not be that of all workers."""
        if self._recorder.workers.is_alone:
            return
        names = [
            state.block.name for state in self._posterior.blocks
            if uses_sample_gradients(self.curvature, state.block)
        ]
        if names and (self.sample_parallel or not self._recorder.is_synchronized):
            cause = "sample_parallel=True" if self.sample_parallel else "no_sync()"
            raise RuntimeError(
                f"the curvature of {', '.join(names)} comes from the gradients of the samples, "
                f"which are those of all ranks: not with {cause}"
            )

    # ---- the step -------------------------------------------------------------------------------

    @outside_inference_mode
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the samples since the last; returns the mean of the closure's losses.

        A closure is called at `num_samples` samples, and may clear gradients.
        """
        if self._sample is not None:
            raise RuntimeError("step() inside sampled_params(): leave it first")
        if closure is not None:
            check_callable("closure", closure, "a callable that returns the loss")
        before = self._posterior.temperature
        try:
            with naming_step(self._posterior.step), Undo() as undo:
                undo.keep_attributes(*self._mutable)
                loss = None if closure is None else self._sample_closure(closure)
                samples, self._samples = self._samples, None
                if samples is None:
                    raise RuntimeError(
                        "step() without a sample: run forward and backward inside `with "
                        "optimizer.sampled_params():`, calling the network itself"
                    )
                self._warn_of_passes_at_the_mean()
                samples = samples.with_loss(loss, self._store(), self._recorder.workers)
                self._step_from(samples, undo)
        except FloatingPointError:
            self._drop_samples()
            raise
        warn_at_chance(before, self._posterior.temperature, self._is_automatic)
        return loss

    def _step_from(self, samples: EvaluationSum, undo: Undo) -> None:
        store, fraction = self._store(), samples.batch_size / self._num_data
        samples.check_scale(self.curvature, store, self._likelihood)
        posterior = self._in_context(samples.posterior, samples.layout, store)
        posterior = update_from_sample_gradients(
            self.curvature, posterior, samples.mean_price, fraction
        )
        posterior = posterior.with_mirrors(samples.mirrors)
        if samples.is_estimate and self._is_watched:
            posterior = self._network.covering(store, samples.layout).load(posterior)
            posterior = measure_determined(
                self.curvature, posterior, fraction, self._network.owners
            )
        self._move(samples.layout, posterior, store, undo, samples)

    @property
    def _is_automatic(self) -> bool:
        return any(group["temperature"] == AUTO for group in self.param_groups)

    @property
    def _is_watched(self) -> bool:
        """Whether the loss and γ matter for the temperature, or for a warning."""
        return self._is_automatic or self._posterior.temperature.is_first_pass

    def _schedule_recording(self) -> None:
        super()._schedule_recording()
        self._recorder.likelihood = self._likelihood if self._is_watched else None

    def _warn_of_passes_at_the_mean(self) -> None:
        """Where a backward pass outside of `sampled_params()` has left gradients to step from."""
        gradients = (p.grad for group in self.param_groups for p in group["params"])
        if self._recorder.passes and any(g is not None and bool(g.any()) for g in gradients):
            warn_user(
                "a backward pass outside of sampled_params() has left gradients at the mean, which "
                "are part of this step: go through every batch inside of it, or clear them first"
            )

    def _drop_samples(self) -> None:
        """Forget the samples, as if their noise had not been drawn."""
        if self._samples is not None:
            self._samples.undo.restore()
        self._samples = None

    def _sample_closure(self, closure: Callable[[], Any]) -> Any:
        """The mean of the closure's losses; without a pass in it, the pending samples stay."""
        pending, stream = self._samples, self._stream.state_dict()
        self._samples, self._num_particles, self._is_closure = None, self.num_samples, True
        try:
            return sum_gradients(closure, self.num_samples, self._store(), self.sampled_params,
                                 self.zero_grad, lambda: self._samples is not None)
        finally:
            self._num_particles, self._is_closure = 1, False
            if self._samples is None:
                self._samples = pending
                self._stream.load_state_dict(stream)

    def _store(self) -> ParameterStore:
        check_run_settings(
            self.num_data, self.num_samples, self.kl_warmup, self.augmentation, self.antithetic
        )
        return super()._store()

    @property
    def _num_data(self) -> float:
        """N, including augmentation."""
        return self.num_data * self.augmentation

    def _hyperparameters(self, group: Group, layout: ParameterBlocks) -> Hyperparameters:
        rule = TemperatureRule(group["temperature"], self.kl_warmup)
        temperature = rule(self._posterior.temperature, self._posterior.step)
        return Hyperparameters.of(
            group, self._num_data, temperature, self._number_of(group)
        )

    def _prior(self, block: Block, store: ParameterStore) -> BlockPrior:
        return self._priors.of(block, self._recorder.inner, store)

    # ---- using it -------------------------------------------------------------------------------

    def use_mean(self) -> AbstractContextManager[None]:
        """The parameters are the mean inside, also within `sampled_params()`."""
        return nullcontext() if self._sample is None else self._sample.use_mean()

    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(q ‖ prior) in nats, of all weights that have a posterior; 0 before the first step."""
        store = self._store()
        blocks = store.load(self._in_context(self._posterior, self.layout, store)).blocks
        terms = [kl(state.mean, state.precision, state.prior.gaussian) for state in blocks]
        total = torch.stack(terms).sum() if terms else torch.zeros(())
        return self._network.owners.sums([total])[0]

    def summary(self) -> str:
        """As that of `SecondOrderOptimizer`, and the temperature of the last step."""
        temperatures = {
            state.hyperparameters.temperature: None for state in self._posterior.blocks
        }
        return super().summary() + at_temperature(*temperatures)

    def _kinds(self, net: nn.Module) -> tuple[type[TracedNetwork], type[ForwardRecorder]]:
        kinds = super()._kinds(net)
        if self.sample_parallel and kinds[0] is not TracedNetwork:
            raise ValueError(
                "sample_parallel=True of a network that fully_shard has sharded: its ranks have "
                "parts of one sample; use DistributedDataParallel"
            )
        return kinds

    def weight_gaussians(self) -> list[WeightGaussian]:
        """The posterior in independent parts, for `prior=`.

        Raises ValueError for a network that `fully_shard` has sharded, whose ranks have some each.
        """
        if not self._network.owners.is_alone:
            raise ValueError(
                "prior: a VIOptimizer of a network that fully_shard has sharded has the posterior "
                "of a part of its weights on each rank: use DistributedDataParallel"
            )
        return posterior_parts(self._posterior, self._store())

    @torch.no_grad()
    def predict(
        self, *args: Any, num_samples: int | None = None, process_group: Any = None, **kwargs: Any
    ) -> Any:
        """Outputs of the network at samples of the posterior, [num_samples, ...].

        Takes the network's arguments; draws from torch's global generator. Call `net.eval()` first
        if the network behaves differently in training; statistics of batch norm stay as they are
        in either mode. Before the first step it is the network itself. In other outputs each tensor
        is stacked.

        Args:
            num_samples: by default that of the constructor, one; 16 or more for probabilities.
            process_group: shares the samples out over processes, as for `Predictive`.

        Raises ValueError for less than one sample, or for processes with other inputs.
        """
        count = self.num_samples if num_samples is None else num_samples
        check_integer("num_samples", count, 1)
        workers, store = Workers.of(process_group), self._store()
        if not (workers.is_alone or self._network.owners.is_alone):
            raise ValueError(
                "process_group: the ranks of a network that fully_shard has sharded have parts of "
                "each sample, and cannot share samples out: use process_group=None"
            )
        sampler = Sampler(self._posterior.blocks, self.antithetic, noise=store.noise)
        with self.use_mean(), preserve_module_state(self._recorder.inner.modules()):
            return predict_at_samples(
                sampler, count, store, self._recorder.local, args, kwargs, workers
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As the one of all optimizers; RuntimeError inside of `sampled_params()`."""
        if self._sample is not None:
            raise RuntimeError("load_state_dict() inside of sampled_params(): call it outside")
        super().load_state_dict(state_dict)
        self._samples = None
