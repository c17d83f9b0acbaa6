"""In what precision things are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for everything but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
