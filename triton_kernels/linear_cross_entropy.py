"""Linear cross entropy in Triton. Mathematics: repdeg_fast/reference/linear_cross_entropy.py.

*Chunked*, and the backward pass of *streaming*, are cuBLAS around one pass over a buffer of logits
(linear_cross_entropy_rows.py). The forward pass of *streaming* keeps logits in registers: :func:`forward` takes the
log-sum-exp of tile after tile. What is counted and scaled besides is in linear_cross_entropy_heads.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_cross_entropy_rows import class_weights
from .tile import add_exponentials, heads_differ, origin, product, shares, softcapped, weight_of
from .tuning import chip, choose, persistent_programs

if TYPE_CHECKING:
    from repdeg_fast.contracts.linear_cross_entropy import Head, LossRule

_COMBINE_ROWS = 32
_PROGRAMS = 8  # a multiprocessor. One is resident; of many, the last round is a small part


@dataclass(frozen=True)
class MatmulTile:
    """``rows`` × ``columns`` logits at a time, multiplied in steps of ``depth``."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# What ROWS rows meet in a part of the vocabulary: the largest logit (and its place, where it is asked for), the sums of
# exponentials and, for label smoothing, of logits relative to it, and the label's logit. Operations: 2·N·V·d for all
# programs, of which each multiplies one tile of logits after the other and keeps these numbers. Programs of one part
# run side by side and share its rows of the weight in L2. With `grad_heads`: only where these differ, else all is left
# as it is.
@triton.jit
def _forward_kernel(
    part_most, part_sum_exp, part_sum_z, part_label, part_weight, part_best, hidden_states, weight, target, bias,
    class_weight, grad_heads,
    n, vocabulary, positions, d, part_columns, hidden_row, hidden_column, weight_row, weight_column, grad_heads_stride,
    softcap, HEADS: tl.constexpr, SMOOTHING: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    if grad_heads is not None:
        if not heads_differ(grad_heads, grad_heads_stride, HEADS):
            return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    label = tl.load(target + rows % positions, mask=rows < n, other=0).to(tl.int64)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((ROWS,), tl.float32)
    sum_z = tl.zeros((ROWS,), tl.float32)
    z_label = tl.zeros((ROWS,), tl.float32)
    first = part * part_columns
    seen = 0.0  # the weight of the columns so far
    best = tl.zeros((ROWS,), tl.int32) + first
    for begin in range(first, tl.minimum(first + part_columns, vocabulary), COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        z = product(
            hidden_states, weight, rows, columns, n, vocabulary, d,
            hidden_row, hidden_column, weight_row, weight_column, DTYPE, PRECISION, DEPTH,
        )  # fmt: skip
        inside = (columns < vocabulary)[None, :]
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
        if softcap is not None:
            z = softcapped(z, softcap)
        z_label += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), axis=1)
        z = tl.where(inside, z, -float("inf"))
        if part_best is not None:
            largest = tl.max(z, axis=1)
            leftmost = tl.min(tl.where(z == largest[:, None], columns[None, :], vocabulary), axis=1)
            best = tl.where(largest > most, leftmost, best)
        before = origin(most)
        z, most, sum_exp = add_exponentials(z, most, sum_exp)
        if SMOOTHING:
            z = tl.where(inside, z, 0.0)
            if class_weight is None:
                sum_z += (before - origin(most)) * (begin - first) + tl.sum(z, axis=1)
            else:
                of_class = weight_of(class_weight, columns, vocabulary)
                sum_z += (before - origin(most)) * seen + tl.sum(of_class[None, :] * z, axis=1)
                seen += tl.sum(of_class, axis=0)
    at = part.to(tl.int64) * n + rows
    tl.store(part_most + at, most, mask=rows < n)
    tl.store(part_sum_exp + at, sum_exp, mask=rows < n)
    tl.store(part_label + at, z_label, mask=rows < n)
    if SMOOTHING:
        tl.store(part_sum_z + at, sum_z, mask=rows < n)
        if class_weight is not None:
            tl.store(part_weight + at, tl.zeros((ROWS,), tl.float32) + seen, mask=rows < n)
    if part_best is not None:
        tl.store(part_best + at, best, mask=rows < n)


# Loss and log-sum-exp from the parts, put together in their order. lse is zero + rest, of which zero may be large: it
# is left out of differences.
@triton.jit
def _combine_kernel(
    loss, lse, predicted, part_most, part_sum_exp, part_sum_z, part_label, part_weight, part_best, target,
    class_weight, class_total, n, parts, part_columns, vocabulary, positions, ignore_index, label_smoothing,
    SMOOTHING: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None]
    at = part.to(tl.int64) * n + rows[None, :]
    inside = (part < parts) & (rows < n)[None, :]
    each_most = tl.load(part_most + at, mask=inside, other=-float("inf"))
    sum_exp = tl.load(part_sum_exp + at, mask=inside, other=0.0)
    z_label = tl.sum(tl.load(part_label + at, mask=inside, other=0.0), axis=0)
    zero = origin(tl.max(each_most, axis=0))
    rest = tl.log(tl.sum(sum_exp * tl.exp(each_most - zero[None, :]), axis=0))
    label = tl.load(target + rows % positions, mask=rows < n, other=0).to(tl.int64)
    of_label, of_all = shares(class_weight, class_total, label, label_smoothing, vocabulary)
    value = of_all * rest + of_label * (zero - z_label)
    if SMOOTHING:
        columns = tl.minimum(vocabulary - part * part_columns, part_columns)
        if class_weight is not None:
            columns = tl.load(part_weight + at, mask=inside, other=0.0)
        sum_z = tl.load(part_sum_z + at, mask=inside, other=0.0) + (origin(each_most) - zero[None, :]) * columns
        value -= label_smoothing / vocabulary * tl.sum(tl.where(inside, sum_z, 0.0), axis=0)
    if predicted is not None:
        largest = inside & (each_most == tl.max(each_most, axis=0)[None, :])
        best = tl.min(tl.load(part_best + at, mask=largest, other=vocabulary), axis=0)
        tl.store(predicted + rows, tl.where(best < vocabulary, best, 0).to(tl.int64), mask=rows < n)
    value = tl.where((label >= 0) & (label < vocabulary), value, float("nan"))
    tl.store(lse + rows, zero + rest, mask=rows < n)
    tl.store(loss + rows, tl.where(label == ignore_index, 0.0, value), mask=rows < n)


def forward(
    head: Head, rule: LossRule, predicted: Tensor | None = None, grad_heads: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, and the class with its largest logit; arbitrary where ``grad_heads`` (K,) are
    all the same."""
    hidden_states, weight, target, bias = head
    (n, d), vocabulary, positions = hidden_states.shape, weight.shape[0], target.shape[0]
    smoothing = rule.label_smoothing != 0
    class_weight, class_total = class_weights(rule)
    narrow = predicted is not None or (smoothing and class_weight is not None)  # more numbers a row, fewer registers
    tile = choose_tile("forward.narrow", _NARROW_TILES, head) if narrow else choose_tile("forward", FORWARD_TILES, head)
    blocks = triton.cdiv(n, tile.rows)
    grad_heads_stride, heads = heads_of(grad_heads)
    part_columns, parts = _parts(vocabulary, tile.columns, blocks, hidden_states)
    lse, loss = (hidden_states.new_empty(n, dtype=torch.float32) for _ in range(2))
    # most, sum of exponentials, sum, label's logit, weight of the part
    found = hidden_states.new_empty((5, parts, n), dtype=torch.float32)
    best = None if predicted is None else hidden_states.new_empty((parts, n), dtype=torch.int32)
    if n:
        _forward_kernel[(blocks, parts)](
            *found, best, hidden_states, weight, target, bias, class_weight, grad_heads,
            n, vocabulary, positions, d, part_columns, *hidden_states.stride(), *weight.stride(),
            grad_heads_stride, rule.softcap or None, HEADS=heads, SMOOTHING=smoothing,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, **product_constants(hidden_states),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _combine_kernel[(triton.cdiv(n, _COMBINE_ROWS),)](
            loss, lse, predicted, *found, best, target, class_weight, class_total,
            n, parts, part_columns, vocabulary, positions, rule.ignore_index, rule.label_smoothing,
            SMOOTHING=smoothing, PARTS=triton.next_power_of_2(parts), ROWS=_COMBINE_ROWS,
        )  # fmt: skip
    return loss, lse


# For each chip and operands (bits of the rows × bits of the weight), the tile that ships first: the largest for which
# ptxas spills nothing (tests/test_ahead_of_time.py compiles them). The others, for tuning, trade reuse for a second
# program on each multiprocessor, or for longer steps. fp32 is multiplied on tensor cores as three tf32 products, which
# take more registers. "sm_80" stands for all NVIDIA chips that are not named.
_M = MatmulTile
FORWARD_TILES: dict[tuple[str, str], Sequence[MatmulTile]] = {
    ("sm_80", "16x16"): [_M(128, 64, 64, 8, 3)],
    ("sm_90", "16x16"): [
        _M(128, 128, 64, 8, 3), _M(128, 64, 64, 8, 4), _M(64, 64, 64, 4, 4), _M(128, 128, 32, 8, 4),
    ],
    ("sm_100", "16x16"): [_M(128, 64, 64, 8, 3)],
    ("gfx942", "16x16"): [_M(128, 128, 64, 8, 2)],
    ("sm_80", "16x32"): [_M(128, 64, 64, 8, 3)],
    ("sm_90", "16x32"): [_M(128, 128, 64, 8, 3)],
    ("sm_100", "16x32"): [_M(128, 64, 64, 8, 3)],
    ("gfx942", "16x32"): [_M(128, 128, 64, 8, 2)],
    ("sm_80", "32x32"): [_M(64, 64, 32, 8, 2)],
    ("sm_90", "32x32"): [_M(128, 64, 32, 8, 2)],
    ("sm_100", "32x32"): [_M(64, 64, 32, 8, 2)],
    ("gfx942", "32x32"): [_M(64, 64, 32, 4, 2)],
}  # fmt: skip

_NARROW_TILES: dict[tuple[str, str], Sequence[MatmulTile]] = {
    key: list(dict.fromkeys(replace(tile, columns=min(tile.columns, 64)) for tile in tiles))
    for key, tiles in FORWARD_TILES.items()
}


def choose_tile(kernel: str, tiles: dict[tuple[str, str], Sequence[Any]], head: Head) -> Any:
    """One of ``tiles``, which are listed by chip and operands."""
    hidden_states, weight, _, _ = head
    rows, columns = 8 * hidden_states.element_size(), 8 * weight.element_size()
    operands = f"{rows}x{max(rows, columns)}"
    (n, d), vocabulary = hidden_states.shape, weight.shape[0]
    configurations = tiles[chip(hidden_states.device), operands]
    return choose(f"linear_cross_entropy.{kernel}.{operands}", configurations, hidden_states, n=n, v=vocabulary, d=d)


def product_constants(hidden_states: Tensor) -> dict[str, Any]:
    """What is multiplied, and how fp32 is. PyTorch's default, "highest", asks for fp32 results: three tf32 products
    give them to about 1e-6."""
    precision = "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    if chip(hidden_states.device) == "gfx942":
        precision = "ieee"
    return {"DTYPE": _TRITON_TYPES[hidden_states.dtype], "PRECISION": precision}


def heads_of(grad_heads: Tensor | None) -> tuple[int, int]:
    """Stride and number."""
    return (0, 0) if grad_heads is None else (grad_heads.stride(0), grad_heads.shape[0])


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _parts(length: int, step: int, programs: int, tensor: Tensor) -> tuple[int, int]:
    """Cut a loop of ``length`` so that there are about so many programs: (length of a part, parts)."""
    wanted = max(1, min(16, persistent_programs(tensor, _PROGRAMS) // max(programs, 1)))
    each = triton.cdiv(triton.cdiv(length, wanted), step) * step
    return each, triton.cdiv(length, each)
