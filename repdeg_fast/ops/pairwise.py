"""The operators behind the measures over pairs. Mathematics: :mod:`repdeg_fast.reference.pairwise`.

Three: the closed forms, which save a moment of the vectors; what goes over blocks of cosines, and makes its gradients
in the forward pass; and the maxima.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Operation, no_float64, no_limit
from repdeg_fast.contracts.pairwise import Kind, RowKernels, Vectors
from repdeg_fast.native import pairwise as native
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.ops.pairwise_blocks import Blocks, norms
from repdeg_fast.ops.products import LibraryProducts
from repdeg_fast.reference import pairwise as reference


class _LibraryRowKernels(LibraryProducts):
    """A module's row kernels around PyTorch's products."""

    def __init__(self, module: ModuleType) -> None:
        self.measure, self.maxima = module.measure, module.maxima


def _triton() -> RowKernels:
    if TYPE_CHECKING:
        from triton_kernels import pairwise
    else:
        from repdeg_fast.triton_kernels import pairwise
    return _LibraryRowKernels(pairwise)


operation = Operation[RowKernels](
    "pairwise",
    reference=_LibraryRowKernels(reference),
    native=native.RowKernels,
    triton=_triton,
    limits={"cpu": no_limit, "triton": no_float64},
)


@operator()
def pairwise_cosine(
    x: Tensor,
    y: Tensor | None,
    kind: int,
    parameter: float,
    skip_diagonal: bool,
    eps: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The measure () over blocks of cosines, and its gradients by x and y, in the arithmetic dtype; those not needed
    are empty."""
    vectors = Vectors(x, y, skip_diagonal, eps)
    with torch.autocast(x.device.type, enabled=False):
        blocks = Blocks(_kernels(vectors, backend), vectors, backend)
        value, *made = blocks.measure(Kind(kind), parameter, needs)
    grad_x, grad_y = (value.new_empty(0) if gradient is None else gradient for gradient in made)
    return value, grad_x, grad_y


@pairwise_cosine.register_fake
def _(x: Tensor, y: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs, _backend = options
    dtype = arithmetic_dtype(x)
    grad_x, grad_y = (
        x.new_empty(one.shape if need and one is not None else (0,), dtype=dtype)
        for one, need in zip((x, y), needs, strict=True)
    )
    return x.new_empty((), dtype=dtype), grad_x, grad_y


@operator()
def pairwise_scale(made: Tensor, grad_value: Tensor, vectors: Tensor) -> Tensor:
    """A gradient by ``vectors``, made in the forward pass, times what came from above; in their dtype."""
    return (made * grad_value).to(vectors.dtype)


@pairwise_scale.register_fake
def _(made: Tensor, grad_value: Tensor, vectors: Tensor) -> Tensor:
    return torch.empty_like(made, dtype=vectors.dtype)


pairwise_scale.forbid_second_derivative("pairwise_cosine")


@pairwise_cosine.register_formula("pairwise_cosine")
class _CosineFormula(Formula):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], x: Tensor, y: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        value, *made = run(x, y, *options)
        ctx.save_for_backward(x, y, *made)
        *_, ctx.needs, _backend = options
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        return value, *made

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None, None]
        if grad_value is not None:
            x, y, *made = ctx.saved_tensors
            for i, vectors in enumerate((x, y)):
                gradients[i] = pairwise_scale(made[i], grad_value, vectors) if ctx.needs[i] else None
        return None, *gradients, *(None,) * 6


@operator()
def pairwise_moment(
    x: Tensor, y: Tensor | None, order: int, skip_diagonal: bool, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The mean of c (order 1) or c² (2) in closed form, (); then of x and of y, which may be empty, the inverse norms
    (N,) and the sum of û (d,) or û ûᵀ (d, d)."""
    _kernels(Vectors(x, y, skip_diagonal, eps), backend)  # one that was asked for and cannot serve is an error
    with torch.autocast(x.device.type, enabled=False):
        one, other = _set(x, order, eps, backend), None if y is None else _set(y, order, eps, backend)
        value = reference.moment_mean(one, other, skip_diagonal)
    rest = (value.new_empty(0), value.new_empty(0)) if other is None else (other.inverse, other.moment)
    return value, one.inverse, one.moment, *rest


@pairwise_moment.register_fake
def _(x: Tensor, y: Tensor | None, order: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = lambda *shape: x.new_empty(shape, dtype=arithmetic_dtype(x))  # noqa: E731
    (n, d), rest = x.shape, (empty(0), empty(0))
    if y is not None:
        rest = empty(y.shape[0]), empty(*(d,) * order)
    return empty(), empty(n), empty(*(d,) * order), *rest


@operator()
def pairwise_moment_backward(
    grad_value: Tensor,
    x: Tensor,
    inverse_x: Tensor,
    moment_x: Tensor,
    y: Tensor | None,
    inverse_y: Tensor,
    moment_y: Tensor,
    skip_diagonal: bool,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The needed gradients by x and y, in their dtype; else empty."""
    one = reference.Set(x, inverse_x, moment_x)
    other = None if y is None else reference.Set(y, inverse_y, moment_y)
    grad_x, grad_y = _empty_gradients(x, y, needs)
    with torch.autocast(x.device.type, enabled=False):
        if needs[0]:
            reference.moment_gradient(grad_x, grad_value, one, other, skip_diagonal, eps)
        if needs[1] and other is not None:
            reference.moment_gradient(grad_y, grad_value, other, one, skip_diagonal, eps)
    return grad_x, grad_y


@pairwise_moment_backward.register_fake
def _(grad_value: Tensor, x: Tensor, _ix: Tensor, _mx: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, y, rest[-1])


pairwise_moment_backward.forbid_second_derivative("pairwise_cosine")


@pairwise_moment.register_formula("pairwise_cosine")
class _MomentFormula(Formula):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], x: Tensor, y: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        found = run(x, y, *options)
        ctx.save_for_backward(x, *found[1:3], y, *found[3:])
        _, ctx.skip_diagonal, ctx.eps, _backend = options
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return cast("tuple[Tensor, ...]", found)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        rest = (None,) * 4
        if grad_value is None:
            return None, None, None, *rest
        needs = list(ctx.needs_input_grad[1:3])
        x, inverse_x, moment_x, y, inverse_y, moment_y = ctx.saved_tensors
        made = pairwise_moment_backward(
            grad_value, x, inverse_x, moment_x, y, inverse_y, moment_y, ctx.skip_diagonal, ctx.eps, needs
        )
        return None, *_needed(made, needs), *rest


@operator()
def pairwise_max_cosine(
    x: Tensor, y: Tensor | None, skip_diagonal: bool, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest cosine of each row (N,), its column (N,), and the inverse norms of x and y, which may be empty."""
    vectors = Vectors(x, y, skip_diagonal, eps)
    with torch.autocast(x.device.type, enabled=False):
        blocks = Blocks(_kernels(vectors, backend), vectors, backend)
        values, index = blocks.maxima()
    return values, index, blocks.left.inverse, values.new_empty(0) if y is None else blocks.right.inverse


@pairwise_max_cosine.register_fake
def _(x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = lambda n: x.new_empty(n, dtype=arithmetic_dtype(x))  # noqa: E731
    n = x.shape[0]
    return empty(n), x.new_empty(n, dtype=torch.int64), empty(n), empty(0 if y is None else y.shape[0])


@operator()
def pairwise_max_cosine_backward(
    grad_values: Tensor,
    x: Tensor,
    inverse_x: Tensor,
    y: Tensor | None,
    inverse_y: Tensor,
    index: Tensor,
    eps: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """The needed gradients by x and y, in their dtype; else empty."""
    gradients = reference.max_gradients(grad_values, (x, inverse_x), None if y is None else (y, inverse_y), index, eps)
    grad_x, grad_y = _empty_gradients(x, y, needs)
    for out, need, gradient in zip((grad_x, grad_y), needs, gradients, strict=True):
        if need and gradient is not None:
            out.copy_(gradient)
    return grad_x, grad_y


@pairwise_max_cosine_backward.register_fake
def _(grad_values: Tensor, x: Tensor, _: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_gradients(x, y, rest[-1])


pairwise_max_cosine_backward.forbid_second_derivative("pairwise_max_cosine")


@pairwise_max_cosine.register_formula("pairwise_max_cosine")
class _MaxFormula(Formula):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], x: Tensor, y: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        found = run(x, y, *options)
        _, index, inverse_x, inverse_y = found
        ctx.save_for_backward(x, inverse_x, y, inverse_y, index)
        _, ctx.eps, _backend = options
        ctx.mark_non_differentiable(*found[1:])
        ctx.set_materialize_grads(False)
        return cast("tuple[Tensor, ...]", found)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_values is None:
            return (None,) * 6
        needs = list(ctx.needs_input_grad[1:3])
        x, inverse_x, y, inverse_y, index = ctx.saved_tensors
        made = pairwise_max_cosine_backward(grad_values, x, inverse_x, y, inverse_y, index, ctx.eps, needs)
        return None, *_needed(made, needs), None, None, None


def _kernels(vectors: Vectors, backend: str) -> RowKernels:
    x, y = vectors[:2]
    return operation.kernels(backend, x) if y is None else operation.kernels(backend, x, y)


def _set(x: Tensor, order: int, eps: float, backend: str) -> reference.Set:
    found = norms(x, eps, backend)
    moment = found.column_sum if order == 1 else reference.second_moment(x, found.inverse_norm)
    return reference.Set(x, found.inverse_norm, moment)


def _empty_gradients(x: Tensor, y: Tensor | None, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x) if needs[0] else x.new_empty(0),
        torch.empty_like(y) if needs[1] and y is not None else x.new_empty(0),
    )


def _needed(made: tuple[Tensor, Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(made, needs, strict=True)]
