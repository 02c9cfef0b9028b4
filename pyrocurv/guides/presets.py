"""The guides by name: one structure for all layers, where `structure=` does not say otherwise."""

from __future__ import annotations

from pyrocurv.guides.structured import StructuredGuide


class DiagonalGuide(StructuredGuide):
    """Independent weights (mean field).

    Of a model without a network, independent latents of any support, as real vectors.
    """

    structure = "diag"
    supports_joint = True


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
    """One dense Gaussian over all layers: P² numbers, for up to some thousand weights.

    Weights that no supported op consumes, of recurrent layers say, stay independent, unless
    `curvature="hessian"`.

    Of a model without a network, over all latents of any support, as real vectors: P numbers that
    `.posterior` is over, while `median`, `quantiles` and samples are on the latents' own scale.
    `NGVI(model, guide, curvature="hessian")` trains it from the Hessian of the log joint.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyrocurv.guides import FullGuide
        >>> from pyrocurv.infer import NGVI
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0., 5.))
        ...     sd = pyro.sample("sd", dist.Gamma(2., 2.))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mean, sd), obs=y)
        >>> guide = FullGuide(model)
        >>> ngvi = NGVI(model, guide, curvature="hessian")
        >>> losses = [ngvi.step(torch.tensor([1., 2., 4.])) for _ in range(20)]
        >>> bool(guide.median()["sd"] > 0)
        True
    """

    structure = "full"
    supports_joint = True
