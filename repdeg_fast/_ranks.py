"""Whether there are other processes of a training, how many, and what they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed


def are_there() -> bool:
    """A process group was initialized, maybe of one rank."""
    return distributed.is_available() and distributed.is_initialized()


def number(group: Any = None) -> int:
    """How many; an error where this process is in no ``group``: torch's collectives return there at once, undone."""
    if not are_there():
        return 1
    if group not in (None, distributed.GroupMember.NON_GROUP_MEMBER) and not isinstance(
        group, distributed.ProcessGroup
    ):
        raise TypeError(f"group: expected a process group of torch.distributed, got {type(group).__name__}")
    if (ranks := distributed.get_world_size(group)) < 0:
        raise ValueError(f"group: expected one that rank {distributed.get_rank()} is in, got another")
    return ranks


class Share(NamedTuple):
    """What one rank has of something that ranks count."""

    before: int  # of the ranks before it
    own: int
    whole: int
    ranks: int

    @property
    def weight(self) -> float:
        """Of a rank's mean, so that the mean over ranks is that over all that they count; 0 where that is nothing."""
        return self.own * self.ranks / max(self.whole, 1)


def shares(counts: Sequence[int], device: torch.device, group: Any = None) -> list[Share]:
    """Of each of ``counts``, this rank's share. With other ranks a gather, whose result the host waits for."""
    if number(group) == 1:
        return [Share(0, count, count, 1) for count in counts]
    by_count, rank = zip(*gathered(counts, device, group), strict=True), distributed.get_rank(group)
    return [Share(sum(of[:rank]), of[rank], sum(of), len(of)) for of in by_count]


def gathered(counts: Sequence[int], device: torch.device, group: Any = None) -> list[list[int]]:
    """The ``counts`` of each rank, which has as many as the others. The host waits for them."""
    mine = torch.tensor(counts, device=device)
    parts = [torch.empty_like(mine) for _ in range(number(group))]
    distributed.all_gather(parts, mine, group=group)
    found: list[list[int]] = torch.stack(parts).tolist()
    return found
