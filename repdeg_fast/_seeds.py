"""Seeds as the kernels take them: a one-element int64 tensor on the device, so that a CUDA graph can replay another."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as a tensor: an int in [−2⁶³, 2⁶⁴), a one-element int64 tensor on ``device`` (taken as it is), or
    ``None`` to draw one from torch's generator of that device (activation checkpointing then draws the same again).

    Raises:
        TypeError, ValueError: saying what was given and expected.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return _check(seed, device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, a one-element int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected 64 bits, in [-2**63, 2**64), got {seed}")
    return torch.full((1,), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def _check(seed: Tensor, device: torch.device) -> Tensor:
    if seed.dtype != torch.int64:
        raise TypeError(f"seed: expected int64, got {seed.dtype}; call .long()")
    if seed.numel() != 1:
        raise ValueError(f"seed: expected one element, got shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed: expected device {device} like the data, got {seed.device}; call .to({str(device)!r})")
    return seed
