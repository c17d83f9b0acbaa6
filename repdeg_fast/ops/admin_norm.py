"""The operator behind ADMIN's residual block. Mathematics: :mod:`repdeg_fast.reference.admin_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Operation, aligned_rows, no_float64, no_limit
from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Kernels, Norm, Residual, Saved
from repdeg_fast.native import admin_norm as native
from repdeg_fast.ops._operator import Formula, operator
from repdeg_fast.reference import admin_norm as reference


def _triton() -> Kernels:
    if TYPE_CHECKING:
        from triton_kernels import admin_norm
    else:
        from repdeg_fast.triton_kernels import admin_norm
    return admin_norm


operation = Operation[Kernels](
    "admin_norm",
    reference=reference,
    native=native.Kernels,
    triton=_triton,
    limits={"cpu": no_limit, "triton": no_float64, "cuda": aligned_rows},
)


@operator()
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
    """y (N, d), μ (N,) and 1/σ (N,); ``seed`` where ``dropout`` > 0. ``save_input``: what the backward pass keeps."""
    residual = Residual(x, branch, _aligned(omega), _aligned(branch_bias))
    affine = Affine(_aligned(weight), _aligned(bias))
    return operation.kernels(backend, x, branch).forward(residual, affine, Dropout(seed, dropout), Norm(eps, center))


@admin_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = lambda: x.new_empty(x.shape[:1], dtype=arithmetic_dtype(x))  # noqa: E731
    return x.new_empty(x.shape), statistics(), statistics()


@operator()
def admin_norm_backward(
    grad_y: Tensor,
    y: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    omega: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    branch_bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    center: bool,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Gradients. ``wanted``: which of all but the first to make; one that is not is empty."""
    grad_y = grad_y if grad_y.is_contiguous() else grad_y.contiguous()
    made = _empty_gradients(grad_y, rstd, wanted)
    parameters = (_aligned(omega), _aligned(weight), _aligned(bias), _aligned(branch_bias))
    inputs = (y,) if x is None else (x, branch) if y is None else (y, x)
    kernels = operation.kernels(backend, grad_y, *inputs)
    saved = Saved(y, x, branch, *parameters, mean, rstd)
    kernels.backward(_wanted(made, wanted), grad_y, saved, Dropout(seed, dropout), center=center)
    return made


@admin_norm_backward.register_fake
def _(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, rstd, _seed, _dropout, _center, wanted, _backend = arguments
    return _empty_gradients(grad_y.contiguous(), rstd, wanted)


admin_norm_backward.forbid_second_derivative("admin_norm")


def _aligned(parameter: Tensor | None) -> Tensor | None:
    """Kernels read parameters 16 bytes at a time; a view into a flat buffer may start anywhere."""
    return parameter if parameter is None or parameter.data_ptr() % 16 == 0 else parameter.clone()


def _empty_gradients(
    grad_y: Tensor, rstd: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    branch, *parameters = wanted
    d = grad_y.shape[1]
    grad_branch = torch.empty_like(grad_y) if branch else grad_y.new_empty(0)
    omega, weight, bias, branch_bias = [rstd.new_empty(d if make else 0) for make in parameters]
    return torch.empty_like(grad_y), grad_branch, omega, weight, bias, branch_bias


def _wanted(made: tuple[Tensor, ...], wanted: list[bool]) -> Gradients:
    x, *others = made
    return Gradients(x, *[gradient if make else None for gradient, make in zip(others, wanted, strict=True)])


class _Options(NamedTuple):
    dropout: float
    center: bool
    save_input: bool
    wanted: list[bool]
    backend: str


@admin_norm.register_formula("admin_norm")
class _Formula(Formula):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[Tensor, Tensor, Tensor]],
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
        parameters = (omega, weight, bias, branch_bias)
        y, mean, rstd = run(x, branch, *parameters, seed, dropout, eps, center, save_input, backend)
        _, _, *wanted, _, _, _, _, _, _ = ctx.needs_input_grad  # not of run and x
        ctx.options = _Options(dropout, center, save_input, wanted, backend)
        if save_input:
            saved = Saved(None, x, branch, omega, weight, None, branch_bias, mean, rstd)
        else:
            x_of_omega = x if ctx.needs_input_grad[3] else None
            saved = Saved(y, x_of_omega, None, omega, weight, bias, None, None, rstd)
        ctx.save_for_backward(*saved, seed)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        no_gradient = (None,) * 6  # of seed, dropout, eps, center, save_input, backend
        if grad_y is None:
            return (None,) * 7 + no_gradient
        y, x, branch, omega, weight, bias, branch_bias, mean, rstd, seed = _unpack(ctx)
        dropout, center, _, wanted, backend = ctx.options
        made = admin_norm_backward(
            grad_y, y, x, branch, omega, weight, bias, branch_bias, mean, rstd, seed, dropout, center, wanted, backend
        )
        return None, *_wanted(made, wanted), *no_gradient


def _unpack(ctx: Any) -> Any:
    """Once a pass: a checkpointed block is run again for it, and only once."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        changed, instead = (
            ("x, branch or a parameter", 'x = x + 1 for x += 1, or use save="output", which keeps y')
            if ctx.options.save_input
            else ("y, a parameter, or x where omega gets a gradient,", 'y = y + 1 for y += 1, or use save="input"')
        )
        raise RuntimeError(
            f"admin_norm: {changed} was changed in place after the forward pass, and the backward pass starts from it; "
            f"write {instead}. PyTorch says: {error}"
        ) from error
