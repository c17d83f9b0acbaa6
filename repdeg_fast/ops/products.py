"""The products around row kernels: by PyTorch's library, and sums of products in a wide dtype."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from repdeg_fast.contracts.linear_cross_entropy import Products

# Of rows or columns: some in a row, or these; None: all of them, since slicing costs as much as a small kernel.
Piece = slice | Tensor | None


class LibraryProducts:
    """What goes around a row kernel (:class:`~repdeg_fast.contracts.linear_cross_entropy.Products`), from PyTorch."""

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        if out.dtype == a.dtype:
            torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
        elif adds_to_fp32(out.device, a.dtype):
            torch.addmm(out, a, b, out.dtype, out=out) if accumulate else torch.mm(a, b, out.dtype, out=out)
        else:
            self.multiply(out, a.to(out.dtype), b.to(out.dtype), accumulate)

    def add(self, total: Tensor, product: Tensor) -> None:
        total.add_(product)

    def advise(self, fresh: Tensor) -> None:
        pass


def operand_dtype(hidden_states: Tensor) -> torch.dtype:
    """What the GEMMs multiply: the dtype of the hidden states, but fp32 on a CPU that has no fast path for it."""
    dtype = hidden_states.dtype
    if hidden_states.device.type == "cpu" and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        return torch.float32
    return dtype


class Sum:
    """A gradient that is a sum of products, held in a wide dtype until the last of `parts` has been added."""

    def __init__(self, kernels: Products, gradient: Tensor | None, wide: torch.dtype, parts: int) -> None:
        self.kernels = kernels
        self.gradient = self.total = gradient
        if gradient is not None and parts > 1 and needs_sum(gradient.dtype, wide):
            self.total = gradient.new_empty(gradient.shape, dtype=wide)

    def add(self, a: Tensor, b: Tensor, first: bool, part: Piece = None) -> None:
        """total[part] += a @ b, or = where `first` (not of single rows)."""
        assert self.total is not None
        if not isinstance(part, Tensor):
            total = self.total if part is None else self.total[part]
            if total.dtype == a.dtype or (total.dtype == torch.float32 and adds_to_fp32(total.device, a.dtype)):
                return self.kernels.multiply(total, a, b, not first)
        product = a.new_empty((a.shape[0], b.shape[1]))
        self.kernels.multiply(product, a, b, False)
        if isinstance(part, Tensor):
            self.total.index_add_(0, part, product.to(self.total.dtype))
        else:
            total.copy_(product) if first else self.kernels.add(total, product)

    def clear(self, part: slice | None = None) -> None:
        assert self.total is not None
        (self.total if part is None else self.total[part]).zero_()

    def finish(self) -> None:
        if self.gradient is not None and self.total is not None and self.total is not self.gradient:
            self.gradient.copy_(self.total)


@functools.cache
def adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's GEMM adds 16-bit products to an fp32 sum: on a GPU only, and not in every version."""
    if device.type != "cuda":
        return False
    total, factor = (torch.zeros(16, 16, dtype=t, device=device) for t in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def needs_sum(dtype: torch.dtype, wide: torch.dtype) -> bool:
    return torch.promote_types(dtype, wide) != dtype


def is_operand(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GEMM reads the matrix where it lies: right dtype, and unit stride along one dimension."""
    return matrix.dtype == dtype and 1 in matrix.stride()


def operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix if is_operand(matrix, dtype) else matrix.to(dtype).contiguous()
