"""Work on blocks of a matrix: on a CPU what an operation makes is still in the cache when the next one reads it, and
takes no fresh pages, which is worth more than an order of magnitude over many small operations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_A_THREAD = 2**15  # from so many values on PyTorch gives an elementwise operation a second thread
_ON_A_GPU = 2**22


def block_size(device: torch.device) -> int:
    """How many values to work on at a time."""
    return _A_THREAD * torch.get_num_threads() if device.type == "cpu" else _ON_A_GPU


def cut(whole: range, size: int) -> Iterator[range]:
    """``whole`` in pieces of ``size``, the last one shorter."""
    return (range(first, min(first + size, whole.stop)) for first in whole[:: max(1, size)])
