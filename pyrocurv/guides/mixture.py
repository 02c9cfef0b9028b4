"""Several trained guides as one posterior: an equal-weight mixture, a component for each mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyrocurv.guides.param_store import all_or_nothing
from pyrocurv.handlers.modules import named_modules
from pyrocurv.runtime.validation import as_number, check_integer, check_iterable

PREDICTION_ONLY = (
    "a MixtureGuide is for prediction: train its guides separately, and then mix them"
)
COMPONENT_SITE = "_component"


class _Component(dist.Categorical):
    """The component that a sample is from. Only the training of the mixture would score it."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise TypeError(PREDICTION_ONLY)


class MixtureGuide(nn.Module):
    """An equal-weight mixture of trained guides, for prediction.

    Args:
        guides: two or more guides, trained separately, of one model or of models with the same
            latents. Everything else in the models must be equal, as the mixture predicts with one
            of them: parameters that are not latents, statistics of batch-norm layers.

    Each call draws a component, and then a sample from that. The state dict holds the states of the
    components; a mixture of as many new guides loads it without data.

    Raises:
        TypeError: a guide that is not one of `pyrocurv.guides`; an ELBO of the mixture, or `NGVI`
            on it.
        ValueError: no guide, guides with different sites, models that differ in more than their
            latents.

    Example:
        >>> import torch, pyrocurv
        >>> from pyrocurv.guides import KFACGuide, MixtureGuide
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> model = pyrocurv.nn.Classifier(net, num_data=10)
        >>> guides = [KFACGuide(model), KFACGuide(model)]
        >>> for guide in guides:  # in place of training
        ...     weights = guide(torch.randn(10, 4), torch.randint(3, (10,)))
        >>> MixtureGuide(guides).sample_posterior(5)["net.weight"].shape
        torch.Size([5, 3, 4])
    """

    def __init__(self, guides: Iterable[Any]) -> None:
        super().__init__()
        check_iterable("guides", guides, "a list of guides")
        guides = list(guides)
        for guide in guides:
            if not (isinstance(guide, nn.Module) and hasattr(guide, "sample_posterior")):
                raise TypeError(
                    "guides: guides of pyrocurv.guides are needed (KFACGuide, ...), got "
                    f"{type(guide).__name__}"
                )
        if not guides:
            raise ValueError("guides: at least one is needed")
        self.components = nn.ModuleList(guides)
        self._check_sites()
        if differing := _differing([*self._models()]):
            raise ValueError(
                f"the guides' models differ in {_first_names(differing)}, which are not latents: "
                "predict with each guide and its own model; or make latents of those parameters, "
                'with `bayesianize(net, layers=[...])` and `structure={...: "point"}`'
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __getitem__(self, index: int) -> Any:
        return self.components[index]

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights in each component."""
        return self[0].sites

    @property
    def fallback_sites(self) -> tuple[str, ...]:
        """The latents of the components' fallback guides."""
        return self[0].fallback_sites

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw a component and sample all latents from it; takes the model's arguments."""
        size = len(self.components)
        component = pyro.sample(
            COMPONENT_SITE, _Component(torch.full((size,), 1 / size)), infer={"is_auxiliary": True}
        )
        if component.dim():
            raise ValueError(
                "a MixtureGuide draws one component in each call: use Predictive without "
                "parallel=True, or sample_posterior(n)"
            )
        return poutine.block(self[int(component)], hide_fn=_is_internal)(*args, **kwargs)

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n independent draws of every latent, {site: [n, *shape]}."""
        check_integer("n", as_number(n), 0)
        self._check_sites()
        index = torch.randint(len(self.components), (n,))  # of the component of each draw
        counts = index.bincount(minlength=len(self.components)).tolist()
        draws = [
            component.sample_posterior(count)
            for component, count in zip(self, counts, strict=True) if count
        ]
        order = index.argsort(stable=True).argsort()  # from sorted by component to the order drawn
        samples = {}
        for name in draws[0] if draws else ():
            by_component = torch.cat([draw[name] for draw in draws])
            samples[name] = by_component[order.to(by_component.device)]
        return samples

    def median(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not defined: a median between modes would be in none of them."""
        raise NotImplementedError(
            "the median of a mixture is in none of its modes: use mixture[i].median()"
        )

    def quantiles(self, quantiles: float | Sequence[float], *args: Any, **kwargs: Any) -> NoReturn:
        """Not defined; a component has them, and so have samples from `sample_posterior`."""
        raise NotImplementedError(
            "use mixture[i].quantiles(...), or quantiles of mixture.sample_posterior(n)"
        )

    # ---- saving ---------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The number of components."""
        return {"components": len(self.components)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Called by `load_state_dict`; `_load_from_state_dict` has checked the state by then."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state", {})
        if state != {} and not (isinstance(state, Mapping) and "components" in state):
            raise ValueError(
                f"the state is not of a {type(self).__name__}: it has {', '.join(map(str, state))}"
            )
        saved = state.get("components", len(self.components))
        if saved != len(self.components):
            raise ValueError(
                f"the state is of a mixture of {saved} guides, this one has {len(self.components)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `torch.nn.Module.load_state_dict`, but an error leaves everything unchanged.

        Raises ValueError for the state of another class, of another number of components, or that
        a component does not fit.
        """
        with all_or_nothing(self, state_dict, strict):
            return super().load_state_dict(state_dict, strict, assign)

    # ---- checks ---------------------------------------------------------------------------------

    def _check_sites(self) -> None:
        """Raise ValueError if components that are initialized have different sites."""
        sites = [(dict(c.sites), set(c.fallback_sites)) for c in self if c.sites]
        for other in sites[1:]:
            if other != sites[0]:
                raise ValueError(f"the guides have different sites: {sites[0]} and {other}")

    def _models(self) -> Iterator[nn.Module]:
        for component in self:
            if isinstance(component, MixtureGuide):
                yield from component._models()
            elif component._base_model:  # an unpickled guide has none
                yield from [*named_modules(component._base_model[0]).values()][:1]


def _is_internal(msg: Any) -> bool:
    """Whether a message concerns a component alone: its parameters and auxiliary samples."""
    return msg["type"] != "sample" or bool(msg["infer"].get("is_auxiliary"))


def _differing(models: Sequence[nn.Module]) -> list[str]:
    """The entries of the models' state dicts that differ: parameters, statistics."""
    if len({id(model) for model in models}) < 2:
        return []
    first, *others = [model.state_dict() for model in models]
    return [
        name for name in dict.fromkeys(name for state in (first, *others) for name in state)
        if not all(_equal(first.get(name), other.get(name)) for other in others)
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool((a == b.to(a.device)).all())
    return type(a) is type(b)


def _first_names(names: Sequence[str]) -> str:
    others = len(names) - 3
    return ", ".join(names[:3]) + (f" and {others} more" if others > 0 else "")
