"""Natural-gradient descent with a structured curvature, for any PyTorch training loop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyrocurv.curvature import Curvature
from pyrocurv.curvature.likelihood import Likelihood
from pyrocurv.curvature.spec import as_curvature
from pyrocurv.layers.block import Block
from pyrocurv.layers.module_types import has_layer_norm
from pyrocurv.layers.structure_selection import StructureChoice
from pyrocurv.optim.curvature_optimizer import CurvatureOptimizer
from pyrocurv.optim.mean_updates import UpdateChoice
from pyrocurv.optim.parameter_blocks import ParameterBlocks
from pyrocurv.optim.parameter_store import Group, ParameterStore, Params
from pyrocurv.posterior.hyperparameters import AUTO, Hyperparameters
from pyrocurv.posterior.prior import BlockPrior, GaussianPrior
from pyrocurv.runtime.choices import Auto, CurvatureKind
from pyrocurv.runtime.inference_mode import outside_inference_mode
from pyrocurv.runtime.undo import Undo
from pyrocurv.runtime.validation import check_callable, check_module, check_nonnegative
from pyrocurv.runtime.workers import naming_step
from pyrocurv.structures.rescaled import KroneckerScaling

DECAY, DECAY_OF_TRANSFORMERS = 0.3, 0.1  # decoupled, in the default step


class SecondOrderOptimizer(CurvatureOptimizer):
    """Preconditions the gradient by the curvature of the network's layers.

    By default a step is Muon's in coordinates whitened by the layers' inputs. With C the running
    curvature per entry of the loss's mean, g the gradient, δ the weight decay, `update="natural"`
    is

        m ← β m + (1-β) g,   h = m/(1-βᵗ) + δ w,   w ← w - lr ν (C + e + δ + damping)⁻¹ h

    e is the initial curvature that fades, ν the trust region of `kl_clip`. Without momentum,
    damping, clipping and e such a step at lr 1 from "ggn" is Newton's for least squares, and for
    one softmax layer in the structure "full"; for deep linear networks "kfac" gives that of
    Gauss-Newton blocks.

    The loop stays as it is: `zero_grad`, forward, `backward`, `step`. On steps where curvature is
    due the network runs once more, on a few examples of the batch, inside `step`. Only passes count
    whose gradient has reached the parameters. Where outputs and inputs have different rows, as with
    batched graphs, the curvature takes a backward pass for each example. After the first step
    `summary()` tells what has a curvature in which structure, `update_counts()` how often it was
    estimated.

    Args:
        net: the network that the loop calls.
        lr: learning rate; the default is for about a thousand steps on batches of 128.
        params: the parameters or groups of them, as in torch; by default all. A group may have its
            own lr, momentum, damping, kl_clip, weight_decay and decoupled_weight_decay; layers of
            two groups share no block.
        likelihood: whose negative logarithm is the loss: "categorical" (`F.cross_entropy` of
            logits), "bernoulli" (`F.binary_cross_entropy_with_logits`), "normal"
            (`F.mse_loss / 2`), or a callable from the output, of any type, to a `Distribution`
            whose batch shape starts with the batch, or to a list of them. If the network returns a
            mapping, tuple or dataclass, the names are of its "logits", or of its first tensor with
            enough axes. The loss's weights, scale and masks are read off its gradient in the
            output, for "categorical" and "bernoulli" and callables whose `Categorical` or
            `Bernoulli` has the entries of the output as logits. For others, and for soft targets,
            the loss is taken for a mean over all entries that have a gradient.
        class_dim: the axis of the classes of "categorical"; by default that over which the
            gradient sums to 0.
        curvature: a kind or a `Curvature`. "empirical" and "hessian" read the targets off the
            gradient in the output (hard classes; for "normal" of a loss that nothing scales).
        structure: one for all layers, or a choice for each; see `pyrocurv.curvature.estimate`.
            "point" leaves layers to Adam, "frozen" as they are.
        update: how the parameters move; see `pyrocurv.infer.NGVI`. "natural" is the formula above,
            the others use the curvature for their coordinates or not at all. "auto" is
            "whitened-muon", whose steps have a fixed length: give it a schedule that ends at 0.
        momentum, damping: β, and what is added to the curvature.
        nesterov: whether the momentum of "whitened-muon" and "muon" is Nesterov's, as by default.
        weight_decay: δ, of ½ δ |w|² in the objective; it is part of the curvature too.
        decoupled_weight_decay: λ of w ← w - lr λ w in each step, as AdamW and Muon have it, for
            layers with weight matrices. It is no part of the objective, whose fixed points are
            kept at 0 alone. "auto" is 0 if `update` or a `weight_decay` other than 0
            is given, and for groups with a `weight_decay`; else 0.1 for networks with `LayerNorm`
            or `RMSNorm`, as transformers, and 0.3 for others.
        kl_clip: trust region κ of a step, over all layers; None for no clipping. The momentum keeps
            of a gradient no more than ten times its radius.
        fallback_lr: of Adam for what no supported op consumes, in proportion to a schedule on lr.

    Raises:
        TypeError: an argument of another type.
        ValueError: an unknown name, a number out of its range, a parameter that is none of the
            network's, an argument in a group that is one for all, `nesterov=True` with an update
            that has no such momentum; at a step, a batch without examples, an output that the
            likelihood does not fit.
        RuntimeError: a step before any forward pass with a gradient.
        FloatingPointError: a gradient that is not finite, or means or precisions that would not be;
            nothing has changed then.

    Reference: Martens & Grosse 2015, arXiv:1503.05671; Jordan et al. 2024, "Muon: An optimizer for
    hidden layers in neural networks"; Loshchilov & Hutter 2019, arXiv:1711.05101.

    Example:
        >>> import torch
        >>> from pyrocurv.optim import SecondOrderOptimizer
        >>> net = torch.nn.Linear(4, 3)
        >>> optimizer = SecondOrderOptimizer(net, lr=0.03)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(net(x), y).backward()
        ...     optimizer.step()
    """

    fallback_description = "Adam trains them"
    settings = ("_is_automatic_decay",)

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.06,
        *,
        params: Params | None = None,
        likelihood: Likelihood = "categorical",
        class_dim: int | None = None,
        curvature: CurvatureKind | Curvature = "fisher",
        structure: StructureChoice = "kfac",
        update: UpdateChoice = AUTO,
        momentum: float = 0.9,
        nesterov: bool | Auto = AUTO,
        damping: float = 3e-3,
        weight_decay: float = 0.0,
        decoupled_weight_decay: float | Auto = AUTO,
        kl_clip: float | None = 1e-2,
        fallback_lr: float = 2e-3,
    ) -> None:
        if as_curvature(curvature).uses_sample_gradients:
            raise ValueError("curvature='noise' needs the samples of a VIOptimizer")
        check_module("net", net)
        check_nonnegative("decoupled_weight_decay", decoupled_weight_decay, AUTO)
        self._is_automatic_decay = decoupled_weight_decay == AUTO
        if decoupled_weight_decay == AUTO:
            is_default = update == AUTO and weight_decay == 0
            decoupled_weight_decay = _default_decay(net) if is_default else 0.0
        super().__init__(
            net, params, likelihood, class_dim, curvature, structure, update, nesterov,
            fallback_lr, {
                "lr": lr, "momentum": momentum, "damping": damping, "weight_decay": weight_decay,
                "decoupled_weight_decay": decoupled_weight_decay, "kl_clip": kl_clip,
            },
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, see `torch.optim.Optimizer.add_param_group`.

        One with a `weight_decay` of its own has no decoupled one, unless that is given too.

        Raises ValueError for parameters that do not belong to the network, and for an argument that
        is one for all groups.
        """
        has_own = isinstance(param_group, dict) and "weight_decay" in param_group
        if has_own and self._is_automatic_decay:
            param_group.setdefault("decoupled_weight_decay", 0.0)
        super().add_param_group(param_group)

    @outside_inference_mode
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' gradients; returns what the closure returns."""
        loss = None
        if closure is not None:
            check_callable("closure", closure, "a callable that returns the loss")
            with torch.enable_grad():
                loss = closure()
        with naming_step(self._posterior.step), Undo() as undo:
            self._synchronize()
            undo.keep_attributes(*self._mutable)
            passes, store = self._recorder.pop_passes(), self._store()
            self._check_batch(passes)
            layout, posterior = self.layout, self._decayed(store, 0.0)
            if self._is_due() and any(recorded.inputs for recorded in passes):
                layout, posterior = self._update_curvature(layout, posterior, passes, store, 0.0)
            if not layout.layers and not passes:
                raise RuntimeError(
                    "step() before any forward pass of the network that had a gradient: call the "
                    "network itself, then backward()"
                )
            self._move(layout, posterior, store, undo)
        return loss

    def _prior(self, block: Block, store: ParameterStore) -> BlockPrior:
        like, group = store.first(block)
        is_kronecker = block.structure.is_kronecker
        return _decay(group["weight_decay"], like.dtype, like.device, is_kronecker)

    def _hyperparameters(self, group: Group, layout: ParameterBlocks) -> Hyperparameters:
        return Hyperparameters.of(group, 1, 1, self._number_of(group))


def _default_decay(net: nn.Module) -> float:
    return DECAY_OF_TRANSFORMERS if has_layer_norm(net.modules()) else DECAY


@functools.lru_cache(maxsize=64)
def _decay(
    weight_decay: float, dtype: torch.dtype, device: torch.device, is_kronecker: bool
) -> BlockPrior:
    """Weight decay as the prior of a block."""
    precision = torch.tensor(weight_decay, dtype=dtype, device=device)
    prior = GaussianPrior(torch.zeros_like(precision), precision, zero_mean=True)
    return BlockPrior(prior, KroneckerScaling(precision) if is_kronecker else None)
