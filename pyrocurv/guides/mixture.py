"""Several trained guides as one posterior: an equal-weight mixture, a component for each basin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import pyro
import torch
from pyro import distributions as dist
from pyro import poutine
from torch import Tensor, nn

from pyrocurv.handlers.modules import named_modules

TRAINED = "a MixtureGuide is for prediction: train its guides, each by itself, and then mix them"
CHOICE = "_component"


class _Choice(dist.Categorical):
    """Which component a sample is of. Whoever asks for its score, wants to train the mixture."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise TypeError(TRAINED)


class MixtureGuide(nn.Module):
    """An equal-weight mixture of trained guides, for prediction.

    Args:
        guides: two or more, of one model or of models that are alike, each trained by itself. What
            they leave out must be the same in all of their models, as the mixture has no part of
            its own in it: parameters that are no latents, statistics of batch-norm layers.

    In `Predictive` every call draws a component and then, from that, a sample at the sites of the
    model. A state is that of the components; a mixture of as many fresh guides is loaded from it
    without data.

    Raises:
        TypeError: what is no guide of `pyrocurv.guides`; an ELBO of the mixture, or `NGVI` on it.
        ValueError: no guide, guides of other sites, models that differ beside their latents.

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
        guides = list(guides)
        for guide in guides:
            if not (isinstance(guide, nn.Module) and hasattr(guide, "sample_posterior")):
                raise TypeError(
                    "guides: some of pyrocurv.guides are needed (KFACGuide, ...), got "
                    f"{type(guide).__name__}"
                )
        if not guides:
            raise ValueError("guides: at least one is needed")
        self.components = nn.ModuleList(guides)
        self._check_sites()
        if differing := _differing([*self._models()]):
            raise ValueError(
                f"the guides' models differ in {_some(differing)}, which no guide has: predict "
                "with each guide and its own model; or make latents of those parameters, with "
                '`bayesianize(net, layers=[...])` and `structure={...: "point"}`'
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __getitem__(self, index: int) -> Any:
        return self.components[index]

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, as the components have them."""
        return self[0].sites

    @property
    def fallback_sites(self) -> tuple[str, ...]:
        """The latents that the components' fallback guides have."""
        return self[0].fallback_sites

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw a component and then all latents from it; the model's arguments."""
        size = len(self.components)
        choice = pyro.sample(
            CHOICE, _Choice(torch.full((size,), 1 / size)), infer={"is_auxiliary": True}
        )
        if choice.dim():
            raise ValueError(
                "a MixtureGuide draws one component in a call: use Predictive without parallel=True"
                ", or sample_posterior(n)"
            )
        return poutine.block(self[int(choice)], hide_fn=_is_inner)(*args, **kwargs)

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n independent draws of every latent, {site: [n, *shape]}."""
        self._check_sites()
        choice = torch.randint(len(self.components), (n,))
        order = choice.argsort(stable=True).argsort()  # of the draws, which come by component
        counts = choice.bincount(minlength=len(self.components)).tolist()
        parts = [
            component.sample_posterior(count)
            for component, count in zip(self, counts, strict=True) if count
        ]
        samples = {}
        for name in parts[0] if parts else ():
            drawn = torch.cat([part[name] for part in parts])
            samples[name] = drawn[order.to(drawn.device)]
        return samples

    def median(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There is none: the middle between basins is in no basin. Ask the components."""
        raise NotImplementedError(
            "a mixture of basins has no median in any of them: ask mixture[i].median()"
        )

    def quantiles(self, quantiles: float | Sequence[float], *args: Any, **kwargs: Any) -> NoReturn:
        """Ask the components, or take them from `sample_posterior`."""
        raise NotImplementedError(
            "ask mixture[i].quantiles(...), or take quantiles of mixture.sample_posterior(n)"
        )

    # ---- saving ---------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """How many components there are."""
        return {"components": len(self.components)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Used by `load_state_dict`; looked at before, in `_load_from_state_dict`."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}_extra_state", {}).get("components")
        if saved is not None and saved != len(self.components):
            raise ValueError(
                f"the state is of a mixture of {saved} guides, this one has {len(self.components)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- what must be alike ---------------------------------------------------------------------

    def _check_sites(self) -> None:
        """Of the components that have seen their model, or a state of it."""
        known = [(dict(c.sites), set(c.fallback_sites)) for c in self if c.sites]
        for other in known[1:]:
            if other != known[0]:
                raise ValueError(f"the guides have other sites: {known[0]} and {other}")

    def _models(self) -> Iterator[nn.Module]:
        for component in self:
            if isinstance(component, MixtureGuide):
                yield from component._models()
            elif component._base_model:  # pickles leave it behind
                yield from [*named_modules(component._base_model[0]).values()][:1]


def _is_inner(msg: Any) -> bool:
    """Whether a message is a component's own affair: its parameters and auxiliary draws."""
    return msg["type"] != "sample" or bool(msg["infer"].get("is_auxiliary"))


def _differing(models: Sequence[nn.Module]) -> list[str]:
    """What the models' states differ in: parameters that are no latents, statistics."""
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


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
