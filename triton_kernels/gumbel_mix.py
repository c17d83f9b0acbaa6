"""Gumbel sampling and its straight-through gradient in Triton. Mathematics: ``repdeg_fast/reference/gumbel_mix.py``.

Compute-bound: forward is one product of hidden states and vocabulary (2·M·V·d operations) whose tiles never leave
registers, where noise is made from a counter and maximum, token and sum of exponentials are kept. Backward makes the
tiles again and takes the products F·r; it writes y and y (F·r − origin) of one chunk of the vocabulary to a reused
buffer, which one product by torch's library turns into Σ y E and Σ y (F·r − origin) E for all rows. δ is known only
when all chunks have passed, but dh̄ is linear in it: four products, nothing swept twice. No atomics: the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import gumbel, gumbel_at
from .tuning import PADDING, Specialization, choose, padded_columns, padded_vector, persistent_programs, variants

_PROGRAMS = 8  # a multiprocessor, of which one or two are resident: the last round is then a small part of all
_COMBINE_ROWS = 32
_DOT_BLOCK = 512
_LOGITS_COLUMNS, _LOGITS_WARPS = 4096, 8  # 16 a thread: noise takes about four registers each while it is made
_BUFFER_BYTES = 64 << 20  # y and y (F·r − origin) of one chunk of the vocabulary, in padded rows


@dataclass(frozen=True)
class Tile:
    """``rows`` × ``columns`` logits at a time, products in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# By bits of an operand, the one that ships first. Noise needs about as many registers as the logits themselves, so 64 ×
# 128 fp32 sums on 8 warps leave room. 64 × 64 let two programs share a multiprocessor, and noise be made while the
# other one multiplies. fp32 products run without matrix units, from registers, and get smaller tiles.
TILES = {
    16: (Tile(64, 128, 32, 8, 4), Tile(64, 64, 32, 8, 4), Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 8, 3)),
    32: (Tile(32, 64, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)),
}


def _choose(kernel: str, mixed: Tensor, weight: Tensor) -> Tile:
    (m, d), v = mixed.shape, len(weight)
    return choose(f"gumbel_mix.{kernel}", TILES[8 * mixed.element_size()], mixed, m=m, v=v, d=d)


# a[rows] · b[columns]ᵀ, b rounded to the dtype of a; out of bounds: zeros.
@triton.jit
def _product(
    a, b, rows, columns, m, v, depth, a_stride, a_depth_stride, b_stride, b_depth_stride,
    EVEN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, DEPTH)
    a_row = a + rows.to(tl.int64)[:, None] * a_stride
    b_row = b + columns.to(tl.int64)[None, :] * b_stride
    a_inside = (rows < m)[:, None]
    b_inside = (columns < v)[None, :]
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, depth, DEPTH):
        k = (first + at).to(tl.int64)
        if EVEN:
            x = tl.load(a_row + k[None, :] * a_depth_stride, mask=a_inside, other=0.0)
            w = tl.load(b_row + k[:, None] * b_depth_stride, mask=b_inside, other=0.0)
        else:
            x = tl.load(a_row + k[None, :] * a_depth_stride, mask=a_inside & (k < depth)[None, :], other=0.0)
            w = tl.load(b_row + k[:, None] * b_depth_stride, mask=b_inside & (k < depth)[:, None], other=0.0)
        total = tl.dot(x, w.to(x.dtype), total, input_precision="ieee")
    return total


# z + g of a tile; −∞ beyond the vocabulary.
@triton.jit
def _perturbed_logits(
    mixed, weight, bias, seed, rows, first_column, m, v, depth,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    EVEN: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    columns = first_column + tl.arange(0, COLUMNS)
    s = _product(
        mixed, weight, rows, columns, m, v, depth, mixed_stride, mixed_depth_stride, weight_stride,
        weight_depth_stride, EVEN, DEPTH,
    )  # fmt: skip
    if bias is not None:
        s += tl.load(bias + columns, mask=columns < v, other=0.0)[None, :]
    s += gumbel(seed, rows, first_column, COLUMNS)
    return tl.where((columns < v)[None, :], s, float("-inf"))


# What is known of rows, after a tile of z + g more: the largest so far, its token, Σ exp((z + g − largest)/τ).
@triton.jit
def _take(s, first_column, most, token, total, inverse_temperature):
    # a NaN is nobody's maximum, but stays in the sum
    tile_most, index = tl.max(tl.where(s == s, s, float("-inf")), axis=1, return_indices=True)
    token = tl.where(tile_most > most, first_column + index, token)
    new = tl.maximum(most, tile_most)
    origin = tl.where(new == float("-inf"), 0.0, new)
    total *= tl.exp((most - origin) * inverse_temperature)
    total += tl.sum(tl.exp((s - origin[:, None]) * inverse_temperature), axis=1)
    return new, token, total


# A block of rows and one split of the vocabulary: running maximum, its token and Σ exp((s − maximum)/τ).
# Neighbouring programs share the split, so each tile of the weight is read from L2 by all but the first.
@triton.jit
def _forward_kernel(
    partial_most, partial_token, partial_sum, mixed, weight, bias, seed, inverse_temperature,
    m, v, depth, split_columns,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    key = tl.load(seed)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    token = tl.zeros((ROWS,), tl.int32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(split * split_columns, tl.minimum((split + 1) * split_columns, v), COLUMNS):
        s = _perturbed_logits(
            mixed, weight, bias, key, rows, first, m, v, depth,
            mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride, EVEN, COLUMNS, DEPTH,
        )  # fmt: skip
        most, token, total = _take(s, first, most, token, total, inverse_temperature)
    at = split * m + rows
    tl.store(partial_most + at, most, mask=rows < m)
    tl.store(partial_token + at, token, mask=rows < m)
    tl.store(partial_sum + at, total, mask=rows < m)


# The splits put together, in their order.
@triton.jit
def _combine_kernel(
    token_ids, peak, partial_most, partial_token, partial_sum, inverse_temperature, m, splits,
    SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    at = split[:, None] * m + rows[None, :]
    inside = (split < splits)[:, None] & (rows < m)[None, :]
    all_most = tl.load(partial_most + at, mask=inside, other=float("-inf"))
    most, winner = tl.max(all_most, axis=0, return_indices=True)
    tokens = tl.load(partial_token + at, mask=inside, other=0)
    token = tl.sum(tl.where(split[:, None] == winner[None, :], tokens, 0), axis=0)
    origin = tl.where(most == float("-inf"), 0.0, most)
    sums = tl.load(partial_sum + at, mask=inside, other=0.0)
    total = tl.sum(sums * tl.exp((all_most - origin[None, :]) * inverse_temperature), axis=0)
    tl.store(token_ids + rows, token.to(tl.int64), mask=rows < m)
    tl.store(peak + rows, 1 / total, mask=rows < m)


# The same from the logits of K heads, a row a program. Bandwidth: each is read once, in its own dtype.
@triton.jit
def _logits_kernel(
    token_ids, peak, logits, alpha, bias, seed, inverse_temperature, v, width, first_row, head_stride, row_stride,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    key = tl.load(seed)
    rows = first_row + row + tl.zeros((1,), tl.int32)
    most = tl.full((1,), float("-inf"), tl.float32)
    token = tl.zeros((1,), tl.int32)
    total = tl.zeros((1,), tl.float32)
    for first in tl.range(0, v, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        s = tl.reshape(gumbel(key, rows, first, COLUMNS), (COLUMNS,))
        if bias is not None:
            s += tl.load(bias + columns, mask=columns < width, other=0.0)
        head = logits
        for k in tl.static_range(HEADS):
            z = tl.load(head + columns, mask=columns < width, other=0.0)
            s += tl.load(alpha + row * HEADS + k) * z.to(tl.float32)
            head += head_stride  # step by step: k·head_stride may need 64 bits
        s = tl.where(columns < v, s, float("-inf"))[None, :]
        most, token, total = _take(s, first, most, token, total, inverse_temperature)
    at = row + tl.zeros((1,), tl.int32)
    tl.store(token_ids + at, token.to(tl.int64))
    tl.store(peak + at, 1 / total)


# a·b, b rounded to the dtype of a.
@triton.jit
def _dot(a, b, depth, a_stride, b_stride, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, depth, BLOCK):
        k = (first + tl.arange(0, BLOCK)).to(tl.int64)
        x = tl.load(a + k * a_stride, mask=k < depth, other=0.0)
        w = tl.load(b + k * b_stride, mask=k < depth, other=0.0)
        total += x.to(tl.float32) * w.to(x.dtype).to(tl.float32)
    return tl.sum(total, axis=0)


# What a row's y and y F·r count from: z + g of the drawn token and, where `products` is given, its F·r.
@triton.jit
def _origins_kernel(
    origins, products, mixed, weight, bias, embedding, grad, token_ids, seed, depth, embedding_depth,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    embedding_stride, embedding_depth_stride, grad_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    at = tl.zeros((1,), tl.int64)
    mixed += row * mixed_stride
    weight += token * weight_stride
    s = gumbel_at(tl.load(seed), row + at, token + at)
    s += _dot(mixed, weight, depth, mixed_depth_stride, weight_depth_stride, BLOCK)
    if bias is not None:
        s += tl.load(bias + token)
    tl.store(origins + row + at, s)
    if products is not None:
        grad += row * grad_stride
        embedding += token * embedding_stride
        tl.store(products + row, _dot(grad, embedding, embedding_depth, 1, embedding_depth_stride, BLOCK))


# One tile of y and, where `weighted` is given, of y (F·r − product); and their sums over the tile, as they are stored:
# what is taken off a sum of rounded numbers must be made of the same ones.
# y = peak · exp((z + g − origin)/τ), where origin is z + g of the drawn token and peak its y, the largest. Where a tile
# rounds otherwise than the sweep that drew, another token may come out above it, at a small τ far above: it counts as
# equal.
@triton.jit
def _weights_kernel(
    y_out, weighted, total, delta, mixed, weight, bias, embedding, grad, products,
    token_ids, peak, origins, seed, inverse_temperature,
    m, v, depth, embedding_depth, chunk_first, chunk_columns,
    mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride,
    embedding_stride, embedding_depth_stride, grad_stride,
    EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = chunk_first // COLUMNS + tl.program_id(1)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    s = _perturbed_logits(
        mixed, weight, bias, tl.load(seed), rows, tile * COLUMNS, m, v, depth,
        mixed_stride, mixed_depth_stride, weight_stride, weight_depth_stride, EVEN, COLUMNS, DEPTH,
    )  # fmt: skip
    token = tl.load(token_ids + rows, mask=rows < m, other=0).to(tl.int32)
    exponent = (s - tl.load(origins + rows, mask=rows < m, other=0.0)[:, None]) * inverse_temperature
    exponent = tl.where((exponent > 0) | (columns[None, :] == token[:, None]), 0.0, exponent)
    y = tl.exp(exponent) * tl.load(peak + rows, mask=rows < m, other=0.0)[:, None]
    at = rows.to(tl.int64)[:, None] * chunk_columns + (columns - chunk_first)[None, :]
    y = tl.where((rows < m)[:, None] & (columns < v)[None, :], y, 0.0).to(y_out.dtype.element_ty)
    inside = (rows < m)[:, None] & (columns - chunk_first < chunk_columns)[None, :]  # the padding too
    tl.store(y_out + at, y, mask=inside)
    y = y.to(tl.float32)
    tl.store(total + tile.to(tl.int64) * m + rows, tl.sum(y, axis=1), mask=rows < m)
    if weighted is not None:
        fr = _product(
            grad, embedding, rows, columns, m, v, embedding_depth, grad_stride, 1,
            embedding_stride, embedding_depth_stride, EVEN, DEPTH,
        )  # fmt: skip
        y *= fr - tl.load(products + rows, mask=rows < m, other=0.0)[:, None]
        y = y.to(weighted.dtype.element_ty)
        tl.store(weighted + at, y, mask=inside)
        tl.store(delta + tile.to(tl.int64) * m + rows, tl.sum(y.to(tl.float32), axis=1), mask=rows < m)


def sample(
    token_ids: Tensor, peak: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor,
    temperature: float,
) -> None:  # fmt: skip
    """x̂ and y_x̂."""
    (m, d), v = mixed.shape, len(weight)
    if m == 0:
        return
    tile = _choose("sample", mixed, weight)
    blocks, tiles = triton.cdiv(m, tile.rows), triton.cdiv(v, tile.columns)
    split_tiles = triton.cdiv(tiles, max(1, persistent_programs(mixed, _PROGRAMS) // blocks))
    splits = triton.cdiv(tiles, split_tiles)
    partial_most, partial_sum = mixed.new_empty(2, splits, m, dtype=torch.float32)
    partial_token = mixed.new_empty(splits, m, dtype=torch.int32)
    _forward_kernel[(blocks, splits)](
        partial_most, partial_token, partial_sum, mixed, weight, bias, seed, _inverse(temperature),
        m, v, d, split_tiles * tile.columns, *mixed.stride(), *weight.stride(),
        EVEN=d % tile.depth == 0, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(m, _COMBINE_ROWS),)](
        token_ids, peak, partial_most, partial_token, partial_sum, _inverse(temperature), m, splits,
        SPLITS=triton.next_power_of_2(splits), ROWS=_COMBINE_ROWS,
    )  # fmt: skip


def sample_logits(
    token_ids: Tensor, peak: Tensor, logits: Tensor, alpha: Tensor, bias: Tensor | None, seed: Tensor,
    temperature: float, first_row: int,
) -> None:  # fmt: skip
    """x̂ and y_x̂ from logits (K, M, V) without the bias, whose rows are contiguous; alpha is (M, K)."""
    heads, m, v = logits.shape
    if m == 0:
        return
    width = padded_columns(logits)
    _logits_kernel[(m,)](
        token_ids, peak, logits, alpha.contiguous(), padded_vector(bias, width), seed, _inverse(temperature),
        v, width, first_row, *logits.stride()[:2],
        HEADS=heads, COLUMNS=_LOGITS_COLUMNS, num_warps=_LOGITS_WARPS,
    )  # fmt: skip


def soft_value(
    value: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor | None, embedding: Tensor, token_ids: Tensor,
    peak: Tensor, seed: Tensor, temperature: float,
) -> None:  # fmt: skip
    """Σ_v y_v F[v]."""
    value.zero_()
    if len(value) == 0:
        return
    tile = _choose("weights", mixed, weight)
    total = peak.new_empty(triton.cdiv(len(weight), tile.columns), len(value))
    drawn = (token_ids, peak)
    for part, (y,) in _weight_chunks(tile, total, None, mixed, weight, bias, embedding, drawn, seed, temperature):
        _add_product(value, y, embedding[part])
    value /= total.sum(dim=0)[:, None]


def backward(
    grad_mixed: Tensor | None, grad_embedding: Tensor | None, grad_embeddings: Tensor, mixed: Tensor,
    weight: Tensor, bias: Tensor | None, embedding: Tensor, token_ids: Tensor, peak: Tensor, seed: Tensor,
    temperature: float,
) -> None:  # fmt: skip
    """dh̄ and, for a soft value, dF."""
    m, d = mixed.shape
    if m == 0:
        if grad_embedding is not None:
            grad_embedding.zero_()
        return
    upstream, tile = None, _choose("weights", mixed, weight)
    total, delta = peak.new_empty(2, triton.cdiv(len(weight), tile.columns), m)
    if grad_mixed is not None:
        # rows of length 1: neither do large gradients overflow in fp16, nor do small ones vanish
        norm = torch.linalg.vector_norm(grad_embeddings, dim=1, dtype=torch.float32)
        inverse = torch.where(norm == 0, 0, 1 / norm)
        upstream = ((grad_embeddings * inverse[:, None]).to(mixed.dtype), delta)
        sums = peak.new_zeros(2 * m, d)
    drawn = (token_ids, peak)
    chunks = _weight_chunks(tile, total, upstream, mixed, weight, bias, embedding, drawn, seed, temperature)
    for part, buffers in chunks:
        if grad_mixed is not None:
            _add_product(sums, buffers.flatten(0, 1), weight[part])
        if grad_embedding is not None:
            grad_embedding[part] = 0
            _add_product(grad_embedding[part], buffers[0].t(), grad_embeddings)
    if grad_mixed is not None:
        plain, weighted = sums.view(2, m, d)
        share = 1 / total.sum(dim=0)  # y adds up to 1, but for its rounding and where it was drawn from other logits
        weighted -= (delta.sum(dim=0) * share)[:, None] * plain
        torch.mul(weighted, (share * norm / temperature)[:, None], out=grad_mixed)


def _weight_chunks(
    tile: Tile, total: Tensor, upstream: tuple[Tensor, Tensor] | None, mixed: Tensor, weight: Tensor,
    bias: Tensor | None, embedding: Tensor, drawn: tuple[Tensor, Tensor], seed: Tensor, temperature: float,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Chunks of the vocabulary and their y (1, M, n), whose sums over each tile are written to ``total``; with
    ``upstream`` (r, sums that are written) y and y (F·r − F[x̂]·r) (2, M, n). ``drawn`` are tokens and their y. The
    buffer is reused."""
    (m, d), v = mixed.shape, len(weight)
    grad, delta = (None, None) if upstream is None else upstream
    count = 1 if upstream is None else 2
    step = max(1, _BUFFER_BYTES // (count * m * mixed.element_size() * tile.columns)) * tile.columns
    padded = triton.cdiv(v, PADDING) * PADDING
    buffer = mixed.new_empty(count * m * min(step, padded))
    depths = (d, embedding.shape[1])
    strides = (*mixed.stride(), *weight.stride(), *embedding.stride(), 0 if grad is None else grad.stride(0))
    origins, products = torch.empty_like(total[0]), None if grad is None else torch.empty_like(total[0])
    _origins_kernel[(m,)](
        origins, products, mixed, weight, bias, embedding, grad, drawn[0], seed, *depths, *strides,
        BLOCK=_DOT_BLOCK,
    )  # fmt: skip
    for first in range(0, v, step):
        n, width = min(step, v - first), min(step, padded - first)
        buffers = buffer[: count * m * width].view(count, m, width)
        _weights_kernel[(triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns))](
            buffers[0], None if upstream is None else buffers[1], total, delta, mixed, weight, bias, embedding, grad,
            products, *drawn, origins, seed, _inverse(temperature), m, v, *depths, first, width, *strides,
            EVEN=all(depth % tile.depth == 0 for depth in depths),
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
        yield slice(first, first + n), buffers[:, :, :n]


def _inverse(temperature: float) -> float:
    """1/τ as fp32 has it: ∞ · 0 would be NaN."""
    return min(1 / temperature, torch.finfo(torch.float32).max)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, made in fp32; b is rounded to the dtype of a."""
    b = b.to(a.dtype)
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total += torch.mm(a.float(), b.float())


_PARTIALS = {"partial_most": "*fp32", "partial_token": "*i32", "partial_sum": "*fp32"}


def specializations() -> Iterator[Specialization]:
    """What the launchers above ask the compiler for."""
    for name, tiles in (("bf16", TILES[16]), ("fp16", TILES[16][:1]), ("fp32", TILES[32])):
        for bias in (None, "*fp32"):
            yield from variants(tiles, partial(_forward_specialization, name, bias))
            for weighted in (False, True):
                yield from variants(tiles, partial(_weights_specialization, name, bias, weighted))
                yield _origins_specialization(name, bias, weighted)
    types = {
        **_PARTIALS,
        "token_ids": "*i64",
        "peak": "*fp32",
        "inverse_temperature": "fp32",
        "m": "i32",
        "splits": "i32",
    }
    yield Specialization(_combine_kernel, types, {"SPLITS": 8, "ROWS": _COMBINE_ROWS})
    types = {"token_ids": "*i64", "peak": "*fp32", "alpha": "*fp32", "bias": "*fp32", "seed": "*i64"}
    types |= dict.fromkeys(("v", "width", "first_row", "head_stride", "row_stride"), "i32") | {
        "inverse_temperature": "fp32"
    }
    for name in ("bf16", "fp32"):
        constants = {"HEADS": 3, "COLUMNS": _LOGITS_COLUMNS}
        strides = ("width", "head_stride", "row_stride")
        yield Specialization(
            _logits_kernel, types | {"logits": f"*{name}"}, constants, _LOGITS_WARPS, divisible=strides, label=name
        )


def _logits_types(name: str, bias: str | None) -> dict[str, str]:
    """Of the arguments that both kernels make logits from."""
    types = dict.fromkeys(("mixed", "weight"), f"*{name}") | {"seed": "*i64", "inverse_temperature": "fp32"}
    types |= dict.fromkeys(("m", "v", "depth", "mixed_stride", "weight_stride"), "i32")
    return types | ({"bias": bias} if bias else {})


def _logits_constants(tile: Tile, bias: str | None) -> dict[str, object]:
    constants: dict[str, object] = {"EVEN": True, "mixed_depth_stride": 1, "weight_depth_stride": 1}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return constants if bias else constants | {"bias": None}


def _forward_specialization(name: str, bias: str | None, tile: Tile) -> Specialization:
    types = _logits_types(name, bias) | _PARTIALS | {"split_columns": "i32"}
    divisible = ("depth", "mixed_stride", "weight_stride", "split_columns")
    label = name + (" bias" if bias else "")
    constants = _logits_constants(tile, bias)
    return Specialization(_forward_kernel, types, constants, tile.num_warps, tile.num_stages, divisible, label)


def _origins_specialization(name: str, bias: str | None, weighted: bool) -> Specialization:
    types = _logits_types(name, bias) | {"embedding": f"*{name}", "token_ids": "*i64", "origins": "*fp32"}
    strides = ("mixed_stride", "weight_stride", "embedding_stride", "grad_stride")
    types |= dict.fromkeys(("embedding_depth", *strides), "i32")
    constants: dict[str, object] = dict.fromkeys(("mixed_depth_stride", "weight_depth_stride"), 1)
    constants |= {"embedding_depth_stride": 1, "BLOCK": _DOT_BLOCK}
    types |= {"products": "*fp32", "grad": f"*{name}"} if weighted else {}
    constants |= {} if weighted else dict.fromkeys(("products", "grad"))
    constants |= {} if bias else {"bias": None}
    label = name + (" bias" if bias else "") + (" weighted" if weighted else "")
    return Specialization(
        _origins_kernel, types, constants, divisible=("depth", "embedding_depth", *strides), label=label
    )


def _weights_specialization(name: str, bias: str | None, weighted: bool, tile: Tile) -> Specialization:
    types = _logits_types(name, bias) | {"embedding": f"*{name}", "y_out": f"*{name}", "token_ids": "*i64"}
    types |= dict.fromkeys(("origins", "peak", "total"), "*fp32")
    types |= dict.fromkeys(
        ("embedding_depth", "chunk_first", "chunk_columns", "embedding_stride", "grad_stride"), "i32"
    )
    constants = _logits_constants(tile, bias) | {"embedding_depth_stride": 1}
    if weighted:
        types |= {"weighted": f"*{name}", "delta": "*fp32", "grad": f"*{name}", "products": "*fp32"}
    else:
        constants |= dict.fromkeys(("weighted", "delta", "grad", "products"))
    strides = ("mixed_stride", "weight_stride", "embedding_stride", "grad_stride")
    divisible = ("depth", "embedding_depth", "chunk_first", "chunk_columns", *strides)
    label = name + (" bias" if bias else "") + (" weighted" if weighted else "")
    return Specialization(_weights_kernel, types, constants, tile.num_warps, tile.num_stages, divisible, label)
