"""The guides by name: one structure for all layers, where `structure=` does not say otherwise."""

from __future__ import annotations

from pyrocurv.guides.structured import StructuredGuide


class DiagonalGuide(StructuredGuide):
    """Independent weights (mean field)."""

    structure = "diag"


class KFACGuide(StructuredGuide):
    """Matrix-normal-like weights for each layer: the precision is (N/T)(G ⊗ A) + δ.

    The prior enters exactly, with no factored damping. G ⊗ A itself is exact for one datum at one
    position and for deep linear networks. A layer with a side wider than 160 keeps the 16 leading
    eigenvectors of each side of more than 64, and the mean eigenvalue of the rest.

    Reference: Zhang et al. 2018, "Noisy natural gradient as variational inference",
    arXiv:1712.02390.

    Example:
        >>> import torch, pyrocurv
        >>> net = pyrocurv.nn.bayesianize(torch.nn.Linear(4, 3))
        >>> guide = KFACGuide(pyrocurv.nn.Classifier(net, num_data=10))
        >>> weights = guide(torch.randn(10, 4), torch.randint(3, (10,)))
        >>> guide.sites
        {'net.weight': (3, 4), 'net.bias': (3,)}
    """

    structure = "kfac"


class EKFACGuide(StructuredGuide):
    """As `KFACGuide`, with the eigenvalues re-estimated in the Kronecker eigenbasis.

    Reference: Bae, Zhang & Grosse 2018, "Eigenvalue corrected noisy natural gradient",
    arXiv:1811.12565.
    """

    structure = "ekfac"


class BlockGuide(StructuredGuide):
    """A dense Gaussian for each layer: P² numbers, for layers of up to some thousand weights."""

    structure = "block"


class FullGuide(StructuredGuide):
    """One dense Gaussian over all layers: P² numbers, for up to some thousand weights."""

    structure = "full"
