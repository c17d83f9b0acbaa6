"""Which kernels keep the nearest neighbours. No operator of PyTorch's: there is no gradient, and nothing to trace."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from repdeg_fast.backends import Operation, no_limit, requested
from repdeg_fast.contracts.neighbours import Kernels
from repdeg_fast.native import neighbours as native
from repdeg_fast.reference import neighbours as reference

operation = Operation[Kernels](
    "neighbours", reference=cast(Kernels, reference), native=native.Kernels, limits={"cpu": no_limit}
)


def kernels(points: Tensor) -> Kernels:
    """On a GPU those of PyTorch, whatever serves the other operations there."""
    on_cpu = points.device.type == "cpu" and requested() in ("auto", "cpu")
    return operation.kernels(requested() if on_cpu else "reference", points)
