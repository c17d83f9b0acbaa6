"""What the kernels that sweep over a vocabulary share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    a, b, rows, columns, m, v, depth, a_row, a_column, b_row, b_column,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """a[rows] · b[columns]ᵀ in fp32, in steps of DEPTH; zeros beyond m rows and v columns. DTYPE is what is multiplied:
    an fp32 weight is rounded on the way under autocast."""
    a += rows.to(tl.int64)[:, None] * a_row
    b += columns.to(tl.int64)[:, None] * b_row
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, depth, DEPTH):
        at = first + tl.arange(0, DEPTH)
        inside = (at < depth)[None, :]
        x = tl.load(a + at[None, :] * a_column, mask=(rows < m)[:, None] & inside, other=0.0)
        y = tl.load(b + at[None, :] * b_column, mask=(columns < v)[:, None] & inside, other=0.0)
        total = tl.dot(x.to(DTYPE), tl.trans(y.to(DTYPE)), total, input_precision=PRECISION)
    return total


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


@triton.jit
def softcapped(z, softcap):
    """c·tanh(z/c)."""
    return softcap * (1 - 2 / (1 + tl.exp(z * (2 / softcap))))


@triton.jit
def loss_gradient(p, z, label, columns, g, g_and_u, label_smoothing, vocabulary, softcap):
    """(g + u) p − g y, and through the softcap where there is one; shapes that broadcast to those of p."""
    dz = g_and_u * p - g * (label_smoothing / vocabulary)
    dz -= tl.where(columns == label, g * (1 - label_smoothing), 0.0)
    if softcap is not None:
        t = z * (1 / softcap)
        dz *= 1 - t * t
    return dz


@triton.jit
def heads_differ(grad_heads, stride, HEADS: tl.constexpr):
    """Whether the upstream gradients of HEADS losses are not all the same."""
    first = tl.load(grad_heads)
    differ = first != first
    for k in tl.static_range(1, HEADS):
        differ |= tl.load(grad_heads + k * stride) != first
    return differ
