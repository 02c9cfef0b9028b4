"""Do the tests notice? Faults are planted in `posterior/` and `layers/`, and each must be caught.

    python benchmarks/mutations.py                  # all, some minutes for each processor
    python benchmarks/mutations.py --only prior     # mutations whose file or text has "prior"

Each mutation replaces one piece of text in a copy of the package, with a wrong sign, scale, factor,
axis or mask; then the tests of its list run until the first failure. A mutation that no test
catches is printed as SURVIVED, and the exit status is 1. The unchanged copy runs first, and must
pass.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STEP = "tests/posterior tests/infer/test_conjugate.py tests/optim/test_vi.py"
LAYERS = "tests/layers tests/curvature/test_estimate.py"


class Mutation(NamedTuple):
    """Text to be replaced in a file of the package, and the tests that must fail."""

    file: str
    old: str
    new: str
    tests: str


def posterior(file: str, old: str, new: str, tests: str = STEP) -> Mutation:
    return Mutation(f"posterior/{file}.py", old, new, tests)


def layers(file: str, old: str, new: str, tests: str = LAYERS) -> Mutation:
    return Mutation(f"layers/{file}.py", old, new, tests)


MUTATIONS = [
    # ---- posterior: scales, signs, terms
    posterior("natural_gradient", "curvature.scale(likelihood_weight).shift(", "curvature.shift("),
    posterior("natural_gradient", "delta + likelihood_weight * initial_curvature",
              "delta + initial_curvature"),
    posterior("natural_gradient", "delta + likelihood_weight * initial_curvature",
              "likelihood_weight * initial_curvature"),
    posterior("natural_gradient", "delta / likelihood_weight + (initial", "delta + (initial"),
    posterior("natural_gradient", "(initial_curvature + damping)", "initial_curvature"),
    posterior("natural_gradient", "root = None if scaling is None else scaling.root",
              "root = None"),
    posterior("natural_gradient", "estimate - old", "old - estimate"),
    posterior("natural_gradient", "(rate * change).square() / (2 *",
              "(rate * change).square() / (1 *"),
    posterior("natural_gradient", "bias_correction / likelihood_weight",
              "bias_correction * likelihood_weight"),
    posterior("natural_gradient", "value = bias_correction / likelihood_weight",
              "value = -bias_correction / likelihood_weight"),
    posterior("natural_gradient", "math.sqrt(kl_clip / energy)", "kl_clip / energy"),
    posterior("natural_gradient", "energy / 100", "energy / 10"),
    posterior("natural_gradient", "return (total - torch.stack", "return (total + torch.stack"),
    posterior("step", "weight = 1 - state.hyperparameters.momentum",
              "weight = state.hyperparameters.momentum"),
    posterior("step", "return lr / state.hyperparameters.bias_correction(step)", "return lr"),
    posterior("step", "state.hyperparameters.base_lr, state", "state.hyperparameters.lr, state"),
    posterior("step", "state, posterior.step)) ** 2", "state, posterior.step))"),
    posterior("step", "return self.direction.add_to(mean, -self.rate)",
              "return self.direction.add_to(mean, self.rate)"),
    posterior("step", "return 4 / (step + 4)", "return 4 / (step + 5)"),
    posterior("step", "mean = move.moved(state.mean.clone())", "mean = state.mean.clone()"),
    posterior("step", "Posterior(posterior.step + 1, blocks)", "Posterior(posterior.step, blocks)"),
    posterior("hyperparameters", "return self.num_data / self.temperature",
              "return self.num_data * self.temperature"),
    posterior("hyperparameters", "return 1 - self.momentum ** (step + 1)",
              "return 1 - self.momentum ** (step + 2)"),
    posterior("hyperparameters", "min(0.1, num_data / max(size, 1))",
              "min(0.1, max(size, 1) / num_data)"),
    posterior("sampling", "alpha=perturbation.sign", "alpha=1.0"),
    posterior("sampling", "return [perturbation.mirrored() for perturbation in mirrors]",
              "return mirrors"),
    posterior("sampling", "state.precision.rsqrt_(z)", "z"),
    posterior("sampling", "if prior.precision.dim() or prior.loc.dim():", "if False:"),
    posterior("prior", "scale.square().reciprocal()", "scale.reciprocal()"),
    posterior("prior", "(weights - self.loc)", "weights")
    if False else posterior("prior", "weights if self.zero_mean else weights - self.loc",
                            "weights"),
    posterior("prior", "self.precision * power, self.zero_mean, power",
              "self.precision / power, self.zero_mean, power"),
    posterior("prior", "(output / 2).exp(), (input / 2).exp()", "output.exp(), input.exp()"),
    posterior("prior", "((output / 2).exp(), (input / 2).exp())",
              "((-output / 2).exp(), (input / 2).exp())"),
    posterior("prior", "precision.inverse_diag() + (loc - prior.loc).square()",
              "precision.inverse_diag()"),
    posterior("prior", "if prior is None or not (is_static and unchanged):", "if prior is None:"),
    posterior("precision", "min(0.05, max(0.01, batch_fraction))) ** step",
              "min(0.05, max(0.01, batch_fraction)))"),
    posterior("precision", "(1 - spec.decay) / every", "(1 - spec.decay)"),
    posterior("precision", "state.precision.diag() * epsilons", "epsilons"),
    posterior("precision", "if not state.curvature.is_in(state.prior.scaling):", "if False:"),
    posterior("precision", "state.curvature.semidefinite(spec.kind)", "state.curvature.curvature"),
    posterior("joint_update", "x + x @ x / 2", "x + x @ x"),
    posterior("joint_update", "target / values - 1", "target / values"),
    posterior("joint_update", "root @ change @ root.mT", "root.mT @ change @ root"),
    posterior("joint_update", "(precision.logdet() - squared_norm", "(precision.logdet()"),
]


def run(mutation: Mutation | None, folder: Path) -> tuple[bool, float]:
    """Whether the tests pass on a copy of the package with the mutation, and the seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        copy = Path(place)
        for name in ("pyrocurv", "tests", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        tests = f"{STEP} {LAYERS}" if mutation is None else mutation.tests
        if mutation is not None:
            path = copy / "pyrocurv" / mutation.file
            text = path.read_text()
            if text.count(mutation.old) != 1:
                raise ValueError(f"{mutation.file} has {mutation.old!r} not exactly once")
            path.write_text(text.replace(mutation.old, mutation.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider",
             *tests.split()],
            cwd=copy, env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0, time.monotonic() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a mutation's file or text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if args.only in f"{m.file} {m.old} {m.new}"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        passed, seconds = run(None, Path(folder))
        print(f"unchanged: {'passes' if passed else 'FAILS'} ({seconds:.0f} s)", flush=True)
        survived = 0
        for mutation, (passed, seconds) in zip(
            chosen, pool.map(lambda m: run(m, Path(folder)), chosen), strict=True
        ):
            survived += passed
            word = "SURVIVED" if passed else "caught"
            print(f"{word:<9}{mutation.file:<32}{mutation.old} -> {mutation.new} ({seconds:.0f} s)",
                  flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations caught")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
