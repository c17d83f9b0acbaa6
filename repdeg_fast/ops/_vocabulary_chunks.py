"""The linear cross entropy as vendor GEMMs around one row kernel, on reused buffers of logits.

Chunked (:func:`forward_backward`): some rows, the whole vocabulary. logits = h Eᵀ into the buffer, the row kernel
turns them into their gradient in place, dh = dz E and dE += dzᵀ h: three GEMMs, as many as the mathematics has.
Cutting rows means that dE is read and written once a chunk, which the GEMM hides; cutting the vocabulary instead
would need every row's log-sum-exp beforehand, a fourth GEMM.

Streaming (:func:`forward`, then :func:`backward`): nothing but lse is kept in between. With lse known, all rows meet
one tile of the vocabulary at a time, so that a tile of dE is finished when the next begins.

A mixture of the heads is sampled from the same logits: they are handed to ``sample`` before they turn to gradients. A
chunk has the same positions of every head for it, which is why rows are cut by position.

``kernels.rows(logits, lse, loss, grad_bias, target, bias, scale, lse_scale, vocabulary, first_row, first_column,
ignore_index, label_smoothing, softcap, accumulate_bias)`` is the row kernel; csrc/registration.cpp says what it does.
Operands are multiplied in the dtype of the hidden states; a weight of another dtype (fp32 under autocast) is converted
tile by tile, never as a whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from repdeg_fast.reference.linear_cross_entropy import Gradients, arithmetic_dtype, scale_or_repeat_

Sample = Callable[[Tensor, int], None]  # takes logits (K, m, V) without the bias, and the first of their m positions

TILE = 4096  # rows of the weight that are converted at a time: 6 MB in bf16 at d = 768
LIMIT = {"cpu": 64 << 20, "cuda": 512 << 20}  # bytes of buffers; the GEMMs of a GPU need more rows to be efficient
THREAD_SUMS = 8 << 20  # bytes that the CPU's products may take for sums of each thread's own (csrc/cpu/gemm.h)
FEWEST_ROWS = 16  # of logits that are held at once, however large the vocabulary
ALIGNMENT = 64  # bytes: rows of logits that start on a cache line make MKL's h Eᵀ a quarter faster


def forward(
    kernels: Any,
    hidden_states: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    target: Tensor,  # (M,)
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row."""
    options = (ignore_index, label_smoothing, softcap)
    inputs = (hidden_states, weight, target, bias)
    loss, lse, _ = _over_rows(kernels, None, *inputs, options, [False] * 3, torch.float32)
    return loss, lse


def forward_backward(
    kernels: Any,
    grad_loss: Tensor,  # (N,), usually one expanded value
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],
    accumulate_dtype: torch.dtype,
    heads: int = 1,
    sample: Sample | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """Loss, log-sum-exp and gradients in one sweep over the rows."""
    options = (ignore_index, label_smoothing, softcap)
    inputs = (hidden_states, weight, target, bias)
    return _over_rows(kernels, grad_loss, *inputs, options, needs, accumulate_dtype, heads, sample)


def _over_rows(
    kernels: Any,
    grad_loss: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: tuple[int, float, float],
    needs: list[bool],
    accumulate_dtype: torch.dtype,
    heads: int = 1,
    sample: Sample | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    dtype, wide = operand_dtype(hidden_states), arithmetic_dtype(hidden_states)
    n, vocabulary = len(hidden_states), len(weight)
    losses, lses = (hidden_states.new_empty(n, dtype=wide) for _ in range(2))
    grad_hidden, grad_weight, grad_bias = _gradients(hidden_states, weight, wide, needs)
    values = None if bias is None else bias.to(wide).contiguous()
    tiles = list(_ranges(vocabulary, vocabulary if _is_operand(weight, dtype) else TILE))
    step = chunk_positions(n // heads, heads, weight, dtype, accumulate_dtype, needs[1])
    chunks = [slice(*chunk) for chunk in _ranges(n // heads, step)]
    weight_sum = _Sum(kernels, grad_weight, accumulate_dtype, len(chunks))
    size = (heads * min(step, n // heads), vocabulary, dtype)
    memory = _memory(kernels, hidden_states, *size)
    logits = _matrix(hidden_states, *size, memory)
    for chunk in chunks:
        first = chunk.start
        hidden, loss, lse = (_rows(tensor, heads, chunk) for tensor in (hidden_states, losses, lses))
        z, hidden = logits[: len(hidden)], _operand(hidden, dtype)
        for begin, end in tiles:
            _multiply(kernels, z[:, begin:end], hidden, _operand(weight[begin:end], dtype).t())
        if sample is not None:
            sample(z.unflatten(0, (heads, -1)), first)
        scale = None if grad_loss is None else _rows(grad_loss, heads, chunk)
        at = (target, first) if heads == 1 else (target[chunk], 0)  # row r has the target at (first + r) mod length
        inputs = (at[0], values, scale, None, vocabulary, at[1], 0)
        kernels.rows(z, lse, loss, grad_bias, *inputs, *options, first > 0)
        _store(losses, loss, heads, chunk)
        _store(lses, lse, heads, chunk)
        if grad_hidden is not None:
            part = _rows(grad_hidden, heads, chunk)
            hidden_sum = _Sum(kernels, part, wide, len(tiles))
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
    return losses, lses, (grad_hidden, grad_weight, _like(grad_bias, bias))


def backward(
    kernels: Any,
    grad_loss: Tensor,  # (N,)
    grad_lse: Tensor | None,  # (N,)
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],
    accumulate_dtype: torch.dtype,
) -> Gradients:
    """Gradients from the saved log-sum-exp."""
    options = (ignore_index, label_smoothing, softcap)
    dtype, wide = operand_dtype(hidden_states), lse.dtype
    n, vocabulary = len(hidden_states), len(weight)
    grad_hidden, grad_weight, grad_bias = _gradients(hidden_states, weight, wide, needs)
    values = None if bias is None else bias.to(wide).contiguous()
    tiles = list(_ranges(vocabulary, TILE))
    chunks = list(_ranges(n, max(_limit(weight) // (TILE * dtype.itemsize), FEWEST_ROWS)))
    hidden_sum = _Sum(kernels, grad_hidden, wide, len(tiles))
    logits = _matrix(hidden_states, chunks[0][1] if chunks else 0, min(TILE, vocabulary), dtype)
    for begin, end in tiles:
        columns = slice(begin, end)
        part = _operand(weight[columns], dtype)
        weight_sum = _Sum(kernels, None if grad_weight is None else grad_weight[columns], accumulate_dtype, len(chunks))
        for first, last in chunks:
            chunk = slice(first, last)
            z, hidden = logits[: last - first, : end - begin], _operand(hidden_states[chunk], dtype)
            _multiply(kernels, z, hidden, part.t())
            inputs = (target, _part(values, columns), grad_loss[chunk], _part(grad_lse, chunk))
            kernels.rows(
                z, lse[chunk], None, _part(grad_bias, columns), *inputs, vocabulary, first, begin, *options, first > 0
            )
            if grad_hidden is not None:
                hidden_sum.add(z, part, begin == 0, chunk)
            if grad_weight is not None:
                weight_sum.add(z.t(), hidden, first == 0)
        weight_sum.finish()
    hidden_sum.finish()
    return grad_hidden, grad_weight, _like(grad_bias, bias)


def rescale_(
    kernels: Any,
    gradients: list[Tensor | None],
    grad_heads: Tensor,  # (K,)
    grad_loss: Tensor,  # (N,)
    hidden_states: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    needs: list[bool],
    accumulate_dtype: torch.dtype,
) -> None:
    """See the reference."""
    options = (ignore_index, label_smoothing, softcap)
    inputs = (hidden_states, weight, target, bias)
    again = lambda: _over_rows(kernels, grad_loss, *inputs, options, needs, accumulate_dtype)[2]  # noqa: E731
    scale_or_repeat_(gradients, grad_heads, again)


def operand_dtype(hidden_states: Tensor) -> torch.dtype:
    """What the GEMMs multiply: the dtype of the hidden states, but fp32 on a CPU that has no fast path for it."""
    dtype = hidden_states.dtype
    if hidden_states.device.type == "cpu" and (
        dtype == torch.float16 or (dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    ):
        return torch.float32
    return dtype


def chunk_positions(
    positions: int, heads: int, weight: Tensor, dtype: torch.dtype, accumulate_dtype: torch.dtype, grad_weight: bool
) -> int:
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
    if grad_weight and _needs_sum(weight.dtype, accumulate_dtype):
        wide_copy = vocabulary * width * accumulate_dtype.itemsize
        if heads * positions * row_bytes <= wide_copy + limit:
            return max(1, positions)
    most = max(1, limit // (heads * row_bytes), FEWEST_ROWS // heads)
    chunks = max(1, -(-positions // most))
    return max(1, -(-positions // chunks))


class _Sum:
    """A gradient that is a sum of products, held in a wide dtype until the last of `parts` has been added."""

    def __init__(self, kernels: Any, gradient: Tensor | None, wide: torch.dtype, parts: int) -> None:
        self.kernels, self.accumulate = kernels, getattr(kernels, "add", torch.Tensor.add_)
        self.gradient = self.total = gradient
        if gradient is not None and parts > 1 and _needs_sum(gradient.dtype, wide):
            self.total = gradient.new_empty(gradient.shape, dtype=wide)

    def add(self, a: Tensor, b: Tensor, first: bool, part: slice = slice(None)) -> None:
        """total[part] += a @ b, or = where `first`."""
        assert self.total is not None
        total = self.total[part]
        if total.dtype == a.dtype:
            _multiply(self.kernels, total, a, b, not first)
        elif total.dtype == torch.float32 and _adds_to_fp32(total.device, a.dtype):
            wide = torch.float32
            torch.mm(a, b, wide, out=total) if first else torch.addmm(total, a, b, wide, out=total)
        else:
            product = torch.mm(a, b)
            total.copy_(product) if first else self.accumulate(total, product)

    def finish(self) -> None:
        if self.gradient is not None and self.total is not None and self.total is not self.gradient:
            self.gradient.copy_(self.total)


def _multiply(kernels: Any, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b: by the vendor's GEMM, which the CPU kernels spread over the threads themselves."""
    if hasattr(kernels, "multiply"):
        kernels.multiply(out, a, b, accumulate)
    elif accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


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


def _gradients(hidden_states: Tensor, weight: Tensor, wide: torch.dtype, needs: list[bool]) -> Gradients:
    """Where the needed gradients go; zeros, should there be no row at all."""
    fresh = torch.Tensor.new_empty if len(hidden_states) else torch.Tensor.new_zeros
    return (
        fresh(hidden_states, hidden_states.shape) if needs[0] else None,
        fresh(weight, weight.shape) if needs[1] else None,
        fresh(weight, weight.shape[:1], dtype=wide) if needs[2] else None,
    )


def _matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype, memory: Tensor | None = None) -> Tensor:
    """(rows, columns) with rows on cache lines, uninitialized; in ``memory`` where it is given."""
    stride = _aligned(columns, dtype)
    memory = like.new_empty(rows * stride, dtype=dtype) if memory is None else memory[: rows * stride]
    return memory.view(rows, stride)[:, :columns]


def _memory(kernels: Any, like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """For a :func:`_matrix`: on a CPU what :func:`_keep` kept, if it is enough, else in large pages."""
    size = rows * _aligned(columns, dtype)
    kept = _kept.pop(dtype, None) if like.device.type == "cpu" else None  # another thread's call finds none
    if kept is not None and kept.numel() >= size:
        return kept
    with torch.inference_mode(False):  # kept, it may serve a call that trains
        memory = torch.empty(size, dtype=dtype, device=like.device)
    if hasattr(kernels, "advise"):
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
    return tensor.unflatten(0, (heads, -1))[:, positions].flatten(0, 1).contiguous()


def _store(tensor: Tensor, rows: Tensor, heads: int, positions: slice) -> None:
    """Write ``rows`` where :func:`_rows` took them from, unless they are there."""
    if heads > 1:
        tensor.unflatten(0, (heads, -1))[:, positions] = rows.unflatten(0, (heads, -1))


def _is_operand(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether a GEMM reads the matrix where it lies: right dtype, and unit stride along one dimension."""
    return matrix.dtype == dtype and 1 in matrix.stride()


def _operand(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix if _is_operand(matrix, dtype) else matrix.to(dtype).contiguous()


def _like(grad_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    return None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)


def _part(vector: Tensor | None, part: slice) -> Tensor | None:
    return None if vector is None else vector[part]


def _ranges(length: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, step):
        yield first, min(first + step, length)
