"""Random numbers of collators, in the process of a training and in a DataLoader's workers."""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch.utils.data import get_worker_info


class Draws:
    """A collator's ``generator``, or ``None`` for torch's own.

    A worker of a ``DataLoader`` has a copy of it, which no epoch moves on: all workers would choose the same masks, in
    all epochs. It takes torch's own numbers instead, which the loader seeds anew for each worker and epoch.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        self.generator = generator

    @property
    def _numbers(self) -> torch.Generator | None:
        return None if get_worker_info() is not None else self.generator

    def __getstate__(self) -> dict[str, Any]:
        """Without the generator where it goes to a new process, which torch cannot send one to."""
        return self.__dict__ | ({} if get_spawning_popen() is None else {"generator": None})
