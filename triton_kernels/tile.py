"""What the kernels that sweep over a vocabulary share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_exponentials(z, most, sum_exp):
    """Σ exp(z − origin(most)) of rows with the columns of z (rows, columns) more; numbers for one row (columns,).

    Returns the logits relative to the new origin, the largest of all so far, and the sum. NaN is nobody's maximum, but
    stays in the sum."""
    columns: tl.constexpr = len(z.shape) - 1
    larger = tl.maximum(most, tl.max(z, axis=columns))
    new = origin(larger)
    z -= new[:, None] if len(z.shape) == 2 else new
    return z, larger, sum_exp * tl.exp(most - new) + tl.sum(tl.exp(z), axis=columns)


@triton.jit
def origin(most):
    """What the exponentials of a row are taken relative to: its maximum, but 0 while it has met nothing but −∞, as a
    masked vocabulary may begin (exp(−∞ + ∞) is not a number)."""
    return tl.where(most == float("-inf"), 0.0, most)
