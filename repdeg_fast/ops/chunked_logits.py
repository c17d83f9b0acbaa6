"""The linear cross entropy as the library's products around a backend's row kernel, on reused buffers of logits.

Chunked (``forward_backward``): some rows, the whole vocabulary. logits = h Eᵀ into the buffer, the row kernel
turns them into their gradient in place, dh = dz E and dE += dzᵀ h: three GEMMs, as many as the mathematics has.
Cutting rows means that dE is read and written once a chunk, which the GEMM hides; cutting the vocabulary instead
would need every row's log-sum-exp beforehand, a fourth GEMM.

Streaming (``forward``, then ``backward``): nothing but lse is kept in between. With lse known, all rows meet
one tile of the vocabulary at a time, so that a tile of dE is finished when the next begins.

Whoever wants to look at the logits, as the sampling of a mixture does, is shown them before they turn to gradients.
A chunk has the same positions of every head for it, which is why rows are then cut by position.

Operands are multiplied in the dtype of the hidden states; a weight of another dtype (fp32 under autocast) is converted
tile by tile, never as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, scale_or_repeat_
from repdeg_fast.contracts.linear_cross_entropy import (
    Columns,
    Gradients,
    Head,
    LogitBlock,
    Look,
    LossRule,
    Products,
    RowKernels,
    Upstream,
    Wanted,
)

TILE = 4096  # rows of the weight that are converted at a time: 6 MB in bf16 at d = 768
LIMIT = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes of buffers; the GEMMs of a GPU need more rows to be efficient
THREAD_SUMS = 8 << 20  # bytes that the CPU's products may take for sums of each thread's own (csrc/cpu/gemm.h)
FEWEST_ROWS = 16  # of logits that are held at once, however large the vocabulary
ALIGNMENT = 64  # bytes: rows of logits that start on a cache line make MKL's h Eᵀ a quarter faster


class ChunkedLogits:
    """The operation's ``Kernels`` from a backend's ``RowKernels``."""

    def __init__(self, kernels: RowKernels) -> None:
        self.kernels = kernels

    def forward(self, head: Head, rule: LossRule) -> tuple[Tensor, Tensor]:
        nothing = Wanted(False, False, False, torch.float32)
        loss, lse, _ = self._over_rows(None, head, rule, nothing)
        return loss, lse

    def forward_backward(
        self, grad_loss: Tensor, head: Head, rule: LossRule, wanted: Wanted, look: Look | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        return self._over_rows(grad_loss, head, rule, wanted, look)

    def _over_rows(
        self, grad_loss: Tensor | None, head: Head, rule: LossRule, wanted: Wanted, look: Look | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        hidden_states, weight, target, bias = head
        dtype, wide = operand_dtype(hidden_states), arithmetic_dtype(hidden_states)
        n, vocabulary = len(hidden_states), len(weight)
        heads = 1 if look is None else max(1, n // max(1, len(target)))
        losses, lses = (hidden_states.new_empty(n, dtype=wide) for _ in range(2))
        gradients = _gradients(head, wide, wanted)
        grad_hidden, grad_weight, grad_bias = gradients
        values = None if bias is None else bias.to(wide).contiguous()
        tiles = list(_ranges(vocabulary, vocabulary if _is_operand(weight, dtype) else TILE))
        step = chunk_positions(n // heads, heads, weight, dtype, wanted)
        chunks = [slice(*chunk) for chunk in _ranges(n // heads, step)]
        weight_sum = _Sum(self.kernels, grad_weight, wanted.accumulate_dtype, len(chunks))
        size = (heads * min(step, n // heads), vocabulary, dtype)
        memory = _memory(self.kernels, hidden_states, *size)
        logits = _matrix(hidden_states, *size, memory)
        for chunk in chunks:
            first = chunk.start
            hidden, loss, lse = (_rows(tensor, heads, chunk) for tensor in (hidden_states, losses, lses))
            z, hidden = logits[: len(hidden)], _operand(hidden, dtype)
            for begin, end in tiles:
                self.kernels.multiply(z[:, begin:end], hidden, _operand(weight[begin:end], dtype).t(), False)
            if look is not None:
                look(z.unflatten(0, (heads, -1)), first)
            scale = None if grad_loss is None else _rows(grad_loss, heads, chunk)
            at = (target, first) if heads == 1 else (target[chunk], 0)
            block = LogitBlock(z, lse, loss, grad_bias, *at, values, scale, None)
            self.kernels.rows(block, Columns(0, vocabulary), rule, accumulate_bias=first > 0)
            _store(losses, loss, heads, chunk)
            _store(lses, lse, heads, chunk)
            if grad_hidden is not None:
                part = _rows(grad_hidden, heads, chunk)
                hidden_sum = _Sum(self.kernels, part, wide, len(tiles))
                for begin, end in tiles:
                    hidden_sum.add(z[:, begin:end], _operand(weight[begin:end], dtype), begin == 0)
                hidden_sum.finish()
                _store(grad_hidden, part, heads, chunk)
            if grad_weight is not None:
                for begin, end in tiles:
                    weight_sum.add(z[:, begin:end].t(), hidden, first == 0, slice(begin, end))
        weight_sum.finish()
        if grad_loss is not None:
            _keep(memory)
        return losses, lses, _like_bias(gradients, bias)

    def backward(self, upstream: Upstream, head: Head, lse: Tensor, rule: LossRule, wanted: Wanted) -> Gradients:
        hidden_states, weight, target, bias = head
        dtype, wide = operand_dtype(hidden_states), lse.dtype
        n, vocabulary = len(hidden_states), len(weight)
        gradients = _gradients(head, wide, wanted)
        grad_hidden, grad_weight, grad_bias = gradients
        values = None if bias is None else bias.to(wide).contiguous()
        tiles = list(_ranges(vocabulary, TILE))
        chunks = list(_ranges(n, max(_limit(weight) // (TILE * dtype.itemsize), FEWEST_ROWS)))
        hidden_sum = _Sum(self.kernels, grad_hidden, wide, len(tiles))
        logits = _matrix(hidden_states, chunks[0][1] if chunks else 0, min(TILE, vocabulary), dtype)
        for begin, end in tiles:
            tile = slice(begin, end)
            part, columns = _operand(weight[tile], dtype), Columns(begin, vocabulary)
            grad_part = None if grad_weight is None else grad_weight[tile]
            weight_sum = _Sum(self.kernels, grad_part, wanted.accumulate_dtype, len(chunks))
            for first, last in chunks:
                chunk = slice(first, last)
                z, hidden = logits[: last - first, : end - begin], _operand(hidden_states[chunk], dtype)
                self.kernels.multiply(z, hidden, part.t(), False)
                above = (upstream.grad_loss[chunk], _part(upstream.grad_lse, chunk))
                block = LogitBlock(
                    z, lse[chunk], None, _part(grad_bias, tile), target, first, _part(values, tile), *above
                )
                self.kernels.rows(block, columns, rule, accumulate_bias=first > 0)
                if grad_hidden is not None:
                    hidden_sum.add(z, part, begin == 0, chunk)
                if grad_weight is not None:
                    weight_sum.add(z.t(), hidden, first == 0)
            weight_sum.finish()
        hidden_sum.finish()
        return _like_bias(gradients, bias)

    def rescale_(
        self, gradients: Gradients, grad_heads: Tensor, grad_loss: Tensor, head: Head, rule: LossRule, wanted: Wanted
    ) -> None:
        scale_or_repeat_(gradients, grad_heads, lambda: self.forward_backward(grad_loss, head, rule, wanted)[2])


class LibraryProducts:
    """What :class:`ChunkedLogits` needs beside a row kernel, from PyTorch."""

    def multiply(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)

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


def chunk_positions(positions: int, heads: int, weight: Tensor, dtype: torch.dtype, wanted: Wanted) -> int:
    """How many positions, each with a row of logits a head, are held at once: as many as LIMIT allows, in chunks of
    about equal size.

    All positions, if cutting them would take no less memory: a 16-bit weight gradient that is summed over chunks needs
    a wide copy of itself.
    """
    vocabulary, width = weight.shape
    row_bytes = _aligned(vocabulary, dtype) * dtype.itemsize
    limit = _limit(weight) - 24 * heads * positions - 12 * vocabulary  # targets, losses, log-sum-exps; biases
    if not _is_operand(weight, dtype):
        limit -= 2 * TILE * width * dtype.itemsize  # one converted tile of the weight, one of its gradient
    if weight.device.type == "cpu":
        sums = (torch.get_num_threads() - 1) * (limit // row_bytes) * width * arithmetic_dtype(weight).itemsize
        limit -= sums if sums <= THREAD_SUMS else 0
    if wanted.weight and _needs_sum(weight.dtype, wanted.accumulate_dtype):
        wide_copy = vocabulary * width * wanted.accumulate_dtype.itemsize
        if heads * positions * row_bytes <= wide_copy + limit:
            return max(1, positions)
    most = max(1, limit // (heads * row_bytes), FEWEST_ROWS // heads)
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


class _Sum:
    """A gradient that is a sum of products, held in a wide dtype until the last of `parts` has been added."""

    def __init__(self, kernels: Products, gradient: Tensor | None, wide: torch.dtype, parts: int) -> None:
        self.kernels = kernels
        self.gradient = self.total = gradient
        if gradient is not None and parts > 1 and _needs_sum(gradient.dtype, wide):
            self.total = gradient.new_empty(gradient.shape, dtype=wide)

    def add(self, a: Tensor, b: Tensor, first: bool, part: slice = slice(None)) -> None:
        """total[part] += a @ b, or = where `first`."""
        assert self.total is not None
        total = self.total[part]
        if total.dtype == a.dtype:
            self.kernels.multiply(total, a, b, not first)
        elif total.dtype == torch.float32 and _adds_to_fp32(total.device, a.dtype):
            wide = torch.float32
            torch.mm(a, b, wide, out=total) if first else torch.addmm(total, a, b, wide, out=total)
        else:
            product = torch.mm(a, b)
            total.copy_(product) if first else self.kernels.add(total, product)

    def finish(self) -> None:
        if self.gradient is not None and self.total is not None and self.total is not self.gradient:
            self.gradient.copy_(self.total)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch's GEMM adds 16-bit products to an fp32 sum: on a GPU only, and not in every version."""
    if device.type != "cuda":
        return False
    total, factor = (torch.zeros(16, 16, dtype=t, device=device) for t in (torch.float32, dtype))
    try:
        torch.addmm(total, factor, factor, torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _needs_sum(dtype: torch.dtype, wide: torch.dtype) -> bool:
    return torch.promote_types(dtype, wide) != dtype


def _gradients(head: Head, wide: torch.dtype, wanted: Wanted) -> Gradients:
    """Where the wanted gradients go; zeros, should there be no row at all."""
    hidden_states, weight, _, _ = head
    fresh = torch.Tensor.new_empty if len(hidden_states) else torch.Tensor.new_zeros
    return Gradients(
        fresh(hidden_states, hidden_states.shape) if wanted.hidden_states else None,
        fresh(weight, weight.shape) if wanted.weight else None,
        fresh(weight, weight.shape[:1], dtype=wide) if wanted.bias else None,
    )


def _matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """(rows, columns) with rows on cache lines, uninitialized; in ``memory`` where it is given."""
    stride = _aligned(columns, dtype)
    memory = like.new_empty(rows * stride, dtype=dtype) if memory is None else memory[: rows * stride]
    return memory.view(rows, stride)[:, :columns]


def _memory(kernels: Products, like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """For a :func:`_matrix`: on a CPU what :func:`_keep` kept, if it is enough, else in large pages."""
    size = rows * _aligned(columns, dtype)
    kept = _kept.pop(dtype, None) if like.device.type == "cpu" else None  # another thread's call finds none
    if kept is not None and kept.numel() >= size:
        return kept
    with torch.inference_mode(False):  # kept, it may serve a call that trains
        memory = torch.empty(size, dtype=dtype, device=like.device)
    kernels.advise(memory)
    return memory


def _keep(memory: Tensor) -> None:
    """Keep a CPU's buffer for the next call, as BLAS libraries keep theirs: PyTorch would give its pages back to the
    system, and taking them again costs 2 to 8 % of a call. In large pages products are faster, too."""
    if memory.device.type == "cpu" and memory.nbytes <= LIMIT["cpu"]:
        _kept[memory.dtype] = memory


def release() -> None:
    """Give back the memory that is kept between calls."""
    _kept.clear()


_kept: dict[torch.dtype, Tensor] = {}


def _aligned(columns: int, dtype: torch.dtype) -> int:
    step = ALIGNMENT // dtype.itemsize
    return -(-columns // step) * step


def _limit(tensor: Tensor) -> int:
    return LIMIT["cpu" if tensor.device.type == "cpu" else "cuda"]


def _rows(tensor: Tensor, heads: int, positions: slice) -> Tensor:
    """The same positions of every head, head by head: a view where there is one head, else contiguous, as the kernels
    take rows (`flatten` alone gives a view that skips from head to head where there is one position)."""
    if heads == 1:
        return tensor[positions]
    by_head: Tensor = tensor.unflatten(0, (heads, -1))
    return by_head[:, positions].flatten(0, 1).contiguous()


def _store(tensor: Tensor, rows: Tensor, heads: int, positions: slice) -> None:
    """Write ``rows`` where :func:`_rows` took them from, unless they are there."""
    if heads > 1:
        tensor.unflatten(0, (heads, -1))[:, positions] = rows.unflatten(0, (heads, -1))


def _is_operand(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GEMM reads the matrix where it lies: right dtype, and unit stride along one dimension."""
    return matrix.dtype == dtype and 1 in matrix.stride()


def _operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix if _is_operand(matrix, dtype) else matrix.to(dtype).contiguous()


def _like_bias(gradients: Gradients, bias: Tensor | None) -> Gradients:
    """With that of the bias, which was summed in the arithmetic dtype, in the dtype of the bias."""
    if gradients.bias is None or bias is None:
        return gradients
    return gradients._replace(bias=gradients.bias.to(bias.dtype))


def _part(vector: Tensor | None, part: slice) -> Tensor | None:
    return None if vector is None else vector[part]


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, step):
        yield first, min(first + step, length)
