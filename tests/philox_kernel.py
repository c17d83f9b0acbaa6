"""A kernel that writes out random numbers; kernels find the functions they call among their module's names."""

import triton
import triton.language as tl
from repdeg_fast.triton_kernels.philox import gumbel, words


@triton.jit
def block_kernel(
    seed, word, noise, first_row, first_column, stream: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = first_row + tl.arange(0, ROWS)
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    key = tl.load(seed)
    tl.store(word + at, words(key, rows, first_column, stream, COLUMNS).to(tl.int64))
    tl.store(noise + at, gumbel(key, rows, first_column, COLUMNS))
