"""What the Kronecker factors of a network cost: `curvature.estimate` against other libraries.

    pip install -e ".[peers]"
    python benchmarks/curvature_cost.py                # LeNet-5 and an MLP 784-512-512-10
    python benchmarks/curvature_cost.py --agreement    # only whether all compute the same matrix

The Fisher information of a categorical likelihood by one sampled target for each example, as
G ⊗ A for each layer (K-FAC, "expand" for convolutions), batch 128: one forward pass, one backward
pass, the factors. Peers: curvlinops (`KFACLinearOperator`, its number of data given and its checks
off, so that it goes through the data once), BackPACK (`KFAC`) and asdl (`fisher_mc`, `kron`). All
take turns in one process on one thread, in a new order each round; "x ours" is the median over the
rounds of the ratio to ours in the same round. A peer that is not there, or fails, is reported.

Agreement is shown first, on a small net of one convolution and two linear layers: each layer's
G ⊗ A from many sampled targets against the exact one (`curvature="ggn"`), relative and in the
Frobenius norm, without the bias column and with the peer's conventions (a mean or a sum) converted;
and the worst distance of A from ours up to its scale, which has no noise. BackPACK's G of a
convolution is another matrix: it adds the positions up before it takes the outer product.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from nets import CLASSES, NETS
from pyrocurv.curvature import Curvature, estimate
from step_cost import keep_memory

Factors = list[tuple[Tensor, Tensor]]  # (G, A) of each layer; A without the bias where apart
ModelRun = Callable[[], Any]  # computes the factors, and gives what `read` reads
Made = tuple[ModelRun, Callable[[Any], Factors]]

BATCH = 128


def layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def ours(net: nn.Module, x: Tensor, y: Tensor, samples: int) -> Made:
    curvature = Curvature("fisher", num_samples=samples)
    return (
        lambda: estimate(net, x, y, likelihood="categorical", curvature=curvature),
        lambda matrix: [(block.output, block.input) for block in matrix.blocks],
    )


def curvlinops(net: nn.Module, x: Tensor, y: Tensor, samples: int) -> Made:
    from curvlinops import KFACLinearOperator

    parameters = list(net.parameters())
    loss = nn.CrossEntropyLoss(reduction="sum")

    def run() -> Any:
        operator = KFACLinearOperator(
            net, loss, parameters, [(x, y)], fisher_type="mc", mc_samples=samples,
            separate_weight_and_bias=False, check_deterministic=False, num_data=len(x),
            num_per_example_loss_terms=1, seed=random.getrandbits(31),
        )
        operator.compute_kronecker_factors()
        return operator

    def read(operator: Any) -> Factors:
        gradients, inputs = operator._gradient_covariances, operator._input_covariances
        return [(gradients[name], inputs[name]) for name in gradients][::-1]

    return run, read


def backpack(net: nn.Module, x: Tensor, y: Tensor, samples: int) -> Made:
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import KFAC

    net, loss = extend(net), extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> None:
        net.zero_grad(set_to_none=True)
        with context(KFAC(mc_samples=samples)):
            loss(net(x), y).backward()

    def read(_: Any) -> Factors:
        return [tuple(module.weight.kfac) for module in layers(net)]

    return run, read


def asdl(net: nn.Module, x: Tensor, y: Tensor, samples: int) -> Made:
    from asdl import FisherConfig, get_fisher_maker

    maker = get_fisher_maker(net, FisherConfig(
        "fisher_mc", "kron", loss_type="cross_entropy", n_mc_samples=samples, data_size=1
    ))

    def run() -> None:
        maker.setup_model_call(net, x)
        maker.forward_and_backward()

    def read(_: Any) -> Factors:
        krons = [module.fisher.kron for module in layers(net)]
        # the loss, not its square, is divided by the number of samples: G is a sum over it / n²
        return [(kron.B * samples, kron.A / len(x)) for kron in krons]

    return run, read


MAKERS: dict[str, Callable[..., Made]] = {
    "ours": ours, "curvlinops": curvlinops, "backpack": backpack, "asdl": asdl,
}


def ready(names: Sequence[str], data: Callable[[], tuple[nn.Module, Tensor, Tensor]],
          samples: int) -> dict[str, Made]:
    """Each on its own copy of the net, run once; those that fail are named and left out."""
    made = {}
    for name in names:
        torch.manual_seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run, read = MAKERS[name](*data(), samples)
                read(run())
        except Exception as error:  # whatever a peer may raise
            print(f"{name}: fails, {type(error).__name__}: {error}")
        else:
            made[name] = run, read
    return made


def small() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.ReLU(), nn.Linear(6, 4)
    )
    return net, torch.randn(8, 1, 6, 6), torch.randint(4, (8,))


def agreement(names: Sequence[str], samples: int = 3000) -> str:
    """A table of distances from the exact G ⊗ A without the bias column, and from our A."""
    lines = [f"{'agreement':<12}{'error of each layer':>28}{'ratio of traces':>28}{'A':>12}"]
    torch.manual_seed(0)
    net, x, y = small()
    exact = [
        (block.output, block.input[:-1, :-1])
        for block in estimate(net, x, y, curvature="ggn").blocks
    ]
    for name, (run, read) in ready(names, small, samples).items():
        torch.manual_seed(1)
        found = read(run())
        errors, inputs, traces = [], [], []
        for (g, a), (true_g, true_a) in zip(found, exact, strict=True):
            a = a[: len(true_a), : len(true_a)]
            true = torch.kron(true_g, true_a)
            errors.append(((torch.kron(g, a) - true).norm() / true.norm()).item())
            inputs.append((a / a.trace() - true_a / true_a.trace()).norm().item())
            traces.append((g.trace() * a.trace() / true.trace()).item())
        cells = (", ".join(f"{value:.3f}" for value in values) for values in (errors, traces))
        lines.append(f"{name:<12}{next(cells):>28}{next(cells):>28}{max(inputs):>12.1e}")
    return "\n".join(lines)


def times(made: dict[str, Made], rounds: int, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of one estimate, one number for each round."""
    spent: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for number in range(rounds + 1):  # the first is the warm-up
        random.shuffle(names)
        for name in names:
            start = time.process_time()
            for _ in range(repeats):
                made[name][0]()
            if number:
                spent[name].append((time.process_time() - start) / repeats)
    return spent


def table(spent: dict[str, list[float]]) -> str:
    lines = [f"{'method':<12}{'ms':>8}{'x ours':>9}{'quartiles':>14}{'range':>14}"]
    for name, mine in spent.items():
        ratios = [a / b for a, b in zip(mine, spent["ours"], strict=True)]
        low, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.75])).tolist()
        lines.append(
            f"{name:<12}{1e3 * median(mine):>8.2f}{median(ratios):>9.2f}"
            f"{f'{low:.2f}-{high:.2f}':>14}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=["lenet", "mlp"])
    add("--peers", nargs="+", choices=list(MAKERS)[1:], default=list(MAKERS)[1:])
    add("--rounds", type=int, default=15)
    add("--repeats", type=int, default=5, help="estimates of each library in a round")
    add("--agreement", action="store_true", help="no timing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    random.seed(0)
    names = ["ours", *args.peers]
    print(agreement(names), flush=True)
    for net in () if args.agreement else args.nets:
        def data(net: str = net) -> tuple[nn.Module, Tensor, Tensor]:
            return NETS[net](), torch.randn(BATCH, 1, 28, 28), torch.randint(CLASSES, (BATCH,))

        print(f"\n{net}, batch {BATCH}, {args.rounds} rounds of {args.repeats}, one thread")
        print(table(times(ready(names, data, 1), args.rounds, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
