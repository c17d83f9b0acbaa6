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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from repdeg_fast._arithmetic import arithmetic_dtype, scale_or_repeat_
from repdeg_fast.contracts.linear_cross_entropy import (
    Columns,
    Gradients,
    GradRows,
    Head,
    LogitBlock,
    Look,
    Losses,
    LossRule,
    RowKernels,
    Upstream,
    Wanted,
)
from repdeg_fast.ops import buffers
from repdeg_fast.ops.products import Piece, Sum, is_operand, needs_sum, operand, operand_dtype

TILE = 4096  # rows of the weight that are converted at a time: 6 MB in bf16 at d = 768
THREAD_SUMS = 8 << 20  # bytes that the CPU's products may take for sums of each thread's own (csrc/cpu/gemm.h)
FEWEST_ROWS = 16  # of logits that are held at once, however large the vocabulary
NOTHING = Wanted(False, False, False, torch.float32)
WIDE = frozenset((torch.float32, torch.float64))  # in which sums are made


class ChunkedLogits:
    """The operation's ``Kernels`` from a backend's ``RowKernels``."""

    def __init__(self, kernels: RowKernels) -> None:
        self.kernels = kernels

    def at_once(self, head: Head, rule: LossRule, heads: int, mean: bool, wanted: Wanted) -> Losses | None:
        return None

    def share(self, head: Head, rule: LossRule, mean: bool) -> Tensor:
        return self.kernels.share(head, rule, mean)

    def total(self, losses: Tensor, heads: int, share: Tensor) -> Tensor:
        return self.kernels.total(losses, heads, share)

    def forward(
        self, head: Head, rule: LossRule, predicted: Tensor | None = None, look: Look | None = None
    ) -> tuple[Tensor, Tensor]:
        loss, lse, _ = self.forward_backward(None, head, rule, NOTHING, look, predicted)
        return loss, lse

    def forward_backward(
        self, upstream: Upstream | None, head: Head, rule: LossRule, wanted: Wanted, look: Look | None = None,
        predicted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
        """Without ``upstream``: no gradients."""
        hidden_states, weight, target, bias = head
        dtype, wide = operand_dtype(hidden_states), arithmetic_dtype(hidden_states)
        (n, _), vocabulary = hidden_states.shape, weight.shape[0]
        heads = 1 if look is None else max(1, n // max(1, target.shape[0]))
        losses, lses = hidden_states.new_empty(n, dtype=wide), hidden_states.new_empty(n, dtype=wide)
        gradients = _gradients(head, wide, wanted)
        grad_hidden, grad_weight, grad_bias = gradients
        tiles = _pieces(vocabulary, vocabulary if is_operand(weight, dtype) else TILE)
        step = chunk_positions(n // heads, heads, weight, dtype, wanted)
        chunks = _pieces(n // heads, step)
        weight_sum = Sum(self.kernels, grad_weight, wanted.accumulate_dtype, len(chunks))
        size = (heads * min(step, n // heads), vocabulary, dtype)
        memory = buffers.take(self.kernels, hidden_states, *size)
        logits, values, whole = buffers.matrix(hidden_states, *size, memory), _wide(bias, wide), Columns(0, vocabulary)
        grad_loss, grad_lse, of_square = (None, None, None) if upstream is None else upstream
        a_row = (grad_loss, grad_lse, of_square, predicted)
        for chunk in chunks:
            hidden, loss, lse, z, first = hidden_states, losses, lses, logits, 0
            scale, of_lse, of_lse_square, classes = a_row
            if chunk is not None:
                hidden, loss, lse = (_rows(tensor, heads, chunk) for tensor in (hidden_states, losses, lses))
                scale, of_lse, of_lse_square, classes = (t if t is None else _rows(t, heads, chunk) for t in a_row)
                z, first = logits[: hidden.shape[0]], chunk.start
            hidden = operand(hidden, dtype)
            self._make_logits(z, hidden, weight, tiles)
            if look is not None:
                look(z.unflatten(0, (heads, -1)), first)
            at = (target, first) if heads == 1 else (_part(target, chunk), 0)
            block = LogitBlock(
                z, lse, loss, grad_bias, *at, values, scale, of_lse, None, of_lse_square, classes
            )  # fmt: skip
            self.kernels.rows(block, whole, rule, accumulate_bias=first > 0)
            _store(losses, loss, heads, chunk)
            _store(lses, lse, heads, chunk)
            if predicted is not None and classes is not None:
                _store(predicted, classes, heads, chunk)
            kept = _columns_left(z, rule) if rule.gradient_filter and scale is not None else None
            if grad_hidden is not None:
                part = _rows(grad_hidden, heads, chunk)
                self._make_hidden_gradient(part, z, weight, kept or tiles)
                _store(grad_hidden, part, heads, chunk)
            if grad_weight is not None:
                if kept is not None and first == 0:
                    weight_sum.clear()
                for piece in kept or tiles:
                    weight_sum.add(_columns(z, piece).t(), hidden, first == 0 and kept is None, piece)
        weight_sum.finish()
        if grad_loss is not None:
            buffers.keep(memory)
        return losses, lses, _like_bias(gradients, bias)

    def _make_logits(self, z: Tensor, hidden: Tensor, weight: Tensor, tiles: Sequence[Piece]) -> None:
        for tile in tiles:
            self.kernels.multiply(_columns(z, tile), hidden, operand(_part(weight, tile), z.dtype).t(), False)

    def _make_hidden_gradient(self, gradient: Tensor, dz: Tensor, weight: Tensor, tiles: Sequence[Piece]) -> None:
        total = Sum(self.kernels, gradient, arithmetic_dtype(gradient), len(tiles))
        for i, tile in enumerate(tiles):
            total.add(_columns(dz, tile), operand(_part(weight, tile), dz.dtype), i == 0)
        total.finish()

    def backward(
        self, upstream: Upstream, head: Head, lse: Tensor, rule: LossRule, wanted: Wanted,
        columns: Columns | None = None,
    ) -> Gradients:  # fmt: skip
        hidden_states, weight, target, bias = head
        dtype, wide = operand_dtype(hidden_states), lse.dtype
        (n, _), vocabulary = hidden_states.shape, weight.shape[0]
        whole = columns or Columns(0, vocabulary)
        gradients = _gradients(head, wide, wanted)
        grad_hidden, grad_weight, grad_bias = gradients
        made_in = wide if self.kernels.wide_logits else dtype
        size = tile_size(n, weight, {made_in, dtype})
        tiles, chunks = _pieces(vocabulary, size.columns), _pieces(n, size.rows)
        hidden_sum = Sum(self.kernels, grad_hidden, wide, len(tiles))
        at_once = (min(size.rows, n), min(size.columns, vocabulary))
        logits, values = buffers.matrix(hidden_states, *at_once, made_in), _wide(bias, wide)
        gradient = None if made_in == dtype else buffers.matrix(hidden_states, *at_once, dtype)
        for tile in tiles:
            begin = 0 if tile is None else tile.start
            part, here = operand(_part(weight, tile), dtype), Columns(whole.first + begin, whole.vocabulary)
            grad_part, grad_bias_part, bias_part = (
                None if t is None else _part(t, tile) for t in (grad_weight, grad_bias, values)
            )
            weight_sum = Sum(self.kernels, grad_part, wanted.accumulate_dtype, len(chunks))
            for chunk in chunks:
                hidden, first = operand(_part(hidden_states, chunk), dtype), 0 if chunk is None else chunk.start
                of = (slice(hidden.shape[0]), slice(part.shape[0]))
                z, dz = logits[of], None if gradient is None else gradient[of]
                self.kernels.multiply(z, hidden, part.t(), False)
                grad_lse = None if upstream.grad_lse is None else _part(upstream.grad_lse, chunk)
                block = LogitBlock(
                    z, _part(lse, chunk), None, grad_bias_part, target, first, bias_part,
                    _part(upstream.grad_loss, chunk), grad_lse, dz,
                )  # fmt: skip
                self.kernels.rows(block, here, rule, accumulate_bias=first > 0)
                dz = z if dz is None else dz
                kept = _columns_left(dz, rule) if rule.gradient_filter else None
                if grad_hidden is not None:
                    if kept is not None and begin == 0:
                        hidden_sum.clear(chunk)
                    for piece in kept or (None,):
                        new = begin == 0 and kept is None
                        hidden_sum.add(_columns(dz, piece), _part(part, piece), new, chunk)
                if grad_weight is not None:
                    if kept is not None and first == 0:
                        weight_sum.clear()
                    for piece in kept or (None,):
                        weight_sum.add(_columns(dz, piece).t(), hidden, first == 0 and kept is None, piece)
            weight_sum.finish()
        hidden_sum.finish()
        return _like_bias(gradients, bias)

    def rescale_(
        self, gradients: Gradients, grad_heads: Tensor, rows: GradRows, head: Head, rule: LossRule, wanted: Wanted
    ) -> None:
        scale_or_repeat_(gradients, grad_heads, lambda: self.forward_backward(rows(), head, rule, wanted)[2])


def chunk_positions(positions: int, heads: int, weight: Tensor, dtype: torch.dtype, wanted: Wanted) -> int:
    """How many positions, each with a row of logits a head, are held at once: as many as LIMIT allows, in chunks of
    about equal size.

    All positions, if cutting them would take no less memory: a 16-bit weight gradient that is summed over chunks needs
    a wide copy of itself.
    """
    vocabulary, width = weight.shape
    row_bytes = buffers.aligned(vocabulary, dtype) * dtype.itemsize
    if heads * positions <= FEWEST_ROWS:
        return max(1, positions)
    limit = buffers.limit(weight) - 24 * heads * positions - 12 * vocabulary  # targets, losses, log-sum-exps; biases
    if not is_operand(weight, dtype):
        limit -= 2 * TILE * width * dtype.itemsize  # one converted tile of the weight, one of its gradient
    if weight.device.type == "cpu":
        sums = (torch.get_num_threads() - 1) * (limit // row_bytes) * width * arithmetic_dtype(weight).itemsize
        limit -= sums if sums <= THREAD_SUMS else 0
    if wanted.weight and needs_sum(weight.dtype, wanted.accumulate_dtype):
        wide_copy = vocabulary * width * wanted.accumulate_dtype.itemsize
        if heads * positions * row_bytes <= wide_copy + limit:
            return max(1, positions)
    most = max(1, limit // (heads * row_bytes), FEWEST_ROWS // heads)
    chunks = max(1, -(-positions // most))
    if weight.device.type != "cpu":
        chunks = _full_waves(heads * positions, width, chunks, _multiprocessors(weight.device))
    return max(1, -(-positions // chunks))


def _full_waves(rows: int, width: int, fewest: int, multiprocessors: int) -> int:
    """Into how many chunks to cut so that dz E, whose tiles (128 × 256) are few, leaves multiprocessors idle least: a
    round of tiles takes as long whether it is full or not."""
    rounds = lambda chunks: -(-(-(-rows // (128 * chunks)) * -(-width // 256)) // multiprocessors)  # noqa: E731
    return min(range(fewest, fewest + 3), key=lambda chunks: chunks * rounds(chunks))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """An H200's, where tensors have no device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class TileSize(NamedTuple):
    rows: int
    columns: int


def tile_size(rows: int, weight: Tensor, dtypes: set[torch.dtype]) -> TileSize:
    """How many logits are held at once where their log-sum-exp is known, in each of ``dtypes``. On a GPU as many
    columns for all rows as LIMIT allows: a product of few columns leaves multiprocessors idle, and the rows' gradient
    is read and written once a tile."""
    logit_bytes, limit, columns = sum(dtype.itemsize for dtype in dtypes), buffers.limit(weight), TILE
    if weight.device.type != "cpu":
        columns = max(TILE, min(limit // (logit_bytes * max(rows, 1)), weight.shape[0]))
        columns = buffers.aligned(
            -(-weight.shape[0] // -(-weight.shape[0] // columns)), torch.float32
        )  # of about equal size
    return TileSize(max(limit // (columns * logit_bytes), FEWEST_ROWS), columns)


def _gradients(head: Head, wide: torch.dtype, wanted: Wanted) -> Gradients:
    """Where the wanted gradients go; zeros, should there be no row at all."""
    hidden_states, weight, _, _ = head
    gradients = Gradients(
        hidden_states.new_empty(hidden_states.shape) if wanted.hidden_states else None,
        weight.new_empty(weight.shape) if wanted.weight else None,
        weight.new_empty(weight.shape[0], dtype=wide) if wanted.bias else None,
    )
    if hidden_states.shape[0] == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    return gradients


def _pieces(length: int, step: int) -> list[slice | None]:
    if 0 < length <= step:
        return [None]
    return [slice(*ends) for ends in buffers.ranges(length, step)]


def _columns_left(dz: Tensor, rule: LossRule) -> list[Tensor] | None:
    """On a CPU, where to know costs no wait: the columns of dz that its gradient filter has left something of, in
    pieces, and at least one; ``None`` where these are too many for copies to be worth it."""
    if dz.device.type != "cpu":
        return None
    left = dz.bool().any(dim=0).nonzero().squeeze(1)
    if 2 * left.shape[0] > dz.shape[1]:
        return None
    return list((left if left.shape[0] else left.new_zeros(1)).split(TILE))


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor if piece is None else tensor[piece]


def _columns(matrix: Tensor, piece: Piece) -> Tensor:
    return matrix if piece is None else matrix[:, piece]


def _rows(tensor: Tensor, heads: int, positions: slice | None) -> Tensor:
    """The same positions of every head, head by head: a view where that is one, else contiguous, as the kernels take
    rows (`flatten` alone gives a view that skips from head to head where there is one position)."""
    if positions is None or heads == 1:
        return _part(tensor, positions)
    by_head: Tensor = tensor.unflatten(0, (heads, -1))
    return by_head[:, positions].flatten(0, 1).contiguous()


def _store(tensor: Tensor, rows: Tensor, heads: int, positions: slice | None) -> None:
    """Write ``rows`` where :func:`_rows` took them from, unless they are there."""
    if heads > 1 and positions is not None:
        tensor.unflatten(0, (heads, -1))[:, positions] = rows.unflatten(0, (heads, -1))


def _wide(bias: Tensor | None, wide: torch.dtype) -> Tensor | None:
    if bias is None or (bias.dtype == wide and bias.is_contiguous()):
        return bias
    return bias.to(wide).contiguous()


def _like_bias(gradients: Gradients, bias: Tensor | None) -> Gradients:
    """With that of the bias, which was summed in the arithmetic dtype, in the dtype of the bias."""
    if gradients.bias is None or bias is None or gradients.bias.dtype == bias.dtype:
        return gradients
    return gradients._replace(bias=gradients.bias.to(bias.dtype))
