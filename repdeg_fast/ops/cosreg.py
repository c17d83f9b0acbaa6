"""The operators behind CosReg. Mathematics: :mod:`repdeg_fast.reference.cosreg`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Limit, Operation, aligned_rows, no_float64, no_limit
from repdeg_fast.contracts.cosreg import Kernels, Rows, Saved, Sums
from repdeg_fast.native import cosreg as native
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.reference import cosreg as reference


def _triton() -> Kernels:
    if TYPE_CHECKING:
        from triton_kernels import cosreg
    else:
        from repdeg_fast.triton_kernels import cosreg
    return cosreg


def _held_in_registers(most: int, takes: Limit) -> Limit:
    """The limit of kernels that hold a row in registers between its two uses."""

    def limit(weight: Tensor, *others: Tensor) -> str | None:
        if weight.shape[1] > most:
            return f"holds rows of at most {most:,} values in registers, got {weight.shape[1]:,}"
        return takes(weight, *others)

    return limit


operation = Operation[Kernels](
    "cosreg",
    reference=reference,
    native=native.Kernels,
    triton=_triton,
    limits={
        "cpu": no_limit,
        "triton": _held_in_registers(16384, no_float64),
        "cuda": _held_in_registers(12288, aligned_rows),
    },
)


@operator()
def cosreg(
    weight: Tensor, row_weight: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R (), column sum (d,), inverse norms (N,) and total weight ()."""
    _check_row_weight(row_weight)
    return operation.kernels(backend, weight).forward(_rows(weight, row_weight, eps))


@cosreg.register_fake
def _(weight: Tensor, *_: Any) -> Sums:
    n, d = weight.shape
    empty = lambda *shape: weight.new_empty(shape, dtype=arithmetic_dtype(weight))  # noqa: E731
    return Sums(value=empty(), column_sum=empty(d), inverse_norm=empty(n), total_weight=empty())


@operator()
def cosreg_backward(
    grad_value: Tensor,
    weight: Tensor,
    row_weight: Tensor | None,
    column_sum: Tensor,
    inverse_norm: Tensor,
    total_weight: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """grad_value · ∂R/∂W, (N, d) in the dtype of ``weight``."""
    rows, saved = _rows(weight, row_weight, eps), Saved(column_sum, inverse_norm, total_weight)
    grad_weight = torch.empty_like(weight)
    operation.kernels(backend, weight).backward(grad_weight, grad_value, rows, saved, accumulate=False)
    return grad_weight


@cosreg_backward.register_fake
def _(grad_value: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


cosreg_backward.forbid_second_derivative("cosine_regularization")


@cosreg.register_formula("cosine_regularization")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Any], weight: Tensor, row_weight: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, ...]:
        sums = Sums(*run(weight, row_weight, eps, backend))
        # without row weights the total is N, which needs no saving
        total_weight = None if row_weight is None else sums.total_weight
        ctx.save_for_backward(weight, row_weight, sums.column_sum, sums.inverse_norm, total_weight)
        ctx.eps, ctx.backend = eps, backend
        ctx.mark_non_differentiable(*sums[1:])
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_value is None:
            return (None,) * 5
        weight, row_weight, column_sum, inverse_norm, total_weight = ctx.saved_tensors
        grad_weight = cosreg_backward(
            grad_value, weight, row_weight, column_sum, inverse_norm, total_weight, ctx.eps, ctx.backend
        )
        return None, grad_weight, None, None, None


@operator(mutates=("grad",))
def cosreg_add_(
    grad: Tensor, weight: Tensor, coefficient: float, row_weight: Tensor | None, eps: float, backend: str
) -> Tensor:
    """Add coefficient · ∂R/∂W to ``grad`` and return R: both passes in one call, no graph, nothing of size N×d."""
    _check_row_weight(row_weight)
    rows, kernels = _rows(weight, row_weight, eps), operation.kernels(backend, weight, grad)
    sums = Sums(*kernels.forward(rows))
    scale = torch.full_like(sums.value, coefficient)
    kernels.backward(grad, scale, rows, Saved(*sums[1:]), accumulate=True)
    torch.autograd.graph.increment_version(grad)
    return sums.value


@cosreg_add_.register_fake
def _(grad: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((), dtype=arithmetic_dtype(weight))


def _rows(weight: Tensor, row_weight: Tensor | None, eps: float) -> Rows:
    """With the largest row weight as 1, which does not change R: squares then neither overflow nor vanish. Negative
    weights stay negative, or become −∞."""
    if row_weight is not None:
        dtype = arithmetic_dtype(weight)
        row_weight = row_weight.to(torch.promote_types(row_weight.dtype, dtype))
        row_weight = (row_weight / row_weight.amax().clamp_min(0)).to(dtype)
    return Rows(weight, row_weight, eps)


def _check_row_weight(row_weight: Tensor | None) -> None:
    """Values are checked on the CPU only: on a GPU a check would stall the stream, and bad weights give NaN there."""
    if row_weight is None or row_weight.device.type != "cpu":
        return
    if bool((row_weight < 0).any()):
        raise ValueError("row_weight: expected no negative value, got " + f"{row_weight.min().item():g}")
    if bool(row_weight.sum() == 0):
        raise ValueError("row_weight: expected a positive sum, got all zeros; leave it out to weight all rows alike")
