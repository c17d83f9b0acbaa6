"""Argument checks that several functions share. Each error names the argument, what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import Parameter

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN = frozenset((Tensor, Parameter))


class InputError(ValueError):
    """A mistake in what the user asked for: the command line shows it without a traceback."""


def check_floating(name: str, value: Tensor) -> None:
    """``value`` is a strided tensor of one of the four floating dtypes."""
    if type(value) in _PLAIN and value.dtype in FLOATING and value.layout is torch.strided and not value.is_nested:
        return  # the usual case, at once: a call is checked many times over
    if not isinstance(value, Tensor):
        raise not_a_tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    check_dense(name, value)


def not_a_tensor(name: str, value: object) -> TypeError:
    """The error about ``value``, a layer perhaps, in place of a tensor."""
    remedy = "; pass its .weight" if isinstance(getattr(value, "weight", None), Tensor) else ""
    return TypeError(f"{name}: expected a tensor, got {type(value).__name__}{remedy}")


def is_plain(value: Any, dtype: torch.dtype, device: torch.device) -> TypeGuard[Tensor]:
    """Whether ``value`` is a strided tensor of that dtype there: what a check may pass at once."""
    return (
        type(value) in _PLAIN
        and value.dtype is dtype
        and value.device == device
        and value.layout is torch.strided
        and not value.is_nested
    )


def is_dtensor(value: Tensor) -> bool:
    """Whether ``value`` is cut up over processes; without importing torch's class, which takes its time."""
    return type(value) not in _PLAIN and type(value).__module__.startswith("torch.distributed.tensor")


def is_cut(weight: object, shard: object) -> bool:
    """Whether a call is about a vocabulary that lies on several ranks."""
    return shard is not None or (isinstance(weight, Tensor) and is_dtensor(weight))


def check_dense(name: str, value: Tensor) -> None:
    """The tensor ``value`` is a strided one, whole on this device."""
    if is_dtensor(value):
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
    if type(value) is float and 0 < value < math.inf:
        return
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
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")


def row_of_padding(padding_idx: int | None, rows: int) -> int | None:
    """``padding_idx``, of an embedding with so many ``rows``, counted from the front."""
    if padding_idx is None:
        return None
    check_integer("padding_idx", padding_idx)
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx: expected a row of weight, from 0 to {rows - 1}, got {padding_idx}")
    return padding_idx % rows


def check_size(name: str, value: int) -> None:
    """``value`` is a length or a number of things: an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer of at least 1, got {value!r:.60}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value}")


def check_flag(name: str, value: bool) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r:.60}")


def wrong_target(value: int, vocabulary: int, ignore_index: int) -> ValueError:
    """The error about a class index that is none of ``vocabulary``."""
    expected = f"values from 0 to {vocabulary - 1}, or ignore_index ({ignore_index})"
    return ValueError(f"target: expected {expected}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r:.60}")


def check_module(name: str, value: nn.Module) -> None:
    """``value`` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}")


def check_input(name: str, value: Tensor, weight: Tensor) -> None:
    """``value`` (..., d) is what a linear layer with ``weight`` (rows, d) takes."""
    check_floating(name, value)
    if value.dim() == 0 or value.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: expected a last dimension of {weight.shape[1]}, got shape {tuple(value.shape)}")
    if is_dtensor(weight):
        raise TypeError(
            f"{name}: expected a module whose weight is whole, got one whose weight is a DTensor (FSDP2 or tensor "
            f"parallelism); leave that module to the fully_shard of the one around it, which calls it"
        )
    if value.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise TypeError(
            f"{name}: expected {weight.dtype} like the module's weight, got {value.dtype}; convert one of them or use "
            f"torch.autocast"
        )
    if value.device != weight.device:
        raise ValueError(f"{name}: expected device {weight.device} like the module's weight, got {value.device}")


def check_dtype(name: str, value: torch.dtype | None) -> None:
    """``value`` is a dtype that parameters here may have, or ``None`` for torch's default."""
    if value is not None and value not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value!r:.60}")


def check_dropout(name: str, value: float) -> None:
    """``value`` is a probability of dropping a value that leaves some."""
    if type(value) is float and 0 <= value < 1:
        return
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a probability in [0, 1), got {value}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
