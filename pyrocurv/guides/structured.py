"""The base class of the guides: a Gaussian for each block of weights, and a guide for the rest.

At its first call a guide runs the model once to find which latents a supported op consumes as
weights, and creates a Gaussian for each block of them. The other latents go to a fallback guide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import Tensor

from pyrocurv.guides.auxiliary import checked_plates, make_auxiliary_guide
from pyrocurv.guides.blockwise import BlockwiseGuide
from pyrocurv.guides.initialization import fallback_model, init_to_network, initial_values
from pyrocurv.guides.partition import LatentPartition, check_layout
from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.handlers.modules import modules, named_modules
from pyrocurv.handlers.particles import check_particles
from pyrocurv.handlers.prototype import Prototype, check_not_observed, given, trace_prototype
from pyrocurv.handlers.sites import TraceSite
from pyrocurv.handlers.vectorized import VectorizedRunner
from pyrocurv.layers.block_owners import one_layer_each
from pyrocurv.layers.structure_selection import LEFT_OUT, StructureChoice, check_structure
from pyrocurv.posterior.prior import Prior, read_prior
from pyrocurv.posterior.summary import guide_summary
from pyrocurv.runtime import validation
from pyrocurv.runtime.inference_mode import check_differentiable, outside_inference_mode
from pyrocurv.runtime.module_state import preserve_module_state
from pyrocurv.runtime.rng import device_of, rewind_rng_on_error
from pyrocurv.runtime.sharding import check_unsharded
from pyrocurv.runtime.single_thread import one_thread_at_a_time
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user


class StructuredGuide(BlockwiseGuide):
    """A Gaussian posterior over network weights, block by block in one structure.

    Raises at the first call, before anything is set up:
        ValueError: the model has a discrete latent, or no latent at all; at a later call, a latent
            of the first call is observed.

    Of a network sharded by `fully_shard` before `bayesianize`, each rank has the Gaussians of
    some layers and the means of all; what needs the others raises a RuntimeError. `gathered()` is a
    guide with all of them.

    Weights that no supported op consumes, as in recurrent layers, have independent Gaussians, which
    `NGVI` trains from gradients alone; weights with a prior that is not normal go to the fallback
    guide. One warning names them all.
    """

    supports_joint: ClassVar[bool] = False  # one Gaussian over all latents of a model
    unpickled_attributes = (*BlockwiseGuide.unpickled_attributes, "_choice")

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[[TraceSite], Tensor] = init_to_network,
        init_scale: float = 0.01,
        structure: StructureChoice = None,
        fallback: Callable[[Any], AutoGuide] = AutoNormal,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        """A guide of a model, which is not run before the first call.

        Args:
            model: a Pyro model; the weights are latents with normal priors. A site is a latent if
                it is not observed at the first call: call a guide with the data.
            init_loc_fn: initial mean, site -> value. By default weights start at the network's own
                values (see `pyrocurv.nn.bayesianize`) or at a sample from the prior, and other
                latents at the prior's median; without a network all latents start near their
                medians.
            init_scale: initial standard deviation of each weight. `NGVI` takes its first step at
                the mean, and sets the scale from the curvature there.
            structure: the structures of layers that differ from this guide's: {module type, or name
                with * and ?: structure}, where names take precedence over types; or a rule
                (name, module) -> structure or None. A structure is a name, or a `KFAC` or `EKFAC`
                of `pyrocurv.curvature`; "point" makes a layer a point estimate, which `optim`
                trains, and "frozen" keeps it at its initial value.
            fallback: the guide for the other latents, model -> AutoGuide. A guide other than the
                default initializes them itself.
            create_plates: as in Pyro's guides.
        """
        validation.check_callable("model", model, "a Pyro model, a callable,")
        validation.check_callable("init_loc_fn", init_loc_fn, "a callable site -> initial value")
        validation.check_positive("init_scale", init_scale)
        check_structure(structure, LEFT_OUT)
        validation.check_callable("fallback", fallback, "a callable model -> AutoGuide")
        if create_plates is not None:
            validation.check_callable("create_plates", create_plates, "a callable to plates")
            create_plates = functools.partial(checked_plates, create_plates)
        super().__init__(model, init_loc_fn, init_scale, create_plates)
        self._choice, self._make_fallback = structure, fallback
        self._run_fallback = VectorizedRunner()
        self._priors: list[Prior] = []
        self._given: frozenset[Any] = frozenset()  # arguments of the first call

    # ---- the first call -------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup(args, kwargs, requires_data=False)

    @one_thread_at_a_time
    @outside_inference_mode
    def setup(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], prefers_joint: bool = False,
        requires_data: bool = True,
    ) -> None:
        """Run the model once and create the Gaussians; an exception leaves the guide as it was.

        Args:
            args, kwargs: the model's arguments.
            prefers_joint: one Gaussian over all latents in place of layers, also for a network.
            requires_data: raise ValueError if no site is observed.
        """
        validation.check_values((*args, *kwargs.values()), "the model")
        if not self._base_model:
            raise RuntimeError(
                "this guide was pickled before its first call, and pickles leave the model behind: "
                f"make a new one, {type(self).__name__}(model)"
            )
        with Undo() as undo, rewind_rng_on_error(device_of(args)), poutine.block():
            undo.keep_attributes(self, self.blocks, pyro.get_param_store())
            self._setup(args, kwargs, prefers_joint, requires_data)

    def _setup(self, args: Any, kwargs: Any, prefers_joint: bool, requires_data: bool) -> None:
        check_unsharded("model", modules(self._base_model[0]))
        check_differentiable(modules(self._base_model[0]))
        prototype = trace_prototype(
            self.model, self._prototype_hide_fn, self.master is not None, tuple(args), kwargs,
            known={*self.sites, *self._loaded_fallback}, requires_data=requires_data,
        )
        partition = self._partition(prototype, prefers_joint)
        if self.is_shared_out:
            partition = replace(partition, blocks=one_layer_each(partition.blocks))
        if self.sites:
            blocks = [family.block for family in self.blocks]
            check_layout(blocks, partition.blocks, ("the loaded guide", "the model"))
            self._leave_name_of_others()
        else:
            has_default = self._init_loc_fn is init_to_network
            near_medians = has_default and not has_network(self._base_model[0])
            values = initial_values(partition, prototype.latents, near_medians)
            self._build(partition.blocks, values)
            self.adopt_from_store()
        self._latents = {name: partition.latents[name] for name in self.sites}
        self.is_joint = partition.is_joint
        self._observe_prototype(prototype.trace)
        self._prototype_frames = {
            frame.name: frame
            for site in prototype.latents.values() for frame in site["cond_indep_stack"]
        }
        if warning := partition.warning(prototype):
            warn_user(f"{type(self).__name__}: {warning}")
        self._setup_fallback(prototype, partition, args, kwargs)
        self._sync()
        self.prototype_trace, self._given = prototype.trace, given(args, kwargs)
        if self.master is not None:
            self.master()._check_prototype(prototype.trace)

    def _partition(self, prototype: Prototype, prefers_joint: bool) -> LatentPartition:
        """By layer, or one block over all latents; a loaded guide keeps its own."""
        model = self._base_model[0]
        partition = LatentPartition.by_layer(
            prototype, self._choice, self.structure, named_modules(model)
        )
        may_be_joint = not has_network(model) and self.supports_joint_of(model)
        chooses_joint = prefers_joint or may_be_joint and partition.suggests_joint(prototype)
        is_joint = self.is_joint if self.sites else chooses_joint
        return LatentPartition.joint(prototype, self.structure) if is_joint else partition

    def _setup_fallback(
        self, prototype: Prototype, partition: LatentPartition, args: Any, kwargs: Any
    ) -> None:
        self._excluded, self._unsupported = dict(partition.excluded), dict(prototype.unsupported)
        self.fallback_sites = (*partition.excluded, *partition.fallback)
        if not self.fallback_sites:
            if self.create_plates is not None:  # an error belongs to the setup
                self._create_plates(*args, **kwargs)
            return
        at_median = self._make_fallback is AutoNormal
        model = fallback_model(
            self._base_model[0], self._init_loc_fn, partition.fallback, at_median
        )
        values = {name: prototype.latents[name]["value"] for name in partition.excluded}
        self.fallback = make_auxiliary_guide(
            model, values, partition.excluded, partition.fallback, self._make_fallback
        )
        with torch.no_grad(), preserve_module_state(modules(model)), poutine.block():
            self._create_plates(*args, **kwargs)
            self.fallback(*args, **kwargs)
        if self._fallback_state:
            self.fallback.load_state_dict(self._fallback_state)
            self._fallback_state = {}

    def _check_prototype(self, trace: Any) -> None:
        """Called by the fallback guide, whose sites are this guide's by construction."""

    # ---- the guide ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latents at the sites of the model; takes the model's arguments."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_observed(args, kwargs)
        self.sync_with_store()
        self.check_complete()
        self._warn_of_laplace_samples()
        self._create_plates(*args, **kwargs)
        unconstrained: dict[str, Tensor] = {}
        for family in self.blocks:
            packed = pyro.sample(
                f"_{family._pyro_name}_latent", family.distribution(), infer={"is_auxiliary": True}
            )
            if packed.dim() > 1:
                check_particles(self.sites, named_modules(self.model))
            unconstrained.update(family.block.unpack(packed))
        values = {
            name: latent.sample(name, unconstrained[name], self.plates)
            for name, latent in self._latents.items()
        }
        if self.fallback_sites:
            values.update(self.fallback(*args, **kwargs))
        return values

    def _check_observed(self, args: Any, kwargs: Any) -> None:
        """Raise ValueError if arguments that are given now make an observed site of a latent."""
        if self._base_model and not (now := given(args, kwargs)) <= self._given:
            latents = {*self.sites, *self.fallback_sites}
            check_not_observed(self._base_model[0], latents, args, kwargs)
            self._given |= now

    def supports_joint_of(self, model: Callable[..., Any]) -> bool:
        """Whether it can have one Gaussian over all latents of a model.

        "full" can for any model, "diag" for one without a network. A guide that has a fallback
        guide already cannot.
        """
        if not self.supports_joint or self._choice is not None:
            return False
        if self.fallback_sites or self._loaded_fallback:
            return False
        return self.structure == "full" or not has_network(model)

    def _observe_prototype(self, trace: Any) -> None:
        """Set the priors to those of the first call."""
        if not self.is_joint:
            priors = {name: trace.nodes[name]["fn"] for name in self.sites}
            self.observe_priors([
                read_prior(family.block, priors) for family in self.own_families
            ])

    def observe_priors(self, priors: Sequence[Prior]) -> None:
        """Set the priors of the blocks, which `kl` uses."""
        self._priors = list(priors)

    # ---- the posterior --------------------------------------------------------------------------

    @property
    def posterior(self) -> StructuredNormal:
        """The Gaussian over all weights: `.loc` [P] and `.precision` follow `.sites`, row-major."""
        return self._ready_blocks().normal()

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n samples of every latent, {site: [n, *shape]}."""
        validation.check_integer("n", validation.as_number(n), 0)
        posterior = self._ready()
        self.check_complete()
        samples = posterior.sample(n)
        self._warn_of_laplace_samples()
        if self.fallback_sites:
            fallback = poutine.mask(self.fallback, mask=False)  # skips the log densities
            values = self._run_fallback(fallback, {}, n, (), {}).values
            samples.update({name: values[name] for name in self.fallback_sites})
        return samples

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent, {site: [*shape]}."""
        medians = self._ready().median()
        if self.fallback_sites:
            medians.update(self.fallback.median(*args, **kwargs))
        return medians

    @torch.no_grad()
    def quantiles(
        self, quantiles: float | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The marginal quantiles of every latent, {site: [len(quantiles), *shape]}."""
        posterior = self._ready()
        self.check_complete()
        values = posterior.quantiles(quantiles)
        if self.fallback_sites:
            levels = torch.as_tensor(quantiles).reshape(-1).tolist()
            values.update(self.fallback.quantiles(levels, *args, **kwargs))
        return values

    @torch.no_grad()
    def get_posterior(self, site: str) -> dist.TorchDistribution:
        """The exact marginals of the weights of one site: independent normals [*shape].

        For a constrained latent they are transformed normals. Raises ValueError for a name that is
        not in `.sites`.
        """
        return self._ready_blocks().marginal(site)

    def kl(self) -> Tensor:
        """KL(q ‖ prior) over `.sites` in nats, with the priors that the model had last."""
        posterior = self._ready_blocks()
        if self.is_joint:
            raise RuntimeError(
                "the KL divergence from priors of any form is not known in closed form: use "
                "NGVI.evaluate_loss"
            )
        if not self._priors:
            raise RuntimeError("the guide has no priors: call it once with the data, guide(x, y)")
        return posterior.kl(self._priors)

    def summary(self) -> str:
        """A table of all latents: site, shape, structure, and number of parameters.

        The model's parameters that are not latents follow, as "point" if `optim` trains them, else
        as "frozen". The last line counts the parameters that have a posterior, and says at which
        temperature it was trained.
        """
        self._ready()
        model = self._base_model[0] if self._base_model else None  # an unpickled guide has none
        return guide_summary(
            self.median(), [family.block for family in self.blocks], self._excluded,
            self._make_fallback.__name__, named_modules(model), self.temperature,
        )
