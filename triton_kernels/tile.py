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
        at = (first + tl.arange(0, DEPTH)).to(tl.int64)  # a transposed matrix has a long stride
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
def shares(class_weight, class_total, label, label_smoothing, vocabulary):
    """Of the distribution y that a label stands for: what falls to the label itself beside what falls to every class,
    and the sum of all; of labels in the vocabulary."""
    of_label = 1 - label_smoothing
    of_all = 1.0
    if class_weight is not None:
        of_label *= tl.load(class_weight + label, mask=(label >= 0) & (label < vocabulary), other=0.0)
        of_all = of_label + label_smoothing / vocabulary * tl.load(class_total)
    return of_label, of_all


@triton.jit
def weight_of(class_weight, columns, vocabulary):
    """Of classes; 0 beyond the vocabulary."""
    return tl.load(class_weight + columns, mask=columns < vocabulary, other=0.0)


@triton.jit
def loss_gradient(p, z, label, columns, total, of_label, of_each, softcap, gradient_filter):
    """total·p − g y, and through the softcap where there is one; shapes that broadcast to those of p. ``of_label`` and
    ``of_each``: what of g y falls to the label, and to every class."""
    dz = total * p - of_each
    dz -= tl.where(columns == label, of_label, 0.0)
    if softcap is not None:
        t = z * (1 / softcap)
        dz *= 1 - t * t
    if gradient_filter is not None:
        dz = tl.where((p < gradient_filter) & (columns != label), 0.0, dz)
    return dz


@triton.jit
def heads_differ(grad_heads, stride, HEADS: tl.constexpr):
    """Whether the upstream gradients of HEADS losses are not all the same."""
    first = tl.load(grad_heads)
    differ = first != first
    for k in tl.static_range(1, HEADS):
        differ |= tl.load(grad_heads + k * stride) != first
    return differ
