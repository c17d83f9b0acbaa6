"""The native kernels of nearest neighbours: csrc/cpu/neighbours.cpp."""

from __future__ import annotations

from torch import Tensor

from repdeg_fast.contracts.neighbours import Nearest
from repdeg_fast.native import Namespace


class Kernels:
    def __init__(self, operators: Namespace) -> None:
        self._look = operators.neighbours_look.default

    def look(self, nearest: Nearest, cosines: Tensor, first: int) -> None:
        self._look(nearest.values, nearest.indices, cosines, first)
