"""What a fault is."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    what: str
    file: str
    text: str  # occurs once
    replacement: str
    tests: str  # arguments of pytest

    @property
    def interpreted(self) -> bool:
        return self.file.startswith("triton_kernels/")
