"""Natural-gradient variational inference for a Pyro model and a structured guide.

A step samples weights from the guide, runs the model once, takes one backward pass for the gradient
and, at an interval, one more onto the layers' outputs for the curvature; then mean and precision
move by the equations of `pyrocurv.posterior.natural_gradient`, computed in full before any change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.data_checks import DatasetSizeCheck
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.guides import StructuredGuide
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.handlers.modules import modules
from pyrocurv.handlers.support import only_data_validated
from pyrocurv.infer.block_sharing import check_sharing
from pyrocurv.infer.defaults import (
    AUTO,
    Loss,
    ScheduledHyperparameters,
    auxiliary_optimizer,
    check_options,
    resolve_defaults,
)
from pyrocurv.infer.guide_store import GuideStore, check_guide
from pyrocurv.infer.joint_step import uses_joint_update
from pyrocurv.infer.layerwise_step import StepSettings
from pyrocurv.infer.loss_terms import LossTerms
from pyrocurv.infer.model_run import BatchModel
from pyrocurv.infer.resume_checks import (
    RunSignature,
    check_blocks,
    check_ranks,
    check_signature,
    check_state,
)
from pyrocurv.infer.update_rule import UpdateRule, choose_rule
from pyrocurv.layers.module_types import has_layer_norm
from pyrocurv.optim.mean_updates import UpdateChoice, as_mean_update, check_decay
from pyrocurv.posterior.mean_update import NATURAL
from pyrocurv.posterior.shared_state import state_of_all
from pyrocurv.posterior.state import Posterior
from pyrocurv.posterior.step import commit
from pyrocurv.posterior.summary import (
    UpdateCount,
    prior_errors,
    update_counts,
    work_assignment,
)
from pyrocurv.posterior.temperature import TemperatureRule, warn_at_chance
from pyrocurv.runtime.autocast import disable_autocast
from pyrocurv.runtime.choices import Auto, CurvatureKind, Nonfinite
from pyrocurv.runtime.inference_mode import outside_inference_mode
from pyrocurv.runtime.module_state import preserve_module_state, save_buffers
from pyrocurv.runtime.representation import counted, described
from pyrocurv.runtime.rng import RandomStream, rewind_rng_on_error
from pyrocurv.runtime.single_thread import one_thread_at_a_time
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import (
    check_flag,
    check_integer,
    check_nonnegative,
    check_values,
    reading_state,
)
from pyrocurv.runtime.whole_module import shards_of
from pyrocurv.runtime.workers import CHECK_EVERY, Workers, naming_step
from pyrocurv.structures.serialization import FORMAT_VERSION, from_state, to_state


class NGVI:
    """Natural-gradient variational inference.

    Args:
        model: a Pyro model. The number of data N is the full size of the plate around its observed
            site; an additional `poutine.scale` tempers the likelihood.
        guide: one of `pyrocurv.guides`, made for the model.
        lr: learning rate of the mean, best with a schedule on `.optimizer` that lowers it to 0.
            "auto" suits batches of 128 and a thousand steps: 0.02, or 0.03 for "whitened-muon" and
            0.003 for "soap".
        momentum: β of the running average of gradients.
        nesterov: whether the momentum of "whitened-muon" and "muon" is Nesterov's, which helps at
            low temperatures. "auto" is True with `num_particles=0` and for networks with
            `LayerNorm` or `RMSNorm`, else False.
        curvature: a kind or a `Curvature`.
        temperature: T multiplies the KL term alone. 1 is the ELBO, which underfits networks with
            few data, and may leave a network with many weights per datum at chance. "auto" is 1
            without samples or without a network, else a rule that follows the run, see
            `pyrocurv.posterior.temperature`. `.temperature` of `evaluate_loss` is T at present.
        kl_warmup: steps over which T rises linearly to its value.
        damping: added to the curvature in the step of the mean, never to the posterior.
        decoupled_weight_decay: λ of M ← M - lr λ (M - M₀) in each step, as AdamW and Muon have it,
            for layers with weight matrices; M₀ is the mean of the prior. It is no part of the
            objective. A weight matrix that starts nearer than that stays within |d| / λ of M₀, with
            |d| the norm of a step at lr 1: that of Muon, exactly in "whitened-muon", to 30 % in
            "muon". In the benchmarks 0.1 to 0.3 with T = 0.003 to 0.01, lr 0.04 and `nesterov=True`
            predicts better than the defaults for convolutional networks.
        kl_clip: trust region κ of a step; None for no clipping. An outlier enters the momentum with
            at most ten times the radius of the trust region.
        num_particles: samples S of the posterior per step, in antithetic pairs; gradients and
            curvature are means over them. With 0 everything is computed at the mean, which then
            converges to a mode of the log joint (at T = 1). The posterior there is a Laplace
            approximation, for `Laplace(model, guide).predict(x)` and not for sampling.
        antithetic: use each perturbation a second time with its sign turned, also across steps.
        update: how the mean moves: "natural", in the trust region of `kl_clip`; "whitened-muon" and
            "muon", the orthogonalized momentum of each weight matrix with and without whitening by
            the input factor of its curvature, and Adam at a tenth of `lr` for other tensors;
            "soap", Adam in the eigenbasis of the curvature's factors; or a callable from parameters
            (the means, in the shapes of the weights) to a `torch.optim.Optimizer` without a
            closure, which has its own groups, learning rates, momentum and weight decay; its
            learning rates change in proportion with `lr`. All see the gradient of the tempered
            objective and have its fixed points, where the steps of fixed length, those of both
            muons, come to rest as `lr` falls to 0. "auto" is "natural" without samples or without a
            network, else "whitened-muon".
        average: keep a running average of mean and precision, with weight 4/(t+4), in the guide;
            training continues from the iterate.
        optim: the optimizer of everything without a natural gradient, the parameters of the model
            and the fallback guide: a callable from parameters to a `torch.optim.Optimizer`, or a
            `PyroOptim`. By default Adam with β₂ = 0.99 and learning rates 0.002 (model) and 0.01
            (guide). The learning rates of a torch optimizer follow the schedule on `.optimizer`.
        on_nonfinite: if a loss or a gradient is not finite, "raise" a FloatingPointError, or
            "skip" the step and count it in `.skipped`. Either way posterior, momentum and random
            numbers stay unchanged.
        process_group: the processes that train the posterior together, each on its batches of the
            data of all: a group of `torch.distributed`, by default that of `init_process_group`, if
            it was called; None for this process alone. All of them have to call `step` and
            `evaluate_loss`. The first step starts from the weights of rank 0.
        sample_parallel: whether each of these processes has a sample of the posterior of its own,
            in antithetic pairs of ranks, in place of one for all.

    "auto" stands for momentum 0.9, damping 0.003, kl_clip 0.001, one sample and no average for
    networks; the first step is taken at the mean. A `FullGuide` with curvature="hessian", and a
    `DiagonalGuide` of a model without a network, have one Gaussian over all latents in
    unconstrained space, trained by the Hessian of the log joint: lr 0.3, kl_clip 1,
    8 samples, averaged, and the precision moves 0.3 of the way, or 1 - decay of
    `Curvature("hessian", decay=...)`; 0.1 and 32 samples if a latent is constrained, as scales are.
    Momentum and damping are not used there. Other arguments of `Curvature`, such as `every`, belong
    to running averages: with them a network is trained layer by layer.

    Of a network sharded by `fully_shard` before `bayesianize`, each rank has the Gaussians,
    curvature and momenta of the blocks that it owns, by their cost, with diagonal structures, K-FAC
    and EK-FAC without truncation; `guide.gathered()` is a guide with all of them.

    From a posterior that Pyro's param store was given (`load`, `set_state`) the next step starts as
    that of a new `NGVI`. Random numbers come from a separate stream, seeded from torch's generator
    at construction. `.optimizer` is a `torch.optim.Optimizer` for schedulers. If samples are so
    different from the mean that training does not progress (learned log scales, priors much wider
    than 1/fan_in), use several of them (`num_particles=4`) or a lower temperature.

    Raises:
        TypeError: the guide is not one of `pyrocurv.guides`; an argument of another type.
        ValueError: an unknown name, a number out of its range, or `nesterov=True` with an update
            that has no such momentum; at a step, before any state is changed, what the guide raises
            at its first call, no observed site, data outside of the support of their likelihood
            (`pyro.enable_validation(False)` turns that off), a plate smaller than the batch in it,
            a latent that the guide does not have.
        RuntimeError: a step while another thread trains or predicts; a process of the group that
            has died or left, or whose posterior differs from that of rank 0 (compared after the
            first step and after each 100 further ones).

    Reference: Zhang et al. 2018, "Noisy natural gradient as variational inference",
    arXiv:1712.02390; Khan & Rue 2023, "The Bayesian learning rule", arXiv:2107.04562.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=64)
        >>> ngvi = NGVI(model, KFACGuide(model), temperature=0.1)
        >>> losses = [ngvi.step(x, y) for _ in range(50)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: StructuredGuide,
        *,
        lr: float | Auto = AUTO,
        momentum: float | Auto = AUTO,
        nesterov: bool | Auto = AUTO,
        curvature: CurvatureKind | Curvature = "fisher",
        temperature: float | Auto = AUTO,
        kl_warmup: int = 0,
        damping: float | Auto = AUTO,
        decoupled_weight_decay: float = 0.0,
        kl_clip: float | Auto | None = AUTO,
        num_particles: int | Auto = AUTO,
        antithetic: bool = True,
        update: UpdateChoice = AUTO,
        average: bool | Auto = AUTO,
        optim: Callable[..., torch.optim.Optimizer] | PyroOptim | None = None,
        on_nonfinite: Nonfinite = "raise",
        process_group: Any = AUTO,
        sample_parallel: bool = False,
    ) -> None:
        check_guide(guide)
        check_options(model, temperature, kl_warmup, antithetic, on_nonfinite)
        check_nonnegative("decoupled_weight_decay", decoupled_weight_decay)
        self.model, self.guide = model, guide
        self.curvature = as_curvature(curvature)
        self._prefers_joint = (
            uses_joint_update(self.curvature, model) and guide.supports_joint_of(model)
        )
        values = resolve_defaults({
            "lr": lr, "momentum": momentum, "damping": damping,
            "decoupled_weight_decay": decoupled_weight_decay, "kl_clip": kl_clip,
            "num_particles": num_particles, "average": average,
        }, self._prefers_joint)
        self.num_particles: Any = values.pop("num_particles")
        self.average: bool = values.pop("average")
        self.temperature, self.kl_warmup, self.antithetic = temperature, kl_warmup, antithetic
        self.on_nonfinite, self.skipped = on_nonfinite, 0
        self.loss_terms: LossTerms | None = None  # of the last step
        check_flag("sample_parallel", sample_parallel)
        self.process_group, self.sample_parallel = process_group, sample_parallel
        self._shards = shards_of(modules(model))
        check_sharing(self._shards, guide, process_group, sample_parallel, self.curvature)
        self._is_synchronized = False
        self._has_network = has_network(model)
        automatic = "whitened-muon" if self._is_sampled_network else "natural"
        usual = self.num_particles == 0 or has_layer_norm(modules(model))
        self._mean_update = as_mean_update(update, automatic, nesterov, usual)
        check_decay(self._mean_update, decoupled_weight_decay, lr)
        self._is_automatic_update = update == AUTO
        if lr == AUTO and not self._prefers_joint:
            values["lr"] = self._mean_update.default_lr
        self.optimizer = ScheduledHyperparameters(**values)
        self._auxiliary = auxiliary_optimizer(optim)
        self._stream = RandomStream()
        self._store = GuideStore(guide)
        self._rule: UpdateRule | None = None  # chosen at the first step
        self._posterior: Posterior | None = None
        self._loaded: RunSignature | None = None  # of a state that no step has used yet
        self._dataset_size = DatasetSizeCheck()

    def __repr__(self) -> str:
        """Its settings, and where it is; nothing is run."""
        group, posterior = self.optimizer.group, self._posterior
        now = "" if posterior is None else f", {posterior.temperature.value:.3g} now"
        return described(
            self, repr(self.guide), f"curvature={self.curvature.kind!r}",
            f"update={self._mean_update.name!r}", f"lr={group['lr']:.3g}",
            f"temperature={self.temperature!r}{now if self.temperature == AUTO else ''}",
            "" if self.num_data is None else f"N={self.num_data:,g}",
            counted(0 if posterior is None else posterior.step, "step"),
            f"{self.skipped} skipped" if self.skipped else "",
        )

    # ---- a step ---------------------------------------------------------------------------------

    @one_thread_at_a_time
    @outside_inference_mode
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step on a mini-batch; takes the model's arguments.

        Returns the loss before the step: -ELBO at full-data scale, N E[nll] + T KL, at the sampled
        weights (what `SVI.step` returns), or N nll + T KL at the mean. NaN for a skipped step.
        `.loss_terms` has nll, KL and T of the last step that was not skipped.
        """
        self._follow_store()
        try:
            with naming_step(self._posterior.step if self._posterior else 0), Undo() as undo:
                return self._step(undo, args, kwargs)
        except FloatingPointError:
            if self.on_nonfinite == "raise":
                raise
        self.skipped += 1
        return math.nan

    def _follow_store(self) -> None:
        """Start from the posterior that Pyro's store was given, if it was, as a new `NGVI` does."""
        if self._store.sync() and self._loaded is None:
            self._posterior = None

    def _step(self, undo: Undo, args: Any, kwargs: Any) -> float:
        """A step; whatever is raised, `undo` restores all that has changed by then."""
        check_values((*args, *kwargs.values()), "the model")
        undo.keep_attributes(self, self._stream, self._dataset_size)
        self._store.keep(undo)
        self._mean_update.keep(undo)
        undo.keep(save_buffers(modules(self.model)))
        workers = self._workers
        self._store.setup(undo, self._stream, args, kwargs, self._prefers_joint)
        self._synchronize(workers)
        validation = only_data_validated() if self._posterior else nullcontext()
        rule, posterior = self._ready()
        like = self.guide.blocks[0].raw_loc
        with (self._stream(like.device), validation, torch.enable_grad(),
              disable_autocast(like.device) as network):
            model = BatchModel(self.model, self.guide, network, args, kwargs)
            posterior = self._store.load(posterior.to(like))
            update, auxiliary = rule.update(posterior, self._settings(rule, workers), model)
            if not rule.is_joint:
                self._dataset_size.note(update.posterior.blocks[0].hyperparameters.num_data)
            factor = self.optimizer.lr_factor
            auxiliary = [parameter._replace(lr_factor=factor) for parameter in auxiliary]
            self._auxiliary.keep(undo, auxiliary)
            self.optimizer.step(lambda: self._auxiliary.step(auxiliary))

        def assign() -> None:
            self.guide.is_laplace = self.num_particles == 0
            self.guide.temperature = update.posterior.temperature.value
            self._posterior, self.loss_terms = update.posterior, LossTerms.of(update)

        commit(update, self._store, undo, assign)
        if update.posterior.step % CHECK_EVERY == 1:
            others = {parameter.name: parameter.tensor for parameter in auxiliary}
            workers.check_equal(self._store.checksums(update.posterior, others), posterior.step)
        if self.num_particles != 0:
            is_automatic = self.temperature == AUTO and self._is_sampled_network
            warn_at_chance(posterior.temperature, update.posterior.temperature, is_automatic)
        return update.loss

    def _ready(self) -> tuple[UpdateRule, Posterior]:
        """The rule and the posterior, both from the first step on; checks a loaded state."""
        if self._rule is None:
            self._rule = choose_rule(self.curvature, self._store, self._prefers_joint)
        if self._posterior is None:
            return self._rule, self._rule.init(self.optimizer.group)
        if self._loaded is not None:
            self._posterior = self._store.own(self._posterior)
            check_blocks(self._posterior, self._store.blocks)
            check_signature(self._loaded, RunSignature.of(self._rule, self.guide))
            self._loaded = None
        return self._rule, self._posterior

    @property
    def _workers(self) -> Workers:
        """The processes that train together: those that a network was sharded over, or a group."""
        return Workers.of(self.process_group) if self._shards is None else self._shards.workers

    @property
    def _is_sampled_network(self) -> bool:
        """Whether "auto" stands for what networks need, whose posterior is sampled."""
        return self._has_network and self.num_particles != 0 and not self._prefers_joint

    def _synchronize(self, workers: Workers) -> None:
        """Before the first step of several processes: the state of rank 0 for all."""
        if workers.is_alone or self._is_synchronized:
            return
        self._stream.load_state_dict(workers.broadcast(self._stream.state_dict()))
        weights = [family.raw_loc.detach() for family in self.guide.blocks]
        tensors = [*weights, *(p for _, p in pyro.get_param_store().named_parameters())]
        for module in (*modules(self.model), *modules(self.guide)):
            tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own = self._store.tensors_of_owners()
        workers.broadcast_([*{id(x): x.detach() for x in tensors if id(x) not in own}.values()])
        self._is_synchronized = True

    def _settings(self, rule: UpdateRule, workers: Workers) -> StepSettings:
        temperature, mean_update = self.temperature, self._mean_update
        if temperature == AUTO and (rule.is_joint or not self._is_sampled_network):
            temperature = 1.0
        if self._is_automatic_update and rule.is_joint:
            mean_update = NATURAL
        return StepSettings(
            self.curvature, self.optimizer.group,
            TemperatureRule(temperature, self.kl_warmup), self.num_particles,
            self.antithetic, self.average, mean_update, workers, self.sample_parallel,
        )

    # ---- watching and saving --------------------------------------------------------------------

    @one_thread_at_a_time
    @outside_inference_mode
    @torch.no_grad()
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> Loss:
        """-ELBO on these data, N nll + T (log q - log p) at `num_particles` samples of the guide.

        A difference of log densities at the same weights, hence without noise where q is the
        posterior. The returned number has the T that it was computed with, also of "auto", as
        `.temperature`; at 1 it is -ELBO. Draws from torch's global generator; changes nothing.
        """
        check_values((*args, *kwargs.values()), "the model")
        self._follow_store()
        if self.guide.prototype_trace is None:
            self.guide.setup(args, kwargs, self._prefers_joint)
        rule = self._rule or choose_rule(self.curvature, self._store, self._prefers_joint)
        posterior = self._posterior or rule.init(self.optimizer.group)
        device = self.guide.blocks[0].raw_loc.device
        with disable_autocast(device) as network, rewind_rng_on_error(device):
            model = BatchModel(self.model, self.guide, network, args, kwargs)
            with preserve_module_state(modules(self.model)):
                current = self._store.current(posterior.to(self.guide.blocks[0].raw_loc))
                settings = self._settings(rule, self._workers)
                return Loss.at(*rule.negative_elbo(current, settings, model))

    @property
    def num_data(self) -> float | None:
        """N, the size of the model's plate; None before the first step, and without a network."""
        return self._dataset_size.num_data

    def update_counts(self) -> dict[str, UpdateCount]:
        """How often each block's curvature was estimated, and its present interval in steps.

        A block is named by its layer's module, "net.0", or by its weight if no module owns that;
        one of several layers by the first and the last, "net.0 ... net.4". Weights that no
        supported op consumes have an estimate from every step. Empty before the first step.
        """
        if self._posterior is None or self._rule is None or self._rule.is_joint:
            return {}
        return update_counts(self.curvature, self._posterior)

    def work_assignment(self, num_ranks: int | None = None) -> dict[str, dict[str, int]]:
        """Which rank computes what for all, by its cost: to be printed.

        {"eigendecompositions": {"net.0 input": 1, ...}, "update": {"net.0": 0, ...}}, for the ranks
        of the process group or for `num_ranks` of them. Empty before the first step. Where
        `fully_shard` sharded the network it is {"blocks": {"net.0": 1, ...}}, their owners.
        """
        size = self._workers.size if num_ranks is None else num_ranks
        check_integer("num_ranks", size, 1)
        if self.guide.ownership is not None:
            return {"blocks": dict(self.guide.ownership.owners)}
        return work_assignment(self._mean_update, self._posterior or Posterior(0, ()), size)

    def prior_errors(self) -> dict[str, float]:
        """{block: |Λ - (N/T) C - Λ₀|, relative}, if the prior's Λ₀ is another task's posterior."""
        return prior_errors(self.curvature, self._posterior) if self._posterior else {}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters of guide and model, which have their own states.

        Of a network sharded by `fully_shard`, what this rank has; it continues on the same
        rank of as many. See `full_state_dict`.
        """
        self._follow_store()
        signature = self._loaded or RunSignature.of(self._rule, self.guide)
        posterior, ownership = self._posterior, self.guide.ownership
        return {
            "version": FORMAT_VERSION,
            "optimizer": self.optimizer.state_dict(),
            "auxiliary": self._auxiliary.state_dict(),
            "stream": self._stream.state_dict(),
            "skipped": self.skipped,
            "average": self.average,
            "update": self._mean_update.name,
            "update_state": self._mean_update.state_dict(),
            "temperature": self.temperature,
            "kl_warmup": self.kl_warmup,
            **signature._asdict(),
            "posterior": None if posterior is None else to_state(posterior.without_means()),
            **({} if ownership is None else {"sharding": ownership.state()}),
        }

    def full_state_dict(self) -> dict[str, Any]:
        """The state of all ranks of a network sharded by `fully_shard`, which all ask for.

        On rank 0; {} on the others. It continues on any number of ranks, or in one process, with a
        guide that has loaded `guide.full_state_dict()`. Of any other network it is `state_dict()`.
        """
        state = self.state_dict()
        if state.pop("sharding", None) is None:
            return state
        blocks = [family.block for family in self.guide.blocks]
        return state_of_all(state, blocks, self._workers)

    @reading_state("NGVI")
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, given guide and model as they were then.

        Learning rate, momentum, damping, clip and temperature are those of the state.

        Raises ValueError, before anything is changed, if the state is not of an `NGVI`, of a newer
        version or another `average`, or of a guide with other blocks or structures; the latter at
        the first step for a guide that has no blocks yet.
        """
        check_state(state, self.average, self._mean_update.name)
        self._store.sync()
        posterior = from_state(state["posterior"])
        check_ranks(state, self.guide)
        if posterior is not None and self.guide.blocks:
            posterior = self._store.own(posterior)
            check_blocks(posterior, self._store.blocks)
        with Undo() as undo:
            undo.keep_attributes(self, self._stream)
            self._auxiliary.keep(undo, ())
            self._mean_update.keep(undo)
            undo.keep_optimizer(self.optimizer)
            self.optimizer.load_state_dict(state["optimizer"])
            self._auxiliary.load_state_dict(state["auxiliary"])
            self._mean_update.load_state_dict(state["update_state"])
            self._stream.load_state_dict(state["stream"])
            self.skipped, self.temperature = state["skipped"], state["temperature"]
            self.kl_warmup = state["kl_warmup"]
            signature = RunSignature(state["is_joint"], state["means"])
            self._posterior, self._loaded = posterior, None if posterior is None else signature
