"""In what precision things are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for everything but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matrices are multiplied in under autocast on ``device``; ``None`` where it is off, or unknown (meta)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
