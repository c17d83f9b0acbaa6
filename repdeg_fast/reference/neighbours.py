"""The k nearest neighbours of points by cosine, a tile of cosines at a time.

The k largest of a set are the k largest of what a part of it keeps and of the rest. A tile serves both of its sides:
its rows are cosines of the points on the left with those above, its columns the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from repdeg_fast.contracts.neighbours import Nearest


def look(nearest: Nearest, cosines: Tensor, first: int) -> None:
    """As :class:`repdeg_fast.contracts.neighbours.Kernels` says; but torch.topk chooses which of equal cosines stay."""
    values, index = nearest
    k = values.shape[1]
    found, where = cosines.topk(min(k, cosines.shape[1]), dim=1)
    best, chosen = torch.cat([values, found], 1).topk(k, dim=1)
    index.copy_(torch.cat([index, where + first], 1).gather(1, chosen))
    values.copy_(best)
