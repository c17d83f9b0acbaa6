"""C++ kernels that a wheel brings compiled: for machines without a compiler, and for those that would not wait for one.

A library for each of two instruction sets, one of which this processor chooses. They need nothing but PyTorch's stable
ABI, so one wheel serves every Python and every torch from 2.10 on. ``benchmarks/prebuilt_wheel.py`` makes it; a tree
and a plain wheel have none, and compile.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "prebuilt"
_V3 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"))  # names of /proc/cpuinfo
INSTRUCTION_SETS = {  # the best first
    "x86-64-v4": _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": _V3,
}


def library(processor_flags: frozenset[str]) -> Path | None:
    """The one for a processor with these features; ``None`` where there is none, and where ``REPDEG_FAST_MARCH`` asks
    to compile."""
    if os.environ.get("REPDEG_FAST_MARCH") or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return None
    for name, needed in INSTRUCTION_SETS.items():
        path = FOLDER / name / "repdeg_fast_cpu.so"
        if needed <= processor_flags and path.exists():
            return path
    return None


class Prebuilt:
    """In place of the module that a compiled library is."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(str(path))
        self._path = path

    @functools.cached_property
    def _facts(self) -> dict[str, str]:
        facts: dict[str, str] = json.loads(self._path.with_suffix(".json").read_text(encoding="utf-8"))
        return facts

    def build_info(self) -> dict[str, str]:
        return self._facts
