"""Memory for blocks of logits, scores and cosines: rows on cache lines, within a limit, kept between calls on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Products

LIMIT = {"cpu": 64 << 20, "cuda": 1 << 30}  # bytes of buffers; the GEMMs of a GPU need more rows to be efficient
ALIGNMENT = 64  # bytes: rows of logits that start on a cache line make MKL's h Eᵀ a quarter faster


def matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """(rows, columns) with rows on cache lines, uninitialized; in ``memory`` where it is given."""
    stride = aligned(columns, dtype)
    memory = like.new_empty(rows * stride, dtype=dtype) if memory is None else memory
    return memory.as_strided((rows, columns), (stride, 1))


def take(kernels: Products, like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """For a :func:`matrix`: on a CPU what :func:`keep` kept, if it is enough, else in large pages."""
    size = rows * aligned(columns, dtype)
    kept = _kept.pop(dtype, None) if like.device.type == "cpu" else None  # another thread's call finds none
    if kept is not None and kept.numel() >= size:
        return kept
    with torch.inference_mode(False):  # kept, it may serve a call that trains
        memory = torch.empty(size, dtype=dtype, device=like.device)
    kernels.advise(memory)
    return memory


def keep(memory: Tensor) -> None:
    """Keep a CPU's buffer for the next call, as BLAS libraries keep theirs: PyTorch would give its pages back to the
    system, and taking them again costs 2 to 8 % of a call. In large pages products are faster, too."""
    if memory.device.type == "cpu" and memory.nbytes <= LIMIT["cpu"]:
        _kept[memory.dtype] = memory


def release() -> None:
    """Give back the memory that is kept between calls."""
    _kept.clear()


_kept: dict[torch.dtype, Tensor] = {}


def aligned(columns: int, dtype: torch.dtype) -> int:
    step = ALIGNMENT // dtype.itemsize
    return -(-columns // step) * step


def limit(tensor: Tensor) -> int:
    return LIMIT["cpu" if tensor.device.type == "cpu" else "cuda"]


def ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, step):
        yield first, min(first + step, length)
