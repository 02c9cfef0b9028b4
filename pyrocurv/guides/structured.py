"""What all guides here share: a Gaussian for each block of weights, and a guide for the rest.

At its first call a guide runs the model once, sees which latents a supported op consumes as
weights, and lays out a Gaussian for each block of them. What is left goes to a `fallback` guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_median,
    init_to_sample,
)
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrocurv.blocks import Block, positions
from pyrocurv.choice import Choice
from pyrocurv.distributions import StructuredNormal
from pyrocurv.families import FAMILIES
from pyrocurv.guides import identity
from pyrocurv.guides.leftout import Start, rest_of
from pyrocurv.guides.particles import check_particles
from pyrocurv.guides.plan import Plan
from pyrocurv.guides.table import table
from pyrocurv.guides.unconstrained import Latent, has_network, is_local
from pyrocurv.notice import notice
from pyrocurv.priors import Prior, read_prior
from pyrocurv.prototype import Prototype, Site, frozen_buffers, inspect, named_modules
from pyrocurv.repeated import Repeated
from pyrocurv.structures import BlockDiagonal


def init_to_network(site: Site) -> Tensor:
    """Start at the weight that `bayesianize` replaced (its prior's `initial`), or at a sample."""
    initial = getattr(site["fn"], "initial", None)
    return init_to_sample(site) if initial is None else initial.detach()


class StructuredGuide(AutoGuide):
    """A Gaussian posterior over network weights, block by block in one structure.

    Args:
        model: a Pyro model with an observed site; the weights are latents with normal priors.
        init_loc_fn: where the mean starts, site -> value; by default the network's own weights
            (see `pyrocurv.nn.bayesianize`), or a sample from the prior, and the fallback guide's
            own start for its latents; in models without a network the prior's median.
        init_scale: standard deviation of each weight before any training. `NGVI` takes its first
            step at the mean and sets the scale from the curvature there.
        structure: for some layers another one than this guide's, {module type, or name with * and
            ?: structure}, names before types; or a rule (name, module) -> structure or None. A
            structure is a name, a `KFAC` or an `EKFAC` of `pyrocurv.curvature`; "point" leaves a
            layer out (a point estimate, trained by `optim`), "frozen" keeps it at its start.
        fallback: the guide for the latents that are no weights, model -> AutoGuide.
        create_plates: as Pyro's guides have it.

    Raises at the first call, before anything is set up:
        ValueError: the model has no observed site (were the data left out of the call?), a discrete
            latent, or no latent at all.

    Weights that no supported op consumes (of recurrent layers, say) have independent Gaussians,
    which `NGVI` trains from gradients alone; weights whose prior is no normal go to the fallback.
    One warning names them all.
    """

    structure: ClassVar[str]
    may_be_whole: ClassVar[bool] = False  # over all latents of a model without a network

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Callable[[Site], Tensor] = init_to_network,
        init_scale: float = 0.01,
        structure: Choice = None,
        fallback: Callable[[Any], AutoGuide] = AutoNormal,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale!r}: a positive number is needed")
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        identity.take_a_name(self)
        self.register_load_state_dict_post_hook(identity.forget)
        self._base_model = (model,)
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale
        self._choice = structure
        self._make_fallback = fallback
        self._fallback_state: dict[str, Any] = {}
        self._loaded_rest: tuple[str, ...] = ()  # fallback sites of a state that was loaded
        self._fallback_draws = Repeated()
        self.is_whole = False  # whether one block has all latents, as real vectors
        self._latents: dict[str, Latent] = {}
        self._priors: list[Prior] = []
        self.sites: dict[str, tuple[int, ...]] = {}
        self.fallback_sites: tuple[str, ...] = ()
        self._left_out: dict[str, str] = {}
        self.at_mode = False  # the Gaussian is a Laplace approximation, not fitted by its samples
        self._said_so = False
        self.blocks = PyroModule[nn.ModuleList]([])

    # ---- the first call -------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if not self._base_model:
            raise RuntimeError(
                "this guide was pickled before its first call, and pickles leave the model behind: "
                f"make a new one, {type(self).__name__}(model)"
            )
        partial = self.master is not None
        known = {*self.sites, *self._loaded_rest}
        found = inspect(self.model, self._prototype_hide_fn, partial, args, kwargs, known)
        plan = Plan.of(
            found, self._choice, self.structure, named_modules(self._base_model[0])
        )
        if self.is_whole or self._should_be_whole(plan, found):
            plan = Plan.whole(found, self.structure)
        names = {name for block in plan.blocks for name in block.tensors}
        weights = {name: site for name, site in found.latents.items() if name in names}
        if self.sites:
            self._check_layout(plan.blocks)
        else:
            values = {name: site["value"].detach() for name, site in weights.items()}
            untold = self._init_loc_fn is init_to_network and not has_network(self._base_model[0])
            if plan.latents and untold:
                values = {name: init_to_median(site).detach() for name, site in weights.items()}
            values.update({n: one.transform.inv(values[n]) for n, one in plan.latents.items()})
            self._build(plan.blocks, values)
        self._event_dims = {name: site["fn"].event_dim for name, site in weights.items()}
        self._latents, self.is_whole = dict(plan.latents), bool(plan.latents)
        if not self.is_whole:
            priors = {name: site["fn"] for name, site in weights.items()}
            self.observe_priors([read_prior(family.block, priors) for family in self.blocks])
        self._prototype_frames = {
            frame.name: frame
            for site in found.latents.values() for frame in site["cond_indep_stack"]
        }
        if complaint := plan.complaint(found):
            notice(f"{type(self).__name__}: {complaint}")
        self._set_fallback(found, plan, args, kwargs)
        self.prototype_trace = found.trace
        if self.master is not None:
            self.master()._check_prototype(found.trace)

    def _should_be_whole(self, plan: Plan, found: Prototype) -> bool:
        """Whether a model without a network has latents that no op consumes as weights.

        Local latents are the fallback's, which amortises or refuses them.
        """
        may = self.may_be_whole and self._choice is None and not self.sites
        whole = may and plan.is_short and not has_network(self._base_model[0])
        return whole and not any(map(is_local, found.latents.values()))

    def _check_layout(self, blocks: Sequence[Block]) -> None:
        def layout(blocks: Sequence[Block]) -> dict[str, tuple[Any, ...]]:
            return {n: (s, block.structure) for block in blocks for n, s in block.tensors.items()}

        have, want = layout([family.block for family in self.blocks]), layout(blocks)
        if have != want:
            raise ValueError(f"the loaded guide has weights {have}, the model {want}")

    def _build(self, blocks: Sequence[Block], values: Mapping[str, Tensor]) -> None:
        for block in blocks:
            self.blocks.append(FAMILIES[block.kind](block, block.pack(values), self._init_scale))
        self.sites = {name: tuple(value.shape) for name, value in values.items()}

    def _set_fallback(self, found: Prototype, plan: Plan, args: Any, kwargs: Any) -> None:
        self.fallback_sites, self._left_out = (*plan.left_out, *plan.left), plan.left_out
        if not self.fallback_sites:
            return
        model = self._base_model[0]
        if self._init_loc_fn is not init_to_network:
            model = Start(self._init_loc_fn)(model)
        values = {name: found.latents[name]["value"] for name in plan.left_out}
        self.fallback = rest_of(model, values, plan.left_out, plan.left, self._make_fallback)
        with torch.no_grad(), frozen_buffers(model), poutine.block():
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
            name: self._latents[name].sample(name, values[name], self.plates) if self.is_whole
            else pyro.sample(name, dist.Delta(values[name], event_dim=self._event_dims[name]))
            for name in self.sites
        }
        if self.fallback_sites:
            result.update(self.fallback(*args, **kwargs))
        return result

    def image(self, real: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | float]:
        """The latents at values of `.sites`, and the log volume that their transforms have."""
        values = {name: self._image(name, value) for name, value in real.items()}
        if not self.is_whole:
            return values, 0.0
        volumes = [
            self._latents[name].log_volume(real[name], value).sum()
            for name, value in values.items()
        ]
        return values, torch.stack(volumes).sum()

    @property
    def is_one_block(self) -> bool:
        """Whether all latents have one Gaussian, full or diagonal."""
        return len(self.blocks) == 1 and not self.fallback_sites

    def may_be_whole_of(self, model: Callable[..., Any]) -> bool:
        """Whether it is for all latents of a model: "full" always, "diag" without layers."""
        may = self.may_be_whole and self._choice is None
        return may and (self.structure == "full" or not has_network(model))

    @property
    def has_scales(self) -> bool:
        """Whether a latent is not any real number, as a scale is not."""
        return any(not latent.is_real for latent in self._latents.values())

    @property
    def is_untouched(self) -> bool:
        """Whether every standard deviation is still what it was set to at first."""
        wanted = self._init_scale**-2
        diagonals = [family.precision().diag() for family in self.blocks]
        return all(bool(torch.allclose(d, torch.full_like(d, wanted))) for d in diagonals)

    def observe_priors(self, priors: Sequence[Prior]) -> None:
        """Remember the priors of the blocks' weights, for `kl`."""
        self._priors = list(priors)

    def _warn_of_samples(self) -> None:
        """Once, where the precision is the curvature at a mode."""
        if self.at_mode and not self._said_so:
            self._said_so = True
            notice(
                "sampling a Laplace approximation: its width is that of the network linearised at "
                "the mode, and predictions of the network itself at samples of it are wrong by "
                "far; pyrocurv.infer.Laplace(model, guide).predict(x) is what it is for"
            )

    # ---- the posterior --------------------------------------------------------------------------

    def _ready(self) -> None:
        if not self.sites and not self.fallback_sites:
            raise RuntimeError("the guide has not seen its model: call it once, guide(x, y)")
        if self.is_whole and not self._latents:
            raise RuntimeError(
                "the loaded state has latents of any support, whose transforms are met at the "
                "first call: call it once, guide(x, y)"
            )
        if self._fallback_state:
            raise RuntimeError(
                "the loaded state has latents of the fallback guide, which are met at the first "
                "call: call it once, guide(x, y)"
            )

    def _ready_blocks(self) -> None:
        self._ready()
        if not self.sites:
            raise RuntimeError(self.emptiness)

    @property
    def emptiness(self) -> str:
        """Why there is no Gaussian, where there is none."""
        left = [name for name in self.fallback_sites if name not in self._left_out]
        reasons = {
            'structure= leaves out, as "point" or "frozen"': [*self._left_out],
            "the fallback guide has, as no supported op consumes them as weights": left,
        }
        return "no latent has a Gaussian here: " + "; ".join(
            f"{reason} {', '.join(names)}" for reason, names in reasons.items() if names
        )

    @property
    def posterior(self) -> StructuredNormal:
        """The Gaussian over all weights: `.loc` [P] and `.precision` follow `.sites`, row-major."""
        self._ready_blocks()
        blocks = [family.block for family in self.blocks]
        device = self.blocks[0].loc.device
        index = tuple(rows.to(device) for rows in positions(blocks, self.sites))
        precision = BlockDiagonal(tuple(family.precision() for family in self.blocks), index)
        return StructuredNormal(precision.join([f.loc for f in self.blocks]), precision)

    def _unpack(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for family, part in zip(self.blocks, packed, strict=True):
            values.update(family.block.unpack(part))
        return {name: self._image(name, values[name]) for name in self.sites}

    def _image(self, name: str, real: Tensor) -> Tensor:
        """Of a real tensor, where latents are seen as such."""
        return self._latents[name].transform(real) if self.is_whole else real

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n draws of every latent, {site: [n, *shape]}."""
        self._ready()
        self._warn_of_samples()
        samples = self._unpack([f.distribution().sample((n,)) for f in self.blocks])
        if self.fallback_sites:
            fallback = poutine.mask(self.fallback, mask=False)  # no densities are needed
            draws = self._fallback_draws(fallback, {}, n, (), {}).values
            samples.update({name: draws[name] for name in self.fallback_sites})
        return samples

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior median of every latent, {site: [*shape]}."""
        self._ready()
        medians = self._unpack([family.loc.clone() for family in self.blocks])
        if self.fallback_sites:
            medians.update(self.fallback.median(*args, **kwargs))
        return medians

    @torch.no_grad()
    def quantiles(
        self, quantiles: float | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """The marginal quantiles of every latent, {site: [len(quantiles), *shape]}."""
        self._ready()
        result = {}
        for name in self.sites:
            marginal = self._marginal(name)
            levels = torch.as_tensor(quantiles).to(marginal.loc)
            real = marginal.icdf(levels.reshape(-1, *[1] * marginal.loc.dim()))
            result[name] = self._image(name, real)
        if self.fallback_sites:
            listed = torch.as_tensor(quantiles).reshape(-1).tolist()
            result.update(self.fallback.quantiles(listed, *args, **kwargs))
        return result

    @torch.no_grad()
    def get_posterior(self, site: str) -> dist.TorchDistribution:
        """The exact marginals of one site's weights: independent normals [*shape].

        Of a latent that has another support, their image under its transform. Raises ValueError for
        a site that is not among `.sites`.
        """
        marginal = self._marginal(site)
        if self.is_whole:
            return dist.TransformedDistribution(marginal, [self._latents[site].transform])
        return marginal.to_event(marginal.loc.dim())

    def _marginal(self, site: str) -> dist.Normal:
        self._ready_blocks()
        for family in self.blocks:
            if site in family.block.tensors:
                deviations = family.block.unpack(family.precision().inverse_diag().sqrt())[site]
                loc = family.block.unpack(family.loc)[site]
                return dist.Normal(loc, deviations)
        raise ValueError(f"no site {site!r} here: {', '.join(self.sites)} exist")

    def kl(self) -> Tensor:
        """KL(q ‖ prior) over `.sites` in nats; the priors as the model last gave them."""
        self._ready_blocks()
        if self.is_whole:
            raise RuntimeError("latents of any prior have no KL in closed form: evaluate_loss")
        if not self._priors:
            raise RuntimeError("the guide has not seen the priors: call it once, guide(x, y)")
        parts = zip(self.blocks, self._priors, strict=True)
        return torch.stack([
            StructuredNormal(family.loc, family.precision()).kl(prior.loc, prior.precision)
            for family, prior in parts
        ]).sum()

    def summary(self) -> str:
        """A table of every latent: site, shape, structure, how many numbers.

        Parameters of the model that are no latents follow, as "point" where `optim` trains them and
        "frozen" where nothing does; the last line says how many numbers have a posterior here.
        """
        self._ready()
        model = self._base_model[0] if self._base_model else None  # pickles leave it behind
        return table(
            self.median(), [family.block for family in self.blocks], self._left_out,
            self._make_fallback.__name__, named_modules(model),
        )

    # ---- saving ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        modules = identity.without_models(self._modules)
        left = dict.fromkeys(("master", "_model", *identity.LEFT_BEHIND))
        return {**self.__dict__, **left, "_modules": modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if identity.is_by_itself(self):
            identity.take_a_name(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredGuide:
        return identity.copied(self, memo)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with identity.followed_by_the_store(self):
            return super()._apply(*args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        """The layout, in plain values, so that a fresh guide can be loaded without data."""
        sites = {name: list(shape) for name, shape in self.sites.items()}
        blocks = [family.block.state() for family in self.blocks]
        rest = list(self.fallback_sites or self._loaded_rest)
        return {
            "structure": self.structure, "blocks": blocks, "sites": sites, "fallback": rest,
            "is_whole": self.is_whole, "at_mode": self.at_mode,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Used by `load_state_dict`; the work is done before, in `_load_from_state_dict`."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._fallback_state.items():
            destination[f"{prefix}fallback.{name}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        layout = state_dict.get(prefix + "_extra_state")
        if layout and layout["structure"] != self.structure:
            raise ValueError(
                f"the state is of a guide with structure {layout['structure']!r}, this one is "
                f"{self.structure!r}"
            )
        self.at_mode = bool(layout and layout.get("at_mode"))
        if layout and layout["blocks"] and not self.sites:
            plan = [Block.from_state(block) for block in layout["blocks"]]
            like = next(v for k, v in state_dict.items() if k.startswith(f"{prefix}blocks.0.loc"))
            self._build(plan, {n: like.new_zeros(s) for n, s in layout["sites"].items()})
            self.is_whole = layout["is_whole"]
        if "fallback" not in self._modules:  # its latents are met at the first call: keep for then
            start = prefix + "fallback."
            self._loaded_rest = tuple((layout or {}).get("fallback", ()))
            for key in [key for key in state_dict if key.startswith(start)]:
                self._fallback_state[key.removeprefix(start)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
