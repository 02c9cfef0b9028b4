"""Is a device ready: the same numbers as on the CPU, without waiting, and at which cost a step?

    python benchmarks/gpu.py --device cuda
    python benchmarks/gpu.py --device cpu --smoke       # all but the large networks; half a minute
    python benchmarks/gpu.py --device cuda --only resume

One table, a row for each check. "error" is the largest difference between a run on the device and
one on the CPU, relative to the largest number there if that is above 1. Both are in float64 and
have the same random numbers, drawn on the CPU; eigenvectors have the same signs. MPS has no
float64: there both are in float32, with another tolerance. On the CPU itself the other run has data
that differ by their last bits, so that the tolerance says how much of rounding a check amplifies.

`resume` saves a run on one device and continues it on the other. `no waiting` is a step in which no
curvature is due, with data validation off: on CUDA every synchronization in it raises but the one
that reads loss and trust region; on a CPU the operations that would synchronize are counted. `step`
is the time of a step, a median over rounds, as a multiple of AdamW's on the same network.

The exit status is 1 if a check fails; times fail nothing.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import pyro
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyrocurv
from nets import BATCH, IMAGES, NETS
from pyrocurv import guides, optim, structures
from pyrocurv.curvature import KFAC, Curvature, estimate
from pyrocurv.infer import NGVI, Laplace, Predictive
from pyrocurv.posterior import step as step_module
from pyrocurv.structures import linalg
from step_cost import IVON, NUM_DATA, DispatchCounter, ivon_step, torch_step

NUM, FEATURES, CLASSES = 24, (2, 3, 3), 3
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3}
KINDS = ("ggn", "fisher", "empirical", "hessian")
STRUCTURES = ("full", "block", "diag", "kfac", "kfac-block", "ekfac")
GUIDES = {
    "KFACGuide": guides.KFACGuide, "EKFACGuide": guides.EKFACGuide,
    "DiagonalGuide": guides.DiagonalGuide, "BlockGuide": guides.BlockGuide,
    "FullGuide": guides.FullGuide,
    "KFACGuide, rank 2": partial(guides.KFACGuide, structure={"*": KFAC(rank=2)}),
}
UPDATES = ("natural", "whitened-muon", "muon", "soap", torch.optim.AdamW)
SYNCHRONIZING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
NOISE = torch.Generator()  # of all random numbers in a check
RANDOM = ("randn", "rand", "randint", "multinomial", "bernoulli")

Numbers = list[Tensor]
Step = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Place:
    """Where a run takes place; with `rounding` its data differ in their last bits."""

    device: torch.device
    dtype: torch.dtype
    rounding: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        """Images [NUM, *FEATURES] and their classes [NUM]."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(NUM, *FEATURES, generator=generator, dtype=torch.float64)
        if self.rounding:
            x = x * (1 + torch.finfo(self.dtype).eps)
        y = torch.randint(CLASSES, (NUM,), generator=generator)
        return x.to(self.device, self.dtype), y.to(self.device)

    def net(self, norm: bool = False) -> nn.Module:
        """A small network with a convolution; with `norm` also a normalization layer."""
        torch.manual_seed(0)
        middle = [nn.GroupNorm(3, 3)] if norm else []
        net = nn.Sequential(
            nn.Conv2d(2, 3, 2), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(),
            nn.Linear(4, CLASSES),
        )
        return net.to(self.device, self.dtype)

    def model(self, norm: bool = False) -> nn.Module:
        return pyrocurv.nn.Classifier(pyrocurv.nn.bayesianize(self.net(norm)), num_data=NUM)


# ---- the same random numbers everywhere ---------------------------------------------------------


@contextmanager
def same_noise() -> Iterator[None]:
    """Random numbers are drawn on the CPU inside, and the signs of eigenvectors are fixed."""
    NOISE.manual_seed(2)
    eigh = linalg.eigh

    def on_cpu(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(*args: Any, device: Any = None, generator: Any = None, **options: Any) -> Tensor:
            given = next((arg for arg in args if isinstance(arg, Tensor)), None)
            args = tuple(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args)
            drawn = function(*args, generator=NOISE, **options)
            return drawn.to(device or "cpu") if given is None else drawn.to(given.device)

        return draw

    def with_signs(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        weights = torch.linspace(1, 2, matrix.shape[-1]).cos().to(vectors)
        return values, vectors * (weights @ vectors).sign().unsqueeze(-2)

    randn = on_cpu(torch.randn)
    users = [m for n, m in sys.modules.items()
             if n.startswith("pyrocurv") and getattr(m, "eigh", None) is eigh]
    with ExitStack() as stack:
        for name in RANDOM:
            stack.enter_context(mock.patch.object(torch, name, on_cpu(getattr(torch, name))))
        stack.enter_context(mock.patch.object(
            torch, "randn_like", lambda x: randn(x.shape, dtype=x.dtype, device=x.device)
        ))
        for module in users:
            stack.enter_context(mock.patch.object(module, "eigh", with_signs))
        yield


# ---- what is compared ---------------------------------------------------------------------------


def posterior(guide: guides.StructuredGuide) -> Numbers:
    """The means and precisions of a guide."""
    found = []
    for family in guide.blocks:
        found += [family.raw_loc.detach(), family.precision().dense().detach()]
    return found


def parameters(net: nn.Module) -> Numbers:
    return [p.detach() for p in net.parameters()]


def ngvi(
    place: Place, guide: Callable[..., Any] = guides.KFACGuide, kind: str = "fisher",
    steps: int = 4, norm: bool = False, **options: Any,
) -> Numbers:
    """Losses and posterior of a run with two estimates of the curvature."""
    model = place.model(norm)
    made = guide(model)
    engine = NGVI(
        model, made, temperature=0.1, curvature=Curvature(kind, every=2, eigen_every=2), **options
    )
    losses = [engine.step(*place.data()) for _ in range(steps)]
    return [torch.tensor(losses), *posterior(made)]


def joint(place: Place, guide: Callable[..., Any]) -> Numbers:
    """A model without a network."""
    x, y = place.data()
    design, target = x.flatten(1)[:, :3], x.flatten(1)[:, 3] + y

    def model() -> None:
        zero = design.new_zeros(())
        w = pyro.sample("w", pyro.distributions.Normal(zero, 1.0).expand([3]).to_event(1))
        scale = pyro.sample("scale", pyro.distributions.LogNormal(zero, 1.0))
        with pyro.plate("data", NUM):
            pyro.sample("y", pyro.distributions.Normal(design @ w, scale), obs=target)

    made = guide(model)
    engine = NGVI(model, made, curvature="hessian", num_particles=2)
    return [torch.tensor([engine.step() for _ in range(3)]), *posterior(made)]


def optimizer(
    place: Place, make: Callable[..., torch.optim.Optimizer], norm: bool = False
) -> Numbers:
    net = place.net(norm)
    chosen = make(net)
    return optimizer_steps(place, net, chosen, 4)


def optimizer_steps(
    place: Place, net: nn.Module, chosen: torch.optim.Optimizer, steps: int
) -> Numbers:
    x, y = place.data()
    for _ in range(steps):
        chosen.zero_grad()
        with getattr(chosen, "sampled_params", nullcontext)():
            F.cross_entropy(net(x), y).backward()
        chosen.step()
    return parameters(net)


def estimates(place: Place, kind: str) -> Numbers:
    return [
        estimate(place.net(), *place.data(), curvature=kind, structure=structure).dense()
        for structure in STRUCTURES
    ]


def laplace(place: Place, guide: Callable[..., Any]) -> Numbers:
    model, (x, y) = place.model(), place.data()
    made = guide(model)
    fitted = Laplace(model, made).fit([(x, y)])
    evidence = [fitted.log_marginal_likelihood()]
    scales = fitted.tune_prior()
    evidence.append(fitted.log_marginal_likelihood())
    return [torch.tensor(evidence), *scales.values(), fitted.predict(x).probs, *posterior(made)]


def predictive(place: Place, guide: Callable[..., Any]) -> Numbers:
    model, (x, y) = place.model(), place.data()
    made = guide(model)
    engine = NGVI(model, made, temperature=0.1)
    engine.step(x, y)
    sampled = Predictive(model, guide=made, num_samples=5, return_sites=["_RETURN"])(x)
    mixture = guides.MixtureGuide([made, made])
    mixed = Predictive(model, guide=mixture, num_samples=4, return_sites=["_RETURN"])(x)
    return [sampled["_RETURN"], mixed["_RETURN"], torch.tensor([engine.evaluate_loss(x, y)])]


def matrices(place: Place) -> Numbers:
    """Every operation of every structure."""
    x = place.data()[0].flatten(1)
    a, g = x.T @ x / NUM, x[:, :4].T @ x[:, :4] / NUM
    eye = torch.eye(len(a)).to(a)
    factors = structures.Kronecker(g + torch.eye(4).to(g), a[:5, :5] + eye[:5, :5])
    thin = structures.Kronecker(factors.output, a + eye).eigen(ranks=(2, 3))
    found = []
    for matrix in (
        structures.Dense(a + eye), structures.Diagonal(a.diagonal() + 1), factors, thin,
        factors.eigen(), structures.Rescaled(factors.eigen(), 1 + x[0].repeat(2)[:20].square()),
    ):
        z = torch.linspace(-1, 1, matrix.size).to(a)
        found += [
            matrix @ z, matrix.solve(z), matrix.rsqrt(z), matrix.logdet(), matrix.diag(),
            matrix.inverse_diag(), matrix.eigenvalues(), matrix.trace(), matrix.scale(0.5).dense(),
            matrix.psd().dense(), matrix.solution(z.clone()).add_to(z.clone(), 0.5),
        ]
    return found


# ---- a run that is continued on another device --------------------------------------------------


def through_a_file(state: Any, place: Place) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location=place.device, weights_only=True)


def resumed_ngvi(first: Place, second: Place) -> Numbers:
    """Three steps on the first place and three on the second, at the mean and at samples."""
    found = []
    for count in (0, 1):
        pyro.clear_param_store()
        model = first.model()
        made = guides.KFACGuide(model)
        engine = NGVI(model, made, temperature=0.1, num_particles=count)
        for _ in range(3):
            engine.step(*first.data())
        saved = [made.state_dict(), engine.state_dict()]
        if first != second:
            pyro.clear_param_store()
            model = second.model()
            made = guides.KFACGuide(model)
            made.load_state_dict(through_a_file(saved[0], second))
            engine = NGVI(model, made, temperature=0.1, num_particles=count)
            engine.load_state_dict(through_a_file(saved[1], second))
        NOISE.manual_seed(3)
        losses = [engine.step(*second.data()) for _ in range(3)]
        found += [torch.tensor(losses), *posterior(made)]
    return found


def resumed_optimizer(
    make: Callable[..., torch.optim.Optimizer], first: Place, second: Place
) -> Numbers:
    net = first.net()
    chosen = make(net)
    optimizer_steps(first, net, chosen, 3)
    if first != second:
        saved = [net.state_dict(), chosen.state_dict()]
        net = second.net()
        chosen = make(net)
        net.load_state_dict(through_a_file(saved[0], second))
        chosen.load_state_dict(through_a_file(saved[1], second))
    NOISE.manual_seed(3)
    return optimizer_steps(second, net, chosen, 3)


# ---- the table ----------------------------------------------------------------------------------

Check = Callable[[Place], Numbers]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SecondOrderOptimizer": optim.SecondOrderOptimizer,
    "VIOptimizer": partial(optim.VIOptimizer, num_data=NUM, temperature=0.1),
    "noisy_kfac": partial(optim.noisy_kfac, num_data=NUM),
    "noisy_ekfac": partial(optim.noisy_ekfac, num_data=NUM),
    "vogn": partial(optim.vogn, num_data=NUM), "ivon": partial(optim.ivon, num_data=NUM),
}


def name_of(update: Any) -> str:
    return update if isinstance(update, str) else update.__name__


def checks() -> dict[str, Check]:
    """{row: what it computes}."""
    found: dict[str, Check] = {"structures": matrices}
    for kind in KINDS:
        found[f"estimate, {kind}"] = partial(estimates, kind=kind)
    for name, guide in GUIDES.items():
        for kind in KINDS:
            found[f"NGVI, {name}, {kind}, at the mean"] = partial(
                ngvi, guide=guide, kind=kind, num_particles=0
            )
        found[f"NGVI, {name}, samples"] = partial(ngvi, guide=guide, num_particles=2, average=True)
        found[f"Laplace, {name}"] = partial(laplace, guide=guide)
        found[f"Predictive, {name}"] = partial(predictive, guide=guide)
    found["NGVI, DiagonalGuide, noise"] = partial(ngvi, guide=guides.DiagonalGuide, kind="noise")
    found["NGVI, a normalization layer"] = partial(ngvi, norm=True)
    for guide in (guides.FullGuide, guides.DiagonalGuide):
        found[f"NGVI, {guide.__name__}, no network"] = partial(joint, guide=guide)
    for update in UPDATES:
        found[f"NGVI, update={name_of(update)}"] = partial(ngvi, update=update)
        make = partial(optim.SecondOrderOptimizer, update=update)
        found[f"SecondOrderOptimizer, update={name_of(update)}"] = partial(optimizer, make=make)
    for name, make in OPTIMIZERS.items():
        found[name] = partial(optimizer, make=make)
    return found


def resumes() -> dict[str, Callable[[Place, Place], Numbers]]:
    return {"resume, NGVI": resumed_ngvi, **{
        f"resume, {name}": partial(resumed_optimizer, make) for name, make in OPTIMIZERS.items()
    }}


def numbers(run: Callable[..., Numbers], *places: Place) -> Numbers:
    """What a run gives, on the CPU in float64."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    with same_noise():
        return [x.detach().to("cpu", torch.float64) for x in run(*places)]


def error(ours: Numbers, theirs: Numbers) -> float:
    """The largest difference, relative to numbers above 1."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


@dataclass(frozen=True)
class Row:
    name: str
    value: str
    passed: bool | None = None  # None: nothing to pass

    def __str__(self) -> str:
        verdict = {None: "", True: "pass", False: "FAIL"}[self.passed]
        return f"{self.name:<52}{self.value:>22}  {verdict}".rstrip()


def compared(name: str, ours: Callable[[], Numbers], theirs: Callable[[], Numbers],
             tolerance: float) -> Row:
    try:
        found = error(ours(), theirs())
    except Exception as exception:  # a row of the table, and the next ones still run
        return Row(name, f"{type(exception).__name__}: {exception}".splitlines()[0], False)
    return Row(name, f"error {found:.1e}", found <= tolerance)


def correctness(place: Place, only: str) -> Iterator[Row]:
    cpu = Place(torch.device("cpu"), place.dtype)
    tolerance = TOLERANCE[place.dtype]
    for name, check in checks().items():
        if only in name:
            yield compared(name, partial(numbers, check, place), partial(numbers, check, cpu),
                           tolerance)
    for name, run in resumes().items():
        for first, second, way in ((cpu, place, "CPU to device"), (place, cpu, "device to CPU")):
            if only in name:
                yield compared(
                    f"{name}, {way}", partial(numbers, run, first, second),
                    partial(numbers, run, cpu, cpu), tolerance,
                )


# ---- synchronizations ---------------------------------------------------------------------------


@contextmanager
def no_waiting(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives the number of synchronizing operations inside, beside the one that is allowed."""
    if device.type != "cuda":
        with DispatchCounter() as counter:
            yield lambda: sum(counter.counts[name] for name in SYNCHRONIZING)
        return
    allowed = step_module._finite

    def finite(*args: Any) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return allowed(*args)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with mock.patch.object(step_module, "_finite", finite):
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield lambda: 0
        finally:
            torch.cuda.set_sync_debug_mode("default")


def quiet_step(label: str, make: Callable[[nn.Module], Step], place: Place) -> Row:
    """Whether two steps without an estimate, one of them with a new sample, wait."""
    pyro.clear_param_store()
    step, (x, y) = make(place.net()), place.data()
    with pyro.validation_enabled(False), pyro.infer.util.validation_enabled(False):
        for _ in range(3):
            step(x, y)
        try:
            with no_waiting(place.device) as count:
                step(x, y)
                step(x, y)
        except RuntimeError as exception:
            return Row(label, str(exception).splitlines()[0], False)
    return Row(label, f"{count()} beside the one", count() == 0)


def waiting(place: Place, only: str) -> Iterator[Row]:
    """A quiet step of each method."""
    made = {name: partial(ngvi_step, guide=guide) for name, guide in GUIDES.items()}
    for name, make in {
        **made, "SecondOrderOptimizer": second_order_step, "VIOptimizer": vi_step
    }.items():
        if only in f"no waiting, {name}" and place.device.type != "mps":
            yield quiet_step(f"no waiting, {name}", make, place)


# ---- times --------------------------------------------------------------------------------------


class Characters(nn.Module):
    """A GPT whose classes are the second axis of its output [B, V, T]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        # which needs more than the rest
        from transformer import ALPHABET, CONTEXT, GPT

        self.net = GPT(len(ALPHABET), CONTEXT, width, max(1, width // 64), layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).transpose(1, 2)


def ngvi_step(net: nn.Module, guide: Callable[..., Any] = guides.KFACGuide) -> Step:
    pyro.clear_param_store()
    inner = net.net if isinstance(net, Characters) else net
    layers = [nn.Linear] if isinstance(net, Characters) else None
    net = pyrocurv.nn.bayesianize(inner, **({"layers": layers} if layers else {}))
    if layers is None:
        model: Any = pyrocurv.nn.Classifier(net, num_data=NUM_DATA)
    else:
        sys.path.append(str(Path(__file__).parents[1] / "examples"))
        from language.posterior import Tokens

        model = Tokens(net, NUM_DATA)
    return NGVI(model, guide(model), temperature=0.1).step


def second_order_step(net: nn.Module) -> Step:
    class_dim = 1 if isinstance(net, Characters) else None
    return torch_step(net, optim.SecondOrderOptimizer(net, class_dim=class_dim))


def vi_step(net: nn.Module) -> Step:
    chosen = optim.VIOptimizer(net, num_data=NUM_DATA, temperature=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        chosen.zero_grad()
        with chosen.sampled_params():
            F.cross_entropy(net(x), y).backward()
        chosen.step()

    return step


def muon_step(net: nn.Module) -> Step:
    """torch's Muon for what is a matrix, and AdamW for the rest."""
    matrices = [p for p in net.parameters() if p.dim() == 2]
    both = [torch.optim.Muon(matrices, lr=0.02),
            torch.optim.AdamW([p for p in net.parameters() if p.dim() != 2])]

    def step(x: Tensor, y: Tensor) -> None:
        for one in both:
            one.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        for one in both:
            one.step()

    return step


METHODS: dict[str, Callable[[nn.Module], Step]] = {
    "AdamW": lambda net: torch_step(net, torch.optim.AdamW(net.parameters())),
    **({"Muon": muon_step} if hasattr(torch.optim, "Muon") else {}),
    **({"IVON": ivon_step} if IVON is not None else {}),
    "SecondOrderOptimizer": second_order_step,
    "NGVI, KFACGuide": ngvi_step,
    "NGVI, DiagonalGuide": partial(ngvi_step, guide=guides.DiagonalGuide),
}


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def seconds(step: Step, x: Tensor, y: Tensor, steps: int) -> float:
    """Of one step."""
    synchronize(x.device)
    start = time.perf_counter()
    for _ in range(steps):
        step(x, y)
    synchronize(x.device)
    return (time.perf_counter() - start) / steps


def cases(smoke: bool) -> Mapping[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]]:
    """{network: it, and a batch}."""
    width, layers, sequences = (16, 1, 2) if smoke else (768, 12, 32)

    def images(name: str) -> tuple[nn.Module, Tensor, Tensor]:
        batch = 8 if smoke else 128 if name == "resnet18" else BATCH[name]
        return NETS[name](), torch.randn(batch, *IMAGES[name]), torch.randint(10, (batch,))

    def gpt() -> tuple[nn.Module, Tensor, Tensor]:
        x = torch.randint(90, (sequences, 65))
        return Characters(width, layers), x[:, :-1], x[:, 1:]

    return {
        "LeNet-5": partial(images, "lenet"),
        **({} if smoke else {"resnet18": partial(images, "resnet18")}), f"GPT, width {width}": gpt,
    }


def costs(device: torch.device, only: str, smoke: bool) -> Iterator[Row]:
    """In float32; blocks of 20 steps are whole cycles of the curvature."""
    rounds, steps = (1, 2) if smoke else (5, 20)
    for name, make in cases(smoke).items():
        if only not in f"step, {name}":
            continue
        try:
            _, x, y = make()
        except ImportError as missing:
            yield Row(f"step, {name}", f"skipped, no {missing.name}")
            continue
        x, y, found = x.to(device), y.to(device), dict[str, Step]()
        for method, of in METHODS.items():
            torch.manual_seed(0)
            found[method] = of(make()[0].to(device))
        times: dict[str, list[float]] = {method: [] for method in found}
        for number in range(rounds + 1):
            for method, step in found.items():
                taken = seconds(step, x, y, steps)
                if number or smoke:
                    times[method].append(taken)
        for method, taken in times.items():
            ratio = median(a / b for a, b in zip(taken, times["AdamW"], strict=True))
            yield Row(f"step, {name}, {method}", f"{1e3 * median(taken):.2f} ms, x {ratio:.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), required=True)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their names")
    parser.add_argument("--smoke", action="store_true", help="the steps of tiny networks alone")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        parser.error(f"--device {args.device}: torch has no such device here")
    dtype = torch.float32 if device.type == "mps" else torch.float64
    place = Place(device, dtype, rounding=device.type == "cpu")
    print(f"{device.type}, torch {torch.__version__}, checks in {dtype}", flush=True)
    failed = 0
    warnings.filterwarnings("ignore", "SecondOrderOptimizer: .* consumed by no supported op")
    for rows in (correctness(place, args.only), waiting(place, args.only),
                 costs(device, args.only, args.smoke)):
        for row in rows:
            failed += row.passed is False
            print(row, flush=True)
    print(f"{failed} checks failed" if failed else "all checks passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
