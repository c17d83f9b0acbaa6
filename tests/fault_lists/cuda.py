"""Faults of the CUDA kernels, seen in their emulation."""

from .fault import Fault

CUDA = "csrc/cuda/"

FAULTS = [
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
        "what lies behind a row counts in its variance",
        CUDA + "admin_norm_forward.cu",
        "      if (first_column + k * column_step < b.d) deviations.add(z[k]);",
        "      deviations.add(z[k]);",
        "tests/test_admin_norm.py -k 'value_and_gradients and emulated'",
    ),
    Fault(
        "dropout of a long row begins anew with each step",
        CUDA + "admin_norm_forward.cu",
        "f(column, residual_sum(b, x, branch, kept_bits(b, row, column), column));",
        "f(column, residual_sum(b, x, branch, kept_bits(b, row, threadIdx.x * S), column));",
        "tests/test_admin_norm.py -k 'long_rows and emulated'",
    ),
    Fault(
        "a thread reads the stage that is being filled",
        CUDA + "admin_norm_block.cuh",
        "slot(reading, stream, k)));",
        "slot(reading ^ 1, stream, k)));",
        "tests/test_admin_norm.py -k 'value_and_gradients and emulated'",
    ),
    Fault(
        "the groups of a block have the sums of the first",
        CUDA + "admin_norm_block.cuh",
        "value.x += area[group.index * warps + w].x;",
        "value.x += area[w].x;",
        "tests/test_admin_norm.py -k 'value_and_gradients and emulated'",
    ),
    Fault(
        "a mean that lost digits stays as it is",
        CUDA + "admin_norm_block.cuh",
        "return {origin + shift,",
        "return {origin,",
        "tests/test_admin_norm_numerics.py -k emulated",
    ),
    Fault(
        "a warp's sum leaves out every second lane",
        CUDA + "rows.cuh",
        "offset > 0; offset /= 2",
        "offset > 1; offset /= 2",
        "tests/test_cosreg.py -k 'value_and_gradient and emulated'",
    ),
    Fault(
        "a block's sum leaves out its last warp",
        CUDA + "rows.cuh",
        "w < warps; ++w) total += scratch[w];",
        "w + 1 < warps; ++w) total += scratch[w];",
        "tests/test_cosreg.py -k 'value_and_gradient and emulated'",
    ),
    Fault(
        "bfloat16 rows are moved half",
        CUDA + "rows.cuh",
        "static constexpr int size = 16 / sizeof(T);",
        "static constexpr int size = 8 / sizeof(T);",
        "tests/test_cosreg.py -k 'value_and_gradient and emulated'",
    ),
]
