"""A Gaussian over one block of weights whose parameters live in Pyro.

Location and scales are `PyroParam`s, so plain `SVI` can train them; natural gradients write them in
place through `write`. The basis of a Kronecker family is a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyrocurv.guides.structured_normal import StructuredNormal
from pyrocurv.layers.block import Block
from pyrocurv.runtime.undo import Undo
from pyrocurv.structures import Dense, Diagonal, KroneckerEigen, Rescaled, Structure
from pyrocurv.structures.kronecker_eigen import outer
from pyrocurv.structures.linalg import scale_tril


class Family(PyroModule):
    """N(loc, precision⁻¹) over a block's packed weights [P]."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__()
        self.block = block
        self.loc = PyroParam(loc.clone(), event_dim=1)

    @property
    def raw_loc(self) -> Tensor:
        """The parameter under `loc`, to be read and written in place."""
        return self._parameters["loc_unconstrained"]  # a PyroModule's attributes are slow

    def distribution(self) -> Distribution:
        """The Gaussian, differentiable in the parameters."""
        raise TypeError(f"{type(self).__name__} has no distribution")

    def precision(self) -> Structure:
        """Its precision matrix."""
        raise TypeError(f"{type(self).__name__} has no precision")

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        """A precision as the family's parameters and buffers; all that may fail is done here."""
        raise TypeError(f"{type(self).__name__} cannot hold {type(precision).__name__}")

    @torch.no_grad()
    def write(self, encoded: Mapping[str, Tensor]) -> None:
        """Take on the parameters and buffers of an encoded precision, in place."""
        for name, value in encoded.items():
            if name in self._buffers:  # a posterior that was handed out keeps the old one
                setattr(self, name, value.clone(memory_format=torch.contiguous_format))
            else:
                getattr(self, name).copy_(value)

    def keep(self, undo: Undo, encoded: Mapping[str, Tensor]) -> None:
        """Have `undo` keep the location and what `write` changes."""
        changed = [self._parameters[name] for name in encoded if name in self._parameters]
        undo.keep_tensors([self.raw_loc, *changed])
        if encoded:
            undo.keep_attributes(self)


class DiagonalFamily(Family):
    """Independent weights, `scale` [P]."""

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
    """All weights correlated, `scale_tril` [P, P] the lower Cholesky factor of the covariance."""

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__(block, loc, init_scale)
        self.scale_tril = PyroParam(
            torch.eye(block.size).to(loc) * init_scale, constraints.lower_cholesky, event_dim=2
        )

    def distribution(self) -> Distribution:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def precision(self) -> Dense:
        return Dense(torch.cholesky_inverse(self.scale_tril))

    def encode(self, precision: Structure) -> dict[str, Tensor]:
        transform = torch.distributions.transform_to(constraints.lower_cholesky)
        return {"scale_tril_unconstrained": transform.inv(scale_tril(precision.dense()))}


class KroneckerFamily(Family):
    """Weights correlated through two bases: `scale` are the standard deviations in them.

    The precision is a `KroneckerEigen` of spectrum 1 / scale², in the units `output_root` [O] and
    `input_root` [I] of the prior (ones unless weights differ in it); all with a leading axis in
    layers of groups. A side that is truncated has one standard deviation for all of the rest.
    """

    def __init__(self, block: Block, loc: Tensor, init_scale: float) -> None:
        super().__init__(block, loc, init_scale)
        (layer,) = block.layers
        *lead, rows, columns = layer.matrix_shape
        spectrum = [*lead]
        sides = zip(("output", "input"), (rows, columns), block.ranks, strict=True)
        for side, size, rank in sides:
            spectrum.append(rank + (rank < size))
            basis = torch.eye(size, rank).to(loc).repeat(*lead, 1, 1)
            self.register_buffer(f"{side}_basis", basis)
            self.register_buffer(f"{side}_root", loc.new_ones(*lead, size))
        self.scale = PyroParam(
            loc.new_full(spectrum, init_scale), constraints.positive, event_dim=len(spectrum)
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
        root = precision.root if isinstance(precision, Rescaled) else None
        eigen = precision.inner if isinstance(precision, Rescaled) else precision
        assert isinstance(eigen, KroneckerEigen)
        if root is None:
            output, input = map(torch.ones_like, (self.output_root, self.input_root))
        else:
            matrix = root.view(eigen.shape)
            output, input = matrix[..., 0], matrix[..., 0, :] / matrix[..., 0, :1]
        return {
            "scale_unconstrained": eigen.spectrum.log() / -2,
            "output_basis": eigen.output_basis,
            "input_basis": eigen.input_basis,
            "output_root": output,
            "input_root": input,
        }


FAMILIES: dict[str, type[Family]] = {
    "full": DenseFamily,
    "block": DenseFamily,
    "diag": DiagonalFamily,
    "kfac": KroneckerFamily,
    "ekfac": KroneckerFamily,
}
