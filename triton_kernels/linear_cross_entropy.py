"""Linear cross entropy in Triton. Mathematics: repdeg_fast/reference/linear_cross_entropy.py.

*Chunked* is cuBLAS around one pass over a buffer of logits (linear_cross_entropy_rows.py). *Streaming* keeps logits in
registers: :func:`forward` takes the log-sum-exp of tile after tile, :func:`backward` makes each tile again, once for
the gradient of the rows and once for that of the vocabulary, so that every gradient has one owner: no atomics, the
same bits twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_cross_entropy_rows import optional, rows, softcapped
from .tile import add_exponentials, origin
from .tuning import Specialization, choose, persistent_programs, variants

__all__ = ["backward", "forward", "rescale_", "rows"]

_SCALE_BLOCK = 4096
_COMBINE_ROWS = 32
# A multiprocessor. One is resident; of many, the last round is a small part. Backward, parts take memory.
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 8, 2


@dataclass(frozen=True)
class MatmulTile:
    """``own`` × ``loop`` logits at a time, multiplied in steps of ``k``; a program owns ``width`` columns of its
    gradient."""

    own: int
    loop: int
    k: int
    width: int
    num_warps: int
    num_stages: int


# x[own] · y[loop]ᵀ in fp32. DTYPE is what is multiplied: an fp32 weight is rounded on the way under autocast.
@triton.jit
def _product(
    x, y, own, loop, owners, loopers, d, x_row, x_column, y_row, y_column,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    x += own.to(tl.int64)[:, None] * x_row
    y += loop.to(tl.int64)[:, None] * y_row
    total = tl.zeros((OWN, LOOP), tl.float32)
    for first in range(0, d, K):
        columns = first + tl.arange(0, K)
        inside = (columns < d)[None, :]
        a = tl.load(x + columns[None, :] * x_column, mask=(own < owners)[:, None] & inside, other=0.0)
        b = tl.load(y + columns[None, :] * y_column, mask=(loop < loopers)[:, None] & inside, other=0.0)
        total = tl.dot(a.to(DTYPE), tl.trans(b.to(DTYPE)), total, input_precision=PRECISION)
    return total


# What OWN rows meet in a part of the vocabulary: the largest logit, the sums of exponentials and, for label smoothing,
# of logits relative to it, and the label's logit. Operations: 2·N·V·d for all programs, of which each multiplies one
# tile of logits after the other and keeps these numbers. Programs of one part run side by side and share its rows of
# the weight in L2.
@triton.jit
def _forward_kernel(
    part_most, part_sum_exp, part_sum_z, part_label, hidden_states, weight, target, bias, enabled,
    n, vocabulary, positions, d, part_columns, hidden_row, hidden_column, weight_row, weight_column, softcap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, PREDICATED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, OWN: tl.constexpr, LOOP: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    if PREDICATED:
        if tl.load(enabled) == 0:
            return
    rows = tl.program_id(0) * OWN + tl.arange(0, OWN)
    part = tl.program_id(1)
    label = tl.load(target + rows % positions, mask=rows < n, other=0).to(tl.int64)
    most = tl.full((OWN,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((OWN,), tl.float32)
    sum_z = tl.zeros((OWN,), tl.float32)
    z_label = tl.zeros((OWN,), tl.float32)
    first = part * part_columns
    for begin in range(first, tl.minimum(first + part_columns, vocabulary), LOOP):
        columns = begin + tl.arange(0, LOOP)
        z = _product(
            hidden_states, weight, rows, columns, n, vocabulary, d,
            hidden_row, hidden_column, weight_row, weight_column, DTYPE, PRECISION, OWN, LOOP, K,
        )  # fmt: skip
        inside = (columns < vocabulary)[None, :]
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)[None, :]
        if SOFTCAP:
            z = softcapped(z, softcap)
        z_label += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), axis=1)
        before = origin(most)
        z, most, sum_exp = add_exponentials(tl.where(inside, z, -float("inf")), most, sum_exp)
        if SMOOTHING:
            sum_z += (before - origin(most)) * (begin - first) + tl.sum(tl.where(inside, z, 0.0), axis=1)
    at = part.to(tl.int64) * n + rows
    tl.store(part_most + at, most, mask=rows < n)
    tl.store(part_sum_exp + at, sum_exp, mask=rows < n)
    tl.store(part_label + at, z_label, mask=rows < n)
    if SMOOTHING:
        tl.store(part_sum_z + at, sum_z, mask=rows < n)


# Loss and log-sum-exp from the parts, put together in their order. lse is zero + rest, of which zero may be large: it
# is left out of differences.
@triton.jit
def _combine_kernel(
    loss, lse, part_most, part_sum_exp, part_sum_z, part_label, target,
    n, parts, part_columns, vocabulary, positions, ignore_index, label_smoothing,
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
    value = rest + (1 - label_smoothing) * (zero - z_label)
    if SMOOTHING:
        columns = tl.minimum(vocabulary - part * part_columns, part_columns)
        sum_z = tl.load(part_sum_z + at, mask=inside, other=0.0) + (origin(each_most) - zero[None, :]) * columns
        value -= label_smoothing / vocabulary * tl.sum(tl.where(inside, sum_z, 0.0), axis=0)
    label = tl.load(target + rows % positions, mask=rows < n, other=0).to(tl.int64)
    value = tl.where((label >= 0) & (label < vocabulary), value, float("nan"))
    tl.store(lse + rows, zero + rest, mask=rows < n)
    tl.store(loss + rows, tl.where(label == ignore_index, 0.0, value), mask=rows < n)


# One gradient from logits made again, tile by tile: of hidden_states (x; the loop runs over the vocabulary) or, with
# VOCABULARY, of weight and bias (x; the loop runs over the rows). A program owns OWN rows of x and WIDTH columns of
# its gradient, which stay in registers; the d/WIDTH programs that share rows each make the logits for themselves.
# Operations: 2·N·V·d for the gradient and as much for the logits times d/WIDTH.
@triton.jit
def _backward_kernel(
    x, y, grad_x, grad_bias, target, bias, lse, grad_loss, grad_lse, enabled,
    owners, loopers, vocabulary, positions, d, part_loopers, ignore_index,
    x_row, x_column, y_row, y_column, grad_loss_stride, label_smoothing, softcap,
    VOCABULARY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GRAD_BIAS: tl.constexpr, HAS_GRAD_X: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, SOFTCAP: tl.constexpr, PREDICATED: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    OWN: tl.constexpr, LOOP: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if PREDICATED:
        if tl.load(enabled) == 0:
            return
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    slice_columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(2)
    total = tl.zeros((OWN, WIDTH), tl.float32)
    bias_total = tl.zeros((OWN,), tl.float32)
    for begin in range(part * part_loopers, tl.minimum((part + 1) * part_loopers, loopers), LOOP):
        loop = begin + tl.arange(0, LOOP)
        z = _product(
            x, y, own, loop, owners, loopers, d, x_row, x_column, y_row, y_column,
            DTYPE, PRECISION, OWN, LOOP, K,
        )  # fmt: skip
        if VOCABULARY:
            rows, rows_inside = loop, loop < loopers
            columns, columns_inside = own[:, None], (own < owners)[:, None]
        else:
            rows, rows_inside = own, own < owners
            columns, columns_inside = loop[None, :], (loop < loopers)[None, :]
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns_inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            z = softcapped(z, softcap)
        label = tl.load(target + rows % positions, mask=rows_inside, other=ignore_index).to(tl.int64)
        g = tl.load(grad_loss + rows.to(tl.int64) * grad_loss_stride, mask=rows_inside, other=0.0)
        g = tl.where((label >= 0) & (label < vocabulary), g, float("nan"))
        g = tl.where(label == ignore_index, 0.0, g)
        both = g
        if HAS_GRAD_LSE:
            both += tl.load(grad_lse + rows, mask=rows_inside, other=0.0)
        row_lse = tl.load(lse + rows, mask=rows_inside, other=0.0)
        if VOCABULARY:
            g, both, row_lse, label = g[None, :], both[None, :], row_lse[None, :], label[None, :]
            used = columns_inside & rows_inside[None, :]
        else:
            g, both, row_lse, label = g[:, None], both[:, None], row_lse[:, None], label[:, None]
            used = columns_inside & rows_inside[:, None]
        dz = both * tl.exp(z - row_lse) - g * (label_smoothing / vocabulary)
        dz -= tl.where(columns == label, g * (1 - label_smoothing), 0.0)
        if SOFTCAP:
            dz *= 1 - (z / softcap) * (z / softcap)
        dz = tl.where(used & ((g != 0) | (both != 0)), dz, 0.0)
        if HAS_GRAD_BIAS:
            bias_total += tl.sum(dz, axis=1)
        if HAS_GRAD_X:
            mask = (loop < loopers)[:, None] & (slice_columns < d)[None, :]
            values = tl.load(
                y + loop.to(tl.int64)[:, None] * y_row + slice_columns[None, :] * y_column, mask=mask, other=0.0
            )
            total = tl.dot(dz.to(DTYPE), values.to(DTYPE), total, input_precision=PRECISION)
    wide_own = own.to(tl.int64) + part.to(tl.int64) * owners
    if HAS_GRAD_X:
        mask = (own < owners)[:, None] & (slice_columns < d)[None, :]
        out = grad_x + wide_own[:, None] * d + slice_columns[None, :]
        tl.store(out, total.to(grad_x.dtype.element_ty), mask=mask)
    if HAS_GRAD_BIAS:
        if tl.program_id(1) == 0:
            tl.store(grad_bias + wide_own, bias_total.to(grad_bias.dtype.element_ty), mask=own < owners)


# x *= scale, leaving at once where that changes nothing: how the usual upstream gradient of 1 costs no pass over dE.
@triton.jit
def _scale_kernel(x, scale, n, BLOCK: tl.constexpr):
    factor = tl.load(scale)
    if factor == 1:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(x + at, (value * factor).to(x.dtype.element_ty), mask=at < n)


def forward(
    hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, enabled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and log-sum-exp of every row. ``enabled``: a flag on the device; where it is 0 the results are arbitrary."""
    n, vocabulary = len(hidden_states), len(weight)
    tile = _choose("forward", 0, hidden_states, weight)
    blocks = triton.cdiv(n, tile.own)
    part_columns, parts = _parts(vocabulary, tile.loop, blocks, hidden_states, _FORWARD_PROGRAMS)
    lse, loss = hidden_states.new_empty((2, n), dtype=torch.float32)
    found = hidden_states.new_empty((4, parts, n), dtype=torch.float32)  # most, sum of exponentials, sum, label's logit
    if n:
        _forward_kernel[(blocks, parts)](
            *found, hidden_states, weight, target, bias, enabled,
            n, vocabulary, len(target), hidden_states.shape[1], part_columns,
            *hidden_states.stride(), *weight.stride(), softcap,
            HAS_BIAS=bias is not None, SOFTCAP=softcap != 0, SMOOTHING=label_smoothing != 0,
            PREDICATED=enabled is not None, **_matmul_constants(hidden_states, tile),
        )  # fmt: skip
        _combine_kernel[(triton.cdiv(n, _COMBINE_ROWS),)](
            loss, lse, *found, target,
            n, parts, part_columns, vocabulary, len(target), ignore_index, label_smoothing,
            SMOOTHING=label_smoothing != 0, PARTS=triton.next_power_of_2(parts), ROWS=_COMBINE_ROWS,
        )  # fmt: skip
    return loss, lse


def backward(
    grad_loss: Tensor, grad_lse: Tensor | None, hidden_states: Tensor, weight: Tensor, target: Tensor,
    bias: Tensor | None, lse: Tensor, ignore_index: int, label_smoothing: float, softcap: float,
    needs: list[bool], accumulate_dtype: torch.dtype,
    out: list[Tensor | None] | None = None, enabled: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of Σ grad_loss·loss + Σ grad_lse·lse, into ``out`` where given and only if ``enabled``. Sums over a
    program's loop are fp32 whatever ``accumulate_dtype`` is."""
    inputs = (target, bias, lse, grad_loss, grad_lse)
    options = (ignore_index, label_smoothing, softcap)
    n, vocabulary, d = len(hidden_states), len(weight), weight.shape[1]
    if out is None:
        like = (hidden_states, weight, weight if bias is None else bias)
        shapes = ((n, d), (vocabulary, d), (vocabulary,))
        fresh = torch.Tensor.new_empty if n else torch.Tensor.new_zeros
        out = [fresh(t, s) if need else None for t, s, need in zip(like, shapes, needs, strict=True)]
    if n and needs[0]:
        _launch_backward(False, hidden_states, weight, out[0], None, inputs, options, enabled)
    if n and (needs[1] or needs[2]):
        _launch_backward(True, weight, hidden_states, out[1], out[2], inputs, options, enabled)
    grad_hidden, grad_weight, grad_bias = out
    return grad_hidden, grad_weight, grad_bias


def rescale_(
    gradients: list[Tensor | None], grad_heads: Tensor, grad_loss: Tensor,
    hidden_states: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, needs: list[bool], accumulate_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Turn the gradients of Σ loss into those of Σ grad_heads·loss, without asking the device what grad_heads is: one
    scale if all heads have the same, else (kernels that otherwise return at once) made again from grad_loss, the
    upstream gradient of each row."""
    same = (grad_heads == grad_heads[0]).all()
    scale = torch.where(same, grad_heads[0], 1).to(torch.float32)
    for gradient in gradients:
        if gradient is not None:
            blocks = min(triton.cdiv(gradient.numel(), _SCALE_BLOCK), persistent_programs(gradient, 8))
            _scale_kernel[(blocks,)](gradient, scale, gradient.numel(), BLOCK=_SCALE_BLOCK)
    if len(grad_heads) > 1:
        differ = (~same).to(torch.int32)
        inputs, options = (hidden_states, weight, target, bias), (ignore_index, label_smoothing, softcap)
        _, lse = forward(*inputs, *options, enabled=differ)
        backward(grad_loss, None, *inputs, lse, *options, needs, accumulate_dtype, out=gradients, enabled=differ)


def _launch_backward(
    over_vocabulary: bool, x: Tensor, y: Tensor, grad_x: Tensor | None, grad_bias: Tensor | None,
    inputs: tuple[Any, ...], options: tuple[int, float, float], enabled: Tensor | None,
) -> None:  # fmt: skip
    target, bias, lse, grad_loss, grad_lse = inputs
    ignore_index, label_smoothing, softcap = options
    hidden_states, vocabulary = (y, len(x)) if over_vocabulary else (x, len(y))
    weight, d = (x if over_vocabulary else y), x.shape[1]
    tile = _choose("backward_vocabulary" if over_vocabulary else "backward_rows", 1, hidden_states, weight)
    slices = triton.cdiv(d, tile.width) if grad_x is not None else 1
    blocks = triton.cdiv(len(x), tile.own)
    # a grid too small for the device is cut along the loop as well; its parts are added up afterwards
    part_loopers, parts = len(y), 1
    if enabled is None:
        part_loopers, parts = _parts(len(y), tile.loop, blocks * slices, x, _BACKWARD_PROGRAMS)
    outputs = [grad_x, grad_bias]
    if parts > 1:
        outputs = [None if t is None else t.new_empty((parts, *t.shape), dtype=torch.float32) for t in outputs]
    _backward_kernel[(blocks, slices, parts)](
        x, y, *outputs, target, bias, lse, grad_loss, grad_lse, enabled,
        len(x), len(y), vocabulary, len(target), d, part_loopers, ignore_index,
        *x.stride(), *y.stride(), grad_loss.stride(0), label_smoothing, softcap,
        VOCABULARY=over_vocabulary, HAS_BIAS=bias is not None, HAS_GRAD_BIAS=grad_bias is not None,
        HAS_GRAD_X=grad_x is not None, HAS_GRAD_LSE=grad_lse is not None, SOFTCAP=softcap != 0,
        PREDICATED=enabled is not None, WIDTH=tile.width, **_matmul_constants(hidden_states, tile),
    )  # fmt: skip
    if parts > 1:
        for partial, gradient in zip(outputs, (grad_x, grad_bias), strict=True):
            if partial is not None and gradient is not None:
                gradient.copy_(partial.sum(dim=0))


# (forward, backward) for each chip and operands (bits of the rows × bits of the weight), the tile that ships first: the
# largest for which ptxas spills nothing (tests/test_ahead_of_time.py compiles them). The others, for tuning, trade
# reuse for a second program on each multiprocessor, or for longer steps. fp32 is multiplied on tensor cores as three
# tf32 products, which take more registers; an fp32 weight beside 16-bit rows passes through registers and, for want of
# them, goes in steps of 32. "sm_80" stands for all NVIDIA chips that are not named.
_M = MatmulTile
TILES: dict[tuple[str, str], tuple[Sequence[MatmulTile], Sequence[MatmulTile]]] = {
    ("sm_80", "16x16"): ([_M(128, 64, 64, 0, 8, 3)], [_M(64, 64, 64, 256, 8, 3)]),
    ("sm_90", "16x16"): (
        [_M(128, 128, 64, 0, 8, 3), _M(128, 64, 64, 0, 8, 4), _M(64, 64, 64, 0, 4, 4), _M(128, 128, 32, 0, 8, 4)],
        [_M(64, 64, 64, 256, 8, 3), _M(64, 64, 64, 128, 8, 3), _M(64, 64, 32, 256, 8, 4), _M(128, 64, 64, 64, 8, 3)],
    ),
    ("sm_100", "16x16"): ([_M(128, 64, 64, 0, 8, 3)], [_M(64, 64, 64, 256, 8, 3)]),
    ("gfx942", "16x16"): ([_M(128, 128, 64, 0, 8, 2)], [_M(64, 64, 32, 128, 4, 2)]),
    ("sm_80", "16x32"): ([_M(128, 64, 64, 0, 8, 3)], [_M(64, 64, 64, 256, 8, 3)]),
    ("sm_90", "16x32"): ([_M(128, 128, 64, 0, 8, 3)], [_M(64, 64, 32, 256, 8, 3), _M(64, 64, 64, 128, 8, 3)]),
    ("sm_100", "16x32"): ([_M(128, 64, 64, 0, 8, 3)], [_M(64, 64, 64, 256, 8, 3)]),
    ("gfx942", "16x32"): ([_M(128, 128, 64, 0, 8, 2)], [_M(64, 64, 32, 128, 4, 2)]),
    ("sm_80", "32x32"): ([_M(64, 64, 32, 0, 8, 2)], [_M(64, 32, 32, 64, 8, 2)]),
    ("sm_90", "32x32"): ([_M(128, 64, 32, 0, 8, 2)], [_M(64, 64, 32, 128, 8, 2)]),
    ("sm_100", "32x32"): ([_M(128, 64, 32, 0, 8, 2)], [_M(64, 64, 32, 64, 8, 2)]),
    ("gfx942", "32x32"): ([_M(64, 64, 32, 0, 4, 2)], [_M(64, 32, 32, 64, 4, 2)]),
}


def _choose(kernel: str, pass_: int, hidden_states: Tensor, weight: Tensor) -> MatmulTile:
    rows, columns = 8 * hidden_states.element_size(), 8 * weight.element_size()
    operands = f"{rows}x{max(rows, columns)}"
    configurations = TILES[_chip(hidden_states.device), operands][pass_]
    (n, d), vocabulary = hidden_states.shape, len(weight)
    return choose(f"linear_cross_entropy.{kernel}.{operands}", configurations, hidden_states, n=n, v=vocabulary, d=d)


def _chip(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _precision(chip: str) -> str:
    """How fp32 is multiplied. PyTorch's default, "highest", asks for fp32 results: three tf32 products give them to
    about 1e-6."""
    if chip == "gfx942":
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _matmul_constants(hidden_states: Tensor, tile: MatmulTile) -> dict[str, Any]:
    return {
        "DTYPE": _TRITON_TYPES[hidden_states.dtype],
        "PRECISION": _precision(_chip(hidden_states.device)),
        "OWN": tile.own,
        "LOOP": tile.loop,
        "K": tile.k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _parts(length: int, step: int, programs: int, tensor: Tensor, per_multiprocessor: int) -> tuple[int, int]:
    """Cut a loop of ``length`` so that there are about so many programs: (length of a part, parts)."""
    wanted = max(1, min(16, persistent_programs(tensor, per_multiprocessor) // max(programs, 1)))
    each = triton.cdiv(triton.cdiv(length, wanted), step) * step
    return each, triton.cdiv(length, each)


def specializations() -> Iterator[Specialization]:
    """What the launchers above ask the compiler for, over dtypes and options."""
    for dtype in ("bf16", "fp32"):
        types = {"x": f"*{dtype}", "scale": "*fp32", "n": "i32"}
        yield Specialization(_scale_kernel, types, {"BLOCK": _SCALE_BLOCK}, divisible=("n",), label=dtype)
    for full in (False, True):
        yield _combine_specialization(full)
    for (chip, operands), (forward, backward) in TILES.items():
        weight = "fp32" if operands.endswith("x32") else ""
        dtypes = ("fp32",) if operands == "32x32" else ("bf16", "fp16") if chip == "sm_90" else ("bf16",)
        for dtype in dtypes:
            of = (dtype, weight or dtype, chip)
            for full in (False, True) if (chip, dtype) == ("sm_90", "bf16") else (True,):
                all_or_first = slice(None if full and dtype != "fp16" else 1)
                yield from variants(forward[all_or_first], partial(_forward_specialization, *of, full))
                for over_vocabulary in (False, True):
                    make = partial(_backward_specialization, *of, over_vocabulary, full)
                    yield from variants(backward[all_or_first], make)


_PARTS = dict.fromkeys(("part_most", "part_sum_exp", "part_sum_z", "part_label"), "*fp32")


def _combine_specialization(full: bool) -> Specialization:
    integers = ("n", "parts", "part_columns", "vocabulary", "positions", "ignore_index")
    types = {"loss": "*fp32", "lse": "*fp32", "target": "*i64", "label_smoothing": "fp32"} | _PARTS
    constants = {"SMOOTHING": full, "PARTS": 16, "ROWS": _COMBINE_ROWS}
    return Specialization(
        _combine_kernel, types | dict.fromkeys(integers, "i32"), constants, label="smoothing" if full else ""
    )


def _forward_specialization(dtype: str, weight: str, chip: str, full: bool, tile: MatmulTile) -> Specialization:
    integers = ("n", "vocabulary", "positions", "d", "part_columns", "hidden_row", "weight_row")
    types = _PARTS | dict.fromkeys(integers, "i32")
    types |= {"hidden_states": f"*{dtype}", "weight": f"*{weight}", "target": "*i64", "softcap": "fp32"}
    constants: dict[str, Any] = {"hidden_column": 1, "weight_column": 1}
    constants |= dict.fromkeys(("HAS_BIAS", "SOFTCAP", "SMOOTHING", "PREDICATED"), full)
    constants |= optional(types, full, bias=f"*{weight}", enabled="*i32")
    return _matmul_specialization(_forward_kernel, dtype, chip, tile, types, constants, full, _of_weight(dtype, weight))


def _backward_specialization(
    dtype: str, weight: str, chip: str, over_vocabulary: bool, full: bool, tile: MatmulTile
) -> Specialization:
    integers = ("owners", "loopers", "vocabulary", "positions", "d", "part_loopers", "ignore_index", "x_row", "y_row")
    types = dict.fromkeys((*integers, "grad_loss_stride"), "i32")
    types |= dict.fromkeys(("lse", "grad_loss"), "*fp32")
    own, loop = (weight, dtype) if over_vocabulary else (dtype, weight)
    types |= {"x": f"*{own}", "y": f"*{loop}", "grad_x": f"*{own}"}
    types |= {"target": "*i64", "label_smoothing": "fp32", "softcap": "fp32"}
    constants: dict[str, Any] = {"x_column": 1, "y_column": 1, "WIDTH": tile.width}
    constants |= {"VOCABULARY": over_vocabulary, "HAS_GRAD_X": True, "HAS_GRAD_BIAS": full and over_vocabulary}
    constants |= dict.fromkeys(("HAS_BIAS", "HAS_GRAD_LSE", "SOFTCAP", "PREDICATED"), full)
    constants |= optional(types, full, bias=f"*{weight}", enabled="*i32", grad_lse="*fp32")
    constants |= optional(types, full and over_vocabulary, grad_bias=f"*{weight}")
    label = _of_weight(dtype, weight) + ("vocabulary " if over_vocabulary else "rows ")
    return _matmul_specialization(_backward_kernel, dtype, chip, tile, types, constants, full, label)


def _of_weight(dtype: str, weight: str) -> str:
    return "" if weight == dtype else f"{weight} weight "


def _matmul_specialization(
    kernel: Any, dtype: str, chip: str, tile: MatmulTile, types: dict[str, str], constants: dict[str, Any],
    full: bool, label: str = "",
) -> Specialization:  # fmt: skip
    element = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
    constants |= {"DTYPE": element, "PRECISION": _precision(chip), "OWN": tile.own, "LOOP": tile.loop, "K": tile.k}
    return Specialization(
        kernel, types, constants, tile.num_warps, tile.num_stages,
        divisible=("d", "hidden_row", "weight_row", "x_row", "y_row"),
        label=f"{dtype} {label}{'all options' if full else 'plain'}", targets=(chip,),
    )  # fmt: skip
