"""A Gaussian over the named weights of a network: the posterior of one task, prior of the next.

Kirkpatrick et al. 2017, arXiv:1612.00796; Nguyen et al. 2018, "Variational continual learning",
arXiv:1710.10628; Ritter, Botev & Barber 2018, arXiv:1805.07810.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from pyrocurv.layers.block import Block
from pyrocurv.structures import BlockDiagonal, Dense, Diagonal, Structure
from pyrocurv.structures.serialization import cast

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class WeightGaussian:
    """N(loc, precision⁻¹) over the tensors of `shapes`.

    Entry k of the packed vectors is entry index[k] of the tensors, which follow each other, each
    flattened row-major.
    """

    shapes: Shapes
    index: Tensor  # [P], int64
    loc: Tensor  # [P], packed
    precision: Structure  # of packed vectors

    @staticmethod
    def of_block(block: Block, loc: Tensor, precision: Structure) -> WeightGaussian:
        """The Gaussian of a block's packed weights."""
        flat = torch.arange(block.size, device=loc.device)
        pieces = flat.split([math.prod(shape) for shape in block.tensors.values()])
        named = zip(block.tensors.items(), pieces, strict=True)
        index = block.pack({name: piece.reshape(tuple(shape)) for (name, shape), piece in named})
        return WeightGaussian(block.tensors, index, *_copied(loc, precision))

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """{name: [*shape]} -> [P]; tensors that are left out are zeros."""
        zeros = self.loc.new_zeros(())
        shapes = self.shapes.items()
        flat = [values.get(name, zeros).expand(shape).flatten() for name, shape in shapes]
        return torch.cat(flat)[self.index]

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """[..., P] -> {name: [..., *shape]}."""
        flat = packed[..., self.index.argsort()]
        pieces = flat.split([math.prod(shape) for shape in self.shapes.values()], -1)
        named = zip(self.shapes.items(), pieces, strict=True)
        return {name: piece.reshape((*packed.shape[:-1], *shape)) for (name, shape), piece in named}

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """The means {name: [*shape]}."""
        return self.unpack(self.loc)

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """The marginal standard deviations {name: [*shape]}."""
        return self.unpack(self.precision.inverse_diag().sqrt())

    @property
    def is_independent(self) -> bool:
        """Whether no weights are correlated."""
        return isinstance(self.precision, Diagonal)

    def to(self, like: Tensor) -> WeightGaussian:
        """In the dtype and on the device of `like`."""
        if self.loc.dtype == like.dtype and self.loc.device == like.device:
            return self
        return cast(self, like)

    def normal(self, name: str, like: Tensor) -> Normal:
        """The prior of one weight: its marginal, with a `Share` if it is correlated with others."""
        normal: Any = Normal(self.means[name].to(like), self.scales[name].to(like))
        if not self.is_independent:
            normal.share = Share(self, name)
        return normal

    def renamed(self, names: Mapping[str, str]) -> WeightGaussian:
        """With other names {old: new}; tensors that are not in it are integrated out."""
        kept = [name for name in self.shapes if name in names]
        shapes = {names[name]: self.shapes[name] for name in kept}
        if len(kept) == len(self.shapes):
            return WeightGaussian(shapes, self.index, self.loc, self.precision)
        loc = torch.cat([self.means[name].flatten() for name in kept])
        index = torch.arange(len(loc), device=loc.device)
        return WeightGaussian(shapes, index, loc, self._marginal(kept))

    def _marginal(self, kept: Sequence[str]) -> Structure:
        """The precision of some tensors, flattened, with the others integrated out."""
        order = self.index.argsort()
        sizes = torch.tensor([math.prod(shape) for shape in self.shapes.values()])
        marks = torch.tensor([name in kept for name in self.shapes])
        inside = marks.repeat_interleave(sizes).to(order.device)
        a, b = order[inside], order[~inside]  # packed positions
        if isinstance(self.precision, Diagonal):
            return Diagonal(self.precision.entries[a])
        matrix = self.precision.dense()
        schur = torch.linalg.solve(matrix[b][:, b], matrix[b][:, a])
        return Dense(matrix[a][:, a] - matrix[a][:, b] @ schur)


class Share(NamedTuple):
    """One weight of a Gaussian over several: the attribute `share` of its normal prior."""

    gaussian: WeightGaussian
    name: str  # in the Gaussian; the site's name may have a prefix


def split_gaussian(shapes: Shapes, loc: Tensor, precision: Structure) -> list[WeightGaussian]:
    """The independent parts of a Gaussian over tensors that are flattened one after the other.

    A part is a block of a block-diagonal precision, which consists of whole tensors in guides.
    """
    loc, precision = _copied(loc, precision)
    ends = torch.tensor([math.prod(shape) for shape in shapes.values()]).cumsum(0).to(loc.device)
    parts = []
    for rows, structure in _blocks(precision, loc.device):
        owner = torch.bucketize(rows, ends, right=True)
        own = {name: shape for number, (name, shape) in enumerate(shapes.items())
               if bool((owner == number).any())}
        if sum(map(math.prod, own.values())) != len(rows):  # a part of a tensor
            return [WeightGaussian(shapes, torch.arange(len(loc)).to(rows), loc, precision)]
        index = torch.empty_like(rows)
        index[rows.argsort()] = torch.arange(len(rows)).to(rows)
        parts.append(WeightGaussian(own, index, loc[rows], structure))
    return parts


def _copied(loc: Tensor, precision: Structure) -> tuple[Tensor, Structure]:
    """Copies that nothing trains."""
    return loc.detach().clone(), precision.map(lambda tensor: tensor.detach().clone())


def _blocks(precision: Structure, device: torch.device) -> Iterator[tuple[Tensor, Structure]]:
    """The rows and the structure of each diagonal block."""
    if not isinstance(precision, BlockDiagonal):
        yield torch.arange(precision.size, device=device), precision
        return
    start = 0
    for number, structure in enumerate(precision.blocks):
        stop = start + structure.size
        is_permuted = len(precision.index) > 0
        rows = precision.index[number] if is_permuted else torch.arange(start, stop)
        yield rows.to(device), structure
        start = stop


def match_names(parts: Iterable[WeightGaussian], own: Shapes) -> dict[str, str]:
    """{name in the parts: name in a network}, where all of the former may have one prefix.

    A guide's site "net.0.weight" is the weight "0.weight" of a network in `Classifier(net, ...)`.

    Raises ValueError if no name is the same, two prefixes fit, or a tensor has another shape.
    """
    known = {name: shape for part in parts for name, shape in part.shapes.items()}
    prefixes: dict[str, list[str]] = defaultdict(list)  # {prefix: names in the parts}
    for name in known:
        pieces = name.split(".")
        for start in range(len(pieces)):
            if ".".join(pieces[start:]) in own:
                prefixes[".".join((*pieces[:start], ""))].append(name)
    most = max(map(len, prefixes.values()), default=0)
    fitting = [prefix for prefix, names in prefixes.items() if len(names) == most]
    if len(fitting) != 1:
        what = "several fit" if fitting else "none of them is the same"
        raise ValueError(
            f"prior: it is of another network, over {_described(known)}, and this one has "
            f"{_described(own)}: {what}"
        )
    names = {name: name.removeprefix(fitting[0]) for name in prefixes[fitting[0]]}
    for name, weight in names.items():
        if tuple(known[name]) != tuple(own[weight]):
            raise ValueError(
                f"prior: it is of another network, in which {name!r} has shape "
                f"{tuple(known[name])}; {weight!r} has shape {tuple(own[weight])} here"
            )
    return names


def _described(shapes: Shapes) -> str:
    names = [f"{name} {tuple(shape)}" for name, shape in shapes.items()]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def read_posterior(prior: Any) -> list[WeightGaussian] | None:
    """The independent parts of a trained guide or optimizer, or of its `.posterior`.

    None for anything else. Raises TypeError for a guide that is not one Gaussian of this package.
    """
    if hasattr(prior, "weight_gaussians"):
        return prior.weight_gaussians()
    if isinstance(prior, nn.Module) or hasattr(prior, "sample_posterior"):
        raise TypeError(
            "prior: a guide of pyrocurv.guides with one Gaussian is needed (KFACGuide, ...), got "
            f"{type(prior).__name__}; of a mixture, choose a component"
        )
    if not isinstance(getattr(prior, "precision", None), Structure):
        return None
    if not getattr(prior, "sites", None):
        raise TypeError(f"prior: a {type(prior).__name__} without the names of its sites")
    return split_gaussian(prior.sites, prior.loc, prior.precision)
