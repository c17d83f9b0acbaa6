"""Operands of ADMIN's residual block, and the definition in float64 that they are held against."""

import torch
from helpers import TOLERANCE, relative_error

from repdeg_fast import admin_norm
from repdeg_fast.reference import admin_norm as definition
from repdeg_fast.reference import philox

PARAMETERS = ("omega", "weight", "bias", "branch_bias")
MODES = [  # norm, dropout, save
    ("layer", 0.0, "output"),
    ("layer", 0.3, "input"),
    ("rms", 0.3, "output"),
    ("rms", 0.0, "input"),
]
SEED = 0x1234567890


def inputs(*shape, dtype=torch.float32, device="cpu", absent=()):
    """x, branch and the four parameters, away from zero where save="output" divides by them; all want gradients."""
    d = shape[-1]
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "x": torch.randn(shape, dtype=torch.float64) + 0.5,
        "branch": torch.randn(shape, dtype=torch.float64),
        "omega": torch.rand(d, dtype=torch.float64) + 0.5,
        "weight": (torch.rand(d, dtype=torch.float64) + 0.5) * (torch.rand(d) - 0.3).sign(),
        "bias": torch.randn(d, dtype=torch.float64) / 2,
        "branch_bias": torch.randn(d, dtype=torch.float64),
    }
    dtypes = dict.fromkeys(PARAMETERS, parameter_dtype)
    return {
        name: value.to(device, dtypes.get(name, dtype)).requires_grad_()
        for name, value in made.items()
        if name not in absent
    }


def keep_of(shape, dropout, seed=SEED):
    """What dropout multiplies the branch by, in float64."""
    if dropout == 0:
        return None
    rows, d = torch.Size(shape[:-1]).numel(), shape[-1]
    mask = philox.dropout_mask(torch.tensor([seed]), range(rows), range(d), dropout)
    return mask.double().reshape(shape) / (1 - dropout)


def expected(tensors, upstream, norm="layer", dropout=0.0, seed=SEED, eps=1e-5):
    """y and the gradients from the definition, in float64 on the CPU."""
    leaves = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in tensors.items()}
    keep = keep_of(leaves["x"].shape, dropout, seed)
    y = definition.admin_norm(**leaves, keep=keep, norm=norm, eps=eps)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream.cpu().double())
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def actual(tensors, upstream, **options):
    y = admin_norm(**tensors, **options)
    return y, dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), upstream), strict=True))


def assert_matches(tensors, norm="layer", dropout=0.0, **options):
    x = tensors["x"]
    upstream = torch.randn(x.shape, dtype=torch.float64).to(x)
    true_y, true_gradients = expected(tensors, upstream, norm, dropout)
    y, gradients = actual(tensors, upstream, norm=norm, dropout=dropout, seed=SEED, **options)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert relative_error(y, true_y) <= TOLERANCE[x.dtype]
    for name, gradient in gradients.items():
        assert gradient.dtype == tensors[name].dtype, name
        error = relative_error(gradient, true_gradients[name])
        if x.shape[-1] <= 2:  # n is ±1 or 0 whatever z is: gradients cancel to about eps, and rounding is what is left
            error = min(error, (gradient.cpu() - true_gradients[name]).norm().item() / 1e-5**-0.5)  # 1/σ, at most
        assert error <= TOLERANCE[x.dtype], (name, x.dtype, error)
