"""Faults that the tests must see: ``python tests/faults.py [-k WORD]`` puts each into a copy of the tree, by hand as it
were, and runs the few tests that should fail. A fault that none sees is a missing test. Not collected: it compiles the
C++ kernels once for each of their faults."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")
CPU, CUDA, TRITON = "csrc/cpu/", "csrc/cuda/", "triton_kernels/"


class Fault(NamedTuple):
    what: str
    file: str
    text: str  # occurs once
    replacement: str
    tests: str  # arguments of pytest

    @property
    def interpreted(self) -> bool:
        return self.file.startswith(TRITON)


FAULTS = [
    Fault(
        "a shard's exponentials count from its own log-sum-exp",
        "repdeg_fast/distributed/linear_cross_entropy.py",
        "sums = torch.stack([(lse - origin).exp(), target_logit])",
        "sums = torch.stack([torch.ones_like(lse), target_logit])",
        "tests/test_distributed.py -k cross_entropy",
    ),
    Fault(
        "a word of the rank before is drawn here, too",
        "repdeg_fast/distributed/gumbel_mix.py",
        "torch.where(mine, drawn.token_ids, -1)",
        "torch.where(mine, drawn.token_ids, drawn.token_ids)",
        "tests/test_distributed.py -k samples",
    ),
    Fault(
        "a block that goes round the ring comes home without its gradient",
        "repdeg_fast/distributed/contrastive.py",
        "grad_block += made.weight",
        "grad_block = made.weight",
        "tests/test_distributed.py -k contrastive",
    ),
    Fault(
        "positions are not numbered over ranks",
        "repdeg_fast/models/amos/model.py",
        "self._generate(features, target, seed, masked.before)",
        "self._generate(features, target, seed, 0)",
        "tests/test_distributed.py -k 'twenty and Amos'",
    ),
    Fault(
        "a tile's classes have the weights of the first ones",
        CPU + "linear_cross_entropy.cpp",
        "class_weight.each + settings.first_column : nullptr",
        "class_weight.each : nullptr",
        "tests/test_linear_cross_entropy_extras.py -k 'cpu and softcap and streaming and heads'",
    ),
    Fault(
        "a z-loss of rows that do not count",
        CPU + "linear_cross_entropy.cpp",
        "if (square_scale && counted)",
        "if (square_scale)",
        "tests/test_linear_cross_entropy_extras.py -k 'cpu and lse_square_scale and chunked'",
    ),
    Fault(
        "a predicted class counts from its block",
        CPU + "linear_cross_entropy.cpp",
        "std::find(z + first, z + last, value) - z;",
        "std::find(z + first, z + last, value) - z - first;",
        "tests/test_linear_cross_entropy_extras.py -k 'cpu and nothing_is_larger'",
    ),
    Fault(
        "what the gradient filter leaves goes to other rows of the weight",
        "repdeg_fast/ops/products.py",
        "self.total.index_add_(0, part,",
        "self.total.index_add_(0, part.flip(0),",
        "tests/test_linear_cross_entropy_extras.py -k 'spares and chunked'",
    ),
    Fault(
        "the mean of a z-loss is over the weights of classes",
        "repdeg_fast/ops/linear_cross_entropy.py",
        "share = z_loss_share(head.target, rule.ignore_index, mean, grad_loss.dtype)",
        "share = kernels.share(head, rule, mean)",
        "tests/test_linear_cross_entropy_extras.py -k 'reference and weigh_differently and mean'",
    ),
    Fault(
        "the last of equal logits is predicted",
        TRITON + "linear_cross_entropy_rows.py",
        "best = tl.where(largest > most, leftmost, best)",
        "best = tl.where(largest >= most, leftmost, best)",
        "tests/test_linear_cross_entropy_extras.py -k 'nothing_is_larger and chunked'",
    ),
    Fault(
        "columns before weigh one where logits are summed up",
        TRITON + "linear_cross_entropy_rows.py",
        "sum_z += (before - origin(most)) * seen",
        "sum_z += (before - origin(most)) * first",
        "tests/test_linear_cross_entropy_extras.py -k 'long_vocabulary and chunked'",
    ),
    Fault(
        "a z-loss of rows that do not count, where heads weigh differently",
        TRITON + "linear_cross_entropy_heads.py",
        "total_of_p += tl.where(label == ignore_index, 0.0, of_square)",
        "total_of_p += of_square",
        "tests/test_linear_cross_entropy_extras.py -k 'weigh_differently and chunked'",
    ),
    Fault(
        "the target is left out, too, where it is improbable",
        TRITON + "tile.py",
        "(p < gradient_filter) & (columns != label)",
        "p < gradient_filter",
        "tests/test_linear_cross_entropy_extras.py -k 'gradient_filter and chunked and heads'",
    ),
    Fault(
        "1/τ lost where a chunk of the vocabulary rescales the sum",
        CPU + "gumbel_mix_sample.cpp",
        "sum *= std::exp((before - zero) * inverse_temperature);",
        "sum *= std::exp(before - zero);",
        "tests/test_gumbel_mix_numerics.py -k several_chunks",
    ),
    Fault(
        "the soft value of the last chunk alone",
        CPU + "gumbel_mix_value.cpp",
        "multiply(sums, vocabulary.columns_of_logits(z.columns), f, z.first > 0);",
        "multiply(sums, vocabulary.columns_of_logits(z.columns), f, false);",
        "tests/test_gumbel_mix_numerics.py -k several_chunks",
    ),
    Fault(
        "a token above the drawn one weighs more",
        CPU + "gumbel_mix.h",
        "return x > A(0) ? broadcast(A(0)) : x;",
        "return x;",
        "tests/test_gumbel_mix_numerics.py -k 'token_above and cpu'",
    ),
    Fault(
        "noise of a chunk begins at the vocabulary's start",
        CPU + "gumbel_mix.h",
        "uint32_t((first + block) / 4), n);",
        "uint32_t(block / 4), n);",
        "tests/test_gumbel_mix_numerics.py -k several_chunks",
    ),
    Fault(
        "a row shorter than eps counts as of length 1",
        CPU + "cosreg.cpp",
        "(inv * eps < 1 ? 1 : double(length) * inv)",
        "1",
        "tests/test_cosreg.py -k 'shorter_than_eps and cpu'",
    ),
    Fault(
        "an overflowing norm looks like a long row",
        CPU + "cosreg.cpp",
        "if (std::isinf(squared)) return std::numeric_limits<A>::quiet_NaN();",
        "",
        "tests/test_cosreg.py -k 'not_masked and cpu'",
    ),
    Fault(
        "the gradient that is there is overwritten, in rows of unit stride",
        CPU + "cosreg.cpp",
        "accumulate ? load(out + i) + g : g",
        "g",
        "tests/test_cosreg.py -k '(add_to or add_accumulates) and cpu'",
    ),
    Fault(
        "label smoothing scales with the log-sum-exp's gradient",
        CPU + "linear_cross_entropy.cpp",
        "u, g * of_each, inverse",
        "u, (g + u) * of_each, inverse",
        "tests/test_linear_cross_entropy.py -k 'pairs and cpu and streaming'",
    ),
    Fault(
        "the label's gradient without the softcap's derivative",
        CPU + "linear_cross_entropy.cpp",
        "if (inverse) gradient *=",
        "if (false) gradient *=",
        "tests/test_linear_cross_entropy.py -k 'pairs and cpu'",
    ),
    Fault(
        "a mean that lost digits stays as it is",
        CPU + "admin_norm.cpp",
        "A(origin + shift)",
        "origin",
        "tests/test_admin_norm_numerics.py -k cpu",
    ),
    Fault(
        "every row has the mask of the first",
        CPU + "admin_norm.cpp",
        "uint32_t(i), kDropoutStream",
        "0, kDropoutStream",
        "tests/test_admin_norm.py -k 'mask_is_philox and cpu'",
    ),
    Fault(
        "no dropout in the branch's sum",
        CPU + "admin_norm.cpp",
        "z[i] = x[i] * omega[i] + (f[i] + branch_bias[i]) * keep[i];",
        "z[i] = x[i] * omega[i] + f[i] * keep[i] + branch_bias[i];",
        "tests/test_admin_norm.py -k 'value_and_gradients and cpu'",
    ),
    Fault(
        "nine rounds of Philox",
        "csrc/philox.h",
        "round < 10",
        "round < 9",
        "tests/test_philox.py",
    ),
    Fault(
        "row weights where eps divides",
        CUDA + "cosreg.cu",
        "inverse >= largest_inverse ? p : product.of[r] * inverse",
        "inverse >= largest_inverse ? 1 : product.of[r] * inverse",
        "tests/test_cosreg.py -k 'shorter_than_eps and emulated'",
    ),
    Fault(
        "Σ p² is Σ p",
        CUDA + "cosreg.cu",
        "self_sum += p * p * unit * unit;",
        "self_sum += p * unit * unit;",
        "tests/test_cosreg.py -k 'value_and_gradient and emulated'",
    ),
    Fault(
        "the gradient has the weight's row stride",
        CUDA + "cosreg.cu",
        "T* out = grad_weight + row * grad_row_stride;",
        "T* out = grad_weight + row * row_stride;",
        "tests/test_cosreg.py -k '(strides or layout) and emulated'",
    ),
    Fault(
        "a long row of the branch has x's stride, forward",
        CUDA + "admin_norm_forward.cu",
        "const auto branch = Pack<T>::load(b.branch + row * b.branch_stride + column);\n        f(",
        "const auto branch = Pack<T>::load(b.branch + row * b.x_stride + column);\n        f(",
        "tests/test_admin_norm.py -k 'different_strides and emulated'",
    ),
    Fault(
        "a long row of the branch has x's stride, in the means",
        CUDA + "admin_norm_backward.cu",
        "Pack<T>{} : Pack<T>::load(b.branch + row * b.branch_stride + column);",
        "Pack<T>{} : Pack<T>::load(b.branch + row * b.x_stride + column);",
        "tests/test_admin_norm.py -k 'different_strides and emulated'",
    ),
    Fault(
        "a row of the branch has x's stride, backward",
        CUDA + "admin_norm_backward.cu",
        "if (!kFromOutput) prefetch.copy(2, b.branch + row * b.branch_stride,",
        "if (!kFromOutput) prefetch.copy(2, b.branch + row * b.x_stride,",
        "tests/test_admin_norm.py -k 'different_strides and emulated'",
    ),
    Fault(
        "only the last group of a block adds to the parameters' gradients",
        CUDA + "admin_norm_backward.cu",
        "if (g > 0) {",
        "if (false) {",
        "tests/test_admin_norm.py -k 'value_and_gradients and emulated'",
    ),
    Fault(
        "the reduction over blocks leaves some out",
        CUDA + "admin_norm_backward.cu",
        "for (int r = lane; r < partials; r += kReduceLanes)",
        "for (int r = lane; r < partials && r < kReduceLanes; r += kReduceLanes)",
        "tests/test_admin_norm.py -k 'more_blocks and emulated'",
    ),
    Fault(
        "parameters that do not start on 16 bytes reach the kernels",
        CUDA + "admin_norm_block.cuh",
        "return misaligned ? MaybeTensor(torch::stable::clone(*parameter)) : parameter;",
        "return parameter;",
        "tests/test_admin_norm.py -k 'flat_buffer and emulated'",
    ),
    Fault(
        "matrices that do not start on 16 bytes reach the kernels",
        "repdeg_fast/backends.py",
        "matrix.data_ptr() % 16 or any",
        "any",
        "tests/test_cosreg.py -k 'strides and emulated'",
    ),
    Fault(
        "label smoothing scales with the log-sum-exp's gradient",
        TRITON + "linear_cross_entropy_rows.py",
        "    column = tl.where(valid, label - first_column, -1).to(tl.int32)\n    of_each = g *",
        "    column = tl.where(valid, label - first_column, -1).to(tl.int32)\n    of_each = (g + u) *",
        "tests/test_linear_cross_entropy.py -k 'pairs and smoothing and lse and streaming'",
    ),
    Fault(
        "logits of a part stay relative to its own maximum",
        TRITON + "linear_cross_entropy.py",
        " + (origin(each_most) - zero[None, :]) * columns",
        "",
        "tests/test_linear_cross_entropy.py -k '(pairs or several_chunks) and smoothing and streaming'",
    ),
    Fault(
        "a running sum of exponentials is not rescaled",
        TRITON + "tile.py",
        "sum_exp * tl.exp(most - new)",
        "sum_exp",
        "tests/test_linear_cross_entropy.py -k 'several_chunks and streaming and plain'",
    ),
    Fault(
        "row weights where eps divides",
        TRITON + "cosreg.py",
        "tl.where(inverse >= largest_inverse, p,",
        "tl.where(inverse >= largest_inverse, 1.0,",
        "tests/test_cosreg.py -k shorter_than_eps",
    ),
    Fault(
        "tiny rows are zero rows",
        TRITON + "cosreg.py",
        "norm = tl.where(squared < TINY, enlarged, norm)",
        "norm = norm",
        "tests/test_cosreg.py -k squares_leave",
    ),
    Fault(
        "a row of the branch has x's stride, forward",
        TRITON + "admin_norm.py",
        "z += (_block(branch, rows, columns, n, d, branch_stride)",
        "z += (_block(branch, rows, columns, n, d, x_stride)",
        "tests/test_admin_norm.py -k 'different_strides and 96'",
    ),
    Fault(
        "dropout counts in eval mode",
        "repdeg_fast/nn/admin/profile.py",
        "kept = 1 - norm.dropout if norm.training else 1.0",
        "kept = 1 - norm.dropout",
        "tests/test_admin_init.py -k while_training_only",
    ),
    Fault(
        "nine rounds of Philox",
        "repdeg_fast/reference/philox.py",
        "_ROUNDS = 10",
        "_ROUNDS = 9",
        "tests/test_philox.py",
    ),
    Fault(
        "own columns of hard negatives are no longer own",
        CPU + "contrastive.cpp",
        "const int64_t step = settings.period ? settings.period : scores.columns;",
        "const int64_t step = scores.columns;",
        "tests/test_contrastive.py -k 'value_and_gradients and cpu'",
    ),
    Fault(
        "own columns are as hard as all others",
        CPU + "contrastive.cpp",
        "z[j] *= own_factor;",
        "z[j] *= A(1);",
        "tests/test_contrastive.py -k 'value_and_gradients and cpu'",
    ),
    Fault(
        "too similar documents of the last few columns are negatives",
        CPU + "contrastive.cpp",
        "z[i] = v > most ? A(-INFINITY) : v;",
        "z[i] = v;",
        "tests/test_contrastive.py -k 'value_and_gradients and cpu'",
    ),
    Fault(
        "every row has the id of the first",
        CPU + "contrastive.cpp",
        "ids.columns[i] == ids.rows[r]",
        "ids.columns[i] == ids.rows[0]",
        "tests/test_contrastive.py -k 'value_and_gradients and cpu'",
    ),
    Fault(
        "zero columns count with φ(0)",
        CPU + "pairwise.cpp",
        "sum[k] += kept == A(0) ? c : value;",
        "sum[k] += value;",
        "tests/test_pairwise.py -k '(values_and_gradients or zero_rows) and cpu'",
    ),
    Fault(
        "what is left out of a row keeps its cosine as a slope",
        CPU + "pairwise.cpp",
        "if constexpr (slopes) std::fill(row + begin, row + next, T(0));",
        "",
        "tests/test_pairwise.py -k 'values_and_gradients and cpu'",
    ),
    Fault(
        "a row may be its own nearest neighbour",
        CPU + "pairwise.cpp",
        "keep, std::min(own + 1, n), n);",
        "keep, own, n);",
        "tests/test_pairwise.py -k 'maxima and cpu'",
    ),
    Fault(
        "of equal neighbours the last is kept",
        CPU + "neighbours.cpp",
        "index[i] > index[j]",
        "index[i] < index[j]",
        "tests/test_degeneration.py -k 'nearest or equal'",
    ),
    Fault(
        "neighbours are numbered from the start of their tile",
        CPU + "neighbours.cpp",
        "best.replace(row[i], first + i)",
        "best.replace(row[i], i)",
        "tests/test_degeneration.py -k 'nearest or equal'",
    ),
    Fault(
        "the smoothed part of a loss has no class weights",
        CPU + "linear_cross_entropy.cpp",
        "sum += load(weight + i) * (origin - load(z + i));",
        "sum += origin - load(z + i);",
        "tests/test_linear_cross_entropy_extras.py -k 'heads and cpu'",
    ),
    Fault(
        "a predicted class is counted from its block",
        CPU + "linear_cross_entropy.cpp",
        "return std::find(z + first, z + last, value) - z;",
        "return std::find(z + first, z + last, value) - z - first;",
        "tests/test_linear_cross_entropy_extras.py -k 'predictions and cpu'",
    ),
    Fault(
        "the gradient filter leaves nothing out",
        CPU + "linear_cross_entropy.cpp",
        "g = e < least ? broadcast(A(0)) : g;",
        "g = e < least ? g : g;",
        "tests/test_linear_cross_entropy_extras.py -k 'filter or (heads and cpu)'",
    ),
    Fault(
        "all columns behind the own one are own",
        TRITON + "contrastive.py",
        "(columns - first_own) % period == 0",
        "(columns - first_own) >= 0",
        "tests/test_contrastive.py -k value_and_gradients",
    ),
    Fault(
        "a row meets itself where pairs are met once",
        TRITON + "pairwise.py",
        "return inside & (columns > own)",
        "return inside & (columns >= own)",
        "tests/test_pairwise.py -k values_and_gradients",
    ),
    Fault(
        "a zero row counts with φ(0)",
        TRITON + "pairwise.py",
        "nothing = keep * keep_row == 0",
        "nothing = keep == 0",
        "tests/test_pairwise.py -k zero_rows",
    ),
    Fault(
        "each pair of rows is met twice",
        "repdeg_fast/ops/pairwise_blocks.py",
        "slice(rows.start if self.symmetric else 0, None)",
        "slice(0, None)",
        "tests/test_pairwise.py -k 'values_and_gradients and cut and cpu'",
    ),
    Fault(
        "analysis: PWCCA weighs the wrong side where y is narrower",
        "repdeg_fast/analysis/cca.py",
        "narrower, cross = (y, cross.T) if y.rank < x.rank else (x, cross)",
        "narrower, cross = (x, cross)",
        "tests/test_similarity.py -k variates_themselves",
    ),
    Fault(
        "analysis: merging forgets that origins differ",
        "repdeg_fast/analysis/covariances.py",
        "moments += _moved(theirs.T, self._shift(other, j)).T",
        "moments += theirs",
        "tests/test_similarity.py -k streams_and_merges",
    ),
    Fault(
        "analysis: influence compares the token that is left out, too",
        "repdeg_fast/analysis/layers.py",
        "others = without & (part_of == part)[:, None]",
        "others = mask[rows] & (part_of == part)[:, None]",
        "tests/test_hidden_states.py -k influence_by_hand",
    ),
    Fault(
        "analysis: mutual information is not corrected for chance",
        "repdeg_fast/analysis/mutual_information.py",
        "entropies[1] * (plug_in - by_chance) / room",
        "entropies[1] * plug_in / entropies[1]",
        "tests/test_degeneration.py -k mutual_information_in_its_limits",
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", metavar="WORD", help="only faults with this in their file or description")
    word = parser.parse_args().k
    faults = sorted((f for f in FAULTS if word in f"{f.file} {f.what}"), key=lambda fault: fault.file)
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "tree", ignore=NOT_COPIED)
        (tree / "repdeg_fast" / "triton_kernels").symlink_to(tree / "triton_kernels")  # as installed
        if not all(_passes_without(tree, faults, interpreted) for interpreted in (False, True)):
            return 2
        caught = [_is_caught(tree, fault) for fault in faults]
    print(f"caught {sum(caught)} of {len(faults)}")
    return 0 if all(caught) else 1


def _passes_without(tree: Path, faults: list[Fault], interpreted: bool) -> bool:
    selections = sorted({fault.tests for fault in faults if fault.interpreted == interpreted})
    failing = [tests for tests in selections if _pytest(tree, tests, interpreted).returncode != 0]
    for tests in failing:
        print(f"fails without a fault, or there is no such test: {tests}")
    return not failing


def _is_caught(tree: Path, fault: Fault) -> bool:
    path = tree / fault.file
    before = path.read_text() if path.exists() else ""
    if before.count(fault.text) != 1:
        return _report("STALE", fault, f"its text is there {before.count(fault.text)} times, not once: {fault.text}")
    path.write_text(before.replace(fault.text, fault.replacement))
    done = _pytest(tree, fault.tests, fault.interpreted)
    path.write_text(before)
    printed, died = done.stdout + done.stderr, done.returncode < 0
    if "ninja: build stopped" in printed:
        return _report("STALE", fault, f"does not compile\n{printed[-3000:]}")
    last = (done.stdout.splitlines() or [""])[-1]
    if died or (done.returncode == 1 and " failed" in last):
        return _report("caught", fault)
    return _report("ESCAPED", fault, last)


def _report(verdict: str, fault: Fault, why: str = "") -> bool:
    print(f"{verdict:8} {fault.file}: {fault.what}{why and f': {why}'}", flush=True)
    return verdict == "caught"


def _pytest(tree: Path, tests: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}",
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one second would share their bytecode
        "REPDEG_FAST_CACHE_DIR": str(tree / "cache"),
        "TRITON_INTERPRET": str(int(interpreted)),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "faults",
        *shlex.split(tests),
    ]
    command += ["-m", "interpreter"] * interpreted
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def pytest_configure() -> None:
    """As a plugin of the runs above: what was compiled of files without the fault is used again."""
    from repdeg_fast.native import build

    def compile_what_changed(library: str, path: Path) -> object:
        folder = path.parent.parent / "objects"
        folder.mkdir(exist_ok=True)
        return build._run_compiler(library, path.stem, folder)

    build._compile = compile_what_changed


if __name__ == "__main__":
    sys.exit(main())
