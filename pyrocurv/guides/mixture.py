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
from pyrocurv.handlers.given_tensors import model_tensors, use_given_tensors
from pyrocurv.runtime.representation import described
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
            latents. The models may also differ in parameters that are not latents, and in buffers,
            as the statistics of batch-norm layers: the mixture has a copy for each component of
            what differs when it is made, in `component_tensors`.

    Each call draws a component, and then a sample from that, with what is the component's own in
    its model. `Predictive` takes the model of any of the guides (that of `pyrocurv.infer` any equal
    one too), and runs it with the tensors of the component that a sample is from. The state dict
    holds the states of the components and these tensors; a mixture of as many new guides, also of a
    single model, loads it without data.

    Raises:
        TypeError: a guide that is not one of `pyrocurv.guides`; an ELBO of the mixture, or `NGVI`
            on it.
        ValueError: no guide, guides with different sites, models that are not of one architecture.

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
        self.component_tensors = nn.ModuleList()
        self._set_tensors(_differing([*self._model_tensors()]))

    def __repr__(self) -> str:
        return described(self, *map(repr, self))

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
        component = pyro.sample(
            COMPONENT_SITE, _Component(self._weights), infer={"is_auxiliary": True}
        )
        if component.dim():
            raise ValueError(
                "a MixtureGuide draws one component in each call: use Predictive without "
                "parallel=True, or sample_posterior(n)"
            )
        guide = self.leaves[int(component)]
        values = poutine.block(guide, hide_fn=_is_internal)(*args, **kwargs)
        for name, value in self.tensors_of(guide).items():
            fn = dist.Delta(value, event_dim=value.dim())
            values[name] = pyro.sample(name, fn, infer={"is_auxiliary": True})
        return values

    @torch.no_grad()
    def sample_posterior(self, n: int) -> dict[str, Tensor]:
        """n independent draws of every latent, {site: [n, *shape]}.

        With those of `component_tensors`, which belong to the samples as the latents do.
        """
        check_integer("n", as_number(n), 0)
        self._check_sites()
        index = self._weights.multinomial(max(n, 1), replacement=True)[:n]
        guides = self.leaves
        counts = index.bincount(minlength=len(guides)).tolist()
        draws = [
            self._draws(guide, count) for guide, count in zip(guides, counts, strict=True) if count
        ]
        order = index.argsort(stable=True).argsort()  # from sorted by component to the order drawn
        samples = {}
        for name in draws[0] if draws else ():
            by_component = torch.cat([draw[name] for draw in draws])
            samples[name] = by_component[order.to(by_component.device)]
        return samples

    def _draws(self, guide: Any, n: int) -> dict[str, Tensor]:
        """n draws from one of the guides, with its tensors."""
        own = {name: x.expand(n, *x.shape) for name, x in self.tensors_of(guide).items()}
        return {**guide.sample_posterior(n), **own}

    def tensors_of(self, guide: Any) -> dict[str, Tensor]:
        """{name in the model: tensor} of one of the guides: what differs between their models."""
        number = next(k for k, other in enumerate(self.leaves) if other is guide)
        if not self.component_tensors:
            return {}
        return dict(self.component_tensors[number].named_buffers())

    def prepare(self, model: Any) -> None:
        """Have a model use the tensors of the component that a sample is from."""
        use_given_tensors(model, self.tensors_of(self.leaves[0]))

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
        start = f"{prefix}component_tensors."
        loaded: list[dict[str, Tensor]] = [{} for _ in self.leaves]
        for key in [key for key in state_dict if key.startswith(start)]:
            number, _, name = key.removeprefix(start).partition(".")
            loaded[int(number)][name] = state_dict[key]
        self._set_tensors(loaded)
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

    def _leaves(self) -> Iterator[tuple[Any, float]]:
        """The guides that are no mixtures, and their weights."""
        for component in self:
            if isinstance(component, MixtureGuide):
                for guide, weight in component._leaves():
                    yield guide, weight / len(self)
            else:
                yield component, 1 / len(self)

    @property
    def leaves(self) -> list[Any]:
        """The guides in it, those of mixtures in it too."""
        return [guide for guide, _ in self._leaves()]

    @property
    def _weights(self) -> Tensor:
        return torch.tensor([weight for _, weight in self._leaves()])

    def _model_tensors(self) -> Iterator[dict[str, Tensor] | None]:
        """The tensors of each guide's model, with what a mixture in this one has in their place.

        None for a guide without a model, as an unpickled one.
        """
        for component in self:
            if isinstance(component, MixtureGuide):
                for guide, own in zip(component.leaves, component._model_tensors(), strict=True):
                    yield None if own is None else {**own, **component.tensors_of(guide)}
            else:
                model = component._base_model
                yield model_tensors(model[0]) if model else None

    def _set_tensors(self, tensors: Sequence[Mapping[str, Tensor]]) -> None:
        """Copy the tensors of each component, and have the models use them."""
        names = tensors[0].keys()
        for other in tensors:
            if other.keys() != names:
                different = [*names ^ other.keys()]
                raise ValueError(f"the components have different tensors: {different}")
        models = [guide._base_model[0] for guide in self.leaves if guide._base_model]
        for own in map(model_tensors, models):
            for name in names:
                found = tuple(own[name].shape) if name in own else None
                if found != (shape := tuple(tensors[0][name].shape)):
                    raise ValueError(
                        f"the components have {name} of shape {shape}, the model has "
                        f"{'none' if found is None else found}"
                    )
        self.component_tensors = nn.ModuleList(map(_tree, tensors if names else ()))
        for model in models:
            self.prepare(model)


def _is_internal(msg: Any) -> bool:
    """Whether a message concerns a component alone: its parameters and auxiliary samples."""
    return msg["type"] != "sample" or bool(msg["infer"].get("is_auxiliary"))


def _tree(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module of modules whose buffers have these dotted names."""
    root = nn.Module()
    for path, value in tensors.items():
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module._buffers[name] = value.detach().clone()
    return root


def _differing(
    tensors: Sequence[Mapping[str, Tensor] | None]
) -> list[dict[str, Tensor]]:
    """What differs between the models of the components, for each of them.

    Raises ValueError for models of different architectures.
    """
    known = [own for own in tensors if own is not None]
    if len(known) < len(tensors):
        return [{} for _ in tensors]  # of some it is not known
    first, *others = known
    if unknown := [*dict.fromkeys(name for own in others for name in own.keys() ^ first.keys())]:
        raise ValueError(
            f"the guides' models have different parameters and buffers: {_first_names(unknown)}"
        )
    names = [name for name, x in first.items() if not all(_equal(x, own[name]) for own in others)]
    reshaped = [name for name in names if len({own[name].shape for own in known}) > 1]
    if reshaped:
        raise ValueError(f"the guides' models have {_first_names(reshaped)} of different shapes")
    return [{name: own[name] for name in names} for own in known]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or a.shape == b.shape and bool((a == b.to(a.device)).all())


def _first_names(names: Sequence[str]) -> str:
    others = len(names) - 3
    return ", ".join(names[:3]) + (f" and {others} more" if others > 0 else "")
