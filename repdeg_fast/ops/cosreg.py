"""The operator behind CosReg. Mathematics: :mod:`repdeg_fast.reference.cosreg`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repdeg_fast.backends import Limit, Operation
from repdeg_fast.ops._common import forbid_double_backward
from repdeg_fast.reference.cosreg import arithmetic_dtype


def _held_in_registers(most: int) -> Limit:
    """The limit of kernels that hold a row in registers between its two uses."""

    def limit(weight: Tensor, *_: Tensor) -> str | None:
        if weight.dtype == torch.float64:
            return "float64 is for the reference and cpu backends"
        if weight.shape[1] > most:
            return f"holds rows of at most {most:,} values in registers, got {weight.shape[1]:,}"
        return None

    return limit


def _cuda_limit(*matrices: Tensor) -> str | None:
    for matrix in matrices:
        row_bytes = [size * matrix.element_size() for size in (matrix.shape[1], matrix.stride(0))]
        if matrix.stride(1) != 1 or matrix.data_ptr() % 16 or any(size % 16 for size in row_bytes):
            return "needs contiguous rows of a multiple of 16 bytes that start on 16-byte boundaries"
    return _held_in_registers(12288)(*matrices)


operation = Operation(
    "cosreg",
    functions=("forward", "backward"),
    backends={"cpu": lambda *_: None, "triton": _held_in_registers(16384), "cuda": _cuda_limit},
)


@torch.library.custom_op("repdeg_fast::cosreg", mutates_args=())
def cosreg(
    weight: Tensor, row_weight: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R (), column sum (d,), inverse norms (N,) and total weight ()."""
    _check_row_weight(row_weight)
    return operation.kernels(backend, weight).forward(weight, row_weight, eps)


@cosreg.register_fake
def _(weight: Tensor, row_weight: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = weight.shape
    empty = lambda *shape: weight.new_empty(shape, dtype=arithmetic_dtype(weight))  # noqa: E731
    return empty(), empty(d), empty(n), empty()


@torch.library.custom_op("repdeg_fast::cosreg_backward", mutates_args=())
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
    grad_weight = torch.empty_like(weight)
    operation.kernels(backend, weight).backward(
        grad_weight, grad_value, weight, row_weight, column_sum, inverse_norm, total_weight, eps, False
    )
    return grad_weight


@cosreg_backward.register_fake
def _(grad_value: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight, row_weight, ctx.eps, ctx.backend = inputs
    _, column_sum, inverse_norm, total_weight = output
    # without row weights the total is N, which needs no saving
    ctx.save_for_backward(weight, row_weight, column_sum, inverse_norm, None if row_weight is None else total_weight)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
    grad = None if grad_value is None else cosreg_backward(grad_value, *ctx.saved_tensors, ctx.eps, ctx.backend)
    return grad, None, None, None


cosreg.register_autograd(_backward, setup_context=_setup_context)
forbid_double_backward(cosreg_backward, "cosine_regularization")


@torch.library.custom_op("repdeg_fast::cosreg_add_", mutates_args={"grad"})
def cosreg_add_(
    grad: Tensor, weight: Tensor, coefficient: float, row_weight: Tensor | None, eps: float, backend: str
) -> Tensor:
    """Add coefficient · ∂R/∂W to ``grad`` and return R: both passes in one call, no graph, nothing of size N×d."""
    _check_row_weight(row_weight)
    kernels = operation.kernels(backend, weight, grad)
    value, column_sum, inverse_norm, total_weight = kernels.forward(weight, row_weight, eps)
    scale = torch.full_like(value, coefficient)
    kernels.backward(grad, scale, weight, row_weight, column_sum, inverse_norm, total_weight, eps, True)
    return value


@cosreg_add_.register_fake
def _(grad: Tensor, weight: Tensor, coefficient: float, row_weight: Tensor | None, eps: float, backend: str) -> Tensor:
    return weight.new_empty((), dtype=arithmetic_dtype(weight))


def _check_row_weight(row_weight: Tensor | None) -> None:
    """Values are checked on the CPU only: on a GPU a check would stall the stream, and bad weights give NaN there."""
    if row_weight is None or row_weight.device.type != "cpu":
        return
    if bool((row_weight < 0).any()):
        raise ValueError("row_weight: expected no negative value, got " + f"{row_weight.min().item():g}")
    if bool(row_weight.sum() == 0):
        raise ValueError("row_weight: expected a positive sum, got all zeros; leave it out to weight all rows alike")
