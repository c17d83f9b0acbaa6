"""CosReg: arguments checked, then handed to :mod:`repdeg_fast.ops.cosreg`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._checks import check_finite, check_floating, check_positive, is_cut
from repdeg_fast.ops import cosreg as _cosreg

if TYPE_CHECKING:
    from repdeg_fast.distributed import VocabularyShard


def cosine_regularization(
    weight: Tensor,  # (N, d)
    *,
    row_weight: Tensor | None = None,  # (N,)
    eps: float = 1e-12,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Mean cosine similarity over all ordered pairs of different rows (CosReg, arXiv 1907.12009, section 5).

    R(W) = (1/P²) Σ_i Σ_{j≠i} p_i p_j ŵ_i·ŵ_j with ŵ = w/max(‖w‖, eps), p = ``row_weight`` (1 unless given), P = Σ p.
    Computed in O(N·d) without the N×N matrix; saves one value a row and one a column for the backward pass.

    Args:
        weight: (N, d), float32, float64, bfloat16 or float16, any strides; usually a word embedding. A zero row
            (padding) contributes nothing and gets a zero gradient; NaN and Inf come out as NaN.
        row_weight: (N,), at least 0, for example token frequencies; gets no gradient.
        eps: smallest norm that is divided by.
        shard: ``weight`` and ``row_weight`` are the rows that this rank has of N on several ranks, which all get R.
            Not needed where ``weight`` is a DTensor whose rows are cut, as FSDP2's parameters are.

    Returns:
        R, a scalar in float32 (float64 for float64 weights).

    Raises:
        TypeError, ValueError: naming the argument. A negative ``row_weight``, or one that sums to zero, raises on the
            CPU and gives NaN on a GPU, where a check would stall the stream.
    """
    if is_cut(weight, shard):
        from repdeg_fast.distributed import cosreg as over_shards

        return over_shards.cosine_regularization(weight, row_weight, eps, shard)
    _check_cosreg(weight, row_weight, eps)
    return _cosreg.cosreg(weight, row_weight, eps, backends.requested())[0]


@torch.no_grad()
def add_cosine_regularization_(
    weight: Tensor,  # (N, d)
    coefficient: float,
    *,
    row_weight: Tensor | None = None,  # (N,)
    eps: float = 1e-12,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Add coefficient · ∂R/∂W straight into ``weight.grad`` and return R (see :func:`cosine_regularization`).

    For use after ``backward()`` and before ``step()``, like decoupled weight decay: no graph and no second (N, d)
    gradient. Under a gradient scaler call it after ``scaler.unscale_(optimizer)``. A missing ``.grad`` is made.

    Raises:
        TypeError, ValueError: naming the argument; also when ``weight`` is frozen or not a leaf, and when its ``.grad``
            is sparse, of another dtype, or expanded.
    """
    cut = is_cut(weight, shard)
    if not cut:
        _check_cosreg(weight, row_weight, eps)
    check_finite("coefficient", coefficient)
    if not weight.is_leaf:
        raise ValueError(
            "weight: expected a parameter, got the result of a computation, which has no .grad to add to; make "
            "cosine_regularization(weight) a term of the loss"
        )
    if weight.grad is None:
        if not weight.requires_grad:
            raise ValueError("weight: is frozen (requires_grad=False) and has no .grad to add to; leave the call out")
        weight.grad = torch.zeros_like(weight)
    grad = weight.grad
    if grad.layout != torch.strided:
        raise ValueError(
            f"weight.grad: expected a dense gradient, got layout {grad.layout}; make the embedding with sparse=False"
        )
    if grad.dtype != weight.dtype:
        raise TypeError(f"weight.grad: expected {weight.dtype} like weight, got {grad.dtype}")
    if cut:
        from repdeg_fast.distributed import cosreg as over_shards

        return over_shards.add_cosine_regularization_(weight, float(coefficient), row_weight, eps, shard)
    if any(stride == 0 and size > 1 for size, stride in zip(grad.shape, grad.stride(), strict=True)):
        raise ValueError("weight.grad: elements share memory (an expanded tensor); use weight.grad.clone()")
    return _cosreg.cosreg_add_(grad, weight, float(coefficient), row_weight, eps, backends.requested())


def _check_cosreg(weight: Tensor, row_weight: Tensor | None, eps: float) -> None:
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected 2 dimensions (N, d), got shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"weight: expected at least one row and one column, got shape {tuple(weight.shape)}")
    check_positive("eps", eps)
    if row_weight is None:
        return
    check_floating("row_weight", row_weight)
    if row_weight.shape != weight.shape[:1]:
        raise ValueError(
            f"row_weight: expected shape ({weight.shape[0]},), one value a row of weight, got {tuple(row_weight.shape)}"
        )
    if row_weight.device != weight.device:
        raise ValueError(f"row_weight: expected device {weight.device} like weight, got {row_weight.device}")
    if row_weight.requires_grad:
        raise ValueError("row_weight: gets no gradient; pass row_weight.detach()")
