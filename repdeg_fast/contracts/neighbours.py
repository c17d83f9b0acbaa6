"""The contract of nearest neighbours. Mathematics: :mod:`repdeg_fast.reference.neighbours`.

A backend knows one tile of cosines at a time; :mod:`repdeg_fast.analysis.tiles` makes them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Nearest(NamedTuple):
    """The k largest cosines of each point among those seen so far, in no order."""

    values: Tensor  # (N, k), in the cosines' dtype; −inf where fewer than k were seen
    indices: Tensor  # (N, k), int64: of which other points

    def rows(self, first: int, count: int) -> Nearest:
        """Of some of the points, in the same memory."""
        return Nearest(self.values.narrow(0, first, count), self.indices.narrow(0, first, count))


class Kernels(Protocol):
    def look(self, nearest: Nearest, cosines: Tensor, first: int) -> None:
        """Takes cosines (R, W) of R points, contiguous along their rows or their columns, with points [first, first +
        W) into the ``nearest`` (R, k) of those R, in place. Cosines of −inf count for nothing. ``first`` grows from
        call to call; of equal cosines those seen first stay."""
