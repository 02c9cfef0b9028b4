"""Do the tests notice? Faults are planted in the package, and each must be caught by a test.

    python benchmarks/mutations.py                  # all, about ten minutes of one processor
    python benchmarks/mutations.py --only prior     # mutations whose file or text contains "prior"

Each mutation replaces one piece of text in a copy of the package, such as a sign, a scale, a
factor, an axis or a mask, and the tests listed with it run until the first failure. A mutation that
no test catches is printed as SURVIVED, and the exit status is 1. The tests run on the unchanged
package first, and must pass there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAPTURE = "tests/layers/test_capture.py::test_"
PRIOR = "tests/posterior/test_prior.py::test_"
PRECISION = "tests/posterior/test_precision.py::test_"
NATURAL = "tests/posterior/test_natural_gradient.py::test_"
BLOCK = "tests/layers/test_block.py::test_"
PACKING = "tests/layers/test_packing.py::test_"
STACK = "tests/structures/test_stack.py::test_"
STRUCTURES = "tests/structures/test_structures.py::test_"
LAYERS = "tests/layers/test_layers.py::test_"
TOKENS = "tests/curvature/test_tokens.py::test_"
UPDATES = "tests/posterior/test_mean_update.py::test_"
TEMPERATURE = "tests/posterior/test_temperature_rule.py::test_"
NGVI = "tests/infer/test_ngvi.py::test_"
STEP = "tests/infer/test_ngvi_step.py::test_"
MODELS = "tests/infer/test_ngvi_models.py::test_"
ERRORS = "tests/infer/test_ngvi_errors.py::test_"
RETRACT = "tests/posterior/test_joint_update.py::test_"
JOINT = "tests/infer/test_joint_step.py::test_"
VI = "tests/optim/test_vi.py::test_"
PARAMETERS = "tests/infer/test_ngvi_parameters.py::test_"
TASKS = "tests/infer/test_sequential_tasks.py::test_"
NN = "tests/nn/test_nn.py::test_"

# {file of the package: (text that occurs once, its replacement, a test that fails)}
FAULTS: dict[str, list[tuple[str, str, str]]] = {
    "posterior/natural_gradient": [
        ("curvature.scale(likelihood_weight).shift(", "curvature.shift(",
         f"{NGVI}one_step_finds_the_exact_posterior"),
        ("delta + likelihood_weight * initial_curvature", "delta + initial_curvature",
         f"{NGVI}initial_curvature_fades"),
        ("delta + likelihood_weight * initial_curvature", "likelihood_weight * initial_curvature",
         f"{NGVI}one_step_finds_the_exact_posterior"),
        ("delta + likelihood_weight * initial_curvature",
         "delta + likelihood_weight * (initial_curvature + damping)",
         f"{NGVI}damping_never_shrinks_the_posterior"),
        ("delta / likelihood_weight + (initial", "delta + (initial",
         f"{NGVI}one_step_finds_the_exact_posterior"),
        ("weight + (initial_curvature + damping)", "weight + initial_curvature",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
        ("root = None if scaling is None else scaling.root", "root = None",
         f"{NGVI}per_input_priors_are_exact_in_kronecker_blocks"),
        ("prior.diagonal / likelihood_weight\n", "prior.diagonal * likelihood_weight\n",
         f"{VI}ivon_is_its_equations"),
        ("estimate - old", "old - estimate", f"{VI}ivon_is_its_equations"),
        ("/ (2 * (old + share))", "/ (old + share)", f"{VI}ivon_is_its_equations"),
        ("torch.where(old + share > 0, old, torch.zeros_like(old))", "old",
         f"{NATURAL}a_diagonal_that_the_prior_no_longer_outweighs_starts_again"),
        ("total.scale(1 / likelihood_weight)", "total",
         f"{TASKS}two_halves_in_sequence_are_all_data_at_once"),
        ("math.sqrt(kl_clip / energy)", "kl_clip / energy", f"{STEP}the_clip_bounds_a_step"),
        ("energy / 100", "energy / 10",
         f"{NATURAL}momentum_is_at_most_ten_radii_of_the_trust_region"),
        ("torch._foreach_neg([*negative, *squared_norms])", "[*negative, *squared_norms]",
         f"{NGVI}one_step_finds_the_exact_posterior"),
    ],
    "posterior/mean_update": [
        ("numbers.lr / correction, numbers", "numbers.lr, numbers",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
        ("numbers.base_lr / correction)", "numbers.lr / correction)",
         f"{PARAMETERS}the_trust_region_is_that_of_the_base_learning_rate"),
        ("[push.bias_correction for push in pushes])]", "[1.0 for push in pushes])]",
         f"{UPDATES}gradients_are_those_of_the_tempered_objective"),
        ("correction / push.state.hyperparameters.likelihood_weight",
         "correction * push.state.hyperparameters.likelihood_weight",
         f"{NGVI}one_step_finds_the_exact_posterior"),
        ("correction / push.state.hyperparameters.likelihood_weight",
         "1 / push.state.hyperparameters.likelihood_weight",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
    ],
    "posterior/muon": [
        ("max(1.0, outputs / inputs) ** 0.5", "max(1.0, outputs / inputs)",
         f"{UPDATES}tall_matrices_move_further"),
        ("return vector if root is None else vector / root", "return vector",
         f"{UPDATES}whitened_muon"),
        ("Direction.of(push, _over_root(push, vector), lr)", "Direction.of(push, vector, lr)",
         f"{UPDATES}whitened_muon"),
        ("or curvature.positions > 1", "or curvature.positions > 0",
         f"{UPDATES}a_wide_matrix_is_whitened_only_if_a_batch_has_many_rows"),
    ],
    "posterior/orthogonalization": [
        ("self.whitening(self.h, 2)", "self.whitening(self.h, 1)",
         f"{UPDATES}orthogonalized_in_whitened_coordinates"),
        ("matmul(self.x, self._whiten(factor))", "matmul(self.x, factor)",
         f"{UPDATES}orthogonalized_in_whitened_coordinates"),
        ("self.is_wide and self.is_accurate", "self.is_wide",
         f"{UPDATES}whitened_by_bases_of_half_precision"),
        ("torch._foreach_div(single, _magnitudes(single))", "single",
         f"{UPDATES}matrices_of_any_scale"),
    ],
    "posterior/adam": [
        ("max(1 - DECAY, 1 / count)", "1 - DECAY",
         f"{UPDATES}soap_is_adam_in_the_eigenbasis"),
        ("basis.mean_squares(last)", "basis.mean_squares(h)",
         f"{UPDATES}soap_is_adam_in_the_eigenbasis"),
    ],
    "posterior/temperature": [
        ("REFERENCE * fit**POWER", "REFERENCE * fit", f"{TEMPERATURE}the_automatic_temperature"),
        ("if state.is_fitted else", "if True else", f"{TEMPERATURE}the_automatic_temperature"),
        ("state.is_first_pass or state.is_stalled", "state.is_first_pass",
         f"{TEMPERATURE}the_automatic_temperature"),
        ("loss / self.start / 4", "loss / self.start / 3",
         f"{TEMPERATURE}the_ceiling_is_that_of_two_early_passes"),
        ("self.finished != 3 or", "self.finished != 2 or",
         f"{TEMPERATURE}the_ceiling_is_that_of_two_early_passes"),
        ("loss - value * self.determined / 2 <", "loss <",
         f"{TEMPERATURE}the_ceiling_is_that_of_two_early_passes"),
        ("loss > RISEN * self.second", "loss > 2 * self.second",
         f"{TEMPERATURE}the_ceiling_is_that_of_two_early_passes"),
        ("if is_stalled and is_noise", "if is_noise",
         f"{TEMPERATURE}progress_after_the_first_pass_keeps_the_factor"),
        ("new.passes < 1 or", "new.passes < 2 or",
         f"{TEMPERATURE}the_factor_falls_by_ten_once_in_a_pass_without_progress"),
    ],
    "posterior/step": [
        ("complete, 1 - momentum)", "complete, momentum)",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
        ("dot * direction.energy_rate * direction", "dot * direction",
         f"{STEP}the_clip_bounds_a_step"),
        ("add_to(mean, -self.rate)", "add_to(mean, self.rate)",
         f"{NGVI}one_step_finds_the_exact_posterior"),
        ("return 4 / (step + 4)", "return 4 / (step + 5)", f"{NGVI}average"),
        ("lerp(precision, average_weight(step))", "lerp(precision, 1 - average_weight(step))",
         f"{NGVI}average"),
        ("mean = move.moved(state.mean.clone())", "mean = state.mean.clone()", f"{NGVI}average"),
        ("step=posterior.step + 1", "step=posterior.step",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
        ("for g in gradients if g is not None]", "for g in []]",
         f"{ERRORS}a_gradient_that_is_not_finite_where_the_loss_is"),
    ],
    "posterior/hyperparameters": [
        ("self.num_data / self.temperature", "self.num_data * self.temperature",
         f"{NGVI}temperature"),
        ("1 - self.momentum ** (step + 1)", "1 - self.momentum ** (step + 2)",
         f"{STEP}momentum_is_of_the_likelihood_gradient"),
        ('group.get(BASE_LR, group.get("initial_lr", group["lr"]))', 'group["lr"]',
         f"{PARAMETERS}the_trust_region_is_that_of_the_base_learning_rate"),
    ],
    "posterior/sampling": [
        ("alpha=perturbations[0].sign", "alpha=1.0",
         f"{NGVI}noise_comes_in_antithetic_pairs_over_the_steps"),
        ("[perturbation.mirrored() for perturbation in mirrors]", "mirrors",
         f"{NGVI}noise_comes_in_antithetic_pairs_over_the_steps"),
        ("samples_([state.precision for state in blocks], drawn)", "drawn",
         f"{VI}ivon_draws_from_its_posterior"),
        ("torch._foreach_mul(norms, norms)", "norms", f"{NGVI}one_step_finds_the_exact_posterior"),
    ],
    "posterior/state": [
        ("return self.sign * self.direction", "return self.direction",
         f"{VI}ivon_is_its_equations"),
    ],
    "posterior/prior": [
        ("scale.square().reciprocal()", "scale.reciprocal()",
         f"{PRIOR}priors_are_packed_as_the_weights_are"),
        ("weights if self.zero_mean else weights - self.loc", "weights",
         f"{PRIOR}a_prior_to_a_power"),
        ("self._log_sum * size", "self._log_sum",
         f"{PRIOR}one_prior_for_all_weights_is_a_scalar"),
        ("self.precision * power, self", "self.precision / power, self",
         f"{PRIOR}a_prior_to_a_power"),
        ("(log - self.power.log() - LOG_TWO_PI)", "(log - LOG_TWO_PI)",
         f"{PRIOR}a_prior_to_a_power"),
        ("(output / 2).exp(), (input / 2).exp()", "output.exp(), input.exp()",
         f"{PRIOR}kronecker_scalings_are_exact_for_products"),
        ("(output / 2).exp(), (input / 2).exp()", "(-output / 2).exp(), (input / 2).exp()",
         f"{PRIOR}kronecker_scalings_are_exact_for_products"),
        ("precision.inverse_diag() + self.deviation(mean).square()", "precision.inverse_diag()",
         f"{PRIOR}a_prior_to_a_power"),
        ("deviation = self.deviation(weights)", "deviation = weights",
         f"{NGVI}a_prior_with_a_mean"),
        ("if prior is None or not (is_static and unchanged):", "if prior is None:",
         f"{PRIOR}a_cached_prior_holds_while_its_distributions_do"),
    ],
    "posterior/correlated_prior": [
        ("return trace_ratio(precision, self.precision)",
         "return 0 * trace_ratio(precision, self.precision)",
         f"{TASKS}the_model_has_the_density_and_the_kl_of_the_prior"),
        ("alpha=value", "alpha=1.0", f"{TASKS}independent_weights_under_a_correlated_prior"),
        ("self.precision.scale(power)", "self.precision",
         f"{TASKS}a_scaled_prior_is_a_power_of_the_density"),
        ("value - len(self.loc) * self.power.log()", "value",
         f"{TASKS}a_scaled_prior_is_a_power_of_the_density"),
        ("torch.equal(index[0], index[0].sort().values)", "True",
         f"{TASKS}the_posterior_of_a_joint_gaussian"),
        ("scale.square().reciprocal()", "scale.reciprocal()",
         f"{TASKS}the_part_of_the_fallback_guide"),
    ],
    "posterior/precision": [
        ("min(0.05, max(0.01, batch_fraction))) ** step", "min(0.05, max(0.01, batch_fraction)))",
         f"{NGVI}initial_curvature_fades"),
        ("max(0.01, batch_fraction)", "batch_fraction",
         f"{NGVI}how_fast_the_initial_curvature_fades"),
        ("(1 - spec.decay) / every", "(1 - spec.decay)",
         f"{PRECISION}the_gradients_at_samples_have_the_weight_of_an_estimate_in_a_while"),
        ("state.precision.diag() * epsilons", "epsilons", f"{VI}ivon_is_its_equations"),
        ("        return state\n    numbers = state", "        pass\n    numbers = state",
         f"{PRECISION}a_precision_is_kept_until_the_next_estimate_is_scaled_as_the_prior_is"),
        ("torch.dot(deviation, deviation) - by_prior", "torch.dot(deviation, deviation)",
         f"{TEMPERATURE}weights_at_a_random_start_do_not_count"),
        ("prior.precision * deviation, determined", "prior.precision * deviation, deviation",
         f"{TEMPERATURE}the_weights_that_the_data_determine"),
        ("remainder * precision.inverse_trace()", "prior.precision * precision.inverse_trace()",
         f"{TEMPERATURE}the_weights_that_the_data_determine"),
        ("precision.solution(deviation.clone())", "precision.solution(deviation)",
         f"{TEMPERATURE}the_weights_that_the_data_determine"),
        ("        return number, number", "        pass",
         f"{TEMPERATURE}the_weights_that_the_data_determine"),
        ("temperature=REFERENCE)", "temperature=state.hyperparameters.temperature)",
         f"{TEMPERATURE}the_weights_that_the_data_determine"),
        ("state.curvature.semidefinite(spec.kind)", "state.curvature.curvature",
         f"{PRECISION}negative_curvature_does_not_enter_a_precision"),
    ],
    "posterior/joint_update": [
        ("x + x @ x / 2", "x + x @ x",
         f"{RETRACT}small_steps_of_the_precision_are_linear_with_the_correction"),
        ("root @ change @ root.mT", "root.mT @ change @ root",
         f"{RETRACT}small_steps_of_the_precision_are_linear_with_the_correction"),
        ("target / values - 1", "target / values",
         f"{RETRACT}a_precision_stays_positive_and_keeps_its_target"),
        ("clamp(max=rate)", "new_tensor(rate)",
         f"{RETRACT}a_step_of_the_precision_is_bounded"),
        ("(precision.logdet() - squared_norm", "(precision.logdet()",
         f"{JOINT}a_gaussian_posterior_is_found"),
    ],
    "layers/layer": [
        ("kernel).transpose(1, 2)", "kernel)", f"{BLOCK}strided_views"),
        ("weight = weight.transpose(-3, -2)", "pass", f"{CAPTURE}an_in_out_weight"),
        ("matrix.select(-1, -1)", "matrix.select(-1, 0)", f"{CAPTURE}packing"),
    ],
    "layers/weight_gaussian": [
        ("packed[..., self.index.argsort()]", "packed[..., self.index]",
         f"{TASKS}the_model_has_the_density_and_the_kl_of_the_prior"),
        ("matrix[a][:, a] - matrix[a][:, b] @ schur", "matrix[a][:, a]",
         f"{TASKS}the_posterior_of_a_joint_gaussian"),
        ("index[rows.argsort()] =", "index[:] =",
         f"{TASKS}two_halves_in_sequence_are_all_data_at_once"),
    ],
    "layers/block": [
        ("torch.cat(packed)", "torch.cat(packed[::-1])", f"{CAPTURE}partitions"),
        ("start + offset)", "offset)", f"{BLOCK}strided_views"),
        ("any(layer.is_transposed", "any(layer.is_untraced", f"{BLOCK}lerp_of_unpacked_values"),
        ("outputs, inputs = layer.out_features, layer.in_features",
         "inputs, outputs = layer.out_features, layer.in_features",
         f"{NGVI}a_wide_layer_with_few_data_is_exact"),
        ("pieces = torch.arange(sum(sizes)", "pieces = torch.zeros(sum(sizes)",
         f"{CAPTURE}positions_of_blocks_in_a_flat_vector"),
    ],
    "layers/packing": [
        ("for name in targets], weight)", "for name in targets], 1 - weight)",
         f"{BLOCK}lerp_of_unpacked_values"),
        ("if blocks[index].is_flat]", "if blocks[index].has_views]", f"{PACKING}pack_and_lerp"),
        ("torch._foreach_lerp(starts, ends, weight)", "torch._foreach_lerp(ends, starts, weight)",
         f"{PACKING}pack_and_lerp"),
    ],
    "structures/kronecker_eigen": [
        ("(self.multiplicity / self.spectrum).sum()", "self.spectrum.reciprocal().sum()",
         f"{STRUCTURES}scalars_and_diagonals"),
    ],
    "structures/stack": [
        (" or matrix.size > MAX_STACKED", "", f"{STACK}solutions_and_samples"),
        ("split(counts)", "split(counts[::-1])", f"{STACK}solutions_and_samples"),
        ("[*map(id, known)] != [*map(id, others)]", "False",
         f"{STACK}a_stack_follows_its_matrices"),
    ],
    "layers/structure_spec": [
        ("self._pair[1], self._pair[0]", "self._pair", f"{LAYERS}factors_in_blocks"),
        ("return layer.is_untraced", "return None",
         f"{BLOCK}layers_that_no_supported_op_consumes"),
    ],
    "layers/op": [
        ("rows.new_ones", "rows.new_zeros",
         f"{CAPTURE}edges_are_exact_under_in_place_activations"),
    ],
    "layers/linear": [
        ("rows_of_last_axis(input[:count])", "rows_of_last_axis(input[-count:])",
         f"{CAPTURE}only_the_first_examples_are_read"),
        ('if settings["padding"] is not None:', "if False:", f"{LAYERS}block"),
    ],
    "layers/convolution": [
        ("(total // 2, total - total // 2)", "(total - total // 2, total // 2)",
         f"{CAPTURE}rows_and_gradients_of_a_convolution"),
        ("for size in reversed(sides)", "for size in sides",
         f"{CAPTURE}rows_and_gradients_of_a_convolution"),
        ("unfold(axis, span, stride)[..., ::dilation]",
         "unfold(axis, span, dilation)[..., ::stride]",
         f"{CAPTURE}rows_and_gradients_of_a_convolution"),
        ("axis + axes for axis in positions", "axis + axes for axis in reversed(positions)",
         f"{CAPTURE}rows_and_gradients_of_a_convolution"),
        ("F.pad(input[:count]", "F.pad(input[-count:]",
         f"{LAYERS}the_first_examples_have_the_rows_that_they_have_alone"),
        ("patches.new_ones(", "patches.new_zeros(",
         f"{CAPTURE}rows_and_gradients_of_a_convolution"),
        ("unflatten(-1, (groups, -1)).movedim(-2, 0)", "unflatten(-1, (-1, groups)).movedim(-1, 0)",
         f"{LAYERS}block"),
        ("patches.flip([*range(-len(kernel), 0)])", "patches", f"{LAYERS}block"),
        ("pads += before, before + more", "pads += before + more, before", f"{LAYERS}block"),
    ],
    "layers/normalization": [
        ("permute(2, 0, 1)", "permute(2, 1, 0)", f"{LAYERS}block"),
        ("permute(1, 0, 2)", "permute(1, 2, 0)", f"{LAYERS}block"),
        ('settings["normalize"](input)[:count]', "input[:count]", f"{LAYERS}block"),
        ('input if settings["batch_coupling"] else input[:count]', "input[:count]",
         f"{CAPTURE}rows_of_a_norm_layer"),
        ("partial(function, **options)", "partial(function, **{**options, 'eps': 0.1})",
         f"{CAPTURE}rows_of_a_norm_layer"),
    ],
    "layers/calls": [
        (".transpose(0, 1)", ".reshape(self.sequence_first_batch, -1, tensor.shape[-1])",
         f"{LAYERS}block"),
        ("if record.input._version != record.input_version:", "if False:",
         f"{CAPTURE}an_input_that_is_changed_in_place_later"),
        ("(start, tensor.shape[0] - stop)", "(tensor.shape[0] - stop, start)", f"{LAYERS}block"),
        ("batch_first(gradient)[:count]", "batch_first(gradient)[-count:]",
         f"{CAPTURE}only_the_first_examples_are_read"),
        ("movedim(0, -2).flatten(-2)", "movedim(0, -1).flatten(-2)",
         f"{CAPTURE}the_bias_of_groups_alone"),
    ],
    "layers/capture": [
        ("query.shape[1] if query.dim() == 3", "query.shape[0] if query.dim() == 3",
         f"{CAPTURE}the_linear_maps_of_attention"),
        ("if bias is None and op.outputs_last:", "if bias is None:",
         f"{CAPTURE}a_bias_on_another_axis_than_the_outputs_is_a_layer"),
        ("if id(product) in self._with_bias:", "if False:",
         f"{CAPTURE}a_product_with_another_use_is_separated_from_its_bias"),
        ("return torch.is_grad_enabled() and any(", "return any(",
         f"{CAPTURE}uses_without_a_gradient_do_not_count"),
    ],
    "layers/trace": [
        ("partners[weight] == {bias} and partners[bias] == {weight}", "partners[weight] == {bias}",
         f"{CAPTURE}one_bias_in_two_layers_is_separated_from_both"),
        ("record.orientation != orientation)", "False)", f"{LAYERS}block"),
        ("if is_inside is None:\n                return True",
         "if is_inside is None:\n                return False",
         f"{CAPTURE}marking_returns_another_trace"),
        ("reused=self.reused | reused", "reused=self.reused",
         f"{CAPTURE}a_product_that_an_unrecorded_op_reads_is_separated_from_its_bias"),
    ],
    "layers/batch_axis": [
        ("call.batch_size == count", "True",
         f"{CAPTURE}a_layer_with_more_or_fewer_rows_than_examples"),
        ("for rows in (half, ~half):", "for rows in (half,):",
         f"{LAYERS}examples_that_meet_far_apart"),
        ("if count % 4 == 0:", "if False:", f"{LAYERS}examples_that_meet_far_apart"),
        ("torch.linspace(1, 2,", "torch.linspace(1, 1,",
         f"{CAPTURE}a_projection_depends_on_outputs_whose_sum_is_constant"),
        ('if name == "Add" and any(', 'if name == "Mul" and any(',
         f"{CAPTURE}rows_that_the_graph_keeps_apart"),
    ],
    "layers/module_types": [
        ("(weight.shape[1] * module.groups)", "weight.shape[0]",
         f"{NN}fan_in_of_other_layers"),
    ],
    "curvature/likelihood": [
        ("~mask.expand(shape)[:count].flatten(1)", "mask.expand(shape)[:count].flatten(1)",
         f"{TOKENS}padding_has_no_part"),
        ("flatten(1).any(1)", "flatten(1).all(1)", f"{TOKENS}padding_has_no_part"),
    ],
    "curvature/layer_statistics": [
        ("a.mean(-2, keepdim=True), g.sum", "a.sum(-2, keepdim=True), g.sum", f"{LAYERS}reduce"),
        ("a * (mask / mask.mean().sqrt())", "a * mask", f"{TOKENS}padding_has_no_part"),
    ],
}  # fmt: skip


class Mutation(NamedTuple):
    """A fault in one file of the package, and the tests that must notice it."""

    file: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file:<28} {' '.join(self.old.split())} -> {' '.join(self.new.split())}"

    def plant(self, package: Path) -> None:
        """Replace the text in a copy of the package."""
        path = package / f"{self.file}.py"
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{path.name} does not contain {self.old!r} exactly once")
        path.write_text(text.replace(self.old, self.new))


MUTATIONS = [Mutation(file, *fault) for file, faults in FAULTS.items() for fault in faults]


def run_tests(place: Path, tests: list[str]) -> bool:
    """Whether tests pass with the package in `place`. For a process that has not imported it yet.
    """
    os.chdir(place)
    sys.path.insert(0, str(place))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(output.getvalue())
    return code == pytest.ExitCode.OK


def survives(mutation: Mutation) -> tuple[bool, float]:
    """Whether no test fails with a mutation, and the processor seconds that this took."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("pyrocurv", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        mutation.plant(copy / "pyrocurv")
        return run_tests(copy, [mutation.tests]), time.process_time() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of a mutation's file or text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if args.only in str(m)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro", "pytest"])  # once for all, as this takes seconds
    survivors = 0
    with context.Pool(args.jobs, maxtasksperchild=1) as pool:
        passes = pool.apply(run_tests, (ROOT, sorted({m.tests for m in chosen})))
        print(f"unchanged: {'passes' if passes else 'FAILS'}", flush=True)
        results = pool.imap(survives, chosen, chunksize=1)
        for mutation, (survived, seconds) in zip(chosen, results, strict=True):
            survivors += survived
            word = "SURVIVED" if survived else "caught"
            print(f"{word:<9}{mutation} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
