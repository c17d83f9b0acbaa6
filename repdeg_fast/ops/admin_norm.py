"""The operator behind ADMIN's residual block. Mathematics: :mod:`repdeg_fast.reference.admin_norm`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.backends import Operation, aligned_rows, no_float64, no_limit
from repdeg_fast.native import build
from repdeg_fast.ops._common import forbid_double_backward
from repdeg_fast.reference import admin_norm as reference
from repdeg_fast.reference.cosreg import arithmetic_dtype

operation = Operation[Any](
    "admin_norm",
    reference=reference,
    native=lambda namespace: build.operators("admin_norm", *("forward", "backward"), namespace=namespace),
    triton=lambda: importlib.import_module("repdeg_fast.triton_kernels.admin_norm"),
    limits={"cpu": no_limit, "triton": no_float64, "cuda": aligned_rows},
)


@torch.library.custom_op("repdeg_fast::admin_norm", mutates_args=())
def admin_norm(
    x: Tensor,
    branch: Tensor,
    omega: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    center: bool,
    save_input: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, d), μ (N,) and 1/σ (N,). ``x`` and ``branch``: (N, d), rows of unit stride; parameters: (d,),
    contiguous, in the arithmetic dtype; ``seed`` where ``dropout`` > 0. ``save_input``: what the backward pass keeps.
    """
    kernels = operation.kernels(backend, x, branch)
    parameters = map(_aligned, (omega, weight, bias, branch_bias))
    return kernels.forward(x, branch, *parameters, seed, dropout, eps, center)


@admin_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = lambda: x.new_empty(x.shape[:1], dtype=arithmetic_dtype(x))  # noqa: E731
    return x.new_empty(x.shape), statistics(), statistics()


@torch.library.custom_op("repdeg_fast::admin_norm_backward", mutates_args=())
def admin_norm_backward(
    grad_y: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    omega: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout: float,
    center: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, ω, γ, β and branch bias, each in memory of its own. ``wanted``: which of all but the
    first to make; one that is not is empty. n is made from ``y`` where given, else from the inputs.
    """
    gradients = _empty_gradients(grad_y, rstd, wanted)
    grad_y = grad_y.contiguous()
    matrices = [matrix for matrix in (grad_y, y, x, branch) if matrix is not None]
    operation.kernels(backend, *matrices).backward(
        *_made(gradients, wanted), grad_y, y, x, branch, *map(_aligned, (omega, weight, bias, branch_bias)), seed,
        mean, rstd, dropout, center,
    )  # fmt: skip
    return gradients


@admin_norm_backward.register_fake
def _(
    grad_y: Tensor, y: Any, x: Any, branch: Any, omega: Any, weight: Any, bias: Any, branch_bias: Any, seed: Any,
    mean: Any, rstd: Tensor, dropout: float, center: bool, wanted: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(grad_y, rstd, wanted)


def _aligned(parameter: Tensor | None) -> Tensor | None:
    """Kernels read parameters 16 bytes at a time; a view into a flat buffer may start anywhere."""
    return parameter if parameter is None or parameter.data_ptr() % 16 == 0 else parameter.clone()


def _empty_gradients(
    grad_y: Tensor, rstd: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch, *parameters = wanted
    rows = [grad_y.new_empty(grad_y.shape if make else 0) for make in (True, branch)]
    sums = [rstd.new_empty(grad_y.shape[1] if make else 0) for make in parameters]
    return rows[0], rows[1], sums[0], sums[1], sums[2], sums[3]


def _made(gradients: tuple[Tensor, ...], wanted: list[bool]) -> list[Tensor | None]:
    """``None`` in place of what was not wanted."""
    return [gradient if make else None for gradient, make in zip(gradients, [True, *wanted], strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, omega, weight, bias, branch_bias, seed, ctx.dropout, _, ctx.center, save_input, ctx.backend = inputs
    y, mean, rstd = output
    ctx.wanted = list(ctx.needs_input_grad[1:6])
    if save_input:
        ctx.save_for_backward(None, x, branch, omega, weight, None, branch_bias, seed, mean, rstd)
    else:
        ctx.save_for_backward(y, x if ctx.wanted[1] else None, None, omega, weight, bias, None, seed, None, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 12
    saved = ctx.saved_tensors  # once: a checkpointed block is run again for it, and only once
    gradients = admin_norm_backward(grad_y, *saved, ctx.dropout, ctx.center, ctx.wanted, ctx.backend)
    return *_made(gradients, ctx.wanted), *(None,) * 6


admin_norm.register_autograd(_backward, setup_context=_setup_context)
forbid_double_backward(admin_norm_backward, "admin_norm")
