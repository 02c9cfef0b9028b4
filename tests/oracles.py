"""Slow, dense, float64 truths that the tests compare against; imports torch alone.

Everything loops over the examples, each a batch of one, and is a SUM over them of the curvature of
the negative log likelihood. Rows follow `net.named_parameters()`, frozen ones left out, each
flattened row-major. A likelihood is a name of `NLL` or a `callable(output) -> Distribution`.

B examples, D outputs of one example, P parameters, K vectors, S positions, I inputs, O outputs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, MultivariateNormal, Normal
from torch.nn.attention import SDPBackend, sdpa_kernel

Likelihood = str | Callable[[Tensor], Distribution]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, *BATCH_NORMS)
CHANNELS_FIRST = (*CONVOLUTIONS, *TRANSPOSED, *BATCH_NORMS, nn.GroupNorm)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED, *NORMS)

NLL: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # the classes are the last axis of the logits; the axes before it are independent positions
    "categorical": lambda f, y: F.cross_entropy(f.movedim(-1, 1), y, reduction="none"),
    "bernoulli": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="none"),
    "normal": lambda f, y: (f - y).square() / 2 + math.log(2 * math.pi) / 2,
}


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Equal relative to the norm of the whole, so exact zeros need no second tolerance."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).norm() <= rtol * expected.norm()


# --- the likelihood ---------------------------------------------------------------------------


def nll(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """-log p(y_n | f_n) of each example, [B], summed over the positions of the example."""
    terms = NLL[likelihood](f, y) if isinstance(likelihood, str) else -likelihood(f).log_prob(y)
    return terms.reshape(len(f), -1).sum(1)


def output_hessian(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """H = d^2 -log p(y | f) / df df^T of one example (f and y a batch of one), [D, D]."""

    def loss(f: Tensor) -> Tensor:
        return nll(likelihood, f, y).sum()

    return torch.autograd.functional.hessian(loss, f.detach()).reshape(f.numel(), f.numel())


def output_gradient(likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """r_n = d -log p(y_n | f_n) / df_n, [B, D]."""
    f = f.detach().requires_grad_()
    return torch.autograd.grad(nll(likelihood, f, y).sum(), f)[0].reshape(len(f), -1)


def outcomes(likelihood: Likelihood, f: Tensor, support: Tensor | None = None) -> Tensor:
    """Every target that one example (f a batch of one) can have, [M, ...].

    `support` holds the values at one position; a callable likelihood needs it, and may cut a tail.
    """
    if support is None:
        support = torch.arange(f.shape[-1]) if likelihood == "categorical" else f.new_tensor([0, 1])
    if isinstance(likelihood, str):
        shape = f.shape[1:-1] if likelihood == "categorical" else f.shape[1:]
    else:
        shape = likelihood(f).batch_shape[1:]
    return torch.cartesian_prod(*[support] * math.prod(shape)).reshape(-1, *shape)


# --- derivatives in the parameters ------------------------------------------------------------


def parameters(net: nn.Module) -> list[nn.Parameter]:
    """The trained parameters in the order of `net.named_parameters()`."""
    return [p for p in net.parameters() if p.requires_grad]


def flat_gradient(scalar: Tensor, net: nn.Module, create_graph: bool = False) -> Tensor:
    """d scalar / d theta, [P]."""
    gradients = torch.autograd.grad(
        scalar,
        parameters(net),
        retain_graph=True,
        create_graph=create_graph,
        materialize_grads=True,
    )
    return torch.cat([g.flatten() for g in gradients])


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """J_n = df_n / d theta with f_n the flattened output of example n, [B, D, P]."""

    def one(x: Tensor) -> Tensor:
        return torch.stack([flat_gradient(f, net) for f in net(x).flatten()])

    return torch.stack([one(example) for example in x.split(1)])


def ggn(net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """sum_n J_n^T H_n J_n, [P, P]."""
    examples = zip(jacobian(net, x), x.split(1), y.split(1), strict=True)
    return sum_of(J.T @ output_hessian(likelihood, net(x), y) @ J for J, x, y in examples)


def empirical(net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """sum_n g_n g_n^T with g_n = d -log p(y_n | f_n) / d theta, [P, P]."""
    examples = zip(x.split(1), y.split(1), strict=True)
    gradients = [flat_gradient(nll(likelihood, net(x), y).sum(), net) for x, y in examples]
    return sum_of(torch.outer(g, g) for g in gradients)


def hessian(net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """d^2 sum_n -log p(y_n | f_n) / d theta d theta^T, [P, P]."""
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        gradient = flat_gradient(nll(likelihood, net(x), y).sum(), net, create_graph=True)
        if not gradient.requires_grad:  # linear in all weights
            return gradient.new_zeros(len(gradient), len(gradient))
        return torch.stack([flat_gradient(g, net) for g in gradient])


def fisher_moments(
    net: nn.Module, x: Tensor, likelihood: Likelihood, support: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and elementwise variance of sum_n u_n u_n^T, u_n = J_n^T v_n, v_n the score at one draw.

    E = sum_n E[u u^T] and Var = sum_n E[(u u^T)^2] - E[u u^T]^2, squares elementwise, both [P, P];
    the average of K independent draws has variance Var / K.
    """

    def one(J: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if likelihood == "normal":
            return _gaussian_moments(J)
        return _enumerated_moments(J, likelihood, net(x).detach(), support)

    moments = [one(J, example) for J, example in zip(jacobian(net, x), x.split(1), strict=True)]
    return sum_of(mean for mean, _ in moments), sum_of(variance for _, variance in moments)


def information(
    density: Callable[[Tensor], Distribution], f: Tensor, support: Tensor, widths: Tensor
) -> Tensor:
    """E[s s^T], s = d log p(y | f) / d f, as a sum over support points [M] of these widths, [D, D].

    For one datum whose parameters are functions of f [D].
    """
    each = f.detach().expand(len(support), -1).requires_grad_()  # its own f for each point
    log_prob = density(each).log_prob(support)
    (score,) = torch.autograd.grad(log_prob.sum(), each)
    mass = log_prob.detach().exp() * widths
    assert abs(float(mass.sum()) - 1) < 1e-6, "the support is cut too short"
    return torch.einsum("m,mi,mj->ij", mass, score, score)


def _gaussian_moments(J: Tensor) -> tuple[Tensor, Tensor]:
    """u = J^T v, v ~ N(0, 1): C = J^T J and, by Isserlis, Var(u_i u_j) = C_ii C_jj + C_ij^2."""
    C = J.T @ J
    return C, torch.outer(C.diag(), C.diag()) + C.square()


def _enumerated_moments(
    J: Tensor, likelihood: Likelihood, f: Tensor, support: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same moments as sums over every outcome y, weighted by p(y | f)."""
    y = outcomes(likelihood, f, support)
    f = f.expand(len(y), *f.shape[1:])
    p = torch.exp(-nll(likelihood, f, y))[:, None]
    u = output_gradient(likelihood, f, y) @ J  # [M, P]
    mean = u.T @ (p * u)
    return mean, u.square().T @ (p * u.square()) - mean.square()


def sum_of(terms: Any) -> Tensor:
    """The sum of an iterable of tensors."""
    return torch.stack(list(terms)).sum(0)


# --- partitions of the parameters -------------------------------------------------------------


def block_sizes(net: nn.Module) -> list[int]:
    """Numbers of trained parameters per module: its own weight and bias are one block."""
    own = [[p for p in m.parameters(recurse=False) if p.requires_grad] for m in net.modules()]
    return [sum(p.numel() for p in block) for block in own if block]


def blocks(matrix: Tensor, sizes: list[int]) -> Tensor:
    """The matrix with everything outside its diagonal blocks put to zero."""
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(label[:, None] == label, matrix, 0.0)


# --- Kronecker factors ------------------------------------------------------------------------

# per example: inputs a [groups, S, I] and output gradients g [K, groups, S, O]
Pairs = list[tuple[Tensor, Tensor]]


def kfac_dense(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    curvature: str = "ggn",
    sharing: str = "expand",
    cuts: tuple[int, int] = (1, 1),
) -> Tensor:
    """K-FAC (Martens & Grosse 2015; Eschenhagen et al. 2023), [P, P].

    Per layer and group W = [weight | bias] has the block G kron A, put where its weights are, with
    A = 1/B sum_n sum_s a a^T and G = 1/S sum_n sum_k sum_s g g^T. k runs over the columns of a root
    of the output Hessian ("ggn") or is the one gradient ("empirical"). The positions s are those of
    every run of the layer, so a layer that runs twice on vectors has S = 2. With sharing="reduce"
    there is one position instead, of the mean a and the sum of g. `cuts` are the numbers of
    diagonal blocks that G and A are cut into. A norm layer has its exact 2 x 2 blocks.
    """

    def block(pairs: Pairs) -> Tensor:
        G, A = kronecker_factors(pairs, sharing)
        return torch.kron(cut(G, cuts[0]), cut(A, cuts[1]))

    return _layerwise(block, net, x, y, likelihood, curvature)


def cut(matrix: Tensor, parts: int) -> Tensor:
    """The matrix with all but `parts` diagonal blocks put to zero, the larger ones first."""
    return blocks(matrix, [len(part) for part in torch.tensor_split(matrix, parts)])


def ekfac_dense(
    net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, curvature: str = "ggn"
) -> Tensor:
    """EK-FAC (George et al. 2018), [P, P]: the eigenvectors of K-FAC with the best eigenvalues.

    Per layer and group (Q_G kron Q_A) diag(Lambda) (Q_G kron Q_A)^T, where its weights are, with
    Lambda = sum_n sum_k (Q_G^T (sum_s g a^T) Q_A)^2, the square elementwise.
    """

    def block(pairs: Pairs) -> Tensor:
        Q_G, Q_A = (torch.linalg.eigh(factor).eigenvectors for factor in kronecker_factors(pairs))
        rotated = [Q_G.T @ g.mT @ a @ Q_A for a, g in pairs]  # each [K, O, I]
        Q, eigenvalues = torch.kron(Q_G, Q_A), sum_of(r.square().sum(0) for r in rotated)
        return Q @ torch.diag(eigenvalues.flatten()) @ Q.T

    return _layerwise(block, net, x, y, likelihood, curvature)


def hessian_kfac_dense(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    sharing: str = "expand",
    cuts: tuple[int, int] = (1, 1),
) -> Tensor:
    """K-FAC of the Hessian, [P, P]: per layer and group G kron A as in `kfac_dense`.

    G = 1/S sum_n sum_s H_n[s, s] with H_n the Hessian in the layer's output, which may be
    indefinite; with sharing="reduce" sum_n sum_st H_n[s, t]. A norm layer has its exact blocks.
    """

    def block(seen: OutputHessians) -> Tensor:
        G, A = hessian_factors(seen, sharing)
        return torch.kron(cut(G, cuts[0]), cut(A, cuts[1]))

    return _hessian_layerwise(block, output_block, net, x, y, likelihood)


def hessian_ekfac_dense(net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood) -> Tensor:
    """Q diag(Q^T H Q) Q^T with the eigenvectors Q of `hessian_kfac_dense`, [P, P].

    H is the true Hessian, in the block of each layer and group.
    """

    def basis(seen: OutputHessians) -> Tensor:
        return torch.kron(*(torch.linalg.eigh(f).eigenvectors for f in hessian_factors(seen)))

    def exact(seen: OutputHessians) -> Tensor:
        return torch.linalg.eigh(output_block(seen)).eigenvectors

    Q = _hessian_layerwise(basis, exact, net, x, y, likelihood)
    return Q @ torch.diag((Q.T @ hessian(net, x, y, likelihood) @ Q).diag()) @ Q.T


# per example, of one group: inputs a [S, I] and H [S, O, S, O]
OutputHessians = list[tuple[Tensor, Tensor]]


def hessian_factors(seen: OutputHessians, sharing: str = "expand") -> tuple[Tensor, Tensor]:
    """G = 1/S sum_n sum_s H_n[s, s], [O, O], and A = 1/B sum_n sum_s a a^T, [I, I]."""
    if sharing == "reduce":
        seen = [(a.mean(0, keepdim=True), H.sum((0, 2))[None, :, None]) for a, H in seen]
    G = sum_of(torch.einsum("sosp->op", H) for _, H in seen) / len(seen[0][0])
    return G, sum_of(a.T @ a for a, _ in seen) / len(seen)


def output_block(seen: OutputHessians) -> Tensor:
    """C = sum_n sum_st H_n[s, t] kron a_s a_t^T over W row-major, [O I, O I]."""
    C = sum_of(torch.einsum("sotp,si,tj->oipj", H, a, a) for a, H in seen)
    return C.reshape(C.shape[0] * C.shape[1], -1)


def layer_output_hessians(
    net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood
) -> dict[Any, list[OutputHessians]]:
    """Per trained layer, group and example: a [S, I], and d^2 -log p in the outputs."""
    layers = [m for m in net.modules() if isinstance(m, LAYERS) and parameters(m)]
    found: dict[Any, list[OutputHessians]] = {m: [[] for _ in weight_index(m)] for m in layers}
    for example, target in zip(x.split(1), y.split(1), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            f, seen = _watch(net, layers, example)
        loss = nll(likelihood, f, target).sum()
        for layer, runs in seen.items():
            zeros, a = [zero for _, zero in runs], torch.cat([a for a, _ in runs], 1)
            g = _all_positions(layer, _gradients(loss, zeros, create_graph=True))
            for group, mine in enumerate(g):
                rows = [_all_positions(layer, _gradients(e, zeros))[group] for e in mine.flatten()]
                H = torch.stack(rows).reshape(*mine.shape, *mine.shape)
                found[layer][group].append((a[group], H))
    return found


def _gradients(scalar: Tensor, zeros: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    if not scalar.requires_grad:
        return [torch.zeros_like(zero) for zero in zeros]
    return list(torch.autograd.grad(
        scalar, zeros, retain_graph=True, create_graph=create_graph, materialize_grads=True
    ))


def _hessian_layerwise(
    block: Callable[[OutputHessians], Tensor],
    norm_block: Callable[[OutputHessians], Tensor],
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
) -> Tensor:
    """As `_layerwise`, with a function of its own for norm layers."""
    matrices = []
    for layer, groups in layer_output_hessians(net, x, y, likelihood).items():
        index = weight_index(layer)  # [groups, O, I]
        matrix = torch.zeros(index.numel(), index.numel(), dtype=torch.float64)
        for places, seen in zip(index, groups, strict=True):
            where = places.flatten()
            make = norm_block if isinstance(layer, NORMS) else block
            matrix[where[:, None], where] = make(seen)
        matrices.append(matrix)
    return torch.block_diag(*matrices)


def kronecker_factors(pairs: Pairs, sharing: str = "expand") -> tuple[Tensor, Tensor]:
    """G = 1/S sum_n sum_k sum_s g g^T, [O, O], and A = 1/B sum_n sum_s a a^T, [I, I]."""
    if sharing == "reduce":
        pairs = [(a.mean(0, keepdim=True), g.sum(1, keepdim=True)) for a, g in pairs]
    B, S = len(pairs), len(pairs[0][0])
    G = sum_of(torch.einsum("kso,ksp->op", g, g) for _, g in pairs) / S
    return G, sum_of(a.T @ a for a, _ in pairs) / B


def _layerwise(
    block: Callable[[Pairs], Tensor],
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    likelihood: Likelihood,
    curvature: str,
) -> Tensor:
    """The block-diagonal matrix of every layer's `block`, in the order of its parameters."""
    matrices = []
    for layer, pairs in layer_pairs(net, x, y, likelihood, curvature).items():
        index = weight_index(layer)  # [groups, O, I]
        matrix = torch.zeros(index.numel(), index.numel(), dtype=torch.float64)
        for group, places in enumerate(index):
            mine = [(a[group], g[:, group]) for a, g in pairs]
            where = places.flatten()
            exact = isinstance(layer, NORMS)
            matrix[where[:, None], where] = _outer_products(mine) if exact else block(mine)
        matrices.append(matrix)
    return torch.block_diag(*matrices)


def _outer_products(pairs: Pairs) -> Tensor:
    """sum_n sum_k vec(J) vec(J)^T with J = sum_s g a^T."""
    J = torch.cat([(g.mT @ a).flatten(1) for a, g in pairs])
    return J.T @ J


def weight_index(layer: Any) -> Tensor:
    """Where the entries of [weight | bias] stand among the layer's trained parameters, flattened.

    [groups, O, I]: groups are those of a convolution, or the units of a norm layer.
    """
    parts, start = [], 0
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if _trains(weight):
        parts.append(_weight_matrix(layer, torch.arange(weight.numel()).reshape(weight.shape)))
        start = weight.numel()
    if _trains(bias):
        groups = len(parts[0]) if parts else 1
        places = torch.arange(start, start + bias.numel()).reshape(groups, -1, 1)
        parts.append(places)
    return torch.cat(parts, -1)


def _weight_matrix(layer: Any, weight: Tensor) -> Tensor:
    """A weight as [groups, O, I]."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, NORMS):
        return weight.reshape(-1, 1, 1)
    if isinstance(layer, nn.Embedding):
        return weight.T[None]
    if isinstance(layer, TRANSPOSED):
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
        apart = weight.reshape(groups, inputs, outputs, -1)
        return apart.transpose(1, 2).reshape(groups, outputs, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def parameter_order(rows: int, columns: int, bias: bool) -> Tensor:
    """Where the entries of [weight.flatten(), bias] sit in [weight | bias].flatten()."""
    index = torch.arange(rows * columns).reshape(rows, columns)
    return torch.cat([index[:, :-1].flatten(), index[:, -1]]) if bias else index.flatten()


def layer_pairs(
    net: nn.Module, x: Tensor, y: Tensor, likelihood: Likelihood, curvature: str
) -> dict[Any, Pairs]:
    """Per trained layer and example: a [groups, S, I] and g_k = (df / d output)^T v_k."""
    layers = [m for m in net.modules() if isinstance(m, LAYERS) and parameters(m)]
    pairs: dict[Any, Pairs] = {layer: [] for layer in layers}
    for example, target in zip(x.split(1), y.split(1), strict=True):
        f, seen = _watch(net, layers, example)
        vectors = output_vectors(curvature, likelihood, f, target)
        for layer, runs in seen.items():
            a = torch.cat([a for a, _ in runs], 1)
            g = torch.stack([_pull_back(f, v, layer, runs) for v in vectors])
            pairs[layer].append((a, g))
    return pairs


def output_vectors(curvature: str, likelihood: Likelihood, f: Tensor, y: Tensor) -> Tensor:
    """The v_k of one example, [K, D]: sum_k v v^T is its output Hessian, or r r^T (empirical)."""
    if curvature == "empirical":
        return output_gradient(likelihood, f, y)
    eigenvalues, Q = torch.linalg.eigh(output_hessian(likelihood, f, y))
    return (Q * eigenvalues.clamp(min=0).sqrt()).T


def _watch(net: nn.Module, layers: list[Any], x: Tensor) -> tuple[Tensor, dict[Any, Any]]:
    """The output at x, and of each run of a layer the inputs and a zero added to its output.

    The gradient in that zero is the gradient in the output, also when an in-place op follows.
    """
    seen: dict[Any, Any] = {layer: [] for layer in layers}
    busy = []

    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if busy:  # `_inputs` at work
            return output
        busy.append(layer)
        zero = torch.zeros_like(output, requires_grad=True)
        seen[layer].append((_inputs(layer, args[0].detach().clone()), zero))
        busy.clear()
        return output + zero

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        return net(x), seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _inputs(layer: Any, x: Tensor) -> Tensor:
    """The rows a of out = [weight | bias] a, [groups, S, I].

    A layer is linear in its weights, so a_i is the output where one weight is 1 and all others 0.
    """
    index = weight_index(layer)[:, 0]  # [groups, I], of the first output of each group
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    shapes = [layer.get_parameter(name).shape for name in names]
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    rows = []
    for group, places in enumerate(index):
        columns = []
        for place in places:
            flat = torch.zeros(sum(math.prod(shape) for shape in shapes), dtype=torch.float64)
            flat[place] = 1.0
            split = flat.split([math.prod(shape) for shape in shapes])
            weights = {n: f.reshape(s) for n, f, s in zip(names, split, shapes, strict=True)}
            output = torch.func.functional_call(layer, {**zeros, **weights}, (x,))
            column = _positions(layer, output, len(index))[group, :, 0]
            if place == _padding(layer):
                column = torch.zeros_like(column)  # that row gets no gradient
            columns.append(column)
        rows.append(torch.stack(columns, 1))
    return torch.stack(rows)


def _padding(layer: Any) -> int | None:
    """Where an embedding's padding row begins."""
    index = getattr(layer, "padding_idx", None)
    return None if index is None else index * layer.embedding_dim


def _positions(layer: Any, output: Tensor, groups: int) -> Tensor:
    """An output of one example as [groups, S, O]."""
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        units = output.reshape(-1, math.prod(layer.normalized_shape))
    else:
        channels = 1 if isinstance(layer, CHANNELS_FIRST) else -1
        units = output.movedim(channels, -1)
        units = units.reshape(-1, units.shape[-1])
    return units.reshape(len(units), groups, -1).transpose(0, 1)


def _pull_back(f: Tensor, v: Tensor, layer: Any, runs: Any) -> Tensor:
    """v pulled back to the outputs of every run of a layer, [groups, S, O]."""
    zeros = [zero for _, zero in runs]
    gradients = torch.autograd.grad(
        f, zeros, v.reshape(f.shape), retain_graph=True, materialize_grads=True
    )
    return _all_positions(layer, gradients)


def _all_positions(layer: Any, gradients: Any) -> Tensor:
    """Gradients in the outputs of every run of a layer, [groups, S, O]."""
    groups = len(weight_index(layer))
    return torch.cat([_positions(layer, g, groups) for g in gradients], 1)


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


# --- conjugate Bayesian linear regression -----------------------------------------------------


def linear_posterior(
    X: Tensor, y: Tensor, noise: float, prior_mean: Tensor, prior_precision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [P], covariance [P, P] and log evidence of w, for y ~ N(X w, noise^2).

    Prior w ~ N(m_0, diag(p)^-1), so S = (diag(p) + X^T X / noise^2)^-1 and
    m = S (p m_0 + X^T y / noise^2); by Bayes' rule log p(y) = log p(y | m) + log p(m) - log q(m).
    `noise` is a standard deviation.
    """
    precision = torch.diag(prior_precision) + X.T @ X / noise**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (prior_precision * prior_mean + X.T @ y / noise**2)
    log_likelihood = Normal(X @ mean, noise).log_prob(y).sum()
    log_prior = Normal(prior_mean, prior_precision.rsqrt()).log_prob(mean).sum()
    log_posterior = MultivariateNormal(mean, precision_matrix=precision).log_prob(mean)
    return mean, covariance, log_likelihood + log_prior - log_posterior


def linear_layer_design(x: Tensor, outputs: int) -> Tensor:
    """X with (x W^T + bias).flatten() = X [W.flatten(), bias] for x [B, I], [B O, O I + O]."""
    eye = torch.eye(outputs, dtype=x.dtype)
    weight = torch.einsum("bi,op->bopi", x, eye).reshape(len(x) * outputs, -1)
    return torch.cat([weight, eye.repeat(len(x), 1)], dim=1)


def linear_layer_posterior(
    x: Tensor,
    y: Tensor,
    noise: float,
    weight_precision: float,
    bias_precision: float,
    prior_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_posterior` of nn.Linear(I, O): x [B, I], y [B, O], rows [weight.flatten(), bias]."""
    weights, outputs = x.shape[1] * y.shape[1], y.shape[1]
    parts = x.new_full((weights,), weight_precision), x.new_full((outputs,), bias_precision)
    precision = torch.cat(parts)
    mean = torch.zeros_like(precision) if prior_mean is None else prior_mean
    return linear_posterior(linear_layer_design(x, outputs), y.flatten(), noise, mean, precision)
