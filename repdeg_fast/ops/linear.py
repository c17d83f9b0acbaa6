"""A linear layer by the native products, where they are faster than PyTorch's own (:mod:`repdeg_fast.native.products`).

x Wᵀ + b; the gradients are g W, gᵀ x and Σ g (sums over rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from repdeg_fast import backends
from repdeg_fast._checks import is_plain
from repdeg_fast.native import build, products
from repdeg_fast.ops._operator import Formula, operator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` for x (..., k), weight (n, k) and bias (n,)."""
    if not _ours(x, weight, bias):
        return F.linear(x, weight, bias)
    if x.dim() == 2:
        return native_linear(x, weight, bias)
    return native_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def _ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """fp32 on a CPU in a plain call, and oneDNN is fastest there: all else PyTorch's own product does as well."""
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or not x.numel():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(is_plain(operand, torch.float32, _CPU) for operand in operands):
        return False
    if backends.requested() not in ("auto", "cpu"):
        return False
    if reason := build.unavailable("cpu"):
        backends.forbid_if_strict(f"repdeg_fast: a linear layer on cpu is PyTorch's own: {reason}")
        return False
    build.load("cpu")
    return products.settle(torch.ops.repdeg_fast_native) in ("onednn", products.BATCH_INVARIANT)


_CPU = torch.device("cpu")


@operator()
def native_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, k), weight (n, k), bias (n,) -> (N, n)."""
    made: Tensor = torch.ops.repdeg_fast_native.product.default(x, weight.t(), bias)
    return made


@native_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator()
def native_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias; ``wanted``: which of them, one that is not is empty."""
    grad = grad if grad.is_contiguous() else grad.contiguous()
    product = torch.ops.repdeg_fast_native.product.default
    return (
        product(grad, weight, None) if wanted[0] else grad.new_empty(0),
        product(grad.t(), x, None) if wanted[1] else grad.new_empty(0),
        grad.sum(0) if wanted[2] else grad.new_empty(0),
    )


@native_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    empty = [grad.new_empty(shape if make else (0,)) for shape, make in zip(shapes, wanted, strict=True)]
    return empty[0], empty[1], empty[2]


native_linear_backward.forbid_second_derivative("linear")


@native_linear.register_formula("linear")
class _Formula(Formula):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[1:])
        x, weight = ctx.saved_tensors
        made = native_linear_backward(grad, x, weight, wanted)
        return None, *[gradient if make else None for gradient, make in zip(made, wanted, strict=True)]
