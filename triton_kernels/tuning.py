"""Launch configurations, and the list of specializations that are compiled ahead of time in the tests."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Specialization:
    """One compile-time variant of a kernel, as a launcher would ask for it.

    ``types`` maps each run-time argument to its Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``), ``constants`` each
    compile-time one to its value. Pointers and the arguments named in ``divisible`` are taken to be multiples of 16,
    as the launcher finds them for rows of a multiple of 16 values.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    label: str = field(default="", compare=False)
    targets: tuple[str, ...] = ()  # the chips it is for; none named: all


@dataclass(frozen=True)
class RowTile:
    """How a kernel that holds whole rows in registers cuts its work: ``rows`` × ``columns`` values a step."""

    rows: int
    columns: int
    num_warps: int


def row_tile(d: int, values: int = 4096) -> RowTile:
    """About ``values`` values a step, 32 a thread: enough independent 16-byte loads in flight, and room for as many
    accumulators without spilling. Longer rows get more warps instead of more values a thread."""
    columns = triton.next_power_of_2(d)
    return RowTile(max(1, values // columns), columns, max(4, columns // 1024))


def persistent_programs(tensor: torch.Tensor, per_multiprocessor: int) -> int:
    """Programs of a persistent grid on the tensor's device. On a CPU (the interpreter) a small odd number."""
    if tensor.device.type != "cuda":
        return 3
    return _multiprocessors(tensor.device) * per_multiprocessor


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
