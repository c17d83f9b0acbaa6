"""ADMIN's residual block: the paper's formula in eager and compiled PyTorch, every peer that is installed, and ours.

The branch is so small that no dropout mask shows in y: providers draw different masks, and are all held to one value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import repdeg_fast
from repdeg_fast.bench import peers
from repdeg_fast.bench.suite import FORWARD, Case, Inputs, Provider, Suite, Work, compiled, per_backend
from repdeg_fast.ops.admin_norm import operation
from repdeg_fast.reference import admin_norm as reference

_BRANCH_SIZE = 1e-7


def _rows(name: str, n: int, d: int, dropout_percent: int = 0, **options: object) -> Case:
    return Case(name, {"N": n, "d": d, "dropout_percent": dropout_percent}, tokens=n, **options)  # type: ignore[arg-type]


_GPU: dict[str, Any] = {"default_on": ("cuda",), "dtype": torch.bfloat16}

CASES = [
    _rows("bert-base", 8192, 768, brief=True),
    _rows("bert-base-dropout", 8192, 768, 10),
    *(_rows(f"d-{d}", 16384, d, **_GPU) for d in (768, 1024, 2048, 4096, 8192)),
    _rows("d-1024-dropout", 16384, 1024, 10, **_GPU),
    *(_rows(f"sweep-{n}", n, 512, group="sweep", default_on=("cuda",)) for n in (1024, 4096, 16384)),
]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    n, d = case.sizes["N"], case.sizes["d"]
    generator = torch.Generator(device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": device}
    x = case.load().to(device, case.dtype).clone() if case.load else torch.randn(n, d, dtype=case.dtype, **options)
    return {
        "x": x.requires_grad_(),
        "branch": torch.randn(n, d, dtype=case.dtype, **options).mul_(_BRANCH_SIZE).requires_grad_(),
        "omega": torch.rand(d, **options).add_(0.5).requires_grad_(),
        "weight": torch.rand(d, **options).add_(0.5).requires_grad_(),
        "bias": torch.randn(d, **options).mul_(0.1).requires_grad_(),
        "dropout": torch.tensor(case.sizes["dropout_percent"] / 100),
    }


@torch.no_grad()
def exact(inputs: Inputs) -> Tensor:
    x, branch, *parameters = (inputs[name].double() for name in ("x", "branch", "omega", "weight", "bias"))
    return reference.admin_norm(x, branch, *parameters)


def work(case: Case, pass_: str, graph_free: bool) -> Work:
    """Forward reads x and the branch and writes y; backward reads dy, y and x and writes two gradients. A number a row
    goes between them. Operations: 8 a value forward (sum, mean, variance, output), 17 backward."""
    n, d = case.sizes["N"], case.sizes["d"]
    matrix, parameters = n * d * case.dtype.itemsize, 3 * 4 * d
    if pass_ == FORWARD:
        return Work(3 * matrix + parameters + 4 * n, 8 * n * d)
    return Work(8 * matrix + 3 * parameters + 8 * n, 25 * n * d)


def _arguments(inputs: Inputs) -> tuple[list[Tensor], float]:
    return [inputs[name] for name in ("x", "branch", "omega", "weight", "bias")], float(inputs["dropout"])


def _ours(inputs: Inputs) -> Tensor:
    tensors, dropout = _arguments(inputs)
    return repdeg_fast.admin_norm(*tensors, dropout=dropout)


def _prepare_eager(inputs: Inputs, function: Callable[..., Tensor] = reference.eager_form) -> Callable[[], Tensor]:
    tensors, dropout = _arguments(inputs)
    return lambda: function(*tensors, dropout)


def _prepare_liger(inputs: Inputs) -> Callable[[], Tensor]:
    """Its LayerNorm after an eager scaled add."""
    from liger_kernel.ops import LigerLayerNormFunction

    (x, branch, omega, weight, bias), dropout = _arguments(inputs)

    def run() -> Tensor:
        z = x * omega.to(x.dtype) + F.dropout(branch, dropout)
        return LigerLayerNormFunction.apply(z, weight, bias, 1e-5)

    return run


def _prepare_admin_torch(inputs: Inputs) -> Callable[[], Tensor]:
    """Its residual module, with our ω in place of its own, then PyTorch's LayerNorm."""
    import admin_torch

    (x, branch, omega, weight, bias), dropout = _arguments(inputs)
    residual = admin_torch.as_module(2, as_parameter=True, embed_dim=len(omega))
    del residual.omega
    residual.omega = omega

    def run() -> Tensor:
        z = residual(x, F.dropout(branch, dropout))
        return F.layer_norm(z.to(weight.dtype), z.shape[-1:], weight, bias).to(x.dtype)

    return run


def _eager_needs(case: Case) -> Work:
    """The scaled stream, the dropped branch and its mask, the sum and its fp32 form, y, and the gradients of these."""
    size = case.sizes["N"] * case.sizes["d"]
    return Work(12 * 4 * size, work(case, "forward+backward", False).flops)


def _case_of_weights(name: str, weight: Tensor) -> Case:
    return _rows(name, *weight.shape, dtype=weight.dtype, load=lambda: weight)


PROVIDERS = [
    Provider("eager", _prepare_eager, needs=_eager_needs),
    Provider("compile", lambda inputs: _prepare_eager(inputs, compiled(reference.eager_form))),
    peers.ADMIN_TORCH.provider(_prepare_admin_torch, needs=_eager_needs),
    peers.LIGER.provider(_prepare_liger, needs=_eager_needs),
    *per_backend(operation, _ours, lambda inputs: [inputs["x"], inputs["branch"]], reference_needs=_eager_needs),
]

SUITE = Suite(
    op="admin_norm",
    cases=CASES,
    providers=PROVIDERS,
    make_inputs=make_inputs,
    work=work,
    exact=exact,
    size=lambda case: case.sizes["N"] * case.sizes["d"],
    size_label="N·d",
    value_name="mean y",
    case_of_weights=_case_of_weights,
)
