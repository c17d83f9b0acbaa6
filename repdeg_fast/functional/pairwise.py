"""Measures over pairs of vectors: arguments checked, then handed to :mod:`repdeg_fast.ops.pairwise`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._checks import check_choice, check_finite, check_flag, check_floating, check_positive
from repdeg_fast.contracts.pairwise import Kind
from repdeg_fast.functional.cosreg import cosine_regularization
from repdeg_fast.ops import pairwise as _ops
from repdeg_fast.ops._operator import wants_gradient

KINDS = ("mean", "square", "abs", "relu", "logmeanexp")
_PHI = {"square": Kind.SQUARE, "abs": Kind.ABS, "relu": Kind.RELU, "logmeanexp": Kind.EXP}


def pairwise_cosine(
    x: Tensor,  # (N, d)
    y: Tensor | None = None,  # (M, d)
    *,
    kind: str,
    margin: float = 0.0,
    temperature: float = 0.25,
    skip_diagonal: bool = False,
    eps: float = 1e-12,
) -> Tensor:
    """Mean of φ(cos(x_i, x_j)) over all ordered pairs of different rows, or of φ(cos(x_i, y_j)) over two sets.

    ============  ==================  ====================================================================
    ``kind``      φ(c)                cost
    ============  ==================  ====================================================================
    mean          c                   N·d: (‖Σ û‖² − N)/(N(N − 1))
    square        c²                  N·d²: (‖Σ û ûᵀ‖² − N)/(N(N − 1)); N²·d where d is larger than N
    abs           ``|c|``             N²·d
    relu          max(c − margin, 0)  N²·d
    logmeanexp    log mean exp(c/T)   N²·d
    ============  ==================  ====================================================================

    The N × N matrix is never held: where it is needed, chunks of its rows go through a buffer of at most 64 MiB on a
    CPU. "logmeanexp" with T = ``temperature`` is uniformity (arXiv 2005.10242) but for a constant: log mean
    exp(−t‖x̂ − ŷ‖²) is its value at T = 1/(2t), less 2t.

    The mean is over N(N − 1) pairs of one set, whereas CosReg (:func:`cosine_regularization`, arXiv 1907.12009) divides
    the same sum by N²: its value is (N − 1)/N of "mean" here. Of two sets it is over all N·M pairs, or without those of
    equal row numbers.

    A zero row (padding) adds nothing to the sum, but counts among the pairs, and gets a zero gradient. Where no pair is
    left — a single row, or none but zero rows — the value is 0 with a zero gradient. NaN and Inf come out as NaN.

    Args:
        x: (N, d), float32, float64, bfloat16 or float16, any strides.
        y: (M, d), another set, in the dtype of x; ``None``: x with itself.
        kind: one of the above.
        margin: of "relu".
        temperature: T of "logmeanexp".
        skip_diagonal: leave out the pairs (x_i, y_i), of texts that belong together, say. Of one set they never count.
        eps: smallest norm that is divided by.

    Returns:
        A scalar in float32 (float64 for float64 inputs). The N²·d kinds make their gradients in the forward pass, and
        save those; "square" saves d × d values.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_choice("kind", kind, KINDS)
    _check_vectors(x, y, skip_diagonal, eps)
    check_finite("margin", margin)
    check_positive("temperature", temperature)
    n, backend = x.shape[0], backends.requested()
    if kind == "mean" and y is None:
        return cosine_regularization(x, eps=eps) * (n / (n - 1) if n > 1 else 0.0)
    # where vectors are fewer than their dimensions, the pairs are less work, and no difference of large numbers
    rows, columns = (n, n) if y is None else (n + y.shape[0], y.shape[0])
    if kind == "mean" or (kind == "square" and n * columns > rows * x.shape[1]):
        return _ops.pairwise_moment(x, y, 1 if kind == "mean" else 2, skip_diagonal, eps, backend)[0]
    parameter = {"relu": float(margin), "logmeanexp": 1 / temperature}.get(kind, 0.0)
    needs = [wants_gradient(x), wants_gradient(y)]
    return _ops.pairwise_cosine(x, y, int(_PHI[kind]), parameter, skip_diagonal, eps, needs, backend)[0]


class MaxCosine(NamedTuple):
    """The largest cosine of each row, and of which column it is."""

    values: Tensor  # (N,)
    indices: Tensor  # (N,), int64


def pairwise_max_cosine(
    x: Tensor,  # (N, d)
    y: Tensor | None = None,  # (M, d)
    *,
    skip_diagonal: bool = False,
    eps: float = 1e-12,
) -> MaxCosine:
    """Of each row of x the largest cosine with another row of x, or with a row of y, and which one that is.

    As a term of a loss it drives every vector from its nearest neighbour. The gradient goes to the row and to its
    neighbour. Chunks as in :func:`pairwise_cosine`; saves two values a row.

    Args:
        x, y, skip_diagonal, eps: as in :func:`pairwise_cosine`.

    Returns:
        values (N,) in float32 (float64 for float64 inputs) and indices (N,), the smaller one of equals. Zero rows are
        nobody's neighbours. A zero row, or one without any other, has the value 0, index −1 and a zero gradient. Of
        16-bit inputs neighbours are found by cosines in 16 bits where the device multiplies in those.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_vectors(x, y, skip_diagonal, eps)
    values, indices, *_ = _ops.pairwise_max_cosine(x, y, skip_diagonal, eps, backends.requested())
    return MaxCosine(values, indices)


def global_orthogonal_regularization(
    x: Tensor,  # (N, d)
    y: Tensor | None = None,  # (M, d)
    *,
    mean_weight: float = 1.0,
    second_moment_weight: float = 1.0,
    reduction: str = "sum",
) -> Tensor:
    """GOR: spreads vectors as if they were drawn evenly from the sphere (arXiv 1708.06320, section 3.3).

    mean_weight · M₁² + second_moment_weight · max(M₂ − 1/d, 0), where M₁ and M₂ are the means of the cosines and of
    their squares over all ordered pairs i ≠ j, N(N − 1) of one set: what sentence-transformers'
    ``GlobalOrthogonalRegularizationLoss`` computes of one column of inputs, in O(N·d²) and without its N × N matrix.
    EmbeddingGemma (arXiv 2509.20354) has the second moment alone, ``mean_weight=0``. CosReg divides the sum in M₁ by N²
    instead, and does not square it.

    Args:
        x: (N, d), as in :func:`pairwise_cosine`. One row gives 0 with a zero gradient.
        y: (M, d), whose row i belongs to row i of x, as the paper's matching descriptors do: the pairs (x_i, y_j)
            with i ≠ j count. ``None``: x with itself.
        mean_weight, second_moment_weight: of the two terms; a term with weight 0 is not computed.
        reduction: "sum", or "none" for both terms, (2,).

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_choice("reduction", reduction, ("sum", "none"))
    check_finite("mean_weight", mean_weight)
    check_finite("second_moment_weight", second_moment_weight)
    _check_vectors(x, y, False, 1.0)
    zero = x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    first = second = zero
    if mean_weight:
        first = mean_weight * pairwise_cosine(x, y, kind="mean", skip_diagonal=y is not None).square()
    if second_moment_weight:
        moment = pairwise_cosine(x, y, kind="square", skip_diagonal=y is not None)
        second = second_moment_weight * (moment - 1 / x.shape[1]).relu()
    return first + second if reduction == "sum" else torch.stack((first, second))


def _check_vectors(x: Tensor, y: Tensor | None, skip_diagonal: bool, eps: float) -> None:
    for name, vectors in (("x", x),) if y is None else (("x", x), ("y", y)):
        check_floating(name, vectors)
        if vectors.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions (N, d), got shape {tuple(vectors.shape)}")
        if vectors.numel() == 0:
            raise ValueError(f"{name}: expected at least one row and one column, got shape {tuple(vectors.shape)}")
    check_flag("skip_diagonal", skip_diagonal)
    check_positive("eps", eps)
    if y is None:
        return
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"y: expected {x.shape[1]} columns like x, got shape {tuple(y.shape)}")
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected {x.dtype} like x, got {y.dtype}; convert one of them")
    if y.device != x.device:
        raise ValueError(f"y: expected device {x.device} like x, got {y.device}")
