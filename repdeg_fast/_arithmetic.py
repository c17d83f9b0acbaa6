"""In what precision things are computed, and scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """fp32 for everything but float64, which stays."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What matrices are multiplied in under autocast on ``device``; ``None`` where it is off, or unknown (meta)."""
    if not torch._C._is_any_autocast_enabled():  # at once: a name of a device is slow to come by
        return None
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def scale_or_repeat_(
    gradients: Sequence[Tensor | None], grad_heads: Tensor, make_again: Callable[[], Sequence[Tensor | None]]
) -> None:
    """Turn gradients of Σ_k loss_k into those of Σ_k grad_heads_k·loss_k, where the K values may be looked at."""
    scale, *others = grad_heads.tolist()
    if all(other == scale for other in others):
        for gradient in gradients if scale != 1 else ():
            if gradient is not None:
                gradient.mul_(scale)
    else:
        for gradient, right in zip(gradients, make_again(), strict=True):
            if gradient is not None and right is not None:
                gradient.copy_(right)


def softcapped(logits: Tensor, softcap: float) -> Tensor:
    """softcap · tanh(logits / softcap); 0: as they are."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def weight_of_targets(target: Tensor, ignore_index: int, class_weight: Tensor) -> Tensor:
    """(): the sum of the weights (V,) of the classes that are targets, added up in double; 1 instead of 0."""
    counts = (target != ignore_index) & (target >= 0) & (target < class_weight.shape[0])
    each = class_weight.index_select(0, target.where(counts, 0))
    total = each.where(counts, 0).sum(dtype=torch.float64)
    return total.where(total != 0, 1).to(class_weight.dtype)


_PLAIN = nullcontext()


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Dtypes are chosen by then. A context that switches off what is off costs as much as a product of a small call."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _PLAIN
