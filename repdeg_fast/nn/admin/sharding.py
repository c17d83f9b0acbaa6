"""Parameters that FSDP2 or tensor parallelism cut up."""

from __future__ import annotations

from torch import nn

from repdeg_fast import _ranks
from repdeg_fast._checks import is_dtensor


def reshard(model: nn.Module) -> None:
    """FSDP2 puts whole copies in the place of its parameters for a forward pass, and the outermost module keeps them
    there afterwards: what is written to a copy is lost. This takes them away."""
    if _ranks.are_there():
        from torch.distributed.fsdp import FSDPModule  # half a second, which nobody else should pay

        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


def check_whole(name: str, model: nn.Module, remedy: str) -> None:
    """No parameter of ``model`` is cut up."""
    reshard(model)
    if cut := next((key for key, parameter in model.named_parameters() if is_dtensor(parameter)), None):
        raise ValueError(
            f"{name}: expected whole parameters, got {cut} as a DTensor (FSDP2 or tensor parallelism); {remedy}"
        )
