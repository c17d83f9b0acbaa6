"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The word at (row, column) of a stream is lane column % 4 of Philox with key = seed (its low and high 32 bits) and
counter = (column // 4, row, stream, 0). Every backend makes these same 32 bits, so noise is never stored and any block
of it can be made without the rest. From a word x:

    u = ((x >> 9) + ½) · 2⁻²³        exact in fp32, never 0 or 1
    Gumbel noise g = −log(−log u)
    dropout keeps where u ≥ p, with p rounded to fp32
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from repdeg_fast.reference._blocks import block_size, cut

# A seed may serve two operations at once: each draws from a stream of its own.
GUMBEL_STREAM = 0
DROPOUT_STREAM = 1

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """The four output words, int64 in [0, 2³²), of four counter and two key words; tensors broadcast."""
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # int64 products wrap modulo 2⁶⁴
        c0, c1 = _high_half(second, c1, k0), second
        c2, c3 = _high_half(first, c3, k1), first
        k0, k1 = k0 + _KEY_STEPS[0] & _LOW, k1 + _KEY_STEPS[1] & _LOW
    return c0, c1 & _LOW, c2, c3 & _LOW


def _high_half(product: Tensor, word: Tensor, key: Tensor | int) -> Tensor:
    """The upper 32 bits of an unsigned product ^ word ^ key. Of ``word`` only the lower 32 bits count."""
    mixed = product >> 32 ^ word
    mixed ^= key
    mixed &= _LOW
    return mixed


def words(seed: Tensor, rows: range, columns: range, stream: int) -> Tensor:
    """(len(rows), len(columns)) words, int64 in [0, 2³²), on the device of ``seed``, a one-element int64 tensor."""
    return _in_blocks(seed, rows, columns, stream, torch.int64, lambda words: words)


def uniform(seed: Tensor, rows: range, columns: range, stream: int) -> Tensor:
    """(len(rows), len(columns)) numbers in (0, 1), fp32."""
    return _in_blocks(seed, rows, columns, stream, torch.float32, _uniform)


def gumbel(
    seed: Tensor, rows: range, columns: range, stream: int = GUMBEL_STREAM, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(len(rows), len(columns)) standard Gumbel noise; the logarithms are taken in ``dtype``."""
    noise = lambda words: _uniform(words).to(dtype).log_().neg_().log_().neg_()  # noqa: E731
    return _in_blocks(seed, rows, columns, stream, dtype, noise)


def dropout_mask(seed: Tensor, rows: range, columns: range, p: float, stream: int = DROPOUT_STREAM) -> Tensor:
    """(len(rows), len(columns)) bool, true with probability 1 − p: what dropout keeps."""
    (rounded,) = struct.unpack("f", struct.pack("f", p))
    smallest = math.ceil(rounded * 2**23 - 0.5) << 9  # the first word whose u is p or more: both are exact
    return _in_blocks(seed, rows, columns, stream, torch.bool, lambda words: words >= smallest)


def _uniform(words: Tensor) -> Tensor:
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _in_blocks(
    seed: Tensor, rows: range, columns: range, stream: int, dtype: torch.dtype, of: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``of`` makes of each word, (len(rows), len(columns)), a block of rows and columns at a time."""
    quads = range(columns.start // 4, (columns.stop + 3) // 4)
    out = seed.new_empty(len(rows), len(quads), 4, dtype=dtype)
    key = (seed.reshape(()) & _LOW, seed.reshape(()) >> 32 & _LOW)
    block = block_size(seed.device)
    for some in cut(quads, block):
        quad = torch.arange(some.start, some.stop, device=seed.device)
        for part in cut(rows, block // len(some)):
            row = torch.arange(part.start, part.stop, device=seed.device)[:, None]
            at = out[part.start - rows.start :, some.start - quads.start :][: len(part), : len(some)]
            counter = (quad, row, torch.full_like(row, stream), torch.zeros_like(row))
            for lane, words in enumerate(philox(counter, key)):
                at[..., lane] = of(words)
    return out.flatten(1)[:, columns.start - 4 * quads.start :][:, : len(columns)]
