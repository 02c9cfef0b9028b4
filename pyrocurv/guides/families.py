"""Gaussians over one block of weights, with their parameters in Pyro.

Locations and scales are `PyroParam`s, so that plain `SVI` can train them; the bases of a Kronecker
family are buffers. Natural gradients write them all in place through `write`, so that what Pyro's
parameter store has of them stays one posterior.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.layers import structure_spec
from pyrocurv.layers.block import Block
from pyrocurv.runtime.undo import Undo
from pyrocurv.structures import Dense, Diagonal, KroneckerEigen, Rescaled, Structure
from pyrocurv.structures.eigenspaces import outer
from pyrocurv.structures.linalg import at_least_single, scale_tril

# of each family that has been trained, see `Family.mean_and_views`; in no copy of it
_means: weakref.WeakKeyDictionary[Family, tuple[Tensor, dict[str, Tensor] | None]] = (
    weakref.WeakKeyDictionary()
)


class Family(PyroModule):
    """N(loc, precision⁻¹) over the packed weights [P] of a block."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__()
        self.block = block
        self.loc = PyroParam(loc.clone(), event_dim=1)

    @property
    def raw_loc(self) -> Tensor:
        """The parameter behind `loc`, to be read and written in place."""
        return self._parameters["loc_unconstrained"]  # a PyroModule's attributes are slow

    def mean_and_views(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The memory of `raw_loc` [P] without gradients, and {name: view [*shape]} if it has such.
        """
        raw, known = self.raw_loc, _means.get(self)
        if known is None or known[0].data_ptr() != raw.data_ptr() or known[0].shape != raw.shape:
            with torch.inference_mode(False), torch.no_grad():
                mean = raw.detach()
                views = self.block.strided_views(mean) if self.block.has_views else None
                known = _means[self] = mean, views
        return known

    def distribution(self) -> Distribution:
        """The Gaussian, differentiable in the parameters."""
        raise NotImplementedError

    def precision(self) -> Structure:
        """The precision matrix."""
        raise NotImplementedError

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        """The parameters and buffers {name: value} for a precision; everything that may fail.

        Raises TypeError for a structure that the family does not have.
        """
        raise NotImplementedError

    @torch.no_grad()
    def write(self, encoded: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers, in place, to those of an encoded precision."""
        for name, value in encoded.items():
            getattr(self, name).copy_(value)

    def keep(self, undo: Undo, encoded: Mapping[str, Tensor]) -> None:
        """Have `undo` keep the location and everything that `write` changes."""
        undo.keep_tensors([self.raw_loc, *(getattr(self, name) for name in encoded)])


class DiagonalFamily(Family):
    """Independent weights of standard deviations `scale` [P]."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__(block, loc, init_scale)
        self.scale = PyroParam(torch.full_like(loc, init_scale), constraints.positive, event_dim=1)

    def distribution(self) -> Distribution:
        return dist.Normal(self.loc, self.scale).to_event(1)

    def precision(self) -> Diagonal:
        return Diagonal(self.scale.square().reciprocal())

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        return {"scale_unconstrained": precision.diag().log() / -2}


class DenseFamily(Family):
    """All weights correlated; `scale_tril` [P, P] is the Cholesky factor of the covariance."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__(block, loc, init_scale)
        self.scale_tril = PyroParam(
            torch.eye(block.size).to(loc) * init_scale, constraints.lower_cholesky, event_dim=2
        )

    def distribution(self) -> Distribution:
        if at_least_single(self.loc) is not self.loc:  # torch's has no densities of half precision
            return StructuredNormal(self.loc, self.precision())
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def precision(self) -> Dense:
        root = self.scale_tril
        return Dense(torch.cholesky_inverse(at_least_single(root)).to(root.dtype))

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        transform = torch.distributions.transform_to(constraints.lower_cholesky)
        return {"scale_tril_unconstrained": transform.inv(scale_tril(precision.dense()))}


class KroneckerFamily(Family):
    """Weights correlated through an output and an input basis.

    `scale` [s, r] holds the standard deviations in the joint basis, so that the precision is a
    `KroneckerEigen` with eigenvalues 1 / scale². A truncated side has one further standard
    deviation, for all directions orthogonal to its basis. If the precision of the prior differs
    between weights, the matrix is rescaled by `output_root` [O] and `input_root` [I], which are
    ones otherwise. Grouped layers have a leading axis.
    """

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__(block, loc, init_scale)
        (layer,) = block.layers
        *groups, outputs, inputs = layer.matrix_shape
        scale_shape = [*groups]
        sides = zip(("output", "input"), (outputs, inputs), block.ranks, strict=True)
        for side, size, rank in sides:
            scale_shape.append(rank + (rank < size))
            basis = torch.eye(size, rank).to(loc).repeat(*groups, 1, 1)
            self.register_buffer(f"{side}_basis", basis)
            self.register_buffer(f"{side}_root", loc.new_ones(*groups, size))
        self.scale = PyroParam(
            loc.new_full(scale_shape, init_scale), constraints.positive, event_dim=len(scale_shape)
        )

    def distribution(self) -> Distribution:
        return StructuredNormal(self.loc, self.precision())

    def precision(self) -> KroneckerEigen | Rescaled:
        spectrum = self.scale.square().reciprocal()
        eigen = KroneckerEigen(self.output_basis, self.input_basis, spectrum)
        output, input = self.output_root, self.input_root
        if bool((output == 1).all() & (input == 1).all()):
            return eigen
        return Rescaled(eigen, outer(output, input).flatten())

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        match precision:
            case KroneckerEigen() as eigen:
                output, input = map(torch.ones_like, (self.output_root, self.input_root))
            case Rescaled(inner=KroneckerEigen() as eigen, root=packed):
                root = packed.view(eigen.shape)
                output, input = root[..., 0], root[..., 0, :] / root[..., 0, :1]
            case _:
                raise TypeError(f"a Kronecker family cannot hold {type(precision).__name__}")
        return {
            "scale_unconstrained": eigen.spectrum.log() / -2,
            "output_basis": eigen.output_basis,
            "input_basis": eigen.input_basis,
            "output_root": output,
            "input_root": input,
        }


FAMILIES: dict[type[structure_spec.StructureSpec], type[Family]] = {
    structure_spec.Full: DenseFamily,
    structure_spec.Block: DenseFamily,
    structure_spec.Diagonal: DiagonalFamily,
    structure_spec.KFAC: KroneckerFamily,
    structure_spec.EKFAC: KroneckerFamily,
}


def family_of(structure: type[structure_spec.StructureSpec]) -> type[Family]:
    """The family for blocks of a structure. Raises TypeError for one that has none."""
    if structure not in FAMILIES:
        raise TypeError(
            f"no guide can hold the structure {structure.__name__}: set FAMILIES of "
            "pyrocurv.guides.families for it, to DenseFamily for example"
        )
    return FAMILIES[structure]
