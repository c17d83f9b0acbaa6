"""Faults of the Triton kernels, seen in the interpreter."""

from .fault import Fault

TRITON = "triton_kernels/"

FAULTS = [
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
]
