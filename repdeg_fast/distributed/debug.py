"""A debug mode: before each operation ranks compare their arguments, and an error on each of them names what differs.

Without it ranks that disagree give wrong numbers, or wait for one another until torch.distributed's timeout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.distributed.shards import gathered

_on = os.environ.get("REPDEG_FAST_DISTRIBUTED_DEBUG", "0") not in ("", "0")


@contextmanager
def compare_arguments(on: bool = True) -> Iterator[None]:
    """Inside a ``with`` block, on all ranks: compare. ``REPDEG_FAST_DISTRIBUTED_DEBUG=1`` does so everywhere."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def check_same(group: Any, operation: str, **arguments: Any) -> None:
    """In the debug mode, raise where an argument is not the same on all ranks: a gather of what they are, of tensors
    that every rank should have whole of their sums.

    Raises:
        ValueError: on every rank, naming the arguments.
    """
    if not _on:
        return
    mine = {"operation": operation} | {name: _told(value) for name, value in arguments.items()}
    told = gathered(mine, group)
    names = dict.fromkeys(name for one in told for name in one)
    differ = [name for name in names if any(one.get(name) != told[0].get(name) for one in told)]
    if differ:
        shown = "; ".join(f"{name}: {[one.get(name) for one in told]}" for name in differ)
        raise ValueError(f"{operation}: expected the same arguments on all ranks, got, in their order, {shown}")


def _told(value: Any) -> Any:
    """What is compared: bits of numbers, and of a tensor its dtype, shape and values by two sums."""
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    if not isinstance(value, Tensor):
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
    wide = value.detach().double().flatten()
    places = torch.arange(1, wide.numel() + 1, dtype=wide.dtype, device=wide.device)
    return f"{value.dtype} {tuple(value.shape)} {wide.sum().item():.17g} {(wide / places).sum().item():.17g}"
