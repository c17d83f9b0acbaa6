"""The operator behind ADMIN's residual block. Mathematics: :mod:`repdeg_fast.reference.admin_norm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype
from repdeg_fast.backends import Operation, aligned_rows, no_float64, no_limit
from repdeg_fast.contracts.admin_norm import Affine, Dropout, Gradients, Kernels, Norm, Residual, Saved, Wanted
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
    residual, affine = Residual(x, branch, omega, branch_bias), Affine(weight, bias)
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
    """Gradients. ``wanted``: the fields of Wanted."""
    grad_y = grad_y if grad_y.is_contiguous() else grad_y.contiguous()
    saved = Saved(y, x, branch, omega, weight, bias, branch_bias, mean, rstd)
    matrices = (grad_y, y) if x is None else (grad_y, x, branch) if y is None else (grad_y, y, x)
    kernels = operation.kernels(backend, *matrices)
    return kernels.backward(Wanted(*wanted), grad_y, saved, Dropout(seed, dropout), center=center)


@admin_norm_backward.register_fake
def _(grad_y: Tensor, *arguments: Any) -> Gradients:
    *_, rstd, _seed, _dropout, _center, wanted, _backend = arguments
    return reference.empty_gradients(Wanted(*wanted), grad_y.contiguous(), rstd)


admin_norm_backward.forbid_second_derivative("admin_norm")


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
        y, mean, rstd = run(
            x, branch, omega, weight, bias, branch_bias, seed, dropout, eps, center, save_input, backend
        )
        wanted = list(ctx.needs_input_grad[2:7])  # from branch to branch_bias
        ctx.options = _Options(dropout, center, save_input, wanted, backend)
        if save_input:  # the fields of Saved, and the seed
            ctx.save_for_backward(None, x, branch, omega, weight, None, branch_bias, mean, rstd, seed)
        else:
            x_of_omega = x if wanted[1] else None
            ctx.save_for_backward(y, x_of_omega, None, omega, weight, bias, None, None, rstd, seed)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 13
        y, x, branch, omega, weight, bias, branch_bias, mean, rstd, seed = _unpack(ctx)
        dropout, center, _, wanted, backend = ctx.options
        grad_x, *others = admin_norm_backward(
            grad_y, y, x, branch, omega, weight, bias, branch_bias, mean, rstd, seed, dropout, center, wanted, backend
        )
        gradients = [others[i] if make else None for i, make in enumerate(wanted)]
        return None, grad_x, *gradients, None, None, None, None, None, None  # of run; from the seed on


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
