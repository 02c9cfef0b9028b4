"""What all guides here share: a Gaussian for each block of weights, and a guide for the rest.

At its first call a guide runs the model once, sees which latents a supported op consumes as
weights, and lays out a Gaussian for each block of them. What is left goes to a `fallback` guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from pyrocurv.guides.auxiliary import make_auxiliary_guide
from pyrocurv.guides.blockwise import BlockwiseGuide
from pyrocurv.guides.initialization import (
    InitSelected,
    init_to_network,
    init_to_prior_median,
    initial_values,
)
from pyrocurv.guides.partition import LatentPartition, check_layout
from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.guides.unconstrained import has_network
from pyrocurv.handlers.modules import modules, named_modules
from pyrocurv.handlers.prototype import Prototype, TraceSite, trace_prototype
from pyrocurv.handlers.vectorized import VectorizedRunner
from pyrocurv.layers.structure_selection import StructureChoice
from pyrocurv.posterior.prior import GaussianPrior, read_prior
from pyrocurv.posterior.summary import guide_summary
from pyrocurv.runtime.module_state import preserve_module_state
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.user_warnings import warn_user


class StructuredGuide(BlockwiseGuide):
    """A Gaussian posterior over network weights, block by block in one structure.

    Args:
        model: a Pyro model with an observed site; the weights are latents with normal priors.
        init_loc_fn: where the mean starts, site -> value; by default the network's own weights
            (see `pyrocurv.nn.bayesianize`), or a sample from the prior, and for all other latents
            the prior's median; without a network near the medians.
        init_scale: standard deviation of each weight before any training. `NGVI` takes its first
            step at the mean and sets the scale from the curvature there.
        structure: for some layers another one than this guide's, {module type, or name with * and
            ?: structure}, names before types; or a rule (name, module) -> structure or None. A
            structure is a name, a `KFAC` or an `EKFAC` of `pyrocurv.curvature`; "point" leaves a
            layer out (a point estimate, trained by `optim`), "frozen" keeps it at its start.
        fallback: the guide for the latents that are no weights, model -> AutoGuide. One of your
            own starts them where it says.
        create_plates: as Pyro's guides have it.

    Raises at the first call, before anything is set up:
        ValueError: the model has no observed site (were the data left out of the call?), a discrete
            latent, or no latent at all.

    Weights that no supported op consumes (of recurrent layers, say) have independent Gaussians,
    which `NGVI` trains from gradients alone; weights whose prior is no normal go to the fallback.
    One warning names them all.
    """

    supports_joint: ClassVar[bool] = False  # over all latents of a model without a network
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
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale!r}: a positive number is needed")
        super().__init__(model, init_loc_fn, init_scale, create_plates)
        self._choice, self._make_fallback = structure, fallback
        self._fallback_draws = VectorizedRunner()
        self._priors: list[GaussianPrior] = []
        self._said_so = False

    # ---- the first call -------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.setup(args, kwargs)

    def setup(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], prefers_joint: bool = False
    ) -> None:
        """Run the model once and lay out the Gaussians; all of it, or nothing if that raises.

        Args:
            args, kwargs: the model's arguments.
            prefers_joint: one Gaussian over all latents in place of layers, also of a network.
        """
        if not self._base_model:
            raise RuntimeError(
                "this guide was pickled before its first call, and pickles leave the model behind: "
                f"make a new one, {type(self).__name__}(model)"
            )
        with Undo() as undo:
            undo.keep_attributes(self, self.blocks, pyro.get_param_store())
            self._setup(args, kwargs, prefers_joint)

    def _setup(self, args: Sequence[Any], kwargs: Mapping[str, Any], prefers_joint: bool) -> None:
        model, known = self._base_model[0], {*self.sites, *self._loaded_rest}
        partial = self.master is not None
        prototype = trace_prototype(
            self.model, self._prototype_hide_fn, partial, tuple(args), kwargs, known
        )
        plan = self._plan(prototype, prefers_joint)
        if self.sites:
            check_layout([family.block for family in self.blocks], plan.blocks)
        else:
            uses_default_init = self._init_loc_fn is init_to_network and not has_network(model)
            values = initial_values(plan, prototype.latents, uses_default_init)
            self._build(plan.blocks, values)
        priors = {name: prototype.latents[name]["fn"] for name in self.sites}
        self._event_dims = {name: prior.event_dim for name, prior in priors.items()}
        self._latents, self.is_joint = dict(plan.latents), bool(plan.latents)
        if not self.is_joint:
            self.observe_priors([read_prior(family.block, priors) for family in self.blocks])
        self._prototype_frames = {
            frame.name: frame
            for site in prototype.latents.values() for frame in site["cond_indep_stack"]
        }
        if warning := plan.warning(prototype):
            warn_user(f"{type(self).__name__}: {warning}")
        self._set_fallback(prototype, plan, args, kwargs)
        self.prototype_trace = prototype.trace
        if self.master is not None:
            self.master()._check_prototype(prototype.trace)

    def _plan(self, prototype: Prototype, prefers_joint: bool) -> LatentPartition:
        """Layer by layer, or one block over all latents."""
        model = self._base_model[0]
        plan = LatentPartition.of(prototype, self._choice, self.structure, named_modules(model))
        may = self.supports_joint and self._choice is None and not self.sites
        is_better = may and not has_network(model) and plan.prefers_joint(prototype)
        if self.is_joint or is_better or prefers_joint and not self.sites:
            return LatentPartition.joint(prototype, self.structure)
        return plan

    def _set_fallback(
        self, prototype: Prototype, plan: LatentPartition, args: Any, kwargs: Any
    ) -> None:
        self.fallback_sites, self._excluded = (*plan.excluded, *plan.left), plan.excluded
        if not self.fallback_sites:
            return
        model = self._base_model[0]
        if self._init_loc_fn is not init_to_network:
            model = InitSelected(self._init_loc_fn, plan.left)(model)
        elif self._make_fallback is AutoNormal:
            model = InitSelected(init_to_prior_median, plan.left)(model)
        values = {name: prototype.latents[name]["value"] for name in plan.excluded}
        self.fallback = make_auxiliary_guide(
            model, values, plan.excluded, plan.left, self._make_fallback
        )
        with torch.no_grad(), preserve_module_state(modules(model)), poutine.block():
            self._create_plates(*args, **kwargs)
            self.fallback(*args, **kwargs)
        if self._fallback_state:
            self.fallback.load_state_dict(self._fallback_state)
            self._fallback_state = {}

    def _check_prototype(self, trace: Any) -> None:
        """Asked by the fallback guide, whose sites are this guide's by construction."""

    # ---- the guide ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latents at Pyro sites of the model's names; the model's arguments."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._warn_of_samples()
        self._create_plates(*args, **kwargs)
        values: dict[str, Tensor] = {}
        for number, family in enumerate(self.blocks):
            packed = pyro.sample(
                f"_{self._pyro_name}_{number}", family.distribution(), infer={"is_auxiliary": True}
            )
            if packed.dim() > 1:
                check_particles(self.sites, named_modules(self.model))
            values.update(family.block.unpack(packed))
        result = {
            name: self._latents[name].sample(name, values[name], self.plates) if self.is_joint
            else pyro.sample(name, dist.Delta(values[name], event_dim=self._event_dims[name]))
            for name in self.sites
        }
        if self.fallback_sites:
            result.update(self.fallback(*args, **kwargs))
        return result

    def supports_joint_of(self, model: Callable[..., Any]) -> bool:
        """Whether it is for all latents of a model: "full" always, "diag" without layers.

        Not where it has been laid out with a fallback guide already.
        """
        may = self.supports_joint and self._choice is None
        may = may and not (self.fallback_sites or self._loaded_rest)
        return may and (self.structure == "full" or not has_network(model))

    def observe_priors(self, priors: Sequence[GaussianPrior]) -> None:
        """Remember the priors of the blocks' weights, for `kl`."""
        self._priors = list(priors)

    def _warn_of_samples(self) -> None:
        """Once, where the precision is the curvature at a mode."""
        if self.is_laplace and not self._said_so:
            self._said_so = True
            warn_user(
                "sampling a Laplace approximation: its width is that of the network linearised at "
                "the mode, and predictions of the network itself at samples of it are wrong by "
                "far; pyrocurv.infer.Laplace(model, guide).predict(x) is what it is for"
            )

    # ---- the posterior --------------------------------------------------------------------------

    @property
    def posterior(self) -> StructuredNormal:
        """The Gaussian over all weights: `.loc` [P] and `.precision` follow `.sites`, row-major."""
        return self._ready_blocks().normal()

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n draws of every latent, {site: [n, *shape]}."""
        posterior = self._ready()
        self._warn_of_samples()
        samples = posterior.sample(n)
        if self.fallback_sites:
            fallback = poutine.mask(self.fallback, mask=False)  # no densities are needed
            draws = self._fallback_draws(fallback, {}, n, (), {}).values
            samples.update({name: draws[name] for name in self.fallback_sites})
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
        found = self._ready().quantiles(quantiles)
        if self.fallback_sites:
            listed = torch.as_tensor(quantiles).reshape(-1).tolist()
            found.update(self.fallback.quantiles(listed, *args, **kwargs))
        return found

    @torch.no_grad()
    def get_posterior(self, site: str) -> dist.TorchDistribution:
        """The exact marginals of one site's weights: independent normals [*shape].

        Of a latent that has another support, their image under its transform. Raises ValueError for
        a site that is not among `.sites`.
        """
        return self._ready_blocks().marginal(site)

    def kl(self) -> Tensor:
        """KL(q ‖ prior) over `.sites` in nats; the priors as the model last gave them."""
        posterior = self._ready_blocks()
        if self.is_joint:
            raise RuntimeError("latents of any prior have no KL in closed form: evaluate_loss")
        if not self._priors:
            raise RuntimeError("the guide has not seen the priors: call it once, guide(x, y)")
        return posterior.kl(self._priors)

    def summary(self) -> str:
        """A table of every latent: site, shape, structure, how many numbers.

        Parameters of the model that are no latents follow, as "point" where `optim` trains them and
        "frozen" where nothing does; the last line says how many numbers have a posterior here.
        """
        self._ready()
        model = self._base_model[0] if self._base_model else None  # pickles leave it behind
        return guide_summary(
            self.median(), [family.block for family in self.blocks], self._excluded,
            self._make_fallback.__name__, named_modules(model),
        )

PLATE = "num_particles_vectorized"  # the one that Pyro's ELBOs put around model and guide


def check_particles(sites: Iterable[str], modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError where an ELBO vectorises over weights that torch's own modules consume."""
    if not any(isinstance(frame, IndepMessenger) and frame.name == PLATE for frame in _PYRO_STACK):
        return
    for site in sites:
        owner = modules.get(site.rpartition(".")[0])
        if owner is not None and _is_of_torch(owner):
            raise ValueError(
                f"vectorize_particles=True: {site!r} is a weight of a torch.nn module, which takes "
                "one weight at a time; leave it out, num_particles alone does the same in a loop"
            )


def _is_of_torch(module: nn.Module) -> bool:
    """Whether its forward pass is torch's, of a layer with weights."""
    source = next((kind for kind in type(module).__mro__ if "forward" in vars(kind)), nn.Module)
    return source is not nn.Module and source.__module__.startswith("torch.nn.modules")
