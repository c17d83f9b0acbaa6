"""Argument checks that several functions share. Each error names the argument, what was given and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class InputError(ValueError):
    """A mistake in what the user asked for: the command line shows it without a traceback."""


def check_floating(name: str, value: Tensor) -> None:
    """``value`` is a strided tensor of one of the four floating dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    check_dense(name, value)


def check_dense(name: str, value: Tensor) -> None:
    """The tensor ``value`` is a strided one, whole on this device."""
    if type(value) not in (Tensor, Parameter) and type(value).__module__.startswith("torch.distributed.tensor"):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor (FSDP2 or tensor parallelism); pass {name}.full_tensor(), "
            f"or call this inside the forward pass of the module that FSDP wraps, where its parameters are whole"
        )
    if value.is_nested:
        raise ValueError(f"{name}: expected a dense tensor, got a nested one; call .to_padded_tensor(0.0)")
    if value.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {value.layout}; call .to_dense()")


def check_positive(name: str, value: float) -> None:
    """``value`` is a finite number above 0."""
    _check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_finite(name: str, value: float) -> None:
    """``value`` is a finite number."""
    _check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_integer(name: str, value: int) -> None:
    """``value`` is an integer."""
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def check_dropout(name: str, value: float) -> None:
    """``value`` is a probability of dropping a value that leaves some."""
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
