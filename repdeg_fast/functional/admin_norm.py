"""ADMIN's residual block: arguments checked, then handed to :mod:`repdeg_fast.ops.admin_norm`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from repdeg_fast import backends
from repdeg_fast._arithmetic import arithmetic_dtype, autocast_dtype
from repdeg_fast._checks import check_dropout, check_floating, check_positive, is_plain
from repdeg_fast._recoverable import SMALLEST_RATIO, smallest_ratio
from repdeg_fast._seeds import seed_tensor
from repdeg_fast.ops._operator import wants_gradient
from repdeg_fast.ops.admin_norm import admin_norm as _admin_norm

NORMS = ("layer", "rms")
SAVES = ("auto", "output", "input")


def admin_norm(
    x: Tensor,  # (..., d)
    branch: Tensor,  # (..., d)
    omega: Tensor | float | None = None,  # (d,) or one value
    weight: Tensor | None = None,  # (d,)
    bias: Tensor | None = None,  # (d,)
    *,
    branch_bias: Tensor | None = None,  # (d,)
    dropout: float = 0.0,
    eps: float = 1e-5,
    norm: str = "layer",
    training: bool = True,
    seed: int | Tensor | None = None,
    save: str = "auto",
) -> Tensor:
    """A post-LN residual block's end in one kernel (ADMIN, arXiv 2004.08249, section 4; arXiv 2008.07772):

    y = LayerNorm(x ⊙ ω + dropout(branch + branch_bias)) ⊙ weight + bias, over the last dimension.

    Differentiable in every tensor but ``seed``. The dropout mask is drawn again in the backward pass, never stored.
    Unlike PyTorch's, y must not be changed in place (y += 1, ``relu_``) before its backward pass, unless
    ``save="input"``: the backward pass then raises an error that says so.

    Args:
        x: (..., d), the residual stream; float32, bfloat16, float16, or float64 on a CPU.
        branch: like ``x``, the output of the sub-layer. Rows of any stride; values of a row apart in memory are copied.
        omega, weight, bias, branch_bias: (d,), in float32 (float64 for float64 ``x``) or the dtype of ``x``; ``None``
            stands for 1, 1, 0, 0. ``omega`` may be one value, as a tensor or a number.
        dropout: probability p in [0, 1) of dropping a value of the branch; what is kept is scaled by 1/(1−p).
        eps: added to the variance.
        norm: ``"layer"``, or ``"rms"``, which subtracts no mean.
        training: ``False`` switches dropout off.
        seed: of the mask: an int, a one-element int64 tensor on the device (which a CUDA graph can replay with another
            value), or ``None`` to draw one from torch's generator. The same seed gives the same mask on every backend.
        save: what the backward pass recomputes the normalized value from. ``"output"``: from y, which the next layer
            keeps anyway, so that this block itself keeps 4 bytes a row. ``"input"``: from ``x`` and ``branch``, which
            it then keeps, and 8 bytes a row; exact also where a weight is near zero, that is
            |weight| < r·max(|bias|, 2⁻⁸) with r = 2⁻² for bfloat16, 2⁻⁵ for float16, else 2⁻⁸. ``"auto"``: the output
            unless a weight is near zero, announced once. It looks again when the parameters change (not through
            ``.data``); on a GPU every 16 updates and without waiting. A compiled graph keeps what it was traced with.

    Returns:
        y, (..., d) in the dtype of ``x``. Under autocast ``x`` and ``branch`` are cast to autocast's dtype first, and y
        comes out in it; the arithmetic is in float32 inside the kernel all the same.

    Raises:
        TypeError, ValueError: naming the argument. ``save="output"`` with a weight near zero is one of them.
    """
    if torch._C._is_any_autocast_enabled():
        x, branch = _under_autocast(x), _under_autocast(branch)
    _check_activations(x, branch)
    check_options(dropout, eps, norm, save)
    omega, weight, bias, branch_bias = _parameters(x, omega, weight, bias, branch_bias)
    dropout = float(dropout) if training else 0.0
    seed = seed_tensor(seed, x.device) if dropout > 0 else None
    differentiated = torch.is_grad_enabled() and (
        x.requires_grad or branch.requires_grad or any(map(wants_gradient, (x, omega, weight, bias, branch_bias)))
    )
    save_input = differentiated and _save_input(save, weight, bias, x.dtype)
    y, _, _ = _admin_norm(
        _rows(x), _rows(branch), omega, weight, bias, branch_bias, seed, dropout, float(eps), norm == "layer",
        save_input, backends.requested(),
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(x.shape)


def check_options(dropout: float, eps: float, norm: str, save: str) -> None:
    """The options that the module shares."""
    check_dropout("dropout", dropout)
    check_positive("eps", eps)
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if save not in SAVES:
        raise ValueError(f"save: expected one of {', '.join(map(repr, SAVES))}, got {save!r}")


def _under_autocast(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return value
    autocast = autocast_dtype(value.device)
    there = autocast is not None and value.is_floating_point() and value.dtype != torch.float64
    return value.to(autocast) if there else value


def _check_activations(x: Tensor, branch: Tensor) -> None:
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected shape (..., d) with d of at least 1, got {tuple(x.shape)}")
    if is_plain(branch, x.dtype, x.device) and branch.shape == x.shape:
        return
    check_floating("branch", branch)
    if branch.shape != x.shape:
        raise ValueError(f"branch: expected shape {tuple(x.shape)} like x, got {tuple(branch.shape)}")
    if branch.dtype != x.dtype:
        raise TypeError(f"branch: expected {x.dtype} like x, got {branch.dtype}; call .to(x.dtype)")
    if branch.device != x.device:
        raise ValueError(f"branch: expected device {x.device} like x, got {branch.device}")


def _rows(value: Tensor) -> Tensor:
    """(N, d) with the values of a row side by side, without a copy where memory allows."""
    rows = value if value.dim() == 2 else value.reshape(-1, value.shape[-1])
    beside = rows.is_contiguous() or rows.stride(1) == 1 or rows.shape[1] == 1
    return rows if beside else rows.contiguous()


def _parameters(
    x: Tensor, omega: Tensor | float | None, weight: Tensor | None, bias: Tensor | None, branch_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernels take them: (d,), contiguous, in the arithmetic dtype."""
    dtype, device, shape = arithmetic_dtype(x), x.device, x.shape[-1:]
    given = omega, weight, bias, branch_bias
    for value in given:
        fits = value is None or (is_plain(value, dtype, device) and value.shape == shape and value.is_contiguous())
        if not fits:
            break
    else:  # the usual case, at once
        return given  # type: ignore[return-value]
    return (
        None if omega is None else _parameter("omega", _omega(omega, x, dtype), x, dtype),
        None if weight is None else _parameter("weight", weight, x, dtype),
        None if bias is None else _parameter("bias", bias, x, dtype),
        None if branch_bias is None else _parameter("branch_bias", branch_bias, x, dtype),
    )


def _omega(omega: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """(d,): one value is spread over the columns."""
    if not isinstance(omega, Tensor):
        if isinstance(omega, bool) or not isinstance(omega, (int, float)) or not -math.inf < omega < math.inf:
            raise TypeError(f"omega: expected a tensor, a finite number or None, got {omega!r}")
        omega = torch.ones(1, dtype=dtype, device=x.device) * omega  # full() would be compiled for each value
    if omega.dim() < 2 and omega.numel() == 1:
        _check_parameter("omega", omega, x, dtype)
        return omega.expand(x.shape[-1])
    if omega.shape != x.shape[-1:]:
        expected = f"({x.shape[-1]},), one value a column, or one value"
        raise ValueError(f"omega: expected shape {expected}, got {tuple(omega.shape)}")
    return omega


def _parameter(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    _check_parameter(name, value, x, dtype)
    if value.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape ({x.shape[-1]},), one value a column, got {tuple(value.shape)}")
    return value if value.dtype == dtype and value.is_contiguous() else value.to(dtype).contiguous()


def _check_parameter(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    check_floating(name, value)
    if value.dtype not in (dtype, x.dtype):
        expected = dict.fromkeys((str(dtype), str(x.dtype)))
        raise TypeError(f"{name}: expected {' or '.join(expected)} for x of {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} like x, got {value.device}")


def _save_input(save: str, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the backward pass starts from the inputs. Looked up while a graph is traced, then fixed in it."""
    if save == "input":
        return True
    ratio, needed = smallest_ratio(weight, bias), SMALLEST_RATIO[dtype]
    if ratio is None:
        return save == "auto"
    if ratio >= needed:
        return False
    problem = f"weight has an entry near zero: min |weight|/max(|bias|, 2⁻⁸) is below {needed:g}, too small for {dtype}"
    if math.isnan(ratio):
        problem = "weight or bias has a NaN entry, from which nothing can be recovered"
    if save == "output":
        raise ValueError(f'save: {problem} (it is {ratio:.3g}); use save="input" or "auto"')
    backends.announce(
        f"repdeg_fast: admin_norm: {problem}; the backward pass keeps x and branch there instead of the output alone"
    )
    return True


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (a second).
_save_input._dynamo_marked_constant = True  # type: ignore[attr-defined]
