"""A tied embedding that FSDP2 cuts by itself, where a head reads it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial

from repdeg_fast.distributed.shards import waited
from repdeg_fast.functional.gumbel_mix import gradient_reversal


def whole_weight(embedding: nn.Module, weight: Any) -> Tensor:
    """Of an embedding that ``fully_shard`` was called on, the weight gathered: ranks have batches of their own, which a
    cut vocabulary would not serve. Its gradient is averaged over ranks and cut, as FSDP does. Any other as it is."""
    if not isinstance(embedding, FSDPModule) or not isinstance(weight, DTensor):
        return weight
    mesh = weight.device_mesh
    whole = waited(weight.full_tensor(grad_placements=[Partial()] * mesh.ndim))
    return gradient_reversal(whole, 1 / mesh.size())
