"""ADMIN's residual block where rounding shows. What its error may be, PyTorch's own LayerNorm says in the same run."""

import pytest
import torch
import torch.nn.functional as F
from admin_norm_cases import actual, inputs
from helpers import relative_error

from repdeg_fast import admin_norm
from repdeg_fast.ops.admin_norm import operation  # noqa: F401

WIDTHS = [100, 768, 2056, 8712]


def values(kind, *shape):
    """x, branch and the upstream gradient in float32."""
    x, branch, upstream = (torch.randn(shape) for _ in range(3))
    if "mean 1000" in kind:
        x += 1000
    if "upstream 1000" in kind:
        upstream += 1000
    if kind == "constant rows":  # what is not a power of two loses digits in sums, and no sum is left over here
        x, branch = torch.full(shape, 1234.567), torch.zeros(shape)
    if kind in ("1e-15", "1e15"):
        x, branch = float(kind) * x, float(kind) * branch
    return x, branch, upstream


def errors(function, x, branch, upstream, exact):
    """Of y and the gradient of x, against those in ``exact``."""
    x, branch = (t.to(upstream.device).requires_grad_() for t in (x, branch))
    y = function(x, branch)
    return [
        relative_error(out, true) for out, true in zip((y, *torch.autograd.grad(y, x, upstream)), exact, strict=True)
    ]


@pytest.mark.parametrize("kind", ["usual", "rms", "mean 1000", "upstream 1000", "constant rows", "1e-15", "1e15"])
@pytest.mark.parametrize("d", WIDTHS)
def test_as_near_to_float64_as_pytorch(place, d, kind):
    # The interpreter is slow. Rounding 1/σ moves a whole row, by up to an ulp, and three rows do not average that out.
    rows, least = (3, 2.0**-23) if (place.backend, place.device) == ("triton", "cpu") else (40, 0.0)
    x, branch, upstream = values(kind, rows, d)
    upstream = upstream.to(place.device)
    norm, normalize = ("rms", F.rms_norm) if kind == "rms" else ("layer", F.layer_norm)
    pytorch = lambda x, branch: normalize(x + branch, (d,), eps=1e-5)  # noqa: E731
    exact_x, exact_branch = x.double().requires_grad_(), branch.double()
    exact_y = pytorch(exact_x, exact_branch)
    exact = (exact_y, *torch.autograd.grad(exact_y, exact_x, upstream.double().cpu()))
    theirs = errors(pytorch, x, branch, upstream, exact)
    for save in ("output", "input"):
        ours = errors(lambda x, branch: admin_norm(x, branch, norm=norm, save=save), x, branch, upstream, exact)  # noqa: B023
        assert all(error <= max(1.25 * own, least) for error, own in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_the_nearest(place, dtype):
    """Not the next towards zero, nor the next above."""
    if dtype not in place.dtypes():
        pytest.skip("not a dtype of this backend")
    x, branch, _ = values("usual", 20, 96)
    x, branch = x.to(dtype), branch.to(dtype)
    exact = F.layer_norm(x.double() + branch.double(), (96,)).to(dtype)
    y = admin_norm(x.to(place.device), branch.to(place.device))
    assert (y.cpu() == exact).float().mean() > 0.98


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_not_masked(place, bad, norm):
    for name in ("x", "branch"):
        tensors = inputs(6, 64, device=place.device)
        tensors[name].data[2, 5] = bad
        y, gradients = actual(tensors, torch.randn(6, 64, device=place.device), norm=norm)
        assert y[2].isnan().any()
        assert gradients["x"][2].isnan().any()
        assert y[[0, 1, 3, 4, 5]].isfinite().all()
        assert gradients["x"][[0, 1, 3, 4, 5]].isfinite().all()
